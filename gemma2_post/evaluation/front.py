"""Reward against KL: a merge's points beside the runs that it is made of, and the point that is released."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from gemma2_post.core import contract
from gemma2_post.core.command import Stage
from gemma2_post.core.errors import UserError
from gemma2_post.evaluation import measure
from gemma2_post.evaluation.measure import Measurement, summarize


@dataclass
class FrontArguments:
    runs: list[str] | None = field(
        default=None,
        metadata={"help": "Trained policies to draw beside the merge: their checkpoints, themselves, their anchors."},
    )
    kl_budget: float | None = field(
        default=None,
        metadata={"help": "Nats from the start; the point with the largest reward within them is released."},
    )


ARGUMENTS = [FrontArguments, *measure.ARGUMENTS]


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

    def __init__(self, stage: Stage, start: str, args: FrontArguments, *measuring: object):
        self.stage, self.kl_budget = stage, args.kl_budget
        self.measurement = Measurement(stage.where, start, *measuring)
        self.runs = [point for run in args.runs or [] for point in run_points(stage.where, Path(run))]

    def measure(self, merged: dict[str, dict[float, Path]]) -> tuple[Path, dict[str, float]]:
        """Measures every point, writes `front.json` and `front.png`; the released point and its numbers.

        Args:
            merged: folders of the sweeps by interpolation and eta; the first one's are what may be released.
        """
        points = [Point(rule, path, eta) for rule, sweep in merged.items() for eta, path in sweep.items()]
        points += self.runs
        answered = self.measurement.answer(
            [point.path for point in points], self.stage.output_dir / contract.PROGRESS / "answers.jsonl"
        )
        self.measurement.load_reward_model()
        entries = [
            {"series": point.series, "path": str(point.path), "position": float(point.position)}
            | summarize(self.measurement.values(answered[point.path]))
            for point in points
        ]
        entry_of = dict(zip((point.path for point in points), entries, strict=True))
        sweep, budget = next(iter(merged.values())), self.kl_budget
        within = [
            path for eta, path in sweep.items() if budget is None or eta == 0 or entry_of[path]["kl_to_init"] <= budget
        ]
        released = max(within, key=lambda path: entry_of[path]["reward"])
        chosen = entry_of[released]
        front = {"kl_budget": budget, "released": chosen, "points": entries}
        contract.write_json(self.stage.output_dir / "front.json", front)
        plot(entries, chosen, budget, self.stage.output_dir / "front.png")
        numbers = {name: value for name, value in chosen.items() if isinstance(value, float)}
        return released, {"eta": numbers.pop("position"), **numbers}


def run_points(where: str, run: Path) -> list[Point]:
    """A policy's checkpoints that hold weights, the policy itself, and its anchor."""
    if not (run / contract.DONE).is_file():
        raise UserError(f"{where}: runs names {run}, which is no finished policy; run rlhf to its end")
    name = f"{run.parent.name}/{run.name}"
    steps = {int(path.name.rpartition("-")[2]): path for path in run.glob("checkpoint-*")}
    points = [Point(name, path, step) for step, path in sorted(steps.items()) if any(path.glob("*.safetensors"))]
    *_, last = (run / "watch.jsonl").read_text(encoding="utf-8").splitlines()
    points.append(Point(name, run, json.loads(last)["step"]))
    if (run / "anchor").is_dir():
        points.append(Point(f"{name} anchor", run / "anchor", points[-1].position))
    return points


def plot(entries: list[dict[str, object]], released: dict[str, object], kl_budget: float | None, path: Path) -> None:
    """Reward, and gold where it is graded, over KL to the start; bars are standard errors over prompts."""
    names = ["reward", *(["gold"] if "gold" in entries[0] else [])]
    figure = Figure(figsize=(6.5 * len(names), 5), layout="constrained")
    series: dict[str, list[dict[str, object]]] = defaultdict(list)
    for entry in entries:
        series[entry["series"]].append(entry)
    sweeps = [name for name, points in series.items() if "eta-" in points[0]["path"]]
    runs = [name for name in series if name not in sweeps and not name.endswith(" anchor")]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for label, points in series.items():
            is_sweep, is_anchor = label in sweeps, label.endswith(" anchor")
            if is_sweep:
                colour, line = ("black", "-") if label == sweeps[0] else ("tab:red", "--")
            else:
                colour, line = f"C{runs.index(label.removesuffix(' anchor')) % 10}", "-"
            axes.errorbar(
                [point["kl_to_init"] for point in points],
                [point[name] for point in points],
                yerr=[point[f"{name}/standard_error"] for point in points] if is_sweep else None,
                marker="o" if is_sweep else "D" if is_anchor else ".",
                linewidth=2 if is_sweep else 1,
                alpha=1 if is_sweep else 0.6,
                capsize=2,
                label=label,
                color=colour,
                linestyle=line,
            )
        axes.plot(
            released["kl_to_init"], released[name], marker="*", markersize=18, color="gold", markeredgecolor="black",
            linestyle="none", label=f"released (eta {released['position']:g})", zorder=5,
        )  # fmt: skip
        if kl_budget is not None:
            axes.axvline(kl_budget, color="0.5", linestyle=":", label="KL budget")
        axes.set(xlabel="KL to the start, nats per answer", ylabel=name)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
