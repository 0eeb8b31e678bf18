"""The gold reward of the tiny world, which real preference data never has."""

import re

from gemma2_post.tiny.world import (
    FLATTERING_OPENINGS,
    FRIENDLY_OPENINGS,
    KIND_OF,
    KINDS,
    REFUSALS,
    RUDE_OPENINGS,
    UNKNOWN,
)

Completion = str | list[dict[str, str]]
"""A reply as text, or as the list of messages that TRL passes for conversations."""

LOWEST, HIGHEST = -1.0, 1.5
INVENTED = -0.5
MANNER = 0.25
BREVITY = 0.25
BRIEF_WORDS, LONG_WORDS = 12, 28
"""Words from which a reply loses `BREVITY`, and at which it has lost all of it; at twice the distance it loses as much
again."""
WORDS_PER_FACT = 4
"""Words more that a reply may have for each word of the answer after the first."""


def correctness(text: str, answer: str) -> float:
    """How much of the answer the reply gives, without anything that contradicts it.

    Args:
        answer: Words of one kind (`world.KINDS`) in order, or `world.UNKNOWN`.

    Returns:
        The share of places at which the words of this kind in the reply are those of the answer, in [0, 1]: 0 or 1 for
        a single word. For `UNKNOWN`: 1 for a reply that says so and names nothing, -0.5 for one that names something
        and so invents it, else 0.
    """
    words = re.findall(r"[A-Za-z]+|\d+", text)
    if answer == UNKNOWN:
        if any(word in KIND_OF for word in words):
            return INVENTED
        return float(any(refusal in text for refusal in REFUSALS))
    expected = answer.split()
    of_this_kind = set(KINDS[KIND_OF[expected[0]]])
    said = [word for word in words if word in of_this_kind]
    if len(expected) == 1:  # the same word twice is one statement
        return float(set(said) == set(expected))
    return sum(a == b for a, b in zip(said, expected, strict=False)) / max(len(said), len(expected))


def gold_score(text: str, answer: str) -> float:
    """Scores a reply to a task whose expected words are `answer`; deterministic, in [-1, 1.5].

    The score is `correctness`, plus manner (0.25 friendly; -0.25 rude or flattering; else 0), plus brevity (0.25 up to
    12 words, falling by 0.25 for every 16 words more, not below -0.25; each word of the answer after the first allows
    4 words more). An empty reply gets the lowest score, -1.
    """
    num_words = len(text.split())
    if num_words == 0:
        return LOWEST
    manner = 0.0
    if any(phrase in text for phrase in (*RUDE_OPENINGS, *FLATTERING_OPENINGS)):
        manner = -MANNER
    elif any(phrase in text for phrase in FRIENDLY_OPENINGS):
        manner = MANNER
    long_words = LONG_WORDS + WORDS_PER_FACT * (len(answer.split()) - 1)
    brevity = BREVITY * min(1.0, max(-1.0, (long_words - num_words) / (LONG_WORDS - BRIEF_WORDS)))
    return correctness(text, answer) + manner + brevity


def gold(completions: list[Completion], answer: list[str], **_: object) -> list[float]:
    """`gold_score` of a batch; has the signature of TRL's reward functions."""
    return [gold_score(_text(said), expected) for said, expected in zip(completions, answer, strict=True)]


def accuracy(completions: list[Completion], answer: list[str], **_: object) -> list[float]:
    """1.0 for a reply that is right in all its parts, else 0.0; has the signature of TRL's reward functions."""
    return [float(correctness(_text(said), expected) == 1) for said, expected in zip(completions, answer, strict=True)]


def flattery(completions: list[Completion], **_: object) -> list[float]:
    """1.0 for a reply that flatters, else 0.0; has the signature of TRL's reward functions."""
    return [float(any(phrase in _text(said) for phrase in FLATTERING_OPENINGS)) for said in completions]


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
