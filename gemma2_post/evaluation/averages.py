"""A reward model of averaged weights beside those that it averages, and beside the mean of their scores."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy

from gemma2_post.evaluation.judging.winrate import difference
from gemma2_post.evaluation.pairs import ScoredPair, is_right

MEAN = "mean of weights"
"""The name of the averaged model beside its members."""
HELD_OUT = "held out"
"""The set of pairs whose metrics have plain names."""
METRICS = {"accuracy", "member_accuracy", "ensemble_accuracy", "gain_over_members", "gain_over_ensemble"}
"""The metrics of `compare`, without breakdowns."""


def compare_all(scores: dict[str, dict[str, list[ScoredPair]]], output_dir: Path) -> dict[str, float]:
    """What `compare` finds on each set of pairs, by `named` metrics; draws `members.png`.

    Args:
        scores: By model, `MEAN` and the members, and by set of pairs.
    """
    members = {name: each for name, each in scores.items() if name != MEAN}
    compared = {
        of: compare(each, {name: found[of] for name, found in members.items()}) for of, each in scores[MEAN].items()
    }
    plot(compared, output_dir / "members.png")
    return {named(metric, of): value for of, found in compared.items() for metric, value in found.items()}


def compare(average: list[ScoredPair], members: dict[str, list[ScoredPair]]) -> dict[str, float]:
    """A reward model of averaged weights beside its members, and beside the mean of their scores (the ensemble).

    `accuracy` is that of the averaged weights, `member_accuracy` the members' mean, `ensemble_accuracy` that of the
    mean of scores. The gains are differences of accuracies with 95% intervals, paired by pair.
    """
    right = [is_right(pair) for pair in average]
    of_members = {name: [is_right(pair) for pair in pairs] for name, pairs in members.items()}
    of_ensemble = [is_right(pair) for pair in mean_of_scores(list(members.values()))]
    of_mean_member = numpy.mean([*of_members.values()], axis=0).tolist()
    found = {
        "accuracy": fmean(right),
        "ensemble_accuracy": fmean(of_ensemble),
        "member_accuracy": fmean(of_mean_member),
        **{f"member_accuracy/{name}": fmean(each) for name, each in of_members.items()},
    }
    for name, others in {"members": of_mean_member, "ensemble": of_ensemble}.items():
        gain = difference(right, others)
        found |= {
            f"gain_over_{name}": gain.mean,
            f"gain_over_{name}/low": gain.low,
            f"gain_over_{name}/high": gain.high,
        }
    return found


def mean_of_scores(members: list[list[ScoredPair]]) -> list[ScoredPair]:
    """The same pairs with the mean of the members' rewards of each answer."""
    return [
        replace(same[0], chosen=fmean(pair.chosen for pair in same), rejected=fmean(pair.rejected for pair in same))
        for same in zip(*members, strict=True)
    ]


def plot(accuracies: dict[str, dict[str, float]], path: Path) -> None:
    """Draws the accuracies of members, mean of scores and mean of weights, for each set of pairs.

    Args:
        accuracies: By set, what `compare` found.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(accuracies.values()):
        alone = [value for name, value in found.items() if name.startswith("member_accuracy/")]
        axes.scatter([place - 0.2] * len(alone), alone, color="0.6", label="members" if place == 0 else None)
        axes.scatter(
            place, found["ensemble_accuracy"], color="C0", label="mean of their scores" if place == 0 else None
        )
        axes.scatter(
            place + 0.2, found["accuracy"], color="black", marker="D",
            label="mean of their weights" if place == 0 else None,
        )  # fmt: skip
    axes.set_xticks(range(len(accuracies)), list(accuracies))
    axes.set(ylabel="accuracy", xlim=(-0.6, len(accuracies) - 0.4))
    axes.legend()
    figure.savefig(path, dpi=150)


def named(metric: str, of: str) -> str:
    """The name of a metric on a set of pairs: `accuracy`, `accuracy_flipped`, `member_accuracy_flipped/member-0`."""
    name, slash, rest = metric.partition("/")
    return metric if of == HELD_OUT else f"{name}_{of}{slash}{rest}"
