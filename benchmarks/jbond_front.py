"""Gold over KL in the tiny world: J-BOND against RLOO, both with an EMA anchor, at equal samples.

    gemma2-post run recipes/tiny/pipeline.yaml --run_dir runs/base --until reward
    python benchmarks/jbond_front.py --run runs/base --seeds 0 1 2 3 4

For each seed the script trains a policy by each algorithm from the run's `distill` on its `reward`. Both sample the
same number of answers in a step: RLOO four to a prompt, J-BOND three, one of which is the policy's. The learning rate
of each is the one of `--rates` whose run ends with the highest reward on selection prompts, with a seed that is not
used again; `--also jbond-0.0001` adds an arm at another of these rates. All points of all policies are then measured
on the test prompts, which chose nothing. Finished stages are skipped. Intervals are 95%, Student's t over seeds, of
differences within a seed.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from fronts import Fronts, draw, tables

ARMS = {
    "rloo": {"algorithm": "rloo", "num_generations": 4, "beta": 0.05, "anchor_mu": 0.01},
    "jbond": {"algorithm": "jbond", "beta": 0.0, "anchor_mu": 0.1},
    "jbond-beta-1": {"algorithm": "jbond", "beta": 1.0, "anchor_mu": 0.1},
}


def of_seed(seed: int, **keys: object) -> dict[str, Any]:
    """The keys of an arm, which are the same for all seeds."""
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=["rloo", "jbond"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--also", nargs="*", default=[])
    parser.add_argument("--search_seed", type=int, default=100)
    parser.add_argument("--kls", type=float, nargs="+", default=[0.25, 0.5, 1.0, 1.5])
    parser.add_argument("--max_steps", type=int, default=80)
    parser.add_argument("--num_samples", type=int, default=240)
    parser.add_argument("--output", type=Path, default=Path("runs/jbond-front"))
    arguments = parser.parse_args()
    folder, of_all = arguments.run / "jbond-front", (arguments.max_steps, arguments.num_samples)
    tried = {
        f"{arm}-{rate:g}": partial(of_seed, learning_rate=rate, **ARMS[arm])
        for arm in arguments.arms
        for rate in arguments.rates
    }
    search = Fronts(arguments.run, folder / "search", tried, [arguments.search_seed], *of_all)
    search.train()
    ends = {name: search.watched(name, arguments.search_seed)[-1] for name in tried}
    for name, end in ends.items():
        print(name, {key: round(end[key], 3) for key in ("reward", "gold", "kl_to_start")}, flush=True)
    best = [
        max((f"{arm}-{rate:g}" for rate in arguments.rates), key=lambda name: ends[name]["reward"])
        for arm in arguments.arms
    ]
    arms = {name: tried[name] for name in [*best, *arguments.also]}
    policies = Fronts(arguments.run, folder, arms, arguments.seeds, *of_all)
    policies.train()
    fronts = policies.measure()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "points.json").write_text(json.dumps({"search": ends, "test": fronts}, indent=1) + "\n")
    tables(fronts, arguments.kls)
    draw(fronts, arguments.output / "fronts.png")


if __name__ == "__main__":
    main()
