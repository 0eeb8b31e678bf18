"""The stage contract: a stage writes one directory; `stage.json`, written last, marks it as done.

Nothing here imports torch, so checking whether a stage is up to date is instant.
"""

import enum
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gemma2_post.stage import digests
from gemma2_post.stage.errors import PlacedError, UserError
from gemma2_post.stage.fingerprint import PARTS, Differences, Fingerprint, differences
from gemma2_post.stage.recipe_file import RENAMED

DONE = "stage.json"
BEGUN = "begun.json"
MODELS = "models.json"
"""What a stage that measures models writes: metrics by model."""
GAINS = "gains.json"
"""Also written by it: the difference of each model to the one before it."""
KNOWN_SETS = "reward_benchmarks.json"
"""Also written by it: how often the reward model is right on known sets."""
CHOICE = "select.json"
"""What a selection writes: the candidates, the chosen one, and why."""
CURATION = "curation.json"
"""What a curation has removed and kept, for the report."""
FAILED = "failed.json"
"""Of an evaluation that is not finished: the reason why a part of it could not be measured, by part."""
PROGRESS = "progress"
"""Folder for the partial results of a stage without checkpoints; the stage itself decides whether it can resume."""
HOW_FAR = "progress.json"
"""How far a training stage is, for `gemma2-post status`."""
_PACKAGE = Path(__file__).parents[1]
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
_LEFT_OVER = re.compile(r"\.(.+\.tmp|discarded-.+)")
"""Names of what a kill leaves of a file that was being written, or of a folder that was being deleted."""
RECORDS = {DONE, BEGUN, HOW_FAR, CURATION, "log.jsonl", "watch.jsonl", "answers.jsonl", "removed.parquet"} | {
    f"{name}.json"
    for name in (
        "before",
        "metrics",
        "merge",
        "front",
        "models",
        "gains",
        "reward_benchmarks",
        "best_of",
        "select",
        "greedy",
    )
}
"""Files that record how a stage went; the next stage does not read them, so the output hash leaves them out."""


Keys = Mapping[str, type | tuple[type, ...]]
"""The keys that a JSON object must have, with the types of their values."""
NUMBER = (int, float)
_FINGERPRINT = dict.fromkeys(PARTS, dict)
_BEGUN_KEYS: Keys = {"fingerprint": dict}
_DONE_KEYS: Keys = {"stage": str, "fingerprint": dict, "output": str, "wall_seconds": NUMBER, "metrics": dict}


class State(enum.Enum):
    """What an output folder holds, seen from what is wanted of it."""

    NEW = "nothing that could be used"
    DONE = "the finished output"
    UNMEASURED = "the finished output, measured in another way"
    INTERRUPTED = "an unfinished run that can go on"
    OTHER = "an output that something else has made, finished or not"


def input_digest(path: str) -> str | None:
    """Content hash of an input that a recipe names; see `digests.of_input`."""
    done = read_done(Path(path), "output")
    return output_digest(Path(path), done) if done else digests.of_input(path)


def output_digest(folder: Path, done: dict[str, Any]) -> str:
    """Content hash of a finished output: the recorded one if sizes and times of its files are the recorded ones."""
    now = _stamps(folder)
    return done["output"] if now == done.get("files") else _hashed(folder, json.dumps(now))


@cache
def _hashed(folder: Path, stamps: str) -> str:
    """Content hash of the output that the next stage reads; `stamps` says whether the last one still holds."""
    return digests.of_files(_output_files(folder))


def _output_files(folder: Path) -> list[Path]:
    return [path for path in digests.files_in(folder) if path.name not in RECORDS]


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size in bytes and time of the last change in ns of each file of an output."""
    stats = {path.name: path.stat() for path in _output_files(folder)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def read_json(path: Path, keys: Keys | None = None, advice: str = "") -> Any:
    """The content of a JSON file; None if there is no such file.

    Args:
        keys: The content must be an object with these keys; None: it may be anything.
        advice: What to do about a file that a crash has damaged; by default, to move its folder away.

    Raises:
        UserError: The file is cut, is no JSON, or lacks a key.
    """
    if not path.is_file():
        return None
    advice = advice or f"move {path.parent} away, then run again what makes it"
    try:
        return _parsed(path.read_bytes()) if keys is None else _record(path.read_bytes(), keys)
    except ValueError as error:
        raise PlacedError(f"{path}: the file is damaged ({error}); {advice}") from error


def read_done(folder: Path, *needed: str) -> dict[str, Any] | None:
    """The stage file of a finished stage; None if the folder holds none.

    Args:
        needed: The keys that it must have; by default, all of them.
    """
    return _read_run(folder / DONE, {key: kind for key, kind in _DONE_KEYS.items() if not needed or key in needed})


def read_begun(folder: Path) -> dict[str, Any] | None:
    """The claim of an unfinished stage; None if the folder holds none."""
    return _read_run(folder / BEGUN, _BEGUN_KEYS)


def metrics_of(folder: Path) -> dict[str, Any]:
    """The metrics of a finished stage."""
    done = read_done(folder, "metrics")
    assert done is not None, f"{folder} is finished"
    return done["metrics"]


def _read_run(path: Path, keys: Keys) -> dict[str, Any] | None:
    found = read_json(path, keys)
    if found is not None and "fingerprint" in keys:
        found["fingerprint"].setdefault("measurements", {})  # 0.1.0 wrote all keys into the recipe
    if found is not None and "fingerprint" in keys and (problem := _problem(found["fingerprint"], _FINGERPRINT)):
        raise PlacedError(
            f"{path}: the file is damaged (in its fingerprint {problem}); move {path.parent} away, then run again "
            "what makes it"
        )
    if found is not None and "fingerprint" in keys:
        recipe = found["fingerprint"]["recipe"]
        found["fingerprint"]["recipe"] = {RENAMED.get(name, name): value for name, value in recipe.items()}
    return found


def read_lines(path: Path, keys: Keys | None = None, is_appended_to: bool = True) -> list[dict[str, Any]]:
    """The JSON records in the lines of a file, none if it is missing.

    Args:
        keys: The keys that each record must have.
        is_appended_to: Whether its last line may be cut, by a kill or because it is being written; it is left out.

    Raises:
        UserError: A line is damaged.
    """
    if not path.is_file():
        return []
    written = path.read_bytes()
    whole = written.rfind(b"\n") + 1 if is_appended_to else len(written)
    records = []
    for number, record in enumerate(records_of(written[:whole], keys), start=1):
        if isinstance(record, ValueError):
            advice = "remove that line" if is_appended_to else f"move {path.parent} away"
            raise PlacedError(
                f"{path}: line {number} is damaged ({record}); {advice}, then run the same command again"
            )
        records.append(record)
    return records


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends JSON records, one to a line, beside other processes that append; a last line that is cut goes."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if end and file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines)


def records_of(lines: bytes, keys: Keys | None = None) -> list[dict[str, Any] | ValueError]:
    """The JSON object in each line, or what is wrong with the line."""
    found: list[dict[str, Any] | ValueError] = []
    for line in lines.removesuffix(b"\n").split(b"\n") if lines else []:
        try:
            found.append(_record(line, keys or {}))
        except ValueError as error:
            found.append(error)
    return found


def _record(text: bytes, keys: Keys) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ValueError: What is wrong with it.
    """
    record = _parsed(text)
    if not isinstance(record, dict):
        raise ValueError(f"it holds {type(record).__name__}, not an object")
    if problem := _problem(record, keys):
        raise ValueError(problem)
    return record


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # recursion: a thousand open brackets
        raise ValueError("it is not JSON" if text.strip() else "it is empty") from error


def _problem(record: dict[str, Any], keys: Keys) -> str:
    """What is wrong with the keys of a JSON object; empty if nothing."""
    for key, kind in keys.items():
        if key not in record:
            return f"{key} is missing"
        if not isinstance(record[key], kind):
            return f"{key} is {type(record[key]).__name__}"
    return ""


def write_json(path: Path, content: object) -> None:
    """Writes indented JSON; see `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes to a temporary file, then renames it: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def state_of(output_dir: Path, wanted: Fingerprint) -> tuple[State, Differences]:
    """What the directory holds, and how that differs from what is wanted.

    Raises:
        UserError: The directory holds files that no stage has made, or a file of the contract is damaged.
    """
    wanted = json.loads(json.dumps(wanted))
    if done := read_done(output_dir, "fingerprint", "output"):
        found = differences(done["fingerprint"], wanted)
        if output_digest(output_dir, done) != done["output"]:
            found.output.append("files of the output were changed after it was finished")
        state = State.OTHER if found.output else State.UNMEASURED if found.measurements else State.DONE
        return state, found
    refuse_strange_files(output_dir)
    if (begun := read_begun(output_dir)) and has_progress(output_dir):
        found = differences(begun["fingerprint"], wanted)
        return State.OTHER if found.output else State.INTERRUPTED, found
    return State.NEW, Differences([], [], [])


def refuse_strange_files(output_dir: Path) -> None:
    """Raises a `UserError` if the directory holds files that no stage has made, or the files of one are damaged."""
    is_ours = read_done(output_dir, "fingerprint") is not None or read_begun(output_dir) is not None
    there = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    if not is_ours and not all(map(_LEFT_OVER.fullmatch, there)):
        raise UserError(f"output_dir {output_dir}: holds files that no stage has made; choose another output_dir")


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of an output, by step."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from the name of its folder."""
    return int(checkpoint.name.rpartition("-")[2])


def has_progress(output_dir: Path) -> bool:
    """Whether an interrupted run left something to resume from."""
    partial = output_dir.glob(f"{PROGRESS}/*")
    return bool(checkpoints(output_dir)) or any(path.stat().st_size for path in partial)


def begin(output_dir: Path, wanted: Fingerprint) -> str:
    """Records in the directory which run its checkpoints belong to; keeps who else has made a part of it.

    Returns:
        The run's id for trackers, which it keeps when it resumes.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    before = read_done(output_dir, "fingerprint") or read_begun(output_dir)
    found = differences(before["fingerprint"], json.loads(json.dumps(wanted))) if before else None
    begun: dict[str, Any] = {"fingerprint": wanted, "run_id": secrets.token_hex(4)}
    if before and found:
        earlier = before.get("earlier", [])
        if found.updates:
            earlier = [*earlier, {part: before["fingerprint"][part] for part in ("code", "versions")}]
        begun |= {"earlier": earlier} if earlier else {}
        if "run_id" in before and not found.output:
            begun["run_id"] = before["run_id"]
    write_json(output_dir / BEGUN, begun)
    return begun["run_id"]


def begin_afresh(output_dir: Path, wanted: Fingerprint) -> None:
    """`begin`, after deleting everything that an unfinished run of another recipe has left.

    What the same recipe has measured stays, also if it is to be measured in another way: each answer is kept by what
    decides it.
    """
    begun = read_begun(output_dir)
    found = differences(begun["fingerprint"], json.loads(json.dumps(wanted))) if begun else None
    if found and found.output and not (output_dir / DONE).is_file():
        discard(output_dir)
    begin(output_dir, wanted)


def discard(folder: Path) -> None:
    """Deletes a folder, if it exists; a kill leaves either all of it or a name that nothing reads."""
    discarded = folder.with_name(f".discarded-{folder.name}")
    shutil.rmtree(discarded, ignore_errors=True)
    if folder.is_dir():
        folder.rename(discarded)
        shutil.rmtree(discarded)


def check_finite(metrics: Mapping[str, object]) -> None:
    """Raises a `UserError` if a metric is NaN or infinite; what is measured like that is not done."""
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}, so nothing is released; look for NaN in the models and data it reads")


def finish(
    output_dir: Path,
    stage: str,
    wanted: Fingerprint,
    seconds: float,
    facts: dict[str, object],
    metrics: dict[str, Any],
) -> None:
    """Writes `metrics.json`, then `stage.json`: from then on the stage is done.

    Args:
        facts: What the next stage checks (base model, adapter lineage, dtype, hashes of tokenizer and template). The
            file also says which earlier code and versions have made a part of it.

    Raises:
        UserError: A metric is NaN or infinite.
    """
    check_finite(metrics)
    write_json(output_dir / "metrics.json", metrics)
    begun = read_begun(output_dir) or {}
    stage_file = {
        "stage": stage,
        "fingerprint": wanted,
        **({"earlier": begun["earlier"]} if "earlier" in begun else {}),
        "output": digests.of_files(_output_files(output_dir)),
        "files": _stamps(output_dir),
        **facts,
        "run_id": begun.get("run_id"),
        "git_commit": _git_commit(),
        "wall_seconds": round(seconds, 1),
        "metrics": metrics,
    }
    write_json(output_dir / DONE, stage_file)
    (output_dir / BEGUN).unlink(missing_ok=True)


def _git_commit() -> str | None:
    """Commit of the project's checkout; None if the package is installed without one."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(_PACKAGE.parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
