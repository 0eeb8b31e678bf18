"""WARP of policies of different settings against WARP of policies that differ by seed only, in the tiny world.

    gemma2-post run recipes/tiny/pipeline.yaml --run_dir runs/base --until reward
    python benchmarks/different_members.py --run runs/base --seeds 0 1 2 3 4

For each seed, a pipeline trains four policies with the recipe's settings and four that differ by learning rate, beta,
or anchor, all from the run's `distill` on its `reward`, with the same samples, and merges each four. The policies and
the points of both sweeps then answer the test prompts, which chose nothing. Finished stages are kept. Intervals are
95%, Student's t over seeds, of differences within a seed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from fronts import Point, at_kl
from over_seeds import interval

EQUAL: list[dict[str, float]] = [{}, {}, {}, {}]
DIFFERENT: list[dict[str, float]] = [
    {"learning_rate": 1e-4},
    {"learning_rate": 4e-4},
    {"beta": 0.02},
    {"beta": 0.1, "anchor_mu": 0.05},
]
ARMS = {"equal": EQUAL, "different": DIFFERENT}
ETAS = [0.3, 0.5, 0.75, 1.0]
METRICS = ["gold", "reward", "kl_to_init"]


def recipes(run: Path, folder: Path, seed: int, num_samples: int) -> Path:
    """Writes the pipeline of a seed and its recipes; returns the pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    here = Path("recipes/tiny").resolve()
    start, reward_model = str((run / "distill").resolve()), str((run / "reward").resolve())
    rlhf = yaml.safe_load((here / "rlhf.yaml").read_text())
    rlhf |= {"include": str(here / "data/prompts.yaml"), "model_name_or_path": start, "reward_model": reward_model}
    rlhf |= {"watch_steps": rlhf["max_steps"], "num_samples": 60}  # measured on test prompts below
    warp = {"init": start, "policies": [], "interpolation": "slerp", "angles": "layer", "eta": ETAS}
    evaluate = yaml.safe_load((here / "evaluate.yaml").read_text())
    evaluate |= {"init": start, "baseline": start, "reward_model": reward_model, "num_samples": num_samples}
    del evaluate["base"]
    stages: dict[str, Any] = {}
    models = [start]
    for arm, members in ARMS.items():
        policies = [{"seed": 100 * seed + number} | each for number, each in enumerate(members)]
        stages[f"rlhf-{arm}"] = {"stage": "rlhf", "recipe": "rlhf.yaml", "policies": policies}
        stages[f"warp-{arm}"] = {"stage": "warp", "recipe": "warp.yaml", "policies": [f"rlhf-{arm}"]}
        models += [str(folder / f"run/rlhf-{arm}/policy-{number}") for number in range(len(members))]
        models += [str(folder / f"run/warp-{arm}/eta-{eta:g}") for eta in ETAS]
    for name, recipe in {"rlhf": rlhf, "warp": warp, "evaluate": evaluate | {"models": models}}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(folder / "run" / name)}))
    pipeline = {"run_dir": str(folder / "run"), "launch": str(Path("accelerate_configs/cpu.yaml").resolve())}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline | {"stages": stages}, sort_keys=False))
    return folder / "pipeline.yaml"


def measured(folder: Path) -> dict[str, list[Point]]:
    """What the test prompts say of the start and, for each arm, of its policies and of its sweep (`equal merged`)."""
    found = list(json.loads((folder / "run" / "evaluate" / "models.json").read_text()).values())
    points, first = {"start": found[:1]}, 1
    for arm, members in ARMS.items():
        points[arm] = found[first : first + len(members)]
        points[f"{arm} merged"] = found[first + len(members) : first + len(members) + len(ETAS)]
        first += len(members) + len(ETAS)
    return points


def tables(seeds: list[dict[str, list[Point]]]) -> None:
    """Prints means over the seeds, and the differences of the two merges."""
    print("| | gold | reward | KL |\n|---|---|---|---|")
    for arm, members in ARMS.items():
        rows = {f"{arm}: policy {number} {each or ''}": (arm, number) for number, each in enumerate(members)}
        rows |= {f"{arm}: merge, eta {eta:g}": (f"{arm} merged", number) for number, eta in enumerate(ETAS)}
        for name, (series, number) in rows.items():
            means = " | ".join(f"{mean(seed[series][number][key] for seed in seeds):.3f}" for key in METRICS)
            print(f"| {name} | {means} |")
    print("\n| different less equal | gold | reward | KL |\n|---|---|---|---|")
    for eta, number in ((eta, number) for number, eta in enumerate(ETAS)):
        ends = [(seed["different merged"][number], seed["equal merged"][number]) for seed in seeds]
        cells = [interval([mine[key] - other[key] for mine, other in ends]) for key in METRICS]
        print(f"| merge, eta {eta:g} | {' | '.join(cells)} |")
    fronts = [{arm: [*seed["start"], *seed[f"{arm} merged"]] for arm in ARMS} for seed in seeds]
    highest = min(sweep[-1]["kl_to_init"] for front in fronts for sweep in front.values())
    for kl in (highest / 4, highest / 2, highest):
        cells = [
            interval([at_kl(front["different"], kl, key) - at_kl(front["equal"], kl, key) for front in fronts])
            for key in METRICS[:2]
        ]
        print(f"| merge, at {kl:.2f} nats | {' | '.join(cells)} | 0 |")
    for arm in ARMS:
        gains = [seed[f"{arm} merged"][-1]["gold"] - mean(each["gold"] for each in seed[arm]) for seed in seeds]
        print(f"\nGold of the {arm} merge (eta 1), less the mean of its policies: {interval(gains)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num_samples", type=int, default=480)
    parser.add_argument("--output", type=Path, default=Path("runs/different-members"))
    arguments = parser.parse_args()
    found = []
    for seed in arguments.seeds:
        folder = (arguments.output / f"seed-{seed}").resolve()
        pipeline = recipes(arguments.run, folder, seed, arguments.num_samples)
        subprocess.run([sys.executable, "-m", "gemma2_post.cli", "run", str(pipeline)], check=True)
        evaluate = [sys.executable, "-m", "gemma2_post.evaluate", "--config", str(folder / "evaluate.yaml")]
        if not (folder / "run" / "evaluate" / "stage.json").is_file():
            subprocess.run(evaluate, check=True)
        found.append(measured(folder))
        kept = {
            series: [{key: each[key] for key in METRICS} for each in points] for series, points in found[-1].items()
        }
        (arguments.output / f"seed-{seed}.json").write_text(json.dumps(kept, indent=1) + "\n")
        tables(found)


if __name__ == "__main__":
    main()
