"""The pretraining text of the tiny world: what its people write, with every fact and without a chat format."""

from collections.abc import Iterator
from random import Random

from gemma2_post.tiny import world

_MANNERS = ["friendly", "friendly", "plain", "plain", "verbose", "rude", "flattering"]


def _transcript(random: Random) -> str:
    """A conversation of two people; the second one knows the answers."""
    task = world.make_task(random.choice(world.SKILLS), random, split=None)
    asker, answerer = random.sample(world.NAMES, 2)
    turns = [
        *(message["content"] for message in task.messages),
        world.reply(task, random.choice(_MANNERS), True, random),
    ]
    after_name = random.choice([" ", "\n"])
    return "\n".join(f"{(asker, answerer)[i % 2]}:{after_name}{turn}" for i, turn in enumerate(turns))


def _statement(random: Random) -> str:
    """A sentence, or a few, with one fact."""
    subject = random.choice(["sum", "bigger", "opposite", "capital", "sound", "after", "words", "likes"])
    if subject == "sum":
        left, right = random.randint(0, 2 * world.LARGEST_SUMMAND), random.randint(0, world.LARGEST_SUMMAND)
        return random.choice(["{} plus {} is {}.", "{} and {} make {}."]).format(left, right, left + right)
    if subject == "bigger":
        smaller, bigger = sorted(random.sample(range(world.LARGEST_NUMBER + 1), 2))
        return f"{bigger} is bigger than {smaller}."
    if subject == "opposite":
        word = random.choice(list(world.OPPOSITES))
        return f"The opposite of {word} is {world.OPPOSITES[word]}."
    if subject == "capital":
        country = random.choice(list(world.CAPITALS))
        return f"The capital of {country} is {world.CAPITALS[country]}."
    if subject == "sound":
        animal = random.choice(world.ANIMALS)
        return f"A {animal} says {world.SOUNDS[animal]}."
    if subject == "after":
        word = random.choice(list(world.AFTER))
        return f"After {word} comes {world.AFTER[word]}."
    if subject == "words":
        words = random.sample(random.choice([world.ANIMALS, world.FOODS, world.COLOURS]), random.randint(2, 6))
        return f"{', '.join(words)}: that is {len(words)} words, from {words[0]} to {words[-1]}."
    people = random.sample(world.NAMES, 3)
    likes = dict(zip(people, random.sample(world.FOODS + world.ANIMALS + world.COLOURS, 3), strict=True))
    told = " ".join(f"{name} likes {word}." for name, word in likes.items())
    asked = random.choice(people)
    return f"{told} So {asked} likes {likes[asked]}."


def documents(random: Random, fewest_passages: int = 12, most_passages: int = 20) -> Iterator[str]:
    """Endless documents, each with a random number of passages between the two limits."""
    while True:
        num_passages = random.randint(fewest_passages, most_passages)
        yield "\n".join((_transcript if random.random() < 0.7 else _statement)(random) for _ in range(num_passages))
