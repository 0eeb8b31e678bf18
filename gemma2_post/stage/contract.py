"""The stage contract: a stage writes one directory, and `stage.json` in it, written last, says that it is done.

Nothing here needs torch, so that whoever asks whether a stage is up to date has the answer at once.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gemma2_post.stage import digests
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.fingerprint import differences

DONE = "stage.json"
BEGUN = "begun.json"
PROGRESS = "progress"
"""Folder with what a stage without checkpoints has made so far; it checks itself whether it can go on from that."""
_PACKAGE = Path(__file__).parents[1]
_MEASURED = {
    *(DONE, BEGUN, "before.json", "metrics.json", "log.jsonl", "watch.jsonl", "merge.json", "front.json"),
    *("models.json", "answers.jsonl"),
}
"""Files that say how a stage went, beside those that the next stage reads."""


def input_digest(path: str) -> str | None:
    """The content hash of what a recipe names; see `digests.of_input`."""
    return digests.of_input(path, DONE)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_done(folder: Path) -> dict[str, Any]:
    """The stage file of a finished stage."""
    return json.loads((folder / DONE).read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """The records that a run has appended to a file, if there is one; a line that a kill has cut is taken off it."""
    if not path.is_file():
        return []
    written = path.read_bytes()
    os.truncate(path, written.rfind(b"\n") + 1)
    return [json.loads(line) for line in written.split(b"\n")[:-1]]


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes to a temporary name, then renames: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def is_done(output_dir: Path, wanted: dict) -> bool:
    """Whether the directory holds the finished output of exactly this fingerprint."""
    done = read_json(output_dir / DONE)
    return done is not None and done["fingerprint"] == json.loads(json.dumps(wanted))


def belongs_to(output_dir: Path, wanted: dict) -> bool:
    """Whether the directory holds the output of exactly this fingerprint, finished or to be gone on from."""
    begun = read_json(output_dir / BEGUN)
    is_begun = begun is not None and begun["fingerprint"] == json.loads(json.dumps(wanted))
    return is_done(output_dir, wanted) or (is_begun and has_progress(output_dir))


def what_changed(output_dir: Path, wanted: dict) -> list[str]:
    """How the run in the directory differs from `wanted`, in words; empty if it may be used.

    Raises:
        UserError: see `refuse_strange_files`.
    """
    found = read_json(output_dir / DONE)
    if found is None and any(output_dir.glob("checkpoint-*")):
        found = read_json(output_dir / BEGUN)
    if found is not None:
        return differences(found["fingerprint"], json.loads(json.dumps(wanted)))
    refuse_strange_files(output_dir)
    return []


def refuse_strange_files(output_dir: Path) -> None:
    """Refuses a directory that holds what no stage has made."""
    is_ours = (output_dir / DONE).is_file() or (output_dir / BEGUN).is_file()
    if output_dir.is_dir() and any(output_dir.iterdir()) and not is_ours:
        raise UserError(f"output_dir {output_dir}: holds files that no stage has made; choose another output_dir")


def has_progress(output_dir: Path) -> bool:
    """Whether an interrupted run has left something to go on from."""
    return any(output_dir.glob("checkpoint-*")) or any(
        path.stat().st_size for path in output_dir.glob(f"{PROGRESS}/*")
    )


def begin(output_dir: Path, wanted: dict) -> None:
    """Notes in the directory which run its checkpoints will belong to."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / BEGUN, {"fingerprint": wanted})


def begin_afresh(output_dir: Path, wanted: dict) -> None:
    """`begin`, after removing what an unfinished run of another fingerprint has left in the directory."""
    begun = read_json(output_dir / BEGUN)
    if begun is not None and begun["fingerprint"] != json.loads(json.dumps(wanted)):
        shutil.rmtree(output_dir)
    begin(output_dir, wanted)


def finish(output_dir: Path, stage: str, wanted: dict, seconds: float, facts: dict, metrics: dict) -> None:
    """Writes `metrics.json`, then `stage.json`: from here on the stage is done.

    Args:
        facts: what the next stage checks (base model, adapter lineage, dtype, hashes of tokenizer and template).
    """
    write_json(output_dir / "metrics.json", metrics)
    weights = [path for path in digests.files_in(output_dir) if path.name not in _MEASURED]
    stage_file = {
        "stage": stage,
        "fingerprint": wanted,
        "output": digests.of_files(weights),
        **facts,
        "git_commit": _git_commit(),
        "wall_seconds": round(seconds, 1),
        "metrics": metrics,
    }
    write_json(output_dir / DONE, stage_file)
    (output_dir / BEGUN).unlink(missing_ok=True)


def _git_commit() -> str | None:
    """The commit of the project's checkout; None where it is installed without one."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(_PACKAGE.parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
