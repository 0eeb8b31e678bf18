"""Finds conversations in a data set that repeat an earlier one."""

from typing import Literal

import numpy as np

from gemma2_post.data.near_duplicates import candidates, near, sketch
from gemma2_post.data.overlap import normalized

MAX_EDITS = 0.02
"""Share of the words that may differ: a teacher's answers to similar prompts are similar, and say something else."""


def find_duplicates(conversations: list[tuple[str, ...]]) -> list[Literal["exact", "near"] | None]:
    """Whether each conversation, given in parts (history, question, answer), duplicates an earlier one that is kept.

    "exact": equal once normalized. "near": in each part at most `MAX_EDITS` of the words differ.
    """
    found: list[Literal["exact", "near"] | None] = [None] * len(conversations)
    firsts: dict[tuple[str, ...], int] = {}
    for number, texts in enumerate(conversations):
        if firsts.setdefault(tuple(map(normalized, texts)), number) != number:
            found[number] = "exact"
    different, numbers = list(firsts), list(firsts.values())
    parts = [sketch([[text] for text in texts]) for texts in zip(*different, strict=True)]

    def compare(number: int, other: int) -> float | None:
        texts = zip(parts, different[number], different[other], strict=True)
        are_near = all(
            one == another or part.similarity_if_near(number, other, MAX_EDITS) for part, one, another in texts
        )
        return 1.0 if are_near else None

    for each in near(*candidates(sketch(different).bands), np.arange(len(different)), compare):
        if each:
            found[numbers[each[0]]] = "near"
    return found
