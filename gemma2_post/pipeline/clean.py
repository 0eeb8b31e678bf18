"""Deletes, when asked, the outputs that newer ones have replaced: `gemma2-post clean runs/NAME --yes`."""

import shutil
import time
from pathlib import Path

from gemma2_post.pipeline import lock
from gemma2_post.pipeline.decisions import replaced_folders
from gemma2_post.stage.disk import REPLACED, size_of
from gemma2_post.stage.errors import UserError


def clean(run_dir: Path, yes: bool) -> None:
    """Lists the replaced outputs of a run with size and age; deletes them if `yes`.

    Raises:
        UserError: There is no such folder, or a run is using it.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such folder; name the folder of a run, for example runs/tiny")
    with lock.held(run_dir):
        found = replaced_folders(run_dir)
        for folder in found:
            days = (time.time() - folder.stat().st_mtime) / 86400
            print(f"{folder}: {size_of(folder) / 1e9:.3g} GB, {days:.0f} days old")
            if yes:
                shutil.rmtree(folder)
    if not found:
        print(f"{run_dir / REPLACED} is empty")
    else:
        print("deleted" if yes else "--yes deletes them")
