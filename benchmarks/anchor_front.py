"""What the anchor holds back in the tiny world: reward and gold with an average of the policy, its start, or none.

    python benchmarks/anchor_front.py --runs runs/seed-0 runs/seed-1 runs/seed-2     # each contains distill and reward

Runs the RLHF stage of `recipes/tiny/rlhf.yaml` for each anchor, beta and run, draws reward and gold over KL to the
start, from each run's watched values, and prints how far the reward still rises while gold falls (over-optimization).
Finished runs are skipped. `--anchors ema copy --anchor_mu 0.1` compares the average with what other trainers do: copy
the policy every 1 / mu steps. Without an anchor there is no beta.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = {"ema": "tab:blue", "start": "tab:orange", "copy": "tab:green", "none": "tab:red"}
STYLES = ["-", "--", ":", "-."]


def train(
    run: Path, reward: str, anchor: str, beta: float, mu: float, seed: int, max_steps: int, output: Path
) -> list[dict[str, float]]:
    """Trains one policy, unless that is done; returns its watched curve."""
    folder = output / f"{anchor}-{beta:g}" / run.name
    if not (folder / "policy-0" / "stage.json").is_file():
        values = {
            "model_name_or_path": run / "distill", "reward_model": run / reward, "output_dir": folder, "beta": beta,
            "anchor": "ema" if anchor == "copy" else anchor, "anchor_mu": mu, "seed": seed, "max_steps": max_steps,
            "watch_steps": max_steps // 12, "kl_budget": 1000, "num_samples": 240, "global_batch_size": 64,
            "per_device_train_batch_size": 64, "learning_rate": 1e-4,
        }  # fmt: skip
        program = [__file__, "copy"] if anchor == "copy" else ["-m", "gemma2_post.rlhf"]
        command = [sys.executable, *program, "--config", "recipes/tiny/rlhf.yaml"]
        command += [f"--{key}={value}" for key, value in values.items()]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{folder}: {finished.stderr[-2000:]}")
    lines = (folder / "policy-0" / "watch.jsonl").read_text(encoding="utf-8").splitlines()
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


def over_optimization(curve: list[dict[str, float]]) -> dict[str, float]:
    """What happens after gold has peaked, up to the highest reward: the share of the run, and both changes."""
    peak = max(range(len(curve)), key=lambda i: curve[i]["gold"])
    highest = max(range(peak, len(curve)), key=lambda i: curve[i]["reward"])
    return {
        "share of the run": (curve[highest]["step"] - curve[peak]["step"]) / curve[-1]["step"],
        "reward": curve[highest]["reward"] - curve[peak]["reward"],
        "gold": curve[highest]["gold"] - curve[peak]["gold"],
        "gold, from its peak to the end": curve[-1]["gold"] - curve[peak]["gold"],
    }


def draw(curves: dict[tuple[str, float], list[list[dict[str, float]]]], path: Path) -> None:
    """Draws the mean over the runs at each watched step, and the single runs behind it."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    betas = sorted({beta for _, beta in curves})
    for axes, name in zip(figure.subplots(1, 2), ("reward", "gold"), strict=True):
        for (anchor, beta), runs in curves.items():
            look = {"color": COLOURS[anchor], "linestyle": STYLES[betas.index(beta) % len(STYLES)]}
            for run in runs:
                axes.plot([e["kl_to_start"] for e in run], [e[name] for e in run], alpha=0.2, linewidth=0.8, **look)
            steps = list(zip(*runs, strict=True))
            axes.plot(
                [statistics.mean(e["kl_to_start"] for e in step) for step in steps],
                [statistics.mean(e[name] for e in step) for step in steps],
                label=f"{anchor}, beta {beta:g}",
                marker=".",
                **look,
            )
        axes.set(xlabel="KL to the start, nats per answer", ylabel=name)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.05, 0.5])
    parser.add_argument("--anchors", choices=list(COLOURS), nargs="+", default=["ema", "start", "none"])
    parser.add_argument("--anchor_mu", type=float, default=0.01)
    parser.add_argument("--max_steps", type=int, default=240)
    parser.add_argument("--reward", default="reward", help="folder of the reward model in each run")
    parser.add_argument("--output", type=Path, default=Path("runs/anchor-front"))
    arguments = parser.parse_args()
    curves = {
        (anchor, beta): [
            train(
                run, arguments.reward, anchor, beta, arguments.anchor_mu, seed, arguments.max_steps, arguments.output
            )
            for seed, run in enumerate(arguments.runs)
        ]
        for beta in arguments.betas
        for anchor in arguments.anchors
        if anchor != "none"
    }
    if "none" in arguments.anchors:
        curves["none", 0.0] = [
            train(run, arguments.reward, "none", 0.0, arguments.anchor_mu, seed, arguments.max_steps, arguments.output)
            for seed, run in enumerate(arguments.runs)
        ]
    for (anchor, beta), runs in curves.items():
        ends = {name: [run[-1][name] for run in runs] for name in ("kl_to_start", "reward", "gold")}
        found = [over_optimization(run) for run in runs]
        ends |= {f"after the peak: {name}": [each[name] for each in found] for name in found[0]}
        print(f"{anchor} {beta:g}")
        for name, values in ends.items():
            print(f"  {name} {statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
    draw(curves, arguments.output / "front.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["copy"]:
        del sys.argv[1]
        train_with_copies()
    else:
        main()
