"""The stage contract: a stage writes one directory; `stage.json`, written last, marks it as done.

Nothing here imports torch, so checking whether a stage is up to date is instant.
"""

import json
import math
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma2_post.stage import digests
from gemma2_post.stage.errors import PlacedError, UserError
from gemma2_post.stage.fingerprint import Fingerprint, differences

DONE = "stage.json"
BEGUN = "begun.json"
MODELS = "models.json"
"""What a stage that measures models writes: metrics by model."""
GAINS = "gains.json"
"""Also written by it: the difference of each model to the one before it."""
PROGRESS = "progress"
"""Folder for the partial results of a stage without checkpoints; the stage itself decides whether it can resume."""
HOW_FAR = "progress.json"
"""How far a training stage is, for `gemma2-post status`."""
_PACKAGE = Path(__file__).parents[1]
_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
_MEASURED = {DONE, BEGUN, HOW_FAR, "log.jsonl", "watch.jsonl", "answers.jsonl"} | {
    f"{name}.json" for name in ("before", "metrics", "merge", "front", "models", "gains")
}
"""Files that record how a stage went; the next stage does not read them, so the output hash leaves them out."""


Keys = Mapping[str, type | tuple[type, ...]]
"""The keys that a JSON object must have, with the types of their values."""
NUMBER = (int, float)
_FINGERPRINT = dict.fromkeys(("recipe", "inputs", "code", "versions"), dict)
_BEGUN_KEYS: Keys = {"fingerprint": dict}
_DONE_KEYS: Keys = {"stage": str, "fingerprint": dict, "output": str, "wall_seconds": NUMBER, "metrics": dict}


def input_digest(path: str) -> str | None:
    """Content hash of an input that a recipe names; see `digests.of_input`."""
    done = read_done(Path(path), "output")
    return done["output"] if done else digests.of_input(path)


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
    if found is not None and "fingerprint" in keys and (problem := _problem(found["fingerprint"], _FINGERPRINT)):
        raise PlacedError(
            f"{path}: the file is damaged (in its fingerprint {problem}); move {path.parent} away, then run again "
            "what makes it"
        )
    return found


def read_lines(path: Path, keys: Keys | None = None, is_appended_to: bool = True) -> list[dict[str, Any]]:
    """The JSON records in the lines of a file, none if it is missing.

    Args:
        keys: The keys that each record must have.
        is_appended_to: Whether a kill may have cut the last line, which is then removed.

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
    if whole < len(written):
        os.truncate(path, whole)
    return records


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


def is_done(output_dir: Path, wanted: Fingerprint) -> bool:
    """Whether the directory holds the finished output of exactly this fingerprint."""
    return _is_of(read_done(output_dir, "fingerprint"), wanted)


def belongs_to(output_dir: Path, wanted: Fingerprint) -> bool:
    """Whether the directory holds the output of exactly this fingerprint, finished or resumable."""
    return is_done(output_dir, wanted) or (_is_of(read_begun(output_dir), wanted) and has_progress(output_dir))


def _is_of(found: dict[str, Any] | None, wanted: Fingerprint) -> bool:
    return found is not None and found["fingerprint"] == json.loads(json.dumps(wanted))


def what_changed(output_dir: Path, wanted: Fingerprint) -> list[str]:
    """How the run in the directory differs from `wanted`, in words; empty if the directory can be used.

    Raises:
        UserError: The directory holds files that no stage has made.
    """
    found = read_done(output_dir, "fingerprint")
    if found is None and checkpoints(output_dir):
        found = read_begun(output_dir)
    if found is not None:
        return differences(found["fingerprint"], json.loads(json.dumps(wanted)))
    refuse_strange_files(output_dir)
    return []


def refuse_strange_files(output_dir: Path) -> None:
    """Raises a `UserError` if the directory holds files that no stage has made, or the files of one are damaged."""
    is_ours = read_done(output_dir, "fingerprint") is not None or read_begun(output_dir) is not None
    if output_dir.is_dir() and any(output_dir.iterdir()) and not is_ours:
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
    """Records in the directory which run its checkpoints will belong to; returns its id, which a resumed run keeps."""
    output_dir.mkdir(parents=True, exist_ok=True)
    begun = read_begun(output_dir)
    resumed = begun.get("run_id") if begun and _is_of(begun, wanted) and has_progress(output_dir) else None
    run_id = resumed or secrets.token_hex(4)
    write_json(output_dir / BEGUN, {"fingerprint": wanted, "run_id": run_id})
    return run_id


def begin_afresh(output_dir: Path, wanted: Fingerprint) -> None:
    """`begin`, after deleting the directory if an unfinished run of another fingerprint has left it."""
    begun = read_begun(output_dir)
    if begun is not None and not _is_of(begun, wanted):
        shutil.rmtree(output_dir)
    begin(output_dir, wanted)


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
        facts: What the next stage checks (base model, adapter lineage, dtype, hashes of tokenizer and template).

    Raises:
        UserError: A metric is NaN or infinite.
    """
    check_finite(metrics)
    begun = read_begun(output_dir) or {}
    write_json(output_dir / "metrics.json", metrics)
    stage_file = {
        "stage": stage,
        "fingerprint": wanted,
        "output": digests.of_files([path for path in digests.files_in(output_dir) if path.name not in _MEASURED]),
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
