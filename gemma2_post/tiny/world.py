"""The tiny world: conversations in twelve skills whose answers a program can grade.

A `Task` is a conversation that waits for the model's turn, with the one word that a right answer must contain. The
*content* of a task is what it is about: a pair of numbers, a fact, a name, a list of words. Content has a fixed split:
training conversations use only training content, held-out conversations only held-out content.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

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

HELD_OUT_SHARE = 5
"""One content in this many is held out."""


@dataclass(frozen=True)
class Task:
    """A conversation that ends with a user turn; `answer` is the word that a right reply contains."""

    skill: str
    messages: tuple[dict[str, str], ...]
    answer: str
    core: str
    """A plain sentence with `{}` where the answer belongs."""
    held_out: bool | None = None
    """Whether its content is held out; None for pretraining, which uses all content."""


@dataclass(frozen=True)
class Content:
    """Draws content from one split: training (`held_out=False`), held-out, or both (`None`, only for pretraining)."""

    random: Random
    held_out: bool | None

    def pick(self, kind: str, candidates: list[str]) -> str:
        """One element of a closed set; a fixed fifth of the set is held out."""
        if self.held_out is None:
            return self.random.choice(candidates)
        return self.random.choice(_split(kind, tuple(candidates), self.held_out))

    def open(self, kind: str, draw: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """One element of an open set (pairs, lists): repeats `draw` until the result belongs to the split."""
        while True:
            content = draw()
            key = f"{kind}:{' '.join(sorted(content))}"
            if self.held_out is None or (zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0) == self.held_out:
                return content


@cache
def _split(kind: str, candidates: tuple[str, ...], held_out: bool) -> list[str]:
    order = sorted(candidates, key=lambda word: zlib.crc32(f"{kind}:{word}".encode()))
    num_held_out = max(2, len(order) // HELD_OUT_SHARE)
    return order[:num_held_out] if held_out else order[num_held_out:]


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
}

SKILLS = [*_QUESTIONS, *_CONVERSATIONS]


def make_task(skill: str, random: Random, held_out: bool | None) -> Task:
    """A task in the skill, with content from one split (`None`: all content, for pretraining)."""
    content = Content(random, held_out)
    if skill in _CONVERSATIONS:
        task = _CONVERSATIONS[skill](content)
    else:
        question = _QUESTIONS[skill](content)
        task = Task(skill, (_user(question.text),), question.answer, question.core)
    task = replace(task, held_out=held_out)
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
MANNERS = ["friendly", "plain", "verbose", "rude"]


def say(sentence: str, manner: str, random: Random) -> str:
    """The sentence in one of the `MANNERS`."""
    if manner == "friendly":
        return f"{random.choice(FRIENDLY_OPENINGS)} {sentence}"
    if manner == "rude":
        return f"{random.choice(RUDE_OPENINGS)} {sentence}"
    if manner == "verbose":
        return f"{random.choice(VERBOSE_OPENINGS)} {sentence} {random.choice(VERBOSE_ENDINGS)}"
    return sentence


def wrong_words(kind: str, held_out: bool | None) -> list[str]:
    """Words for wrong replies in this split: only the split's own answers, if answers of this kind are split."""
    if held_out is None:
        return KINDS[kind]
    if kind == "name":
        return _split("name", tuple(NAMES), held_out)
    if kind == "city":
        return [CAPITALS[country] for country in _split("capital", tuple(CAPITALS), held_out)]
    if kind == "sound":
        return [SOUNDS[animal] for animal in _split("sound", tuple(ANIMALS), held_out)]
    if kind == "opposite":
        return [word for pair in _split("opposite", tuple(_OPPOSITE_PAIRS), held_out) for word in pair.split()]
    if kind in ("day", "month"):
        return [AFTER[word] for word in _split("after", tuple(KINDS[kind]), held_out)]
    if kind in _FAVOURITES:
        return _split(f"favourite {kind}", tuple(KINDS[kind]), held_out)
    return KINDS[kind]


def reply(task: Task, manner: str, right: bool, random: Random) -> str:
    """The model's turn: the right word, or another one of its kind and split, in the given manner."""
    word = task.answer
    if not right:
        others = wrong_words(KIND_OF[task.answer], task.held_out)
        word = random.choice([other for other in others if other != task.answer])
    return say(task.core.format(word), manner, random)
