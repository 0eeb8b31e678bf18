"""Intervals over seeds, for the scripts beside it."""

from math import sqrt
from statistics import mean, stdev

from scipy.stats import t


def interval(values: list[float]) -> str:
    """The mean, and its 95% interval by Student's t if there are several."""
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return f"{mean(values):+.3f} ({mean(values) - half:+.3f} to {mean(values) + half:+.3f})"
