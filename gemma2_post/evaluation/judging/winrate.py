"""How often, and by how much, one model's answers beat another's, and how certain that is."""

from dataclasses import dataclass

import numpy
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import t as student

from gemma2_post.evaluation.pairs import wilson_interval

NUM_RESAMPLES = 2000
LEAST_OVERLAP = 0.1
"""Share of the answers that must be no longer than the others', and no shorter, for a win rate at equal lengths."""
RIDGE = 1e-4


@dataclass
class LengthControlled:
    """The win rate if both answers had the same length, with its 95% interval."""

    rate: float
    low: float
    high: float


@dataclass
class WinRate:
    """The win rate of answers over others to the same prompts; a tie is half a win."""

    rate: float
    low: float
    high: float
    """Upper end of the 95% interval."""
    length_controlled: LengthControlled | None
    """None where too few answers overlap in length."""


def win_rate(wins: list[float], lengths: list[int], other_lengths: list[int]) -> WinRate:
    """The win rate with its 95% interval, and at equal lengths.

    Args:
        wins: For each prompt 1, 0, or a value in between (a tie, or two orders that disagree).
        lengths: Lengths of the answers, in tokens or letters.
        other_lengths: Lengths of the answers that they are compared with.
    """
    low, high = rate_interval(wins)
    return WinRate(float(numpy.mean(wins)), low, high, length_controlled(wins, lengths, other_lengths))


def rate_interval(wins: list[float]) -> tuple[float, float]:
    """The 95% interval of the mean of values from 0 to 1: Wilson's, for as many wins and losses as vary as much.

    Values in between, such as ties, vary less than wins and losses, so they count for more. In 1,000 simulated repeats
    each, with 30 to 805 prompts, true rates from 50% to 98%, and up to 30% ties, it covers the truth in 94 to 98%;
    percentiles of bootstrapped means do in 46 to 97% (`benchmarks/win_rate_intervals.py`).
    """
    values = numpy.asarray(wins, dtype=float)
    rate, variance = float(values.mean()), float(values.var())
    if variance == 0 and 0 < rate < 1:
        return rate, rate
    low, high = wilson_interval(rate, len(values) * (rate * (1 - rate) / variance if variance else 1))
    return min(low, rate), max(high, rate)  # at 0 and 1 but for rounding


def pooled_rate(wins: list[float], weights: list[float]) -> tuple[float, float, float]:
    """The share of the weights that is won, over prompts of different weight, with its 95% interval.

    The interval is Wilson's, for as many prompts as give a share of wins the variance of this ratio (linearized).

    Args:
        wins: For each prompt, the weight that is won, a tie counting half.
        weights: For each prompt, the weight of all its verdicts.
    """
    won, total = numpy.asarray(wins, dtype=float), numpy.asarray(weights, dtype=float)
    rate = float(won.sum() / total.sum())
    variance = float(((won - rate * total) ** 2).sum() / total.sum() ** 2)
    if variance == 0 and 0 < rate < 1:
        return rate, rate, rate
    low, high = wilson_interval(rate, rate * (1 - rate) / variance if variance else len(won))
    return rate, min(low, rate), max(high, rate)


def mean_interval(values: list[float]) -> tuple[float, float]:
    """The 95% interval of a mean, by Student's t; a single value has none."""
    if len(values) < 2:
        return values[0], values[0]
    error = numpy.std(values, ddof=1) / numpy.sqrt(len(values))
    width = float(student.ppf(0.975, len(values) - 1) * error)
    centre = float(numpy.mean(values))
    return centre - width, centre + width


def wins_by(scores: list[float], other_scores: list[float]) -> list[float]:
    """Wins of answers to the same prompts: the higher score wins (1), equal scores tie (0.5)."""
    pairs = zip(scores, other_scores, strict=True)
    return [0.5 if score == other else float(score > other) for score, other in pairs]


def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """The 95% interval of a mean: percentiles of the means of resampled values (Efron 1979)."""
    array = numpy.asarray(values, dtype=float)
    rows = numpy.random.default_rng(0).integers(len(array), size=(NUM_RESAMPLES, len(array)))
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


def length_controlled(wins: list[float], lengths: list[int], other_lengths: list[int]) -> LengthControlled | None:
    """The win rate at equal lengths: a logistic regression of the wins on the difference of lengths, at 0.

    None unless at least `LEAST_OVERLAP` of the answers are no longer than the others', and as many no shorter. At
    that share, in simulations (`benchmarks/win_rate_intervals.py`), the root mean square error is 4 points with 805
    prompts, 6 with 256, and 8 with 128. If the length effect has another form than the assumed one, the estimate is
    off by up to 2.5 points on average; at a share of 2%, by up to 7.4. The interval, of the sandwich variance, covers
    the truth in 93 to 95% of the repeats if the form is the assumed one, in 90 to 97% if it is not, and in 81% if only
    the sign of the difference matters and there are 805 prompts.

    As in AlpacaEval (arXiv 2404.04475, equation 3), length enters as the tanh of the difference in units of its
    standard deviation. Unlike there: no term for the difficulty of a prompt, which needs many models' answers to the
    same prompts; no L1 penalty chosen by cross-validation, and no rows of verbose and concise baselines that hold the
    length effect to a known one, so an effect is what these answers alone show; a ridge of 1e-4 keeps the fit finite
    if all are wins. So the numbers are not those of AlpacaEval's leaderboard.
    """
    difference = numpy.subtract(lengths, other_lengths).astype(float)
    if min((difference <= 0).mean(), (difference >= 0).mean()) < LEAST_OVERLAP:
        return None
    spread = difference.std()
    x = numpy.tanh(difference / spread) if spread else numpy.zeros_like(difference)
    y, features = numpy.asarray(wins, dtype=float), numpy.stack([numpy.ones_like(x), x], axis=1)

    def loss(weights: numpy.ndarray) -> float:
        logits = features @ weights
        return float(numpy.mean(numpy.logaddexp(0, logits) - y * logits) + RIDGE * weights @ weights)

    weights = minimize(loss, numpy.zeros(2)).x
    predicted = expit(features @ weights)
    scores = features * (y - predicted)[:, None]
    curvature = (features * (predicted * (1 - predicted))[:, None]).T @ features / len(y) + 2 * RIDGE * numpy.eye(2)
    inverse = numpy.linalg.inv(curvature)
    error = numpy.sqrt((inverse @ (scores.T @ scores / len(y)) @ inverse)[0, 0] / len(y))
    low, rate, high = (float(expit(weights[0] + side * 1.96 * error)) for side in (-1, 0, 1))
    return LengthControlled(rate, low, high)


def versus(key: str, wins: list[float], lengths: list[int], other_lengths: list[int]) -> dict[str, float]:
    """The win rate under `key` and, if it can be estimated, the one at equal lengths, with their 95% intervals."""
    found = win_rate(wins, lengths, other_lengths)
    measured = {key: found.rate, f"{key}/low": found.low, f"{key}/high": found.high}
    controlled = found.length_controlled
    if controlled is None:
        return measured
    key = f"{key}/length_controlled"
    return measured | {key: controlled.rate, f"{key}/low": controlled.low, f"{key}/high": controlled.high}
