"""Finds conversations in a data set that repeat an earlier one."""

import re
from typing import Literal

from datasketch import MinHash, MinHashLSH

SHINGLE_WORDS = 3
SIMILARITY = 0.9
_CANDIDATE_SIMILARITY, _NUM_PERMUTATIONS = 0.8, 128


def find_duplicates(conversations: list[tuple[str, ...]]) -> list[Literal["exact", "near"] | None]:
    """Whether each conversation, given in parts (history, question, answer), duplicates an earlier one that is kept.

    "exact": equal up to case and white space. "near": for each part, the sets of shingles of three words or
    punctuation marks have a Jaccard similarity of at least 0.9. Candidates come from MinHash LSH over whole
    conversations (Broder 1997), which can miss a near duplicate.
    """
    found: list[Literal["exact", "near"] | None] = []
    seen: set[tuple[str, ...]] = set()
    index = MinHashLSH(threshold=_CANDIDATE_SIMILARITY, num_perm=_NUM_PERMUTATIONS)
    kept: dict[int, tuple[str, ...]] = {}
    for number, texts in enumerate(conversations):
        normal = tuple(" ".join(text.casefold().split()) for text in texts)
        signature = MinHash(num_perm=_NUM_PERMUTATIONS)
        shingles = set().union(*map(_shingles, normal))
        signature.update_batch([shingle.encode() for shingle in sorted(shingles)])
        if normal in seen:
            found.append("exact")
        elif any(_are_near(normal, kept[other]) for other in index.query(signature)):
            found.append("near")
        else:
            found.append(None)
            seen.add(normal)
            kept[number] = normal
            index.insert(number, signature)
    return found


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+|[^\w\s]", text)
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _are_near(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    pairs = [(_shingles(a), _shingles(b)) for a, b in zip(first, second, strict=True)]
    return all(len(a & b) >= SIMILARITY * len(a | b) for a, b in pairs)
