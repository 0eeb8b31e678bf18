"""Which point of a front is released, and where the reward and what decides about it disagree. Pure functions."""

from pathlib import Path
from statistics import fmean
from typing import Any

from gemma2_post.evaluation.judging.winrate import rate_interval

Wins = list[float | None]
"""Wins of a point's answers against the start's, one for each prompt: 1, 0, or between; None without a verdict."""


def rates(wins: Wins, reward_wins: Wins) -> dict[str, float]:
    """The win rate against the start, the reward's, both with 95% intervals, and how often the two disagree.

    `disagreement` is the share of the prompts with a verdict on which one prefers the answer that the other does not.
    """
    found: dict[str, float] = {}
    for name, each in {"win_rate": wins, "reward_win_rate": reward_wins}.items():
        given = [win for win in each if win is not None]
        found[name] = fmean(given)
        found[f"{name}/low"], found[f"{name}/high"] = rate_interval(given)
    both = [(a, b) for a, b in zip(wins, reward_wins, strict=True) if a is not None and b is not None]
    return found | {"disagreement": fmean(float((a - 0.5) * (b - 0.5) < 0) for a, b in both)}


def best(points: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The point with the highest value of a metric; of equal ones, that with the least KL to the start."""
    return max(points, key=lambda point: (point[name], -point["kl_to_init"]))


def in_words(chosen: dict[str, Any], by_reward: dict[str, Any], by: str) -> str:
    """What was released, by what, and what the reward would have released."""
    rate, low, high = (f"{chosen[f'win_rate{end}']:.1%}" for end in ("", "/low", "/high"))
    found = f"eta {chosen['position']:g}, whose answers win {rate} ({low} to {high}) against the start's by {by}"
    if chosen is by_reward:
        return f"{found}; the reward would release it, too"
    return (
        f"{found}; the reward would release eta {by_reward['position']:g}, which wins {by_reward['win_rate']:.1%} by "
        f"{by} and {by_reward['reward_win_rate']:.1%} by the reward, and the two disagree on "
        f"{by_reward['disagreement']:.1%} of its answers"
    )


def plot(points: list[dict[str, Any]], chosen: dict[str, Any], kl_budget: float | None, by: str, path: Path) -> None:
    """Plots the points' win rates against the start over KL, by what releases one and by the reward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    kl = [point["kl_to_init"] for point in points]
    for name, label, color in (("win_rate", by, "black"), ("reward_win_rate", "reward", "tab:red")):
        rate = [point[name] for point in points]
        low, high = ([abs(point[f"{name}/{end}"] - point[name]) for point in points] for end in ("low", "high"))
        axes.errorbar(kl, rate, yerr=[low, high], marker="o", capsize=2, color=color, label=f"by {label}")
    axes.plot(
        chosen["kl_to_init"], chosen["win_rate"], marker="*", markersize=18, color="#ffd700", markeredgecolor="black",
        linestyle="none", label=f"released (eta {chosen['position']:g})", zorder=5,
    )  # fmt: skip
    if kl_budget is not None:
        axes.axvline(kl_budget, color="0.5", linestyle=":", label="KL budget")
    axes.axhline(0.5, color="0.7", linestyle="--")
    axes.set(xlabel="KL to the start, nats per answer", ylabel="wins against the start", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
