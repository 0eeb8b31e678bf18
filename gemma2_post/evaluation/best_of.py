"""Best-of-n: what a reward's choice among n answers of one policy is worth, over n.

From N answers to each prompt, every n up to N is estimated without bias: the mean over all sets of n of them. KL of
best-of-n to the policy is at most log n - (n - 1) / n (arXiv 2401.01879), whatever the reward.
"""

import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

NUM_IN_ACCURACY = 4
"""Answers among which the reward must find one with the best grade."""


def kl(n: int) -> float:
    """The upper bound of KL(best-of-n || policy), in nats."""
    return math.log(n) - (n - 1) / n


def expected_best(rewards: list[float], values: list[float], n: int) -> float:
    """The mean value of the answer with the highest reward, over all sets of n of the answers to one prompt.

    Args:
        rewards: Of each answer; those with equal rewards are chosen alike.
        values: Of each answer: its reward, or a grade.
    """
    tied: dict[float, list[float]] = defaultdict(list)
    for reward, value in zip(rewards, values, strict=True):
        tied[reward].append(value)
    found, below, sets = 0.0, 0, math.comb(len(rewards), n)
    for _, each in sorted(tied.items()):
        of_these = math.comb(below + len(each), n) - math.comb(below, n)  # sets whose best is one of them
        found += of_these / sets * mean(each)
        below += len(each)
    return found


def accuracy(rewards: list[float], grades: list[float]) -> float:
    """How often the answer with the highest reward has the highest grade of the four, over sets of four answers.

    The answers are divided into sets in their order. Of answers with equal rewards each counts as chosen by its share.
    """
    found = []
    for first in range(0, len(rewards) - NUM_IN_ACCURACY + 1, NUM_IN_ACCURACY):
        of_set = range(first, first + NUM_IN_ACCURACY)
        best = max(grades[i] for i in of_set)
        found.append(expected_best([rewards[i] for i in of_set], [float(grades[i] == best) for i in of_set], 4))
    return mean(found)


def by_chance(grades: list[float]) -> float:
    """The accuracy of a choice by chance."""
    return accuracy([0.0] * len(grades), grades)


def measure(rewards: list[list[float]], metrics: dict[str, list[list[float]]]) -> dict[str, float]:
    """The metrics of best-of-n for n = 1, 2, 4, ... with their standard errors over prompts, KL, and the accuracies.

    Args:
        rewards: (prompts, answers).
        metrics: What is measured of each answer, (prompts, answers).
    """
    found: dict[str, float] = {}
    for n in numbers(len(rewards[0])):
        found[f"best_of_{n}/kl"] = kl(n)
        for name, values in metrics.items():
            each = [expected_best(*of_prompt, n) for of_prompt in zip(rewards, values, strict=True)]
            found[f"best_of_{n}/{name}"] = mean(each)
            found[f"best_of_{n}/{name}/standard_error"] = stdev(each) / math.sqrt(len(each))
    for name, values in metrics.items():
        if len(rewards[0]) >= NUM_IN_ACCURACY and name != "reward":
            found[f"best_of_4_accuracy/{name}"] = mean(map(accuracy, rewards, values))
            found[f"best_of_4_accuracy/{name}/by_chance"] = mean(map(by_chance, values))
    return found


def numbers(num_answers: int) -> list[int]:
    """1, 2, 4, ... up to the number of answers to a prompt."""
    return [2**power for power in range(num_answers.bit_length())]


def plot(measured: dict[str, float], names: list[str], num_answers: int, path: Path) -> None:
    """Draws each metric over the KL of best-of-n; bars are standard errors over prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        points = [(n, f"best_of_{n}/{name}") for n in numbers(num_answers)]
        errors = [measured[f"{key}/standard_error"] for _, key in points]
        axes.errorbar([kl(n) for n, _ in points], [measured[key] for _, key in points], yerr=errors, marker="o")
        for n, key in points:
            axes.annotate(f"{n}", (kl(n), measured[key]), xytext=(4, -10), textcoords="offset points", fontsize=8)
        axes.set(xlabel="KL of best-of-n, nats", ylabel=name)
    figure.savefig(path, dpi=150)
