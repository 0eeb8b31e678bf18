"""How often, and by how much, one model's answers beat another's, and how certain that is."""

from dataclasses import dataclass

import numpy
from scipy.optimize import minimize

NUM_RESAMPLES = 2000


@dataclass
class WinRate:
    """The win rate of answers over others to the same prompts; a tie is half a win."""

    rate: float
    low: float
    high: float
    """Upper end of the 95% interval, by bootstrap over the prompts."""
    length_controlled: float | None
    """The rate if both answers had the same length; None if that is outside the observed differences."""


def win_rate(wins: list[float], lengths: list[int], other_lengths: list[int], seed: int = 0) -> WinRate:
    """The win rate with its 95% interval, and at equal lengths.

    Args:
        wins: For each prompt 1, 0, or a value in between (a tie, or two orders that disagree).
        lengths: Lengths of the answers, in tokens or letters.
        other_lengths: Lengths of the answers that they are compared with.
    """
    low, high = bootstrap_interval(wins, seed)
    return WinRate(float(numpy.mean(wins)), low, high, length_controlled(wins, lengths, other_lengths))


def wins_by(scores: list[float], other_scores: list[float]) -> list[float]:
    """Wins of answers to the same prompts: the higher score wins (1), equal scores tie (0.5)."""
    pairs = zip(scores, other_scores, strict=True)
    return [0.5 if score == other else float(score > other) for score, other in pairs]


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean: percentiles of the means of resampled values (Efron 1979)."""
    array = numpy.asarray(values, dtype=float)
    rows = numpy.random.default_rng(seed).integers(len(array), size=(NUM_RESAMPLES, len(array)))
    low, high = numpy.percentile(array[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Difference:
    """The mean of paired differences between answers to the same prompts."""

    mean: float
    low: float
    high: float
    """Upper end of the 95% interval, by bootstrap over the prompts."""
    standard_error: float


def difference(values: list[float], other_values: list[float]) -> Difference:
    """How much higher one model's values are than another's to the same prompts, at least two."""
    differences = numpy.subtract(values, other_values)
    low, high = bootstrap_interval(list(differences))
    error = float(differences.std(ddof=1) / numpy.sqrt(len(differences)))
    return Difference(float(differences.mean()), low, high, error)


def length_controlled(wins: list[float], lengths: list[int], other_lengths: list[int]) -> float | None:
    """The win rate at equal lengths, by logistic regression on the difference of lengths.

    None if equal lengths are outside the middle 95% of the differences, where the rate would be a guess.

    As in AlpacaEval (arXiv 2404.04475, equation 3), without its term for the difficulty of a prompt: length enters as
    the tanh of the difference in units of its standard deviation. A small ridge keeps the fit finite if all are wins.
    """
    difference = numpy.subtract(lengths, other_lengths).astype(float)
    low, high = numpy.percentile(difference, [2.5, 97.5])
    if not low <= 0 <= high:
        return None
    spread = difference.std()
    x = numpy.tanh(difference / spread) if spread else numpy.zeros_like(difference)
    y = numpy.asarray(wins, dtype=float)

    def loss(weights: numpy.ndarray) -> float:
        logits = weights[0] + weights[1] * x
        return float(numpy.mean(numpy.logaddexp(0, logits) - y * logits) + 1e-4 * weights @ weights)

    intercept, _ = minimize(loss, numpy.zeros(2)).x
    return float(1 / (1 + numpy.exp(-intercept)))
