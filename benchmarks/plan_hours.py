"""Planned seconds of each stage against the measured ones of a finished run on this machine.

    python benchmarks/plan_hours.py runs/tiny --pipeline recipes/tiny/pipeline.yaml

The plan measures the processor now, so run it as the chain ran: with as many threads (`OMP_NUM_THREADS`) and as little
else on the machine. A stage reports its seconds without its launch, which takes 9 s (`results/2026-11-24-chain.md`).
"""

import argparse
from math import sqrt
from pathlib import Path

from gemma2_post.pipeline import check, loading
from gemma2_post.planning import hours, plan
from gemma2_post.stage import contract

LAUNCH_SECONDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--pipeline", type=Path, default=Path("recipes/tiny/pipeline.yaml"))
    arguments = parser.parse_args()
    jobs = check.check(loading.load_pipeline(arguments.pipeline, arguments.run_dir))
    rows = plan.plan(jobs)
    estimates = hours.estimate([(row.job, row.num_runs) for row in rows], "H100")
    print("| stage | planned seconds | middle | measured | measured / middle |\n|---|---|---|---|---|")
    for each in estimates:
        best, worst = (seconds / each.num_runs for seconds in each.seconds)
        folders = [job.folder for job in jobs if job.config == each.job.config]
        done = [contract.read_json(folder / contract.DONE) for folder in folders]
        seconds = [LAUNCH_SECONDS + one["wall_seconds"] for one in done if one]
        middle, measured = sqrt(best * worst), sum(seconds) / len(seconds)
        name = each.job.command.name + (f", mean of {len(seconds)}" if len(seconds) > 1 else "")
        print(
            f"| {name} | {best:.0f} to {worst:.0f} | {middle:.0f} | {measured:.0f} | {measured / middle:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
