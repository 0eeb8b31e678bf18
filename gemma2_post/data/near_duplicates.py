"""Finds rows that differ in a few words, among millions: MinHash (Broder 1997) proposes pairs, true Jaccard decides.

A text is the set of its pairs of neighboring words and punctuation marks. An edit of one of its words changes two of
them at most, so the Jaccard similarity that edits of a share of the words leave is known: see `least_similarity`.
Answers must be similar by themselves, too: two short answers to a long prompt may say the opposite.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma2_post.data.words import hashes_of, ngrams, words

NUM_BANDS, BAND_ROWS = 32, 4
"""Texts of similarity s are a candidate pair with probability 1 - (1 - s^4)^32: 0.999 at 2/3, 0.988 at 0.6."""
LEAST_SIMILARITY = 0.5
"""No similarity below this is one of near duplicates, whatever the share of edits."""
_MOST_COMPARED = 100
"""Texts that a text is compared with, those with the most common bands first; and kept texts of which a group knows.
Texts with the same long introduction share several bands, and there may be a hundred thousand of them. Near duplicates
share some six bands or more, in most of which a word that only they have decides."""
_SEED = 42
_SIDES = np.array([0, 0, 0xA5A5A5A5A5A5A5A5], np.uint64)
"""What tells a rejected answer from a prompt and an answer."""


@dataclass(frozen=True)
class Sketches:
    """What is compared of several texts."""

    bands: np.ndarray
    """uint32 [texts, NUM_BANDS]; equal bands make a candidate pair. Texts without words have no meaningful bands."""
    pairs: np.ndarray
    """uint32, the hashes of each text's pairs of neighboring words, sorted, one text after the other; those in answers
    are odd, those in prompts even."""
    ends: np.ndarray
    """int64 [texts], where each text's pairs end."""
    num_words: np.ndarray
    """int32 [texts], without punctuation marks."""

    def __len__(self) -> int:
        return len(self.num_words)

    def pairs_of(self, number: int) -> np.ndarray:
        """The pairs of one text."""
        return self.pairs[self.ends[number - 1] if number else 0 : self.ends[number]]

    def similarity_if_near(self, number: int, other: int, max_edits: float) -> float | None:
        """The similarity of two of the texts if they are near duplicates; None of others."""
        words = int(self.num_words[number]), int(self.num_words[other])
        return similarity_if_near(self.pairs_of(number), self.pairs_of(other), *words, max_edits)


def sketch(texts: Iterable[Sequence[str]]) -> Sketches:
    """The sketches of texts, each given in parts.

    Args:
        texts: Each a prompt, or a prompt and what answers it, or also a rejected answer; equal words in different
            parts differ.
    """
    from rensa import RMinHash  # Its threads do not survive a fork: forked processes import it, or nothing is forked.

    found, num_words = [], []
    for parts in texts:
        tokens = [words(part, with_marks=True) for part in parts]
        hashes = [hashes_of(each) for each in tokens]
        several = [
            (((ngrams(each, 2) if len(each) > 1 else each) ^ _SIDES[place]) >> np.uint64(32)).astype(np.uint32)
            & np.uint32(0xFFFFFFFE)
            | np.uint32(place > 0)
            for place, each in enumerate(hashes)
        ]
        found.append(np.unique(np.concatenate(several)))
        num_words.append(sum(token[0].isalnum() for each in tokens for token in each))
    pairs = np.concatenate(found) if found else np.empty(0, np.uint32)
    ends = np.cumsum([len(each) for each in found], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    num_hashes = NUM_BANDS * BAND_ROWS
    digests = RMinHash.digest_matrix_from_flat_token_hashes(
        pairs.astype(np.uint64), starts.astype(np.uint64), num_hashes, _SEED
    )
    signatures = np.array(digests.to_rows(), np.uint64).reshape(len(found), NUM_BANDS, BAND_ROWS)
    bands = np.stack([ngrams(signatures[:, band].T, BAND_ROWS)[0] for band in range(NUM_BANDS)], axis=1)
    return Sketches((bands >> np.uint64(32)).astype(np.uint32), pairs, ends, np.array(num_words, np.int32))


def save_sketches(path: Path, sketches: Sketches) -> None:
    """Writes sketches to a file, under a temporary name at first."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        np.savez(stream, **vars(sketches))
    temporary.replace(path)


def load_sketches(path: Path) -> Sketches:
    """Reads sketches from a file."""
    with np.load(path) as stored:
        return Sketches(**stored)


def least_similarity(num_pairs: int, num_words: int, max_edits: float) -> float:
    """The Jaccard similarity that edits of at most this share of the words leave, at worst.

    k edits of words change at most 2 k of m pairs: (m - 2 k) / (m + 2 k).
    """
    num_changed = 2 * int(max_edits * num_words + 1e-9)
    return max(LEAST_SIMILARITY, (num_pairs - num_changed) / (num_pairs + num_changed))


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sets, given as sorted arrays without repetitions."""
    num_common = len(np.intersect1d(first, second, assume_unique=True))
    return num_common / (len(first) + len(second) - num_common)


def similarity_if_near(
    first: np.ndarray, second: np.ndarray, num_words: int, other_num_words: int, max_edits: float
) -> float | None:
    """The similarity of two texts that are near duplicates; None of others.

    Args:
        first, second: Their pairs of words.
    """
    smaller, larger = sorted((len(first), len(second)))
    if not smaller:
        return None
    least = least_similarity(larger, max(num_words, other_num_words), max_edits)
    if smaller < least * larger:
        return None
    found = similarity(first, second)
    return found if found >= least and _have_near_answers(first, second) else None


def _have_near_answers(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether more than `LEAST_SIMILARITY` of what is in answers is in both; also if there are no answers."""
    answers, others = first[first & 1 == 1], second[second & 1 == 1]
    return not (len(answers) or len(others)) or similarity(answers, others) > LEAST_SIMILARITY


def candidates(bands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which texts share which bands with another text.

    Args:
        bands: uint32 [texts, NUM_BANDS].

    Returns:
        Numbers of texts, ascending, and beside each the number of a group of texts that share a band.
    """
    members, groups = [], []
    num_groups = 0
    for band in range(NUM_BANDS):
        values = bands[:, band]
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        is_same = ordered[1:] == ordered[:-1]
        shared = np.flatnonzero(np.concatenate([[False], is_same]) | np.concatenate([is_same, [False]]))
        begins = np.concatenate([[True], ~is_same])[shared]
        groups.append((num_groups - 1 + np.cumsum(begins)).astype(np.int32))
        members.append(order[shared].astype(np.int32))
        num_groups += int(begins.sum())
    texts, numbers = np.concatenate(members), np.concatenate(groups)
    order = np.argsort(texts, kind="stable")
    return texts[order], numbers[order]


def near(
    texts: np.ndarray, groups: np.ndarray, order: np.ndarray, compare: Callable[[int, int], float | None]
) -> Iterator[tuple[int, int, float] | None]:
    """Goes through texts, the preferred ones first, and drops those that are near duplicates of one that is kept.

    Args:
        texts, groups: See `candidates`.
        order: The rank of each text of the mixture; the lowest comes first.
        compare: The similarity of two texts if they are near duplicates, given their numbers.

    Yields:
        For each text with candidates: its number, that of the kept text that it repeats, and their similarity; None
        if it is kept.
    """
    starts = np.flatnonzero(np.diff(texts, prepend=-1))
    ends = np.append(starts[1:], len(texts))
    sizes = np.minimum(np.bincount(groups), _MOST_COMPARED)
    begins = np.cumsum(sizes) - sizes
    kept = np.empty(sizes.sum(), np.int32)  # Of each group, one after the other; lists take ten times the memory.
    num_kept = np.zeros(len(sizes), np.int32)
    for place in np.argsort(order[texts[starts]], kind="stable"):
        number, own = int(texts[starts[place]]), groups[starts[place] : ends[place]]
        spans = zip(begins[own].tolist(), num_kept[own].tolist(), strict=True)
        shared = [kept[begin : begin + count] for begin, count in spans if count]
        others, counts = np.unique(np.concatenate(shared), return_counts=True) if shared else (kept[:0], kept[:0])
        for other in others[np.argsort(-counts, kind="stable")[:_MOST_COMPARED]].tolist():
            if (value := compare(number, other)) is not None:
                yield number, other, value
                break
        else:
            own = own[num_kept[own] < sizes[own]]
            kept[begins[own] + num_kept[own]] = number
            num_kept[own] += 1
            yield None
