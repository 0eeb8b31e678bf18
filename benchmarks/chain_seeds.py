"""The tiny chain over seeds: what each model reaches on test prompts, and what it gains over the one before it.

    for seed in 0 1 2 3 4; do
        gemma2-post run recipes/tiny/pipeline.yaml --run_dir runs/seed-$seed --seed $seed
    done
    python benchmarks/chain_seeds.py --runs runs/seed-{0,1,2,3,4}

Prints the tables of `recipes/tiny/README.md`. A gain is paired by prompt within a seed; its interval over the seeds is
95%, by Student's t.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from over_seeds import interval

METRICS = {"gold": 3, "accuracy": 3, "flattery": 3, "reward": 2, "kl_to_init": 2, "mean_tokens": 1, "stop_rate": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    runs = [json.loads((run / "summary.json").read_text()) for run in parser.parse_args().runs]
    models = [name for name in runs[0]["models"] if "/" not in name]
    print("| | " + " | ".join(models) + " |\n|---" + "|---" * len(models) + "|")
    for metric, digits in METRICS.items():
        cells = []
        for name in models:
            values = [run["models"][name][metric] for run in runs]
            each = ", ".join(f"{value:.{digits}f}" for value in values)
            cells.append(f"{mean(values):.{digits}f} ({each})" if metric == "gold" else f"{mean(values):.{digits}f}")
        print(f"| {metric} | {' | '.join(cells)} |")
    print("\n| gain in gold | by seed, with its standard error | mean over seeds, 95% interval |\n|---|---|---|")
    gold = [[gain for gain in run["gains"] if gain["metric"] == "gold"] for run in runs]
    for gains in zip(*gold, strict=True):
        by_seed = ", ".join(f"{gain['mean']:.3f} ± {gain['standard_error']:.3f}" for gain in gains)
        print(f"| {gains[0]['model']} over {gains[0]['over']} | {by_seed} | {interval([g['mean'] for g in gains])} |")
    gates = [stage.get("gates", {}) for run in runs for stage in run["stages"].values()]
    print(f"\n{len(runs)} seeds, {sum(map(len, gates))} gates; status: {', '.join(run['status'] for run in runs)}")


if __name__ == "__main__":
    main()
