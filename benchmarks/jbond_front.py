"""Gold over KL in the tiny world: J-BOND against RLOO, both with an EMA anchor, at equal samples.

    gemma2-post run recipes/tiny/pipeline.yaml --run_dir runs/base --until reward
    python benchmarks/jbond_front.py --run runs/base --seeds 0 1 2 3 4

For each seed the script trains a policy by each algorithm from the run's `distill` on its `reward`. Both sample the
same number of answers in a step: RLOO four to a prompt, J-BOND three, one of which is the policy's. It then measures
all policies on the test prompts. Finished stages are skipped. Curves are of the selection prompts;
intervals are 95%, Student's t over seeds, of differences within a seed.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean

import yaml
from matplotlib.figure import Figure
from over_seeds import interval

ARMS = {
    "rloo": {"algorithm": "rloo", "num_generations": 4, "beta": 0.05, "anchor_mu": 0.01},
    "jbond": {"algorithm": "jbond", "beta": 0.0, "anchor_mu": 0.1},
    "jbond-beta-1": {"algorithm": "jbond", "beta": 1.0, "anchor_mu": 0.1},
}
COLORS = {"rloo": "tab:orange", "jbond": "tab:blue", "jbond-beta-1": "tab:green"}
GRADERS = [f"gemma2_post.tiny.gold:{name}" for name in ("gold", "accuracy", "flattery")]
METRICS = ["reward", "gold", "accuracy", "kl_to_init", "mean_tokens"]

Curve = list[dict[str, float]]


class Policies:
    """The policies of all seeds and arms, and what was measured of them."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.folder = arguments, arguments.run / "jbond-front"
        self.start, self.reward_model = arguments.run / "distill", arguments.run / "reward"

    def train(self) -> None:
        """Trains the policies that are missing."""
        recipe = Path("recipes/tiny/rlhf.yaml").read_text().splitlines()
        given = [line for line in recipe if not line.startswith(("num_generations", "beta", "anchor", "include"))]
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "rlhf.yaml"
        file.write_text("\n".join([*given, f"include: {Path('recipes/tiny/data/prompts.yaml').resolve()}"]) + "\n")
        steps = self.arguments.max_steps
        for seed in self.arguments.seeds:
            for arm in self.arguments.arms:
                self.stage(
                    "rlhf", file, f"{arm}-{seed}", model_name_or_path=str(self.start), seed=seed, max_steps=steps,
                    reward_model=str(self.reward_model), learning_rate=self.arguments.learning_rate, anchor="ema",
                    warmup_steps=5, global_batch_size=48, per_device_train_batch_size=48, watch_steps=steps // 5,
                    kl_budget=1000, graders=GRADERS, num_samples=self.arguments.num_watched, **ARMS[arm],
                )  # fmt: skip

    def measure(self) -> None:
        """Measures all models on the test prompts."""
        file = Path("recipes/tiny/evaluate.yaml")
        self.stage(
            "evaluate", file, "test", init=str(self.start), models=[str(path) for path in self.models().values()],
            baseline=str(self.start), reward_model=str(self.reward_model), graders=GRADERS, base=None,
            num_samples=self.arguments.num_samples, datasets=yaml.safe_load(file.read_text())["datasets"],
        )  # fmt: skip

    def stage(self, name: str, file: Path, output: str, **values: object) -> None:
        """Runs a stage of ours, unless its output is there."""
        values |= {"output_dir": str(self.folder / output)}
        command = [sys.executable, "-m", f"gemma2_post.{name}", "--config", str(file)]
        command += [f"--{key}={json.dumps(value)}" for key, value in values.items()]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-3000:]}")
        print(f"{self.folder / output}: done", flush=True)

    def policy(self, arm: str, seed: int) -> Path:
        """The folder of a policy."""
        return self.folder / f"{arm}-{seed}" / "policy-0"

    def models(self) -> dict[tuple[str, int], Path]:
        """All measured models, by name and seed; the start, which is the same for all, has the seed -1."""
        found = {("start", -1): self.start}
        for seed in self.arguments.seeds:
            for arm in self.arguments.arms:
                found |= {(arm, seed): self.policy(arm, seed)}
        return found

    def points(self) -> dict[str, list[dict[str, float]]]:
        """What was measured on the test prompts, by name, in the order of the seeds."""
        measured = json.loads((self.folder / "test" / "models.json").read_text()).values()
        found: dict[str, list[dict[str, float]]] = {}
        for (name, _), each in zip(self.models(), measured, strict=True):
            found.setdefault(name, []).append(each)
        return found

    def curves(self, arm: str) -> list[Curve]:
        """What was watched while the policies of an arm trained, by seed."""
        files = [self.policy(arm, seed) / "watch.jsonl" for seed in self.arguments.seeds]
        return [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def at_kl(curve: Curve, kl: float, name: str) -> float | None:
    """A metric where the curve first passes this KL, on the chord between two measurements; None if it never does."""
    for before, after in pairwise(curve):
        if before["kl_to_start"] <= kl <= after["kl_to_start"]:
            share = (kl - before["kl_to_start"]) / (after["kl_to_start"] - before["kl_to_start"])
            return before[name] + share * (after[name] - before[name])
    return None


def tables(policies: Policies) -> None:
    """Prints each model's means on test prompts, and gold at equal KL along the curves, against RLOO's."""
    points, arms = policies.points(), policies.arguments.arms
    print(f"\n| | {' | '.join(METRICS)} | gold, less the start's | gold, less that of {arms[0]} |")
    print("|---" * (len(METRICS) + 3) + "|")
    for name, found in points.items():
        means = " | ".join(f"{mean(each[key] for each in found):.3f}" for key in METRICS)
        others = [points["start"] * len(found), points[arms[0]] if len(found) > 1 else points["start"]]
        differences = [
            interval([each["gold"] - other["gold"] for each, other in zip(found, reference, strict=True)])
            for reference in others
        ]
        print(f"| {name} | {means} | {' | '.join(differences)} |")
    print(
        f"\n| at this KL, selection prompts | seeds | gold, less that of {arms[0]} | reward, less that of {arms[0]} |"
    )
    print("|---" * 4 + "|")
    for arm in arms[1:]:
        for kl in policies.arguments.kls:
            pairs = zip(policies.curves(arm), policies.curves(arms[0]), strict=True)
            both = [pair for pair in pairs if all(at_kl(curve, kl, "gold") is not None for curve in pair)]
            if both:
                differences = [
                    interval([at_kl(mine, kl, key) - at_kl(other, kl, key) for mine, other in both])
                    for key in ("gold", "reward")
                ]
                print(f"| {arm}, {kl:g} nats | {len(both)} | {' | '.join(differences)} |")


def draw(policies: Policies, path: Path) -> None:
    """Draws gold and reward over KL: every run, and the mean over the seeds at each watched step."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("gold", "reward"), strict=True):
        for arm in policies.arguments.arms:
            curves, color = policies.curves(arm), COLORS[arm]
            for curve in curves:
                axes.plot([e["kl_to_start"] for e in curve], [e[name] for e in curve], alpha=0.25, color=color)
            steps = list(zip(*curves, strict=True))
            means = [[mean(entry[key] for entry in step) for step in steps] for key in ("kl_to_start", name)]
            axes.plot(*means, label=arm, marker="o", linewidth=2, color=color)
        axes.set(xlabel="KL to the start, nats per answer", ylabel=f"{name}, selection prompts")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=["rloo", "jbond"])
    parser.add_argument("--kls", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--max_steps", type=int, default=30)
    parser.add_argument("--num_watched", type=int, default=120)
    parser.add_argument("--num_samples", type=int, default=240)
    parser.add_argument("--output", type=Path, default=Path("runs/jbond-front"))
    arguments = parser.parse_args()
    policies = Policies(arguments)
    policies.train()
    policies.measure()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {"test": policies.points(), "curves": {arm: policies.curves(arm) for arm in arguments.arms}}
    (arguments.output / "points.json").write_text(json.dumps(results, indent=1) + "\n")
    tables(policies)
    draw(policies, arguments.output / "curves.png")


if __name__ == "__main__":
    main()
