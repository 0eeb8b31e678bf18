"""Kills a pipeline at random moments and restarts it: its final outputs must equal those of an undisturbed run.

Each kill hits either only the chain (its stages continue until the next start ends them) or all processes at once, as
in a power failure. The script compares the content hashes of all stages' outputs, and the models' measurements.

    python benchmarks/kills.py recipes/tiny/pipeline.yaml --kills 100 --run_dir /tmp/kills
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from gemma2_post.pipeline import processes
from gemma2_post.report.terminal import STATUS
from gemma2_post.stage.disk import REPLACED
from gemma2_post.weights.points import REPORT


def disturb(command: list[str], run_dir: Path, num_kills: int, longest: float, seed: int) -> list[str]:
    """Starts and kills a run up to `num_kills` times, then lets it finish; returns what each kill hit.

    Args:
        command: Runs the pipeline in `run_dir`.
        longest: Upper limit of the random time before a kill, in seconds.
    """
    randomness = random.Random(seed)
    hit = []
    log = run_dir.with_name(f"{run_dir.name}.log")
    for kill in range(num_kills):
        seconds, takes_all = randomness.uniform(0, longest), randomness.random() < 0.5
        with open(log, "ab") as output:
            chain = subprocess.Popen(command, stdout=output, stderr=output)
            try:
                chain.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                chain.kill()
                chain.wait()
        hit.append(running_in(run_dir))
        if takes_all:
            while left := processes.of_run(run_dir):
                for process in left:
                    subprocess.run(["kill", "-9", str(process)], stderr=subprocess.DEVNULL)
        print(f"{kill}: {'all' if takes_all else 'chain'} killed after {seconds:.0f} s, in {hit[-1]}", flush=True)
    with open(log, "ab") as output:
        subprocess.run(command, stdout=output, stderr=output, check=True)
    return hit


def running_in(run_dir: Path) -> str:
    """The stages that run; of `warp`, whether it has merged and is at its front."""
    try:
        steps = json.loads((run_dir / STATUS).read_text())["steps"]
    except FileNotFoundError:
        return "the start"
    found = {row["stage"]: run_dir / row["folder"] for row in steps.values() if row["state"] == "running"}
    names = [f"{name}, its front" if (folder / REPORT).is_file() else name for name, folder in found.items()]
    return ", ".join(names) or "the start"


def made_by(run_dir: Path) -> dict[str, object]:
    """What must be equal: the hash of each stage's output, and the models' measurements."""
    stages = {
        str(path.parent.relative_to(run_dir)): json.loads(path.read_text())["output"]
        for path in sorted(run_dir.rglob("stage.json"))
        if REPLACED not in path.parts
    }
    return stages | {"models": json.loads((run_dir / "summary.json").read_text())["models"]}


def run_command(pipeline: Path, run_dir: Path, settings: list[str]) -> list[str]:
    """The command that runs the pipeline in `run_dir`, with `STAGE.KEY=VALUE` settings."""
    sets = [f"--set={setting}" for setting in settings]
    return [sys.executable, "-m", "gemma2_post.cli", "run", str(pipeline), "--run_dir", str(run_dir), *sets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--longest", type=float, default=80.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--set", metavar="STAGE.KEY=VALUE", action="append", default=[])
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    quiet = arguments.run_dir / "quiet" / "run"
    quiet.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    subprocess.run(run_command(arguments.pipeline, quiet, arguments.set), check=True)
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    expected, hit, different = made_by(quiet), [], set()
    for round_number in itertools.count():
        disturbed = arguments.run_dir / f"kills-{round_number}" / "run"
        disturbed.parent.mkdir(exist_ok=True)
        command = run_command(arguments.pipeline, disturbed, arguments.set)
        hit += disturb(
            command, disturbed, arguments.kills - len(hit), arguments.longest, arguments.seed + round_number
        )
        found = made_by(disturbed)
        wrong = {key for key in expected if found.get(key) != expected[key]}
        print(f"{len(expected)} outputs compared; different: {', '.join(wrong) or 'none'}", flush=True)
        different |= wrong
        if len(hit) == arguments.kills:
            break
    for where, count in Counter(hit).most_common():
        print(f"{count} kills in {where}")
    print(f"{len(hit)} kills in {round_number + 1} runs of the chain; different: {', '.join(different) or 'none'}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
