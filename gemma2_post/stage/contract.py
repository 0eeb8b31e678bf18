"""The stage contract: a stage writes one directory; `stage.json`, written last, marks it as done.

Nothing here imports torch, so checking whether a stage is up to date is instant.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gemma2_post.stage import digests
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.fingerprint import Fingerprint, differences

DONE = "stage.json"
BEGUN = "begun.json"
PROGRESS = "progress"
"""Folder for the partial results of a stage without checkpoints; the stage itself decides whether it can resume."""
_PACKAGE = Path(__file__).parents[1]
_MEASURED = {DONE, BEGUN, "log.jsonl", "watch.jsonl", "answers.jsonl"} | {
    f"{name}.json" for name in ("before", "metrics", "merge", "front", "models")
}
"""Files that record how a stage went; the next stage does not read them, so the output hash leaves them out."""


def input_digest(path: str) -> str | None:
    """Content hash of an input that a recipe names; see `digests.of_input`."""
    return digests.of_input(path, DONE)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_done(folder: Path) -> dict[str, Any]:
    """The stage file of a finished stage."""
    return json.loads((folder / DONE).read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON records appended to a file, none if it is missing; removes a last line that a kill cut short."""
    if not path.is_file():
        return []
    written = path.read_bytes()
    os.truncate(path, written.rfind(b"\n") + 1)
    return [json.loads(line) for line in written.split(b"\n")[:-1]]


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
    return _has_fingerprint(output_dir / DONE, wanted)


def belongs_to(output_dir: Path, wanted: Fingerprint) -> bool:
    """Whether the directory holds the output of exactly this fingerprint, finished or resumable."""
    return is_done(output_dir, wanted) or (_has_fingerprint(output_dir / BEGUN, wanted) and has_progress(output_dir))


def _has_fingerprint(file: Path, wanted: Fingerprint) -> bool:
    found = read_json(file)
    return found is not None and found["fingerprint"] == json.loads(json.dumps(wanted))


def what_changed(output_dir: Path, wanted: Fingerprint) -> list[str]:
    """How the run in the directory differs from `wanted`, in words; empty if the directory can be used.

    Raises:
        UserError: The directory holds files that no stage has made.
    """
    found = read_json(output_dir / DONE)
    if found is None and any(output_dir.glob("checkpoint-*")):
        found = read_json(output_dir / BEGUN)
    if found is not None:
        return differences(found["fingerprint"], json.loads(json.dumps(wanted)))
    refuse_strange_files(output_dir)
    return []


def refuse_strange_files(output_dir: Path) -> None:
    """Raises a `UserError` if the directory holds files that no stage has made."""
    is_ours = (output_dir / DONE).is_file() or (output_dir / BEGUN).is_file()
    if output_dir.is_dir() and any(output_dir.iterdir()) and not is_ours:
        raise UserError(f"output_dir {output_dir}: holds files that no stage has made; choose another output_dir")


def has_progress(output_dir: Path) -> bool:
    """Whether an interrupted run left something to resume from."""
    partial = output_dir.glob(f"{PROGRESS}/*")
    return any(output_dir.glob("checkpoint-*")) or any(path.stat().st_size for path in partial)


def begin(output_dir: Path, wanted: Fingerprint) -> None:
    """Records in the directory which run its checkpoints will belong to."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / BEGUN, {"fingerprint": wanted})


def begin_afresh(output_dir: Path, wanted: Fingerprint) -> None:
    """`begin`, after deleting the directory if an unfinished run of another fingerprint has left it."""
    if (output_dir / BEGUN).is_file() and not _has_fingerprint(output_dir / BEGUN, wanted):
        shutil.rmtree(output_dir)
    begin(output_dir, wanted)


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
    """
    write_json(output_dir / "metrics.json", metrics)
    stage_file = {
        "stage": stage,
        "fingerprint": wanted,
        "output": digests.of_files([path for path in digests.files_in(output_dir) if path.name not in _MEASURED]),
        **facts,
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
