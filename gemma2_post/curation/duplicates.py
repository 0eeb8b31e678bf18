"""Which of several rows that say the same stays: exact duplicates, and too many answers to one prompt."""

from collections.abc import Iterable

import numpy as np

from gemma2_post.curation.keys import Keep


def ranks(keep: Keep, lengths: np.ndarray, rewards: np.ndarray | None) -> np.ndarray:
    """The rank of each row among those that could stay in its place, lowest first.

    Args:
        lengths: In words.
        rewards: NaN where a row has none; such rows come last.
    """
    if keep == "first":
        return np.arange(len(lengths))
    if keep == "highest_reward":
        assert rewards is not None, "checked"
        by = -np.nan_to_num(rewards, nan=-np.inf)
    else:
        by = -lengths if keep == "longest" else lengths
    found = np.empty(len(lengths), np.int64)
    found[np.argsort(by, kind="stable")] = np.arange(len(lengths))
    return found


def exact(keys: np.ndarray, order: np.ndarray) -> Iterable[tuple[int, int]]:
    """The rows that repeat another one, each with the one that stays: of equal keys, the row of the lowest rank.

    Args:
        keys: A hash of what each row says.
        order: The rank of each row.
    """
    by_rank = np.argsort(order, kind="stable")
    _, firsts, places = np.unique(keys[by_rank], return_index=True, return_inverse=True)
    stays = by_rank[firsts[places]]
    repeated = stays != by_rank
    return zip(by_rank[repeated].tolist(), stays[repeated].tolist(), strict=True)


def too_many(groups: np.ndarray, order: np.ndarray, most: int) -> Iterable[tuple[int, int]]:
    """The rows past the first `most` of each group, by rank, each with the first row of its group.

    Args:
        groups: The number of each row's group.
        order: The rank of each row.
    """
    by_rank = np.lexsort((order, groups))
    ordered = groups[by_rank]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(groups) else by_rank
    first_of = np.repeat(begins, np.diff(np.append(begins, len(groups))))
    surplus = np.arange(len(groups)) - first_of >= most
    return zip(by_rank[surplus].tolist(), by_rank[first_of[surplus]].tolist(), strict=True)
