"""Time and memory of `curate` on many conversations, and its near duplicates beside datatrove's MinHash.

    python benchmarks/curation.py                                     # 10,000 and 100,000 conversations of 300 tokens
    python benchmarks/curation.py --num_rows 1000000 --without_peer
    pip install 'datatrove[processing]'                               # for the comparison

The conversations are sequences of words that are as frequent as in English (Zipf's law), a different one each. Of ten
of them one is an exact duplicate of an earlier one but for case, and one has up to a tenth of its words edited. Both
start from the same JSON lines, in a fresh process. The stage applies all rules that need no model, with 2,000 test
prompts that must stay out; datatrove does its four MinHash steps (signatures, buckets, clusters, filter) on two
processes. Beside the seconds by the clock, seconds of processor time, which do not depend on what else the machine
does.
"""

import argparse
import json
import os
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

from process_memory import Sampler

NUM_WORDS = 220
"""Words of a conversation, some 300 tokens."""
_VOCABULARY = 50_000


def write_rows(folder: Path, num_rows: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Writes `rows.jsonl` and `test.jsonl`; returns the planted exact and near duplicates, each with its original."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(_VOCABULARY)]
    weights = list(accumulate(1 / rank for rank in range(1, _VOCABULARY + 1)))
    exact: list[tuple[int, int]] = []
    near: list[tuple[int, int]] = []
    recent: list[tuple[int, list[str]]] = []
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as stream:
        for number in range(num_rows):
            if number % 10 == 8:
                original, found = draw.choice(recent)
                exact.append((number, original))
                found = [word.capitalize() for word in found]
            elif number % 10 == 9:
                original, found = draw.choice(recent)
                near.append((number, original))
                found = list(found)
                for place in draw.sample(range(NUM_WORDS), draw.randint(1, NUM_WORDS // 10)):
                    found[place] = "".join(draw.choices(string.ascii_lowercase, k=10))
            else:
                found = draw.choices(vocabulary, cum_weights=weights, k=NUM_WORDS)
                recent = [*recent[-1000:], (number, found)]
            content = " ".join(found[:40]), " ".join(found[40:])
            messages = [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), content, strict=True)
            ]
            stream.write(json.dumps({"messages": messages, "text": " ".join(content), "id": str(number)}) + "\n")
    with open(folder / "test.jsonl", "w", encoding="utf-8") as stream:
        for _ in range(2000):
            prompt = " ".join(draw.choices(vocabulary, cum_weights=weights, k=40))
            stream.write(json.dumps({"question": prompt}) + "\n")
    return exact, near


def ours(folder: Path) -> None:
    """The stage, with all rules that need no model."""
    from gemma2_post import curate

    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "output_dir": str(folder / "out"),
                "datasets": [{"path": str(folder / "rows.jsonl")}],
                "evaluation_sets": [{"path": str(folder / "test.jsonl")}],
            }
        )
    )
    curate.COMMAND.run(*curate.COMMAND.parse(["--config", str(folder / "recipe.yaml")]))


def datatrove(folder: Path) -> None:
    """datatrove's MinHash deduplication, on pairs of words and with as many hashes and bands as ours."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(hash_config=HashConfig(precision=64), num_buckets=32, hashes_per_bucket=4, n_grams=2)
    base = folder / "datatrove"

    def reader() -> JsonlReader:
        return JsonlReader(str(folder / "shards"), glob_pattern="*.jsonl")

    def run(steps: list, tasks: int, workers: int) -> None:
        logs = str(base / f"logs-{len(list(base.glob('logs-*')))}")
        LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=workers, logging_dir=logs).run()

    run([reader(), MinhashDedupSignature(str(base / "signatures"), config=config, language="en")], 2, 2)
    run([MinhashDedupBuckets(str(base / "signatures"), str(base / "buckets"), config=config)], 32, 2)
    run([MinhashDedupCluster(str(base / "buckets"), str(base / "removed"), config=config)], 1, 1)
    removed = JsonlWriter(str(base / "dropped"), compression=None)
    kept = JsonlWriter(str(base / "kept"), compression=None)
    run([reader(), MinhashDedupFilter(str(base / "removed"), exclusion_writer=removed), kept], 2, 2)


def removed_by_ours(folder: Path) -> set[int]:
    """The rows that are duplicates for the stage."""
    from pyarrow import parquet

    found = parquet.read_table(folder / "out" / "removed.parquet", columns=["rule", "source_row"]).to_pylist()
    return {row["source_row"] for row in found if row["rule"] in ("exact_duplicate", "near_duplicate")}


def removed_by_datatrove(folder: Path) -> set[int]:
    """The rows that are duplicates for datatrove."""
    files = (folder / "datatrove" / "dropped").rglob("*.jsonl")
    return {int(json.loads(line)["id"]) for file in files for line in open(file, encoding="utf-8")}


def measured(what: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of this script's `--run`, in a process of its own."""
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    process = subprocess.Popen([sys.executable, __file__, "--run", what, "--folder", str(folder)], env=environment)
    sampler, before = Sampler(process.pid), resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.wait():
        raise SystemExit(f"{what} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, without_files = sampler.peaks["all"]
    return {
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_gb": round(peak / 1e9, 2),
        "peak_gb_without_mapped_files": round(without_files / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--without_peer", action="store_true")
    parser.add_argument("--run", choices=["ours", "datatrove"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        {"ours": ours, "datatrove": datatrove}[args.run](args.folder)
        return
    for num_rows in args.num_rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            exact, near = write_rows(folder, num_rows)
            planted = {number for number, _ in [*exact, *near]}
            result: dict[str, object] = {"num_rows": num_rows, "planted": len(planted)}
            removed: dict[str, set[int]] = {}
            for what, found in (("ours", removed_by_ours), ("datatrove", removed_by_datatrove)):
                if what == "datatrove" and args.without_peer:
                    continue
                if what == "datatrove":
                    shards = folder / "shards"
                    shards.mkdir()
                    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
                    for shard in range(2):
                        (shards / f"{shard}.jsonl").write_text("".join(lines[shard::2]))
                figures: dict[str, float] = measured(what, folder)
                removed[what] = found(folder)
                right = len(removed[what] & planted)
                # Of a pair either one may go, so what counts is how many are gone, and that no other text is.
                figures |= {"removed": len(removed[what]), "of_planted": right}
                result[what] = figures
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
