"""How often the 95% intervals of win rates cover the truth, in simulations, and how wrong rates at equal lengths are.

python benchmarks/win_rate_intervals.py
"""

from collections.abc import Callable

import numpy
from scipy.special import expit
from scipy.stats import norm

from gemma2_post.evaluation.judging import winrate

RATES, TIES, SIZES = (0.5, 0.8, 0.9, 0.95, 0.98), (0, 0.3), (30, 64, 128, 256, 805)
REPEATS = 1000
EFFECTS: dict[str, Callable[[numpy.ndarray], numpy.ndarray]] = {
    "assumed": numpy.tanh,
    "linear": lambda x: 0.7 * x.clip(-3, 3),
    "sign": lambda x: 0.8 * numpy.sign(x),
    "large": lambda x: numpy.sign(x) * numpy.tanh(2 * (abs(x) - 1).clip(0)),
    "log": lambda x: numpy.sign(x) * numpy.log1p(abs(x)),
}
"""Effects of a difference of lengths on the log-odds of a win, by name; differences in standard deviations."""


def rates(randomness: numpy.random.Generator) -> None:
    """Prints the least and the largest share of intervals that cover a win rate."""
    found: dict[str, list[float]] = {"Wilson": [], "bootstrap": []}
    for size, rate, ties in ((size, rate, ties) for size in SIZES for rate in RATES for ties in TIES):
        truth, covered = rate * (1 - ties) + 0.5 * ties, {"Wilson": 0, "bootstrap": 0}
        for _ in range(REPEATS):
            wins = (randomness.random(size) < rate).astype(float)
            wins[randomness.random(size) < ties] = 0.5
            for name, interval in (("Wilson", winrate.rate_interval), ("bootstrap", winrate.bootstrap_interval)):
                if name == "Wilson" or size <= 256:  # the bootstrap takes long
                    low, high = interval(wins.tolist())
                    covered[name] += low - 1e-12 <= truth <= high + 1e-12
        for name in found if size <= 256 else ["Wilson"]:
            found[name].append(covered[name] / REPEATS)
    for name, shares in found.items():
        print(f"{name}: covers the win rate in {min(shares):.1%} to {max(shares):.1%} of {REPEATS} repeats")


def at_equal_lengths(randomness: numpy.random.Generator, repeats: int = 300) -> None:
    """Prints mean error, root mean square error, and coverage, by overlap, number of prompts, and length effect."""
    winrate.LEAST_OVERLAP = 0.0
    for share in (0.02, 0.1, 0.3):
        for size in (128, 256, 805):
            for name, effect in EFFECTS.items():
                errors, covered = [], 0
                for _ in range(repeats):
                    differences = randomness.normal(-1000 * norm.ppf(share), 1000, size).round()
                    odds, strength = randomness.choice([-1.5, 0, 1]), randomness.choice([0.5, 1.5])
                    chances = expit(odds + strength * effect(differences / differences.std()))
                    wins = (randomness.random(size) < chances).astype(float).tolist()
                    found = winrate.length_controlled(wins, differences.tolist(), [0] * size)
                    assert found is not None
                    errors.append(100 * (found.rate - expit(odds)))
                    covered += found.low <= expit(odds) <= found.high
                error, spread = numpy.mean(errors), numpy.square(errors).mean() ** 0.5
                print(
                    f"{share:.0%} shorter, {size} prompts, {name}: off by {error:+.1f} points on average, root mean "
                    f"square {spread:.1f}; covered in {covered / repeats:.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    rates(numpy.random.default_rng(0))
    at_equal_lengths(numpy.random.default_rng(1))
