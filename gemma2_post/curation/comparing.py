"""Compares the rows of all parts with each other: which of them repeat others."""

from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from gemma2_post.curation import duplicates
from gemma2_post.curation.keys import DuplicateArguments
from gemma2_post.curation.reading import Compared, Mixture
from gemma2_post.data.near_duplicates import candidates, near, similarity_if_near

Repeated = dict[int, tuple[str, int, float]]
"""Rows that repeat others, by number in the mixture: the rule, the number of the row that stays, their similarity."""


def repeated(mixture: Mixture, args: DuplicateArguments) -> Repeated:
    """The rows that repeat others, by the rules that are switched on."""
    arrays = _load(mixture, "exact", "prompts", "rewards", "whole_num_words")
    order = duplicates.ranks(args.keep, arrays["whole_num_words"], arrays["rewards"])
    found: Repeated = {}
    stays = np.ones(len(order), bool)

    def drop(rule: str, rows: Iterable[tuple[int, int, float]]) -> None:
        for number, other, value in rows:
            found[number] = rule, other, value
            stays[number] = False

    if args.exact_duplicates:
        drop("exact_duplicate", ((*pair, 1.0) for pair in duplicates.exact(arrays["exact"], order)))
    if args.near_duplicate_edits is not None:
        drop("near_duplicate", _near(mixture, "whole", np.flatnonzero(stays), order, args.near_duplicate_edits))
    if args.max_answers_per_prompt is not None:
        rows = np.flatnonzero(stays)
        groups = _prompt_groups(mixture, arrays["prompts"], rows, args.near_duplicate_edits)
        pairs = duplicates.too_many(groups, order[rows], args.max_answers_per_prompt)
        drop("too_many_answers", ((int(rows[one]), int(rows[other]), 1.0) for one, other in list(pairs)))
    return found


def _prompt_groups(mixture: Mixture, prompts: np.ndarray, rows: np.ndarray, max_edits: float | None) -> np.ndarray:
    """The number of each row's group of equal, or near-duplicate, first prompts."""
    _, firsts, groups = np.unique(prompts[rows], return_index=True, return_inverse=True)
    if max_edits is None:
        return groups
    joined = np.arange(len(firsts))
    order = np.arange(len(prompts))
    place_of = {int(rows[first]): place for place, first in enumerate(firsts)}
    for number, other, _ in _near(mixture, "first", rows[np.sort(firsts)], order, max_edits):
        joined[place_of[number]] = place_of[other]
    return joined[groups]


def _near(
    mixture: Mixture, which: str, rows: np.ndarray, order: np.ndarray, max_edits: float
) -> Iterator[tuple[int, int, float]]:
    """Those of some rows that are near duplicates of another one of them.

    Args:
        which: The sketches: `whole` or `first`.
        rows: Numbers in the mixture, ascending.
    """
    texts, groups = candidates(_load(mixture, f"{which}_bands")[f"{which}_bands"][rows])
    numbers = np.unique(texts)
    place_of = np.zeros(len(rows), np.int32)
    place_of[numbers] = np.arange(len(numbers))
    pairs = _pairs_of(mixture, which, rows[numbers])

    def compare(number: int, other: int) -> float | None:
        (first, num_words), (second, other_num_words) = pairs[place_of[number]], pairs[place_of[other]]
        return similarity_if_near(first, second, num_words, other_num_words, max_edits)

    with tqdm(desc=f"comparing {'first prompts' if which == 'first' else 'rows'}", total=len(numbers), delay=1) as bar:
        for each in near(texts, groups, order[rows], compare):
            bar.update()
            if each:
                number, other, value = each
                yield int(rows[number]), int(rows[other]), value


def _pairs_of(mixture: Mixture, which: str, rows: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """The pairs of words, and the number of words, of some rows, whose numbers in the mixture ascend."""
    found, first = [], 0
    for number in range(mixture.num_parts):
        sketches = Compared.sketches(mixture.path(number, "compared"), which)
        begin, end = np.searchsorted(rows, [first, first + len(sketches)])
        for row in (rows[begin:end] - first).tolist():
            found.append((sketches.pairs_of(row).copy(), int(sketches.num_words[row])))
        first += len(sketches)
    return found


def _load(mixture: Mixture, *names: str) -> dict[str, np.ndarray]:
    """Arrays of all parts, one after the other."""
    parts = [Compared.load(mixture.path(number, "compared"), *names) for number in range(mixture.num_parts)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
