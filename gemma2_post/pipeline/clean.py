"""Deletes, when asked, what newer outputs of a run have replaced, and data that was prepared for stages."""

import json
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

from gemma2_post.pipeline import lock
from gemma2_post.pipeline.decisions import replaced_folders
from gemma2_post.stage.disk import REPLACED, size_of
from gemma2_post.stage.errors import UserError


def clean(run_dir: Path | None, yes: bool) -> None:
    """Lists the replaced outputs of a run, or without one all prepared data, with size and age; deletes it if `yes`.

    Raises:
        UserError: There is no such folder, or a run is using it.
    """
    if run_dir and not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such folder; name the folder of a run, for example runs/tiny")
    with lock.held(run_dir) if run_dir else nullcontext():
        found = [(folder, "") for folder in replaced_folders(run_dir)] if run_dir else _prepared_folders()
        for folder, what in found:
            days = (time.time() - folder.stat().st_mtime) / 86400
            print(f"{folder}{what}: {size_of(folder) / 1e9:.3g} GB, {days:.0f} days old")
            if yes:
                shutil.rmtree(folder)
    if not found:
        print(f"{run_dir / REPLACED} is empty" if run_dir else "there is no prepared data")
    else:
        print("deleted" if yes else "--yes deletes them")


def _prepared_folders() -> list[tuple[Path, str]]:
    """The folders of prepared rows, and where the rows are from."""
    from gemma2_post.data.prepared import FILE, root  # a slow import

    folders = sorted(folder for folder in root().glob("*") if folder.is_dir())
    files = [folder / FILE for folder in folders]
    sources = [json.loads(file.read_text())["source"] if file.is_file() else "unfinished" for file in files]
    return [(folder, f" ({source})") for folder, source in zip(folders, sources, strict=True)]
