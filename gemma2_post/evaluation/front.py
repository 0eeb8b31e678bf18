"""Reward against KL: a merge's points beside the runs that it is made of, and the point that is released."""

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from gemma2_post.evaluation.keys import ReleaseArguments
from gemma2_post.evaluation.measure import Measurement, summarize
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.weights.keys import Rule


@dataclass
class Point:
    """A model on the plane of KL and reward."""

    series: str
    """What is drawn as one line."""
    path: Path
    position: float
    """Eta, or the training step."""


class Front:
    """Checked when it is made, before the merge; measures after it."""

    def __init__(self, output_dir: Path, start: str, args: ReleaseArguments):
        self.output_dir, self.args = output_dir, args
        self.measurement = Measurement(start, args.measured)
        self.runs = [point for run in args.runs or [] for point in run_points(Path(run))]

    def release(self, merged: dict[Rule, dict[float, Path]]) -> dict[str, float]:
        """Measures every point, copies the best one under the budget to the output; its eta and its numbers.

        Args:
            merged: folders of the sweeps by interpolation and eta; a point of the first one is released.
        """
        released, numbers = self.measure(merged)
        shutil.copytree(released, self.output_dir, dirs_exist_ok=True)
        return numbers

    def measure(self, merged: dict[Rule, dict[float, Path]]) -> tuple[Path, dict[str, float]]:
        """Measures every point, writes `front.json` and its pictures; the released point and its numbers.

        Args:
            merged: folders of the sweeps by interpolation and eta; the first one's are what may be released.
        """
        points = [Point(rule, path, eta) for rule, sweep in merged.items() for eta, path in sweep.items()]
        points += self.runs
        answered = self.measurement.answer(
            [point.path for point in points], self.output_dir / contract.PROGRESS / "answers.jsonl"
        )
        self.measurement.load_reward_model()
        entries = [
            {"series": point.series, "path": str(point.path), "position": float(point.position)}
            | summarize(self.measurement.values(answered[point.path]))
            for point in points
        ]
        entry_of = dict(zip((point.path for point in points), entries, strict=True))
        sweep, budget = next(iter(merged.values())), self.args.kl_budget
        within = [
            path for eta, path in sweep.items() if budget is None or eta == 0 or entry_of[path]["kl_to_init"] <= budget
        ]
        released = max(within, key=lambda path: entry_of[path]["reward"])
        chosen = entry_of[released]
        front = {"kl_budget": budget, "released": chosen, "points": entries}
        contract.write_json(self.output_dir / "front.json", front)
        grader = self.args.measured.samples.headline_grader
        for name in ["reward", *([grader] if grader in chosen else [])]:
            plot(entries, list(merged), chosen, budget, name, self.output_dir / f"front-{name}.png")
        numbers = {name: value for name, value in chosen.items() if isinstance(value, float)}
        return released, {"eta": numbers.pop("position"), **numbers}


def run_points(run: Path) -> list[Point]:
    """A policy's checkpoints that hold weights, the policy itself, and its anchor."""
    if not (run / contract.DONE).is_file():
        raise UserError(f"runs names {run}, which is no finished policy; run rlhf to its end")
    name = f"{run.parent.name}/{run.name}"
    steps = {int(path.name.rpartition("-")[2]): path for path in run.glob("checkpoint-*")}
    points = [Point(name, path, step) for step, path in sorted(steps.items()) if any(path.glob("*.safetensors"))]
    *_, last = (run / "watch.jsonl").read_text(encoding="utf-8").splitlines()
    points.append(Point(name, run, json.loads(last)["step"]))
    if (run / "anchor").is_dir():
        points.append(Point(f"{name} anchor", run / "anchor", points[-1].position))
    return points


def plot(
    entries: list[dict[str, object]],
    sweeps: list[Rule],
    released: dict[str, object],
    kl_budget: float | None,
    name: str,
    path: Path,
) -> None:
    """A measure, `name`, over KL to the start; bars are standard errors over prompts."""
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[dict[str, object]]] = defaultdict(list)
    for entry in entries:
        series[entry["series"]].append(entry)
    runs = [label for label in series if label not in sweeps and not label.endswith(" anchor")]
    in_legend = set()
    for label, points in series.items():
        is_sweep, is_anchor = label in sweeps, label.endswith(" anchor")
        kl, values = [point["kl_to_init"] for point in points], [point[name] for point in points]
        if is_sweep:
            kind, colour, line = (
                label,
                "black" if label == sweeps[0] else "tab:red",
                "-" if label == sweeps[0] else "--",
            )
        else:
            kind, line = "average of a policy" if is_anchor else "policy", "-"
            colour = f"C{runs.index(label.removesuffix(' anchor')) % 10}"
        axes.errorbar(
            kl,
            values,
            yerr=[point[f"{name}/standard_error"] for point in points] if is_sweep else None,
            marker="D" if is_anchor else "o",
            linewidth=2 if is_sweep else 1,
            alpha=1 if is_sweep else 0.7,
            capsize=2,
            label=None if kind in in_legend else kind,
            color=colour,
            linestyle=line,
        )
        in_legend.add(kind)
        if label in runs:
            axes.annotate(
                label, (kl[-1], values[-1]), xytext=(0, -12), textcoords="offset points", ha="center", fontsize=7,
                color=colour,
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
