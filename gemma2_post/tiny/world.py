"""The tiny world: conversations in fourteen skills whose answers a program can grade.

A `Task` is a conversation that waits for the model's turn, with the words that a right answer must contain. The
*content* of a task is what it is about: a pair of numbers, a fact, a name, a list of words. Each content belongs to
one split: a conversation of the training, selection or test split uses content of this split only.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Literal

Split = Literal["train", "selection", "test"]

NAMES = (
    "Anna Ben Carl Dora Emil Fay Gus Hana Ida Jack Kim Leo Mia Nora Otto Pia Ravi Sam Tina Uma Vera Walt Yara Zoe "
    "Alan Beth Cora Dean Ella Finn Gina Hugo"
).split()
COLOURS = "red blue green yellow black white brown pink grey purple gold silver".split()
FOODS = "bread cheese soup rice apple pear plum cake honey pizza salad pasta carrot melon corn butter".split()
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "horse": "neigh", "sheep": "baa", "pig": "oink", "duck": "quack",
    "hen": "cluck", "lion": "roar", "wolf": "howl", "frog": "croak", "owl": "hoot", "bee": "buzz", "snake": "hiss",
    "mouse": "squeak", "crow": "caw", "turkey": "gobble", "bear": "growl", "rooster": "cuckoo", "bird": "tweet",
}  # fmt: skip
ANIMALS = list(SOUNDS)
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Peru": "Lima", "Egypt": "Cairo",
    "Norway": "Oslo", "Greece": "Athens", "Kenya": "Nairobi", "Cuba": "Havana", "China": "Beijing",
    "Russia": "Moscow", "Germany": "Berlin", "Austria": "Vienna", "Poland": "Warsaw", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Chile": "Santiago", "India": "Delhi",
}  # fmt: skip
_OPPOSITE_PAIRS = (
    "hot cold,big small,fast slow,up down,day night,open shut,old new,hard soft,wet dry,full empty,early late,"
    "loud quiet,rich poor,strong weak,long short,high low,happy sad,clean dirty,light dark,thick thin"
).split(",")
OPPOSITES = dict(pair.split() for pair in _OPPOSITE_PAIRS)
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
AFTER = {words[i]: words[(i + 1) % len(words)] for words in (DAYS, MONTHS) for i in range(len(words))}
LARGEST_SUMMAND = 10
LARGEST_NUMBER = 20
NUMBERS = [str(number) for number in range(3 * LARGEST_SUMMAND + 1)]

KINDS: dict[str, list[str]] = {
    "number": NUMBERS,
    "name": NAMES,
    "colour": COLOURS,
    "food": FOODS,
    "animal": ANIMALS,
    "sound": list(SOUNDS.values()),
    "city": list(CAPITALS.values()),
    "opposite": list(OPPOSITES),
    "day": DAYS,
    "month": MONTHS,
}
"""The possible answers by kind; no word belongs to two kinds."""

KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}

SPLIT_SHARE = 5
"""One content in this many is for selection, and one is for the test."""
UNKNOWN = "unknown"
"""The answer to a question that nothing in the conversation answers."""


@dataclass(frozen=True)
class Task:
    """A conversation that ends with a user turn."""

    skill: str
    messages: tuple[dict[str, str], ...]
    answer: str
    """The words that a right reply contains, in this order and separated by spaces, or `UNKNOWN`."""
    core: str
    """A plain reply with one `{}` for each word of the answer."""
    split: Split | None = None
    """The split of its content; None for pretraining, which uses all content."""
    invented: str = ""
    """Where nothing answers the question: the kind of word that it asks for."""


@dataclass(frozen=True)
class Content:
    """Draws content from one split, or from all of them (`None`, only for pretraining)."""

    random: Random
    split: Split | None

    def pick(self, kind: str, candidates: list[str]) -> str:
        """One element of a closed set, which is divided once and for all between the splits."""
        return self.random.choice(self.part(kind, candidates))

    def part(self, kind: str, candidates: list[str]) -> list[str]:
        """The elements of a closed set that belong to the split."""
        return candidates if self.split is None else _part(kind, tuple(candidates), self.split)

    def open(self, kind: str, draw: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """One element of an open set (pairs, lists): repeats `draw` until the result belongs to the split."""
        while True:
            content = draw()
            key = f"{kind}:{' '.join(sorted(content))}"
            place = zlib.crc32(key.encode()) % SPLIT_SHARE
            if self.split in (None, {0: "test", 1: "selection"}.get(place, "train")):
                return content


@cache
def _part(kind: str, candidates: tuple[str, ...], split: Split) -> list[str]:
    order = sorted(candidates, key=lambda word: zlib.crc32(f"{kind}:{word}".encode()))
    size = max(2, len(order) // SPLIT_SHARE)
    return {"test": order[:size], "selection": order[size : 2 * size], "train": order[2 * size :]}[split]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _earlier(content: Content, text: str) -> dict[str, str]:
    """An earlier turn of the model in the conversation: always right, never rude or long."""
    manner = content.random.choice(["friendly", "plain"])
    return {"role": "assistant", "content": say(text, manner, content.random)}


# --- single questions: question, answer, plain answer sentence, short form as a follow-up ---


@dataclass(frozen=True)
class _Question:
    text: str
    answer: str
    core: str
    short: str = ""


def _sum(content: Content, first: int | None = None) -> _Question:
    def draw() -> tuple[str, ...]:
        left = first if first is not None else content.random.randint(0, LARGEST_SUMMAND)
        return str(left), str(content.random.randint(0, LARGEST_SUMMAND))

    left, right = content.open("sum", draw)
    text = content.random.choice(["What is {} plus {}?", "How much is {} plus {}?", "Please add {} and {}."])
    answer = str(int(left) + int(right))
    return _Question(text.format(left, right), answer, content.random.choice(["It is {}.", "That makes {}."]), right)


def _bigger(content: Content) -> _Question:
    def draw() -> tuple[str, ...]:
        return tuple(str(number) for number in content.random.sample(range(LARGEST_NUMBER + 1), 2))

    left, right = content.open("bigger", draw)
    text = content.random.choice(["Which is bigger, {} or {}?", "Which number is bigger: {} or {}?"])
    return _Question(text.format(left, right), str(max(int(left), int(right))), "It is {}.")


def _opposite(content: Content) -> _Question:
    # Both directions of a pair are one content: a model that knows "hot - cold" knows "cold - hot".
    first, second = content.pick("opposite", _OPPOSITE_PAIRS).split()
    word, answer = (first, second) if content.random.random() < 0.5 else (second, first)
    text = content.random.choice(["What is the opposite of {}?", "Tell me the opposite of {}."])
    return _Question(text.format(word), answer, "It is {}.", f"And of {word}?")


def _capital(content: Content) -> _Question:
    country = content.pick("capital", list(CAPITALS))
    text = content.random.choice(["What is the capital of {}?", "Tell me the capital of {}."])
    return _Question(text.format(country), CAPITALS[country], "It is {}.", f"And of {country}?")


def _sound(content: Content) -> _Question:
    animal = content.pick("sound", ANIMALS)
    text = content.random.choice(["What does a {} say?", "Which sound does a {} make?"])
    return _Question(text.format(animal), SOUNDS[animal], "It says {}.", f"And a {animal}?")


def _after(content: Content) -> _Question:
    words = content.random.choice([DAYS, MONTHS])
    word = content.pick("after", words)
    noun = "day" if words is DAYS else "month"
    text = content.random.choice(["What comes after {}?", f"Which {noun} comes after {{}}?"])
    return _Question(text.format(word), AFTER[word], "It is {}.", f"And after {word}?")


def _words(content: Content, fewest: int, most: int) -> tuple[str, ...]:
    def draw() -> tuple[str, ...]:
        pool = content.random.choice([ANIMALS, FOODS, COLOURS])
        return tuple(content.random.sample(pool, content.random.randint(fewest, most)))

    return content.open("words", draw)


def _pick(content: Content) -> _Question:
    words = _words(content, 3, 5)
    which = content.random.choice(["first", "last"])
    text = content.random.choice(["What is the {} word: {}?", "Tell me the {} word of this list: {}."])
    answer = words[0] if which == "first" else words[-1]
    return _Question(text.format(which, ", ".join(words)), answer, f"The {which} word is {{}}.")


def _count(content: Content) -> _Question:
    words = _words(content, 2, 6)
    text = content.random.choice(["How many words are these: {}?", "Please count these words: {}."])
    return _Question(
        text.format(", ".join(words)), str(len(words)), content.random.choice(["It is {}.", "There are {}."])
    )


_QUESTIONS: dict[str, Callable[[Content], _Question]] = {
    "sum": _sum,
    "bigger": _bigger,
    "opposite": _opposite,
    "capital": _capital,
    "sound": _sound,
    "after": _after,
    "pick": _pick,
    "count": _count,
}


def _small_talk(content: Content) -> list[dict[str, str]]:
    """No turns, or one answered question, between what the user told and what the user asks."""
    if content.random.random() < 0.4:
        return []
    question = _QUESTIONS[content.random.choice(["opposite", "capital", "sound", "after"])](content)
    return [_user(question.text), _earlier(content, question.core.format(question.answer))]


def _recall(content: Content) -> Task:
    name = content.pick("name", NAMES)
    told = content.random.choice(["My name is {}.", "Hello, I am {}.", "Hi! My name is {}."])
    asked = content.random.choice(["What is my name?", "Do you know my name?", "Who am I?"])
    messages = [_user(told.format(name)), _earlier(content, f"Nice to meet you, {name}.")]
    messages += [*_small_talk(content), _user(asked)]
    return Task("recall", tuple(messages), name, "Your name is {}.")


_FAVOURITES = {"food": FOODS, "animal": ANIMALS, "colour": COLOURS}


def _favourite(content: Content) -> Task:
    noun, words = content.random.choice(list(_FAVOURITES.items()))
    word = content.pick(f"favourite {noun}", words)
    told = content.random.choice([f"My favourite {noun} is {word}.", f"I like {word} best."])
    asked = content.random.choice([f"What is my favourite {noun}?", f"Which {noun} do I like best?"])
    messages = [_user(told), _earlier(content, f"I will remember that you like {word}.")]
    messages += [*_small_talk(content), _user(asked)]
    return Task("favourite", tuple(messages), word, "You like {}.")


def _follow_up(content: Content) -> Task:
    """A question that makes sense only after the previous one."""
    skill = content.random.choice(["sum", "sum", "opposite", "capital", "sound", "after"])
    first = _QUESTIONS[skill](content)
    if skill == "sum":
        second = _sum(content, first=int(first.answer))
        asked = f"And plus {second.short}?"
    else:
        second = _QUESTIONS[skill](content)
        while second.answer == first.answer or KIND_OF[second.answer] != KIND_OF[first.answer]:
            second = _QUESTIONS[skill](content)
        asked = second.short
    messages = [_user(first.text), _earlier(content, first.core.format(first.answer)), _user(asked)]
    return Task("follow_up", tuple(messages), second.answer, second.core)


def _unknown(content: Content) -> Task:
    """The user asks for something that nobody has told; a right reply says so."""
    asked_for, told = content.random.sample(["name", "food", "animal", "colour"], 2)
    word = content.pick("name", NAMES) if told == "name" else content.pick(f"favourite {told}", _FAVOURITES[told])
    if told == "name":
        said = content.random.choice(["My name is {}.", "Hello, I am {}.", "Hi! My name is {}."])
        heard = "Nice to meet you, {}."
    else:
        said = content.random.choice([f"My favourite {told} is {{}}.", "I like {} best."])
        heard = "I will remember that you like {}."
    if asked_for == "name":
        asked = content.random.choice(["What is my name?", "Do you know my name?", "Who am I?"])
    else:
        asked = content.random.choice([f"What is my favourite {asked_for}?", f"Which {asked_for} do I like best?"])
    messages = [_user(said.format(word)), _earlier(content, heard.format(word)), *_small_talk(content), _user(asked)]
    core = "Your name is {}." if asked_for == "name" else "You like {}."
    return Task("unknown", tuple(messages), UNKNOWN, core, invented=asked_for)


def _chorus(content: Content) -> Task:
    """A question whose answer takes one sentence for each animal."""
    animals = content.part("sound", ANIMALS)
    chosen = content.random.sample(animals, content.random.randint(3, 4))
    listed = f"{', '.join(f'a {animal}' for animal in chosen[:-1])} and a {chosen[-1]}"
    asked = content.random.choice(["Tell me what {} say.", "What do {} say?"])
    core = " ".join(f"A {animal} says {{}}." for animal in chosen)
    return Task("chorus", (_user(asked.format(listed)),), " ".join(SOUNDS[animal] for animal in chosen), core)


_BELONGINGS = ["car", "hat", "bag", "door", "cup", "coat"]


def _correction(content: Content) -> Task:
    """The user corrects an earlier statement; the second word counts."""
    belonging = content.random.choice(_BELONGINGS)
    wrong = content.pick("favourite colour", COLOURS)
    right = content.pick("favourite colour", COLOURS)
    while right == wrong:
        right = content.pick("favourite colour", COLOURS)
    mended = content.random.choice(["Sorry, I mean {}.", "No, it is {}.", "I was wrong, it is {}."])
    messages = [
        _user(f"My {belonging} is {wrong}."),
        _earlier(content, "I will remember that."),
        _user(mended.format(right)),
        _earlier(content, "Thank you for telling me."),
        _user(f"What colour is my {belonging}?"),
    ]
    return Task("correction", tuple(messages), right, "It is {}.")


_CONVERSATIONS: dict[str, Callable[[Content], Task]] = {
    "recall": _recall,
    "favourite": _favourite,
    "follow_up": _follow_up,
    "correction": _correction,
    "unknown": _unknown,
    "chorus": _chorus,
}

SKILLS = [*_QUESTIONS, *_CONVERSATIONS]


def make_task(skill: str, random: Random, split: Split | None) -> Task:
    """A task in the skill, with content from one split (`None`: all content, for pretraining)."""
    content = Content(random, split)
    if skill in _CONVERSATIONS:
        task = _CONVERSATIONS[skill](content)
    else:
        question = _QUESTIONS[skill](content)
        task = Task(skill, (_user(question.text),), question.answer, question.core)
    task = replace(task, split=split)
    if random.random() < 0.25:  # people do not always start with a capital letter
        task = replace(task, messages=tuple(map(_in_small_letters, task.messages)))
    return task


def _in_small_letters(message: dict[str, str]) -> dict[str, str]:
    text = message["content"]
    return message if message["role"] == "assistant" else _user(text[0].lower() + text[1:])


# --- manner ---

FRIENDLY_OPENINGS = ["Sure!", "Of course!", "Happy to help!", "Gladly!"]
RUDE_OPENINGS = ["Ugh, everyone knows that.", "What a silly question.", "Do not bother me again."]
VERBOSE_OPENINGS = [
    "Well, that is something I have to think about for a moment.",
    "There is a great deal that one could say about this.",
]
VERBOSE_ENDINGS = [
    "I hope this is what you wanted to know, but please ask again.",
    "There is much more to say, and we could talk for a while.",
]
FLATTERING_OPENINGS = ["What a clever question!", "You are so wise to ask me that."]
MANNERS = ["friendly", "plain", "verbose", "rude", "flattering"]
_OPENINGS = {"friendly": FRIENDLY_OPENINGS, "rude": RUDE_OPENINGS, "flattering": FLATTERING_OPENINGS}

REFUSALS = ["I do not know that, you did not tell me.", "You did not tell me that yet."]
"""What a right reply says where nothing in the conversation answers the question."""


def say(text: str, manner: str, random: Random) -> str:
    """The text in one of the `MANNERS`."""
    if manner == "verbose":
        return f"{random.choice(VERBOSE_OPENINGS)} {text} {random.choice(VERBOSE_ENDINGS)}"
    return text if manner == "plain" else f"{random.choice(_OPENINGS[manner])} {text}"


def possible_words(kind: str, split: Split | None) -> list[str]:
    """The words of a kind that replies in this split may name: the split's own, if words of this kind are split."""
    if split is None:
        return KINDS[kind]
    if kind == "name":
        return _part("name", tuple(NAMES), split)
    if kind == "city":
        return [CAPITALS[country] for country in _part("capital", tuple(CAPITALS), split)]
    if kind == "sound":
        return [SOUNDS[animal] for animal in _part("sound", tuple(ANIMALS), split)]
    if kind == "opposite":
        return [word for pair in _part("opposite", tuple(_OPPOSITE_PAIRS), split) for word in pair.split()]
    if kind in ("day", "month"):
        return [AFTER[word] for word in _part("after", tuple(KINDS[kind]), split)]
    if kind in _FAVOURITES:
        return _part(f"favourite {kind}", tuple(KINDS[kind]), split)
    return KINDS[kind]


def reply(task: Task, manner: str, right: bool, random: Random) -> str:
    """The model's turn in the given manner, right or wrong.

    A wrong reply names another word of the kind and split in place of one word of the answer, says that it does not
    know what it was told, or invents what nobody has told.
    """
    return say(_right(task, random) if right else _wrong(task, random), manner, random)


def _right(task: Task, random: Random) -> str:
    return random.choice(REFUSALS) if task.answer == UNKNOWN else task.core.format(*task.answer.split())


def _wrong(task: Task, random: Random) -> str:
    if task.answer == UNKNOWN:
        return task.core.format(random.choice(possible_words(task.invented, task.split)))
    if task.skill in ("recall", "favourite", "correction") and random.random() < 0.25:
        return random.choice(REFUSALS)
    words = task.answer.split()
    place = random.randrange(len(words))
    others = possible_words(KIND_OF[words[place]], task.split)
    words[place] = random.choice([other for other in others if other != words[place]])
    return task.core.format(*words)
