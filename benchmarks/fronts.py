"""Gold over KL along runs of RLHF in the tiny world, for the scripts beside it that compare settings."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from matplotlib.figure import Figure
from over_seeds import interval

GRADERS = [f"gemma2_post.tiny.gold:{name}" for name in ("gold", "accuracy", "flattery")]
METRICS = ["reward", "gold", "accuracy", "kl_to_init", "mean_tokens"]
COLORS = ["tab:orange", "tab:blue", "tab:green", "tab:red"]
NUM_POINTS = 5

Point = dict[str, float]


@dataclass
class Fronts:
    """Policies of several arms and seeds from one start, each measured five times on its way.

    Attributes:
        run: A run of the tiny pipeline with `distill`, the start, and `reward`, which scores the test answers.
        folder: Where the policies and what is measured of them are written; what is there is kept.
        arms: By name, the keys of `rlhf` that are the arm's own, given the seed. Others are held against the first.
    """

    run: Path
    folder: Path
    arms: dict[str, Callable[[int], dict[str, Any]]]
    seeds: list[int]
    max_steps: int
    num_samples: int

    @property
    def start(self) -> Path:
        return self.run / "distill"

    def train(self) -> None:
        """Trains the policies that are missing."""
        recipe = Path("recipes/tiny/rlhf.yaml").read_text().splitlines()
        given = [line for line in recipe if not line.startswith(("num_generations", "beta", "anchor", "include"))]
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "rlhf.yaml"
        file.write_text("\n".join([*given, f"include: {Path('recipes/tiny/data/prompts.yaml').resolve()}"]) + "\n")
        for seed in self.seeds:
            for arm, own in self.arms.items():
                values = {
                    "model_name_or_path": str(self.start), "reward_model": str(self.run / "reward"), "seed": seed,
                    "max_steps": self.max_steps, "anchor": "ema", "warmup_steps": 5, "global_batch_size": 48,
                    "per_device_train_batch_size": 48, "watch_steps": self.max_steps // NUM_POINTS,
                    "save_total_limit": NUM_POINTS, "kl_budget": 1000, "graders": GRADERS, "num_samples": 120,
                }  # fmt: skip
                stage("rlhf", file, self.folder / f"{arm}-{seed}", **values | own(seed))

    def models(self, arm: str, seed: int) -> list[Path]:
        """The points of a run: what it has saved on its way, and its end."""
        policy, step = self.folder / f"{arm}-{seed}" / "policy-0", self.max_steps // NUM_POINTS
        return [*(policy / f"checkpoint-{step * i}" for i in range(1, NUM_POINTS)), policy]

    def measure(self) -> dict[str, list[list[Point]]]:
        """What the test prompts say of each arm, by seed: the start, then the points of the run."""
        file, found = Path("recipes/tiny/evaluate.yaml"), {}
        for seed in self.seeds:
            models = [str(path) for arm in self.arms for path in self.models(arm, seed)]
            output = self.folder / f"test-{seed}"
            stage(
                "evaluate", file, output, init=str(self.start), models=[str(self.start), *models], base=None,
                baseline=str(self.start), reward_model=str(self.run / "reward"), graders=GRADERS,
                num_samples=self.num_samples, datasets=yaml.safe_load(file.read_text())["datasets"],
            )  # fmt: skip
            start, *points = json.loads((output / "models.json").read_text()).values()
            for i, arm in enumerate(self.arms):
                found.setdefault(arm, []).append([start, *points[i * NUM_POINTS : (i + 1) * NUM_POINTS]])
        return found

    def watched(self, arm: str, seed: int) -> list[Point]:
        """What was watched on selection prompts while a policy trained."""
        file = self.folder / f"{arm}-{seed}" / "policy-0" / "watch.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def stage(name: str, file: str | Path, output: Path, **values: object) -> None:
    """Runs a stage of ours, unless its output is there."""
    command = [sys.executable, "-m", f"gemma2_post.{name}", "--config", str(file)]
    command += [f"--{key}={json.dumps(value)}" for key, value in (values | {"output_dir": str(output)}).items()]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-3000:]}")
    print(f"{output}: done", flush=True)


def at_kl(front: list[Point], kl: float, name: str) -> float | None:
    """A metric where a front first passes this KL, on the chord between two of its points; None if it never does."""
    for before, after in pairwise(front):
        if before["kl_to_init"] <= kl <= after["kl_to_init"]:
            share = (kl - before["kl_to_init"]) / (after["kl_to_init"] - before["kl_to_init"])
            return before[name] + share * (after[name] - before[name])
    return None


def tables(fronts: dict[str, list[list[Point]]], kls: list[float]) -> None:
    """Prints the ends of the runs, and gold and reward at equal KL, less those of the first arm."""
    first, *others = fronts
    print(f"\n| | {' | '.join(METRICS)} | gold, less the start's | gold, less that of {first} |")
    print("|---" * (len(METRICS) + 3) + "|")
    for arm, runs in fronts.items():
        means = " | ".join(f"{mean(run[-1][key] for run in runs):.3f}" for key in METRICS)
        gained = interval([run[-1]["gold"] - run[0]["gold"] for run in runs])
        more = interval([run[-1]["gold"] - of[-1]["gold"] for run, of in zip(runs, fronts[first], strict=True)])
        print(f"| {arm} | {means} | {gained} | {more} |")
    print(f"\n| at this KL | seeds that reach it | gold, less that of {first} | reward, less that of {first} |")
    print("|---" * 4 + "|")
    for arm in others:
        for kl in kls:
            both = [
                pair
                for pair in zip(fronts[arm], fronts[first], strict=True)
                if all(at_kl(front, kl, "gold") is not None for front in pair)
            ]
            if both:
                differences = [
                    interval([at_kl(mine, kl, key) - at_kl(other, kl, key) for mine, other in both])
                    for key in ("gold", "reward")
                ]
                print(f"| {arm}, {kl:g} nats | {len(both)} | {' | '.join(differences)} |")


def draw(fronts: dict[str, list[list[Point]]], path: Path) -> None:
    """Draws gold and reward over KL: every run, and the mean over the seeds at each of its points."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("gold", "reward"), strict=True):
        for (arm, runs), color in zip(fronts.items(), COLORS, strict=False):
            for run in runs:
                axes.plot([e["kl_to_init"] for e in run], [e[name] for e in run], alpha=0.25, color=color)
            steps = list(zip(*runs, strict=True))
            means = [[mean(entry[key] for entry in step) for step in steps] for key in ("kl_to_init", name)]
            axes.plot(*means, label=arm, marker="o", linewidth=2, color=color)
        axes.set(xlabel="KL to the start, nats per answer", ylabel=f"{name}, test prompts")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
