"""What anchors, averages and the way back hold back in the tiny world when the reward can be exploited.

    for seed in 0 1 2 3 4; do
        gemma2-post run recipes/tiny/pipeline.yaml --run_dir runs/seed-$seed --seed $seed --until distill
    done
    python benchmarks/anchor_front.py --runs runs/seed-{0,1,2,3,4}

The annotators of `flattered_preferences` prefer flattery to friendliness, and a reward model learns it. For each seed
the script trains that reward model, then policies from `distill` without an anchor, and with their average (`ema`),
their start or a copy of themselves every 1 / mu steps as the anchor. It merges the first one back toward its start
(LITI), and measures all of them on the test prompts. Finished stages are skipped. Curves are of the selection prompts;
intervals are 95%, Student's t over seeds, of differences within a seed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import yaml
from matplotlib.figure import Figure
from over_seeds import interval

COLOURS = {"none": "tab:red", "ema": "tab:blue", "start": "tab:orange", "copy": "tab:green"}
ETAS = [0.3, 0.5, 0.7]
ANNOTATORS = "gemma2_post.tiny.data:flattered_preferences"
GRADERS = [f"gemma2_post.tiny.gold:{name}" for name in ("gold", "accuracy", "flattery")]
METRICS = ["reward", "gold", "accuracy", "flattery", "kl_to_init"]

Curve = list[dict[str, float]]


class Seed:
    """The models of one seed, and what was measured of them."""

    def __init__(self, run: Path, arguments: argparse.Namespace):
        self.folder, self.start, self.arguments = run / "anchor-front", run / "distill", arguments
        self.reward_model = self.folder / "reward"
        distilled = json.loads((self.start / "stage.json").read_text())
        self.number = distilled["fingerprint"]["recipe"].get("seed", 0)

    def make(self) -> None:
        """Trains and merges what is missing, and measures all of it."""
        self.reward()
        for anchor in self.arguments.anchors:
            self.policy(anchor)
        unanchored = [str(self.folder / "none" / "policy-0")]
        values = {"init": str(self.start), "policies": unanchored, "eta": ETAS, "save_dtype": "float32"}
        self.stage(["-m", "gemma2_post.warp"], "LITI", **values)
        recipe = yaml.safe_load(Path("recipes/tiny/evaluate.yaml").read_text())
        self.stage(
            ["-m", "gemma2_post.evaluate", "--config", "recipes/tiny/evaluate.yaml"], "test",
            init=str(self.start), models=[str(path) for path in self.models().values()], baseline=str(self.start),
            reward_model=str(self.reward_model), graders=GRADERS, base=None, num_samples=self.arguments.num_samples,
            datasets=recipe["datasets"],
        )  # fmt: skip

    def stage(self, program: list[str], output: str, **values: object) -> None:
        """Runs a stage of ours, unless its output is there."""
        folder = self.folder / output
        command = [sys.executable, *program]
        command += [f"--{key}={json.dumps(value)}" for key, value in (values | {"output_dir": str(folder)}).items()]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-3000:]}")
        print(f"{folder}: done", flush=True)

    def reward(self) -> None:
        """A reward model that has learned to like flattery."""
        datasets = {
            "datasets": [{"path": ANNOTATORS, "split": "train"}],
            "held_out_datasets": [{"path": ANNOTATORS, "split": "selection"}],
        }
        policies = [str(self.start)]
        program = ["-m", "gemma2_post.reward", "--config", "recipes/tiny/reward.yaml"]
        self.stage(program, "reward", **datasets, policies=policies, seed=self.number)

    def policy(self, anchor: str) -> None:
        """A policy with a larger batch and a lower rate than the recipe's: a steady run, without noise of its own."""
        steps = self.arguments.max_steps
        program = [__file__, "copy"] if anchor == "copy" else ["-m", "gemma2_post.rlhf"]
        self.stage(
            [*program, "--config", "recipes/tiny/rlhf.yaml"], anchor,
            model_name_or_path=str(self.start), reward_model=str(self.reward_model), seed=self.number, max_steps=steps,
            anchor="ema" if anchor == "copy" else anchor, beta=0.0 if anchor == "none" else self.arguments.beta,
            anchor_mu=self.arguments.anchor_mu, learning_rate=1e-4, global_batch_size=64,
            per_device_train_batch_size=64, watch_steps=steps // 12, kl_budget=1000, graders=GRADERS,
        )  # fmt: skip

    def models(self) -> dict[str, Path]:
        """All models by name."""
        found = {"start": self.start}
        found |= {f"anchor {name}": self.folder / name / "policy-0" for name in self.arguments.anchors}
        if "ema" in self.arguments.anchors:
            found["anchor ema: its average"] = found["anchor ema"] / "anchor"
        return found | {f"anchor none: LITI {eta:g}": self.folder / "LITI" / f"eta-{eta:g}" for eta in ETAS}

    def points(self) -> dict[str, dict[str, float]]:
        """What was measured on the test prompts, by name."""
        measured = json.loads((self.folder / "test" / "models.json").read_text()).values()
        return dict(zip(self.models(), measured, strict=True))

    def curve(self, anchor: str) -> Curve:
        """What was watched while a policy trained."""
        lines = (self.folder / anchor / "policy-0" / "watch.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def train_with_copies() -> None:
    """Runs the RLHF stage with a copy every 1 / mu steps in place of the average."""
    from gemma2_post import rlhf
    from gemma2_post.weights import anchor

    class PeriodicCopy(anchor.EmaAnchor):
        def on_step_end(self, args, state, control, **further) -> None:
            if state.global_step % round(1 / self.mu) == 0:
                mu, self.mu = self.mu, 1.0
                super().on_step_end(args, state, control, **further)
                self.mu = mu

    anchor.EmaAnchor = PeriodicCopy
    rlhf.COMMAND.launch()


def over_optimization(curve: Curve) -> dict[str, float]:
    """What happens after gold has peaked, up to the highest reward: the share of the run, and both changes."""
    peak = max(range(len(curve)), key=lambda i: curve[i]["gold"])
    highest = max(range(peak, len(curve)), key=lambda i: curve[i]["reward"])
    return {
        "share of the run": (curve[highest]["step"] - curve[peak]["step"]) / curve[-1]["step"],
        "reward": curve[highest]["reward"] - curve[peak]["reward"],
        "gold": curve[highest]["gold"] - curve[peak]["gold"],
    }


def table(seeds: list[Seed]) -> None:
    """Prints each model's means, and how its gold differs from that of the start and of the unanchored policy."""
    points = [seed.points() for seed in seeds]
    print(f"\n| | {' | '.join(METRICS)} | gold, less the start's | gold, less that without an anchor |")
    print("|---" * (len(METRICS) + 3) + "|")
    for name in points[0]:
        means = " | ".join(f"{mean(each[name][key] for each in points):.3f}" for key in METRICS)
        differences = [
            interval([each[name]["gold"] - each[other]["gold"] for each in points])
            for other in ("start", "anchor none")
        ]
        print(f"| {name} | {means} | {' | '.join(differences)} |")
    print("\nAfter the peak of gold, while the reward still rises:")
    for anchor in seeds[0].arguments.anchors:
        found = [over_optimization(seed.curve(anchor)) for seed in seeds]
        print(f"  {anchor}: " + "; ".join(f"{key} {interval([each[key] for each in found])}" for key in found[0]))


def draw(seeds: list[Seed], path: Path) -> None:
    """Draws the mean over the seeds at each watched step, and the single runs behind it."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("reward", "gold"), strict=True):
        for anchor in seeds[0].arguments.anchors:
            curves, colour = [seed.curve(anchor) for seed in seeds], COLOURS[anchor]
            for curve in curves:
                axes.plot([e["step"] for e in curve], [e[name] for e in curve], alpha=0.2, linewidth=0.8, color=colour)
            steps = list(zip(*curves, strict=True))
            means = [mean(e[name] for e in step) for step in steps]
            axes.plot([step[0]["step"] for step in steps], means, label=anchor, marker=".", color=colour)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
    axes.legend(title="anchor")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--anchors", choices=list(COLOURS), nargs="+", default=list(COLOURS))
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--anchor_mu", type=float, default=0.05)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--num_samples", type=int, default=480)
    parser.add_argument("--output", type=Path, default=Path("runs/anchor-front"))
    arguments = parser.parse_args()
    seeds = [Seed(run, arguments) for run in arguments.runs]
    for seed in seeds:
        seed.make()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {
        str(seed.start.parent): {
            "test": seed.points(),
            "curves": {name: seed.curve(name) for name in arguments.anchors},
        }
        for seed in seeds
    }
    (arguments.output / "points.json").write_text(json.dumps(results, indent=1) + "\n")
    table(seeds)
    draw(seeds, arguments.output / "curves.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["copy"]:
        del sys.argv[1]
        train_with_copies()
    else:
        main()
