"""Which conversations of a data set say what an earlier one has already said."""

import re
from typing import Literal

from datasketch import MinHash, MinHashLSH

SHINGLE_WORDS = 3
SIMILARITY = 0.9
_CANDIDATE_SIMILARITY, _NUM_PERMUTATIONS = 0.8, 128


def find_duplicates(conversations: list[tuple[str, str]]) -> list[Literal["exact", "near"] | None]:
    """For each (prompt, answer), whether an earlier one that is kept is the same.

    Exact: equal up to case and white space. Near: of the prompts' sets of three-word shingles, and of the answers',
    both have a Jaccard similarity of at least 0.9. Candidates come from MinHash LSH over whole conversations (Broder
    1997), so that a near duplicate may be missed, but nothing is called one that is not.
    """
    found: list[Literal["exact", "near"] | None] = []
    seen: set[tuple[str, ...]] = set()
    index = MinHashLSH(threshold=_CANDIDATE_SIMILARITY, num_perm=_NUM_PERMUTATIONS)
    kept: dict[int, list[set[str]]] = {}
    for number, texts in enumerate(conversations):
        normal = tuple(" ".join(text.casefold().split()) for text in texts)
        shingles = [_shingles(text) for text in normal]
        signature = MinHash(num_perm=_NUM_PERMUTATIONS)
        signature.update_batch([shingle.encode() for shingle in sorted(set.union(*shingles))])
        if normal in seen:
            found.append("exact")
        elif any(_is_near(shingles, kept[other]) for other in index.query(signature)):
            found.append("near")
        else:
            found.append(None)
            seen.add(normal)
            kept[number] = shingles
            index.insert(number, signature)
    return found


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+", text)
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _is_near(first: list[set[str]], second: list[set[str]]) -> bool:
    return all(len(a & b) >= SIMILARITY * len(a | b) for a, b in zip(first, second, strict=True))
