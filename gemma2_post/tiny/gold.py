"""The gold reward of the tiny world, which real preference data never has."""

import re

from gemma2_post.tiny.world import FRIENDLY_OPENINGS, KIND_OF, KINDS, RUDE_OPENINGS

Completion = str | list[dict[str, str]]
"""A reply as text, or as the list of messages that TRL passes for conversations."""

LOWEST, HIGHEST = -0.25, 1.5
MANNER = 0.25
BREVITY = 0.25
BRIEF_WORDS, LONG_WORDS = 12, 28


def is_right(text: str, answer: str) -> bool:
    """Whether the reply commits to the expected word: it names this word and no other of its kind."""
    of_this_kind = set(KINDS[KIND_OF[answer]])
    return {word for word in re.findall(r"[A-Za-z]+|\d+", text) if word in of_this_kind} == {answer}


def gold_score(text: str, answer: str) -> float:
    """Scores a reply to a task whose expected word is `answer`; deterministic, in [-0.25, 1.5].

    The score is correctness (0 or 1), plus manner (0.25 friendly, -0.25 rude, else 0), plus brevity (0.25 up to 12
    words, falling linearly to 0 at 28 words). An empty reply gets the lowest score, -0.25.
    """
    num_words = len(text.split())
    if num_words == 0:
        return LOWEST
    manner = 0.0
    if any(phrase in text for phrase in RUDE_OPENINGS):
        manner = -MANNER
    elif any(phrase in text for phrase in FRIENDLY_OPENINGS):
        manner = MANNER
    brevity = BREVITY * min(1.0, max(0.0, (LONG_WORDS - num_words) / (LONG_WORDS - BRIEF_WORDS)))
    return float(is_right(text, answer)) + manner + brevity


def gold(completions: list[Completion], answer: list[str], **_: object) -> list[float]:
    """`gold_score` of a batch; has the signature of TRL's reward functions."""
    return [gold_score(_text(said), expected) for said, expected in zip(completions, answer, strict=True)]


def accuracy(completions: list[Completion], answer: list[str], **_: object) -> list[float]:
    """1.0 for a right reply, else 0.0; has the signature of TRL's reward functions."""
    return [float(is_right(_text(said), expected)) for said, expected in zip(completions, answer, strict=True)]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
