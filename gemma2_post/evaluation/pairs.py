"""How good a reward model is on held-out preference pairs, and which biases it may have learned."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy
from scipy.stats import norm, pearsonr, spearmanr

SIMILAR_LENGTH = 0.1
"""Answers are of similar length if their lengths differ by at most this share of the longer one."""
_NUM_BINS = 10


@dataclass
class ScoredPair:
    """A preference pair with the rewards of its answers."""

    chosen: float
    """The reward of the chosen answer."""
    rejected: float
    num_turns: int
    """Number of user turns in the prompt."""
    chosen_tokens: int
    rejected_tokens: int


def both_of(pairs: list[ScoredPair]) -> list[float]:
    """The rewards of all answers."""
    return [reward for pair in pairs for reward in (pair.chosen, pair.rejected)]


PAIR_METRICS = {
    *("accuracy", "accuracy_low", "accuracy_high", "accuracy_single_turn", "accuracy_multi_turn"),
    *("calibration_error", "reward_mean", "reward_spread"),
    *("length_correlation", "length_correlation_within_pairs"),
}
"""The metrics of `measure_pairs` if there are pairs with one turn and with several."""


def measure_pairs(pairs: list[ScoredPair]) -> dict[str, float]:
    """Accuracy (a tie counts half) with its 95% Wilson interval, by turns and by length; calibration; length bias.

    `calibration_error` is the expected calibration error of P(chosen) = sigmoid(difference) in ten bins of the
    predicted confidence (Guo et al. 2017, arXiv 1706.04599, equation 3). `length_correlation` is Pearson's correlation
    of reward and number of tokens over all answers; `length_correlation_within_pairs`, that of their differences.
    """
    right = numpy.array([is_right(pair) for pair in pairs])
    low, high = wilson_interval(right.mean(), len(right))
    metrics = {"accuracy": right.mean(), "accuracy_low": low, "accuracy_high": high}
    for name, groups in {"turns": _by_turns(pairs), "length": _by_length(pairs)}.items():
        metrics |= {f"accuracy/{name}/{group}": right[rows].mean() for group, rows in groups.items()}
    multi_turn = numpy.array([pair.num_turns > 1 for pair in pairs])
    for name, rows in {"single_turn": ~multi_turn, "multi_turn": multi_turn}.items():
        if rows.any():
            metrics[f"accuracy_{name}"] = right[rows].mean()
    rewards = numpy.array([[pair.chosen, pair.rejected] for pair in pairs])
    lengths = numpy.array([[pair.chosen_tokens, pair.rejected_tokens] for pair in pairs])
    metrics |= {
        "calibration_error": sum(
            len(confidence) / len(pairs) * abs(confidence.mean() - accuracy.mean())
            for confidence, accuracy in calibration_bins(pairs)
        ),
        "reward_mean": rewards.mean(),
        "reward_spread": rewards.std(),
        "length_correlation": _correlation(rewards.ravel(), lengths.ravel()),
        "length_correlation_within_pairs": _correlation(rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1]),
    }
    return {name: float(value) for name, value in metrics.items()}


def wilson_interval(share: float, total: float) -> tuple[float, float]:
    """The 95% interval of a share of `total` (Wilson 1927); ties may have contributed halves to the share."""
    z = norm.ppf(0.975)
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half_width = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return centre - half_width, centre + half_width


def rank_correlation(rewards: list[float], grades: list[float]) -> float:
    """Spearman's correlation of rewards and grades; 0 if all rewards or all grades are equal."""
    if len(set(rewards)) == 1 or len(set(grades)) == 1:
        return 0.0
    return float(spearmanr(rewards, grades).statistic)


def rank_correlation_ceiling(grades: list[float]) -> float:
    """The `rank_correlation` of rewards that order all grades correctly but differ between equal grades.

    sqrt(1 - sum(t^3 - t) / (n^3 - n)) over the sizes t of the groups of equal grades, n grades in all.
    """
    n = len(grades)
    ties = sum(count**3 - count for count in Counter(grades).values())
    return (1 - ties / (n**3 - n)) ** 0.5 if n > 1 else 0.0


def calibration_bins(pairs: list[ScoredPair]) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """For each bin that is not empty: the model's confidence in each pair, and whether it is right (1, 0.5 or 0)."""
    difference = numpy.array([abs(pair.chosen - pair.rejected) for pair in pairs])
    confidence = 1 / (1 + numpy.exp(-difference))
    right = numpy.array([is_right(pair) for pair in pairs])
    bins = numpy.minimum((2 * (confidence - 0.5) * _NUM_BINS).astype(int), _NUM_BINS - 1)
    return [(confidence[bins == i], right[bins == i]) for i in range(_NUM_BINS) if (bins == i).any()]


def plot_pairs(pairs: list[ScoredPair], output_dir: Path, noise_ceiling: float | None) -> None:
    """Draws `calibration.png`, and `turns.png`: accuracy by turns with intervals."""
    from matplotlib.figure import Figure

    pictures = {name: Figure(figsize=(5.5, 4), layout="constrained") for name in ("calibration", "turns")}
    calibration, turns = (figure.subplots() for figure in pictures.values())
    bins = calibration_bins(pairs)
    calibration.plot([0.5, 1], [0.5, 1], color="0.7", linestyle="--", label="perfect")
    calibration.scatter(
        [confidence.mean() for confidence, _ in bins],
        [right.mean() for _, right in bins],
        s=[20 + 300 * len(right) / len(pairs) for _, right in bins],
        label="pairs (area: how many)",
    )
    calibration.set(xlabel="sigmoid(|difference of rewards|)", ylabel="share that is right")
    calibration.legend()
    groups = _by_turns(pairs)
    right = numpy.array([is_right(pair) for pair in pairs])
    for position, rows in enumerate(groups.values()):
        mean = right[rows].mean()
        low, high = wilson_interval(mean, len(rows))
        error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        turns.bar(position, mean, yerr=error, color="C0", capsize=4)
    if noise_ceiling is not None:
        turns.axhline(noise_ceiling, color="0.4", linestyle="--", label="noise ceiling")
        turns.legend(loc="lower right")
    turns.set_xticks(range(len(groups)), [f"{name}\n({len(rows)})" for name, rows in groups.items()])
    turns.set(xlabel="user turns (pairs)", ylabel="accuracy", ylim=(0, 1))
    for name, figure in pictures.items():
        figure.savefig(output_dir / f"{name}.png", dpi=150)


def is_right(pair: ScoredPair) -> float:
    return 0.5 if pair.chosen == pair.rejected else float(pair.chosen > pair.rejected)


def _by_turns(pairs: list[ScoredPair]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for row, pair in sorted(enumerate(pairs), key=lambda item: item[1].num_turns):
        groups[str(pair.num_turns)].append(row)
    return dict(groups)


def _by_length(pairs: list[ScoredPair]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for row, pair in enumerate(pairs):
        difference = pair.chosen_tokens - pair.rejected_tokens
        is_similar = abs(difference) <= SIMILAR_LENGTH * max(pair.chosen_tokens, pair.rejected_tokens)
        groups["similar" if is_similar else "chosen_longer" if difference > 0 else "chosen_shorter"].append(row)
    return dict(groups)


def _correlation(first: numpy.ndarray, second: numpy.ndarray) -> float:
    # Equal numbers may have a tiny spread: the mean of 0.1, 0.1 and 0.1 is not 0.1.
    if any(values.std() <= 1e-12 * abs(values).max() for values in (first, second)):
        return 0.0
    return pearsonr(first, second).statistic
