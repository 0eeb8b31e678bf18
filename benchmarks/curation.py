"""Time and memory of `curate` on many conversations, and its near duplicates beside datatrove's MinHash.

    python benchmarks/curation.py                                     # 10,000 and 100,000 conversations of 300 tokens
    python benchmarks/curation.py --num_rows 1000000
    python -m venv DIR && DIR/bin/pip install 'datatrove[processing]' orjson spacy
    python benchmarks/curation.py --num_rows 100000 --datatrove DIR/bin/python

The conversations are sequences of words that are as frequent as in English (Zipf's law), a different one each. Of ten
of them one is an exact duplicate of an earlier one but for case, and one has up to a tenth of its words edited. The
stage applies all rules that need no model, with 2,000 test prompts that must stay out. Beside datatrove, it also runs
with its rules on duplicates only. datatrove does its four MinHash steps (signatures, buckets, clusters, filter) on two
processes, with its words for English (spaCy) and with words between spaces. All start from the same rows as JSON
lines, in a fresh process. Beside the seconds by the clock, seconds of processor time, which depend less on what else
the machine does.
"""

import argparse
import json
import os
import random
import resource
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections import deque
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from types import SimpleNamespace

from process_memory import Sampler

NUM_WORDS = 220
"""Words of a conversation, some 300 tokens."""
_VOCABULARY = 50_000


def write_rows(folder: Path, num_rows: int) -> dict[int, set[int]]:
    """Writes `rows.jsonl` and `test.jsonl`; returns the duplicates of each row that has some, and itself."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(_VOCABULARY)]
    weights = list(accumulate(1 / rank for rank in range(1, _VOCABULARY + 1)))
    groups: dict[int, set[int]] = {}
    recent: deque[tuple[int, list[str]]] = deque(maxlen=1000)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as stream:
        for number in range(num_rows):
            if number % 10 < 8:
                found = draw.choices(vocabulary, cum_weights=weights, k=NUM_WORDS)
                recent.append((number, found))
            else:
                original, found = draw.choice(recent)
                groups.setdefault(original, {original}).add(number)
                found = [word.capitalize() for word in found] if number % 10 == 8 else _edited(found, draw)
            content = {"user": " ".join(found[:40]), "assistant": " ".join(found[40:])}
            messages = [{"role": role, "content": text} for role, text in content.items()]
            stream.write(json.dumps({"messages": messages, "id": str(number)}) + "\n")
    with open(folder / "test.jsonl", "w", encoding="utf-8") as stream:
        for _ in range(2000):
            prompt = " ".join(draw.choices(vocabulary, cum_weights=weights, k=40))
            stream.write(json.dumps({"question": prompt}) + "\n")
    return groups


def _edited(words: list[str], draw: random.Random) -> list[str]:
    """The words, up to a tenth of them replaced by others."""
    found = list(words)
    for place in draw.sample(range(NUM_WORDS), draw.randint(1, NUM_WORDS // 10)):
        found[place] = "".join(draw.choices(string.ascii_lowercase, k=10))
    return found


def write_shards(folder: Path, num_rows: int) -> None:
    """Writes the same rows as datatrove reads them, in a file for each process."""
    (folder / "shards").mkdir()
    with open(folder / "rows.jsonl", encoding="utf-8") as rows:
        for shard in range(2):
            with open(folder / "shards" / f"{shard}.jsonl", "w", encoding="utf-8") as stream:
                for row in map(json.loads, islice(rows, num_rows // 2)):
                    text = " ".join(turn["content"] for turn in row["messages"])
                    stream.write(json.dumps({"text": text, "id": row["id"]}) + "\n")


def ours(folder: Path, duplicates_only: bool) -> None:
    """The stage, with all rules that need no model, or with its rules on duplicates only."""
    from gemma2_post import curate

    values: dict[str, object] = {"output_dir": str(folder / "out"), "datasets": [{"path": str(folder / "rows.jsonl")}]}
    if duplicates_only:
        values |= {"sensitive_information": None, "personal_information": None, "self_identification": False}
    else:
        values["evaluation_sets"] = [{"path": str(folder / "test.jsonl")}]
    (folder / "recipe.yaml").write_text(json.dumps(values))
    curate.COMMAND.run(*curate.COMMAND.parse(["--config", str(folder / "recipe.yaml")]))


def datatrove(folder: Path, words_between_spaces: bool) -> None:
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
    base = folder / "out"

    def reader() -> JsonlReader:
        return JsonlReader(str(folder / "shards"), glob_pattern="*.jsonl", doc_progress=False)

    def run(name: str, steps: list, tasks: int) -> None:
        # Forked, so that the processor time of its processes counts as that of this one.
        LocalPipelineExecutor(
            steps, tasks=tasks, workers=min(tasks, 2), logging_dir=str(base / name), start_method="fork"
        ).run()

    signature = MinhashDedupSignature(str(base / "signatures"), config=config, language="en")
    if words_between_spaces:
        signature.word_tokenizer = SimpleNamespace(word_tokenize=str.split)
    run("1", [reader(), signature], 2)
    run("2", [MinhashDedupBuckets(str(base / "signatures"), str(base / "buckets"), config=config)], 32)
    run("3", [MinhashDedupCluster(str(base / "buckets"), str(base / "removed"), config=config)], 1)
    removed = JsonlWriter(str(base / "dropped"), compression=None)
    kept = JsonlWriter(str(base / "kept"), compression=None)
    run("4", [reader(), MinhashDedupFilter(str(base / "removed"), exclusion_writer=removed), kept], 2)


def removed_by_ours(folder: Path) -> set[int]:
    """The rows that are duplicates for the stage."""
    from pyarrow import parquet

    found = parquet.read_table(folder / "out" / "removed.parquet", columns=["rule", "source_row"]).to_pylist()
    return {row["source_row"] for row in found if row["rule"] in ("exact_duplicate", "near_duplicate")}


def removed_by_datatrove(folder: Path) -> set[int]:
    """The rows that are duplicates for datatrove."""
    files = (folder / "out" / "dropped").rglob("*.jsonl")
    return {int(json.loads(line)["id"]) for file in files for line in open(file, encoding="utf-8")}


RUNS = {
    "ours": partial(ours, duplicates_only=False),
    "ours, duplicates only": partial(ours, duplicates_only=True),
    "datatrove": partial(datatrove, words_between_spaces=False),
    "datatrove, words between spaces": partial(datatrove, words_between_spaces=True),
}


def measured(what: str, folder: Path, python: str) -> dict[str, float]:
    """Seconds and peak memory of this script's `--run`, in a process of its own."""
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([python, __file__, "--run", what, "--folder", str(folder)], env=environment)
    sampler = Sampler(process.pid)
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
    parser.add_argument("--datatrove", metavar="PYTHON", help="that of an environment with datatrove")
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        RUNS[args.run](args.folder)
        return
    for num_rows in args.num_rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            groups = write_rows(folder, num_rows)
            if args.datatrove:
                write_shards(folder, num_rows)
            for what in RUNS if args.datatrove else ("ours",):
                is_ours = what.startswith("ours")
                result = {"run": what, "num_rows": num_rows}
                result |= measured(what, folder, sys.executable if is_ours else args.datatrove)
                removed = removed_by_ours(folder) if is_ours else removed_by_datatrove(folder)
                # Any row of a group may be the one that stays.
                planted = sum(len(group) - 1 for group in groups.values())
                right = sum(min(len(group & removed), len(group) - 1) for group in groups.values())
                result |= {"planted": planted, "removed_of_planted": right, "removed_others": len(removed) - right}
                print(json.dumps(result), flush=True)
                shutil.rmtree(folder / "out")


if __name__ == "__main__":
    main()
