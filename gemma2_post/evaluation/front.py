"""Reward against KL: the points of a merge next to the runs that it merges, and the point that is released."""

import shutil
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gemma2_post.evaluation import release
from gemma2_post.evaluation.comparison import said
from gemma2_post.evaluation.judging.judge import Judge
from gemma2_post.evaluation.judging.winrate import wins_by
from gemma2_post.evaluation.keys import ReleaseArguments, RewardFunctionArguments
from gemma2_post.evaluation.measure import Answered, Measurement, summarize
from gemma2_post.evaluation.rewards import as_trained
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError, located
from gemma2_post.weights.keys import Rule


@dataclass(frozen=True)
class Released:
    """The point that was released."""

    metrics: dict[str, float]
    why: str
    """In words, if something else than the reward has chosen it; else empty."""


@dataclass
class Point:
    """A model in the plane of KL and reward."""

    series: str
    """Name of the line that connects it with other points."""
    path: Path
    position: float
    """Eta, or the training step."""


class Front:
    """Checks its arguments when it is created, before the merge; measures after the merge."""

    def __init__(
        self, output_dir: Path, start: str, policies: list[str], args: ReleaseArguments, judge: Judge | None = None
    ):
        self.output_dir, self.args, self.judge = output_dir, args, judge
        rewards, weights = rewarded_as(args.measured.rewards, [*policies, *(args.runs or [])])
        kept = output_dir / contract.PROGRESS
        self.measurement = Measurement(start, replace(args.measured, rewards=rewards), kept, weights)
        self.runs = [point for run in args.runs or [] for point in run_points(Path(run))]

    def release(self, merged: dict[Rule, dict[float, Path]]) -> Released:
        """Measures every point, writes `front.json` and its pictures, and copies the best point under the budget into
        the output.

        Args:
            merged: Folders of the sweeps, by interpolation and eta; a point of the first sweep is released.
        """
        points = [Point(rule, path, eta) for rule, sweep in merged.items() for eta, path in sweep.items()]
        points += self.runs
        answered = self.measurement.answer([point.path for point in points])
        self.measurement.load_reward_model()
        values = {point.path: self.measurement.values(answered[point.path]) for point in points}
        self.measurement.unload_reward_model()
        entries: list[dict[str, Any]] = [
            {"series": point.series, "path": str(point.path), "position": float(point.position)}
            | summarize(values[point.path])
            for point in points
        ]
        entry_of = dict(zip((point.path for point in points), entries, strict=True))
        sweep, budget, by = next(iter(merged.values())), self.args.kl_budget, self.args.release_by
        if by != "reward":
            wins = self.wins(sweep, values, answered)
            for path in sweep.values():
                entry_of[path] |= release.rates(wins[by][path], wins["reward"][path])
        for entry in entries:
            with located(entry["path"]):
                contract.check_finite(entry)
        within = [
            entry_of[path]
            for eta, path in sweep.items()
            if budget is None or eta == 0 or entry_of[path]["kl_to_init"] <= budget
        ]
        chosen = release.best(within, "reward" if by == "reward" else "win_rate")
        why = "" if by == "reward" else release.in_words(chosen, release.best(within, "reward"), by)
        front = {"kl_budget": budget, "release_by": by, "released": chosen, "why": why, "points": entries}
        contract.write_json(self.output_dir / "front.json", front)
        grader = self.args.measured.samples.headline_grader
        for name in ["reward", *([grader] if grader in chosen else [])]:
            plot(entries, list(merged), chosen, budget, name, self.output_dir / f"front-{name}.png")
        if by != "reward":
            sweep_entries = [entry_of[path] for path in sweep.values()]
            release.plot(sweep_entries, chosen, budget, by, self.output_dir / "front-wins.png")
        shutil.copytree(chosen["path"], self.output_dir, dirs_exist_ok=True)
        numbers = {name: value for name, value in chosen.items() if isinstance(value, float)}
        return Released({"eta": numbers.pop("position"), **numbers}, why)

    def wins(
        self, sweep: dict[float, Path], values: dict[Path, dict[str, list[float]]], answered: dict[Path, Answered]
    ) -> dict[str, dict[Path, list[float | None]]]:
        """The wins of each point against the start, by the reward and by what releases a point, one for each prompt.

        Args:
            sweep: The points by eta; 0 is the start.
        """
        by, start = self.args.release_by, sweep[0]
        scored = {"reward"} if by == "judge" else {"reward", by}
        found: dict[str, dict[Path, list[float | None]]] = {
            name: {path: list(wins_by(values[path][name], values[start][name])) for path in sweep.values()}
            for name in scored
        }
        if self.judge:
            prompts = list(self.measurement.rows["prompt"])
            texts = {
                path: [said(answered[path], i, prompt) for i, prompt in enumerate(prompts)] for path in sweep.values()
            }
            found[by] = {}
            with closing(self.judge):
                for path in sweep.values():
                    judged = self.judge.compare(prompts, texts[path], texts[start])
                    self.judge.check_most(judged.wins.count(None), judged.num_asked)
                    found[by][path] = judged.wins
        return found


def rewarded_as(
    args: RewardFunctionArguments, policies: list[str]
) -> tuple[RewardFunctionArguments, list[float] | None]:
    """How all the policies that our own stage trained were rewarded, by their records, with the rewards' weights.

    Raises:
        UserError: The recipe says otherwise, or two policies were rewarded differently.
    """
    found: tuple[RewardFunctionArguments, list[float] | None] = args, None
    first = ""
    for policy in policies:
        done = contract.read_done(Path(policy), "stage", "fingerprint")
        if done is None or done["stage"] != "rlhf":
            continue
        recipe, inputs = done["fingerprint"]["recipe"], done["fingerprint"]["inputs"]
        was, said = recipe.get("reward_model"), args.reward_model
        if bool(was) != bool(said) or (said and inputs.get(was) != contract.input_digest(said)):
            raise UserError(
                f"reward_model is {said or 'not set'}, but {policy} was trained with {was or 'none'}, or that has "
                "changed; name the one that it was trained with"
            )
        each = as_trained(args, recipe, policy)
        if first and each != found:
            raise UserError(
                f"{policy} was rewarded in another way than {first}, so no front can be rewarded as both; merge them "
                "without datasets, and measure the points with evaluate"
            )
        found, first = each, first or policy
    return found


def run_points(run: Path) -> list[Point]:
    """A policy's checkpoints (those with weights), the policy itself, and its anchor."""
    if not (run / contract.DONE).is_file():
        raise UserError(f"runs names {run}, which is no finished policy; run rlhf to its end")
    name = f"{run.parent.name}/{run.name}"
    checkpoints = [path for path in contract.checkpoints(run) if any(path.glob("*.safetensors"))]
    points = [Point(name, path, contract.step_of(path)) for path in checkpoints]
    measured = contract.read_lines(run / "watch.jsonl", {"step": int}, is_appended_to=False)
    if not measured:
        raise UserError(f"{run / 'watch.jsonl'} is missing or empty; run rlhf again to make it")
    points.append(Point(name, run, measured[-1]["step"]))
    if (run / "anchor").is_dir():
        points.append(Point(f"{name} anchor", run / "anchor", points[-1].position))
    return points


def plot(
    entries: list[dict[str, Any]],
    sweeps: list[Rule],
    released: dict[str, Any],
    kl_budget: float | None,
    name: str,
    path: Path,
) -> None:
    """Plots the metric `name` over KL to the start; bars are standard errors over prompts."""
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        series[entry["series"]].append(entry)
    runs = [label for label in series if label not in sweeps and not label.endswith(" anchor")]
    in_legend = set()
    for label, points in series.items():
        is_sweep, is_anchor = label in sweeps, label.endswith(" anchor")
        kl, values = [point["kl_to_init"] for point in points], [point[name] for point in points]
        if is_sweep:
            kind = label
            color, line = ("black", "-") if label == sweeps[0] else ("tab:red", "--")
        else:
            kind, line = "average of a policy" if is_anchor else "policy", "-"
            color = f"C{runs.index(label.removesuffix(' anchor')) % 10}"
        axes.errorbar(
            kl,
            values,
            yerr=[point[f"{name}/standard_error"] for point in points] if is_sweep else None,
            marker="D" if is_anchor else "o",
            linewidth=2 if is_sweep else 1,
            alpha=1 if is_sweep else 0.7,
            capsize=2,
            label=None if kind in in_legend else kind,
            color=color,
            linestyle=line,
        )
        in_legend.add(kind)
        if label in runs:
            axes.annotate(
                label, (kl[-1], values[-1]), xytext=(0, -12), textcoords="offset points", ha="center", fontsize=7,
                color=color,
            )  # fmt: skip
    axes.plot(
        released["kl_to_init"], released[name], marker="*", markersize=18, color="#ffd700", markeredgecolor="black",
        linestyle="none", label=f"released (eta {released['position']:g})", zorder=5,
    )  # fmt: skip
    if kl_budget is not None:
        axes.axvline(kl_budget, color="0.5", linestyle=":", label="KL budget")
    axes.set(xlabel="KL to the start, nats per answer", ylabel=name)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
