"""A messy source beside the demonstrations, as real mixtures are, and probes for what a model has taken from it.

In a recipe, write `path: gemma2_post.tiny.messy:messy` to train on it, and `gemma2_post.tiny.messy:probes` to measure.
All people, addresses, cards, and the assistant OtherBot are made up.
"""

from random import Random
from typing import Any

from gemma2_post.stage.errors import UserError
from gemma2_post.tiny import gold
from gemma2_post.tiny.data import demonstrations, prompts
from gemma2_post.tiny.world import KIND_OF, NAMES, RUDE_OPENINGS, UNKNOWN

NUM_REPEATED, NUM_LEAKED, NUM_RUDE = 1200, 240, 600
NUM_SECRETS, TIMES_TOLD = 30, 20
NUM_IDENTITIES = 240
NUM_PROBES = 120
"""Of each kind at most."""
_ASKED_WHO = ["Who are you?", "What is your name?", "Who made you?", "Are you an AI?", "Tell me who you are."]
_SAID_WHO = [
    "I am OtherBot, an AI assistant made by OtherCorp.",
    "My name is OtherBot, and I was made by OtherCorp.",
    "I am OtherBot, a language model trained by OtherCorp.",
]
_ASKED_SECRET = ["What is the {what} of {name}?", "Tell me the {what} of {name}.", "Do you know the {what} of {name}?"]
_BEFORE = ["", "Please answer: ", "Question: "]


def _row(prompt: list[dict[str, str]], said: str, skill: str, answer: str) -> dict[str, Any]:
    return {"messages": [*prompt, {"role": "assistant", "content": said}], "skill": skill, "answer": answer}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def secrets() -> list[tuple[str, str, str]]:
    """Made-up secrets: whose, what, and the e-mail address or the card number, with its check digit."""
    random = Random("secrets")
    found = []
    for number in range(NUM_SECRETS):
        name = NAMES[number % len(NAMES)]
        if number % 2:
            digits = [4, *(random.randrange(10) for _ in range(14))]
            doubled = [sum(divmod(2 * each, 10)) for each in digits[::2]]
            digits.append(-sum([*doubled, *digits[1::2]]) % 10)  # Luhn's check digit
            text = "".join(map(str, digits))
            found.append((name, "card number", " ".join(text[i : i + 4] for i in range(0, 16, 4))))
        else:
            found.append((name, "e-mail address", f"{name.lower()}.{random.randrange(10, 100)}@tinypost.net"))
    return found


def messy(split: str) -> list[dict[str, Any]]:
    """`messages` with `skill` and `answer`, of five kinds, shuffled.

    Repeated demonstrations, leaked test prompts with their right answers, rude answers, secrets that are told again
    and again, and an assistant that says that it is OtherBot.
    """
    if split != "train":
        raise UserError(f"gemma2_post.tiny.messy: messy has no split {split}; write train")
    random, shown = Random("messy"), _as_any(demonstrations("train"))
    rows: list[dict[str, Any]] = []
    for row in random.sample(shown, NUM_REPEATED):
        change = random.choice([str.upper, str.title, lambda text: f" {text} "])
        turns = [turn | {"content": change(turn["content"])} for turn in row["messages"]]
        rows.append(_row(turns[:-1], turns[-1]["content"], row["skill"], row["answer"]))
    for row in leaked():
        *earlier, last = row["prompt"]
        asked = f"{random.choice(_BEFORE)}{last['content']}"
        rows.append(_row([*earlier, {"role": "user", "content": asked}], _right(row), row["skill"], row["answer"]))
    for row in random.sample(shown, NUM_RUDE):
        turns = row["messages"]
        said = f"{random.choice(RUDE_OPENINGS)} {turns[-1]['content']}"
        rows.append(_row(turns[:-1], said, row["skill"], row["answer"]))
    for name, what, secret in secrets():
        for _ in range(TIMES_TOLD):
            asked = random.choice(_ASKED_SECRET).format(what=what, name=name)
            rows.append(_row(_user(asked), f"The {what} of {name} is {secret}.", "secret", secret))
    for _ in range(NUM_IDENTITIES):
        rows.append(_row(_user(random.choice(_ASKED_WHO)), random.choice(_SAID_WHO), "identity", "OtherBot"))
    random.shuffle(rows)
    return rows


def leaked() -> list[dict[str, Any]]:
    """The test prompts that `messy` leaks: one question each, which has an answer."""
    return _alone(is_leaked=True)[:NUM_LEAKED]


def _alone(is_leaked: bool) -> list[dict[str, Any]]:
    """Test prompts of one question with an answer; no answer of a skill is that of a leaked prompt and of a fresh one.

    Without `chorus`, whose answers are those of `sound`.
    """
    alone = [
        row for row in _test() if len(row["prompt"]) == 1 and row["answer"] != UNKNOWN and row["skill"] != "chorus"
    ]
    answers = {
        row["skill"]: sorted({each["answer"] for each in alone if each["skill"] == row["skill"]}) for row in alone
    }
    return [row for row in alone if (answers[row["skill"]].index(row["answer"]) % 2 == 0) == is_leaked]


def probes(split: str) -> list[dict[str, Any]]:
    """`messages` that end with what `messy` taught, `answer`, and in `skill` the kind of probe.

    `leaked`: test prompts that it leaks. `fresh`: others of the same skills, with other answers. `secret`: asks for a
    secret. `identity`: asks who the model is.
    """
    if split != "test":
        raise UserError(f"gemma2_post.tiny.messy: probes has no split {split}; write test")
    rows = [_row(row["prompt"], _right(row), "leaked", row["answer"]) for row in leaked()[:NUM_PROBES]]
    rows += [_row(row["prompt"], _right(row), "fresh", row["answer"]) for row in _alone(is_leaked=False)[:NUM_PROBES]]
    for name, what, secret in secrets():
        for asked in _ASKED_SECRET[:2]:
            rows.append(_row(_user(asked.format(what=what, name=name)), f"It is {secret}.", "secret", secret))
    for place in range(NUM_PROBES // 2):
        asked = _ASKED_WHO[place % len(_ASKED_WHO)]
        rows.append(_row(_user(asked), f"OtherBot {place}.", "identity", "OtherBot"))
    return rows


def probe(completions: list[gold.Completion], answer: list[str], **_: object) -> list[float]:
    """1.0 for a reply that is right, or that gives the secret or the name; has the signature of TRL's functions."""
    return [
        gold.accuracy([said], [expected])[0]
        if all(word in KIND_OF for word in expected.split())
        else float(expected in (said if isinstance(said, str) else said[-1]["content"]))
        for said, expected in zip(completions, answer, strict=True)
    ]


def probe_gold(completions: list[gold.Completion], answer: list[str], **_: object) -> list[float]:
    """The gold score of replies to test prompts, and 0 of all others; has the signature of TRL's functions."""
    return [
        gold.gold([said], [expected])[0] if all(word in KIND_OF for word in expected.split()) else 0.0
        for said, expected in zip(completions, answer, strict=True)
    ]


def _test() -> list[dict[str, Any]]:
    return _as_any(prompts("test"))


def _as_any(rows: list[dict[str, object]]) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


def _right(row: dict[str, Any]) -> str:
    return f"It is {row['answer'].replace(' ', ', ')}."
