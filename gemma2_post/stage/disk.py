"""Folders for outputs and disk space, checked before the work starts."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from gemma2_post.stage.errors import UserError

REPLACED = "replaced"
"""Folder in a run's folder for the outputs that were replaced."""


def check_folder(folder: Path, key: str) -> None:
    """Raises a `UserError` if a folder can neither be written to nor made; leaves nothing behind.

    Args:
        key: The key that names the folder.
    """
    if why := _why_not_usable(folder):
        raise UserError(f"{key}: {folder} cannot be written to ({why}); fix that, or name another folder")


def _why_not_usable(folder: Path) -> str:
    existing = next(parent for parent in [folder, *folder.absolute().parents] if os.path.lexists(parent))
    if not existing.is_dir():
        return os.strerror(errno.ENOTDIR).lower()
    longest, whole = max(map(len, map(os.fsencode, folder.parts)), default=0), len(os.fsencode(folder.absolute()))
    if longest > os.pathconf(existing, "PC_NAME_MAX") or whole >= os.pathconf(existing, "PC_PATH_MAX"):
        return os.strerror(errno.ENAMETOOLONG).lower()
    try:
        os.listdir(existing)
        with tempfile.TemporaryFile(dir=existing):  # every other check lets root pass on a read-only file system
            return ""
    except OSError as error:
        return (error.strerror or str(error)).lower()


def check_space(output_dir: Path, num_bytes: float, is_shared: bool = False, key: str = "output_dir") -> None:
    """Raises a `UserError` if what is missing of `num_bytes` does not fit on the disk of `output_dir`.

    Args:
        num_bytes: All that the output and its checkpoints take at their most.
        is_shared: Whether the folder holds more than that output, so that nothing in it counts.
        key: The key that names the folder.
    """
    needed = num_bytes if is_shared else missing(output_dir, num_bytes)
    existing = next(parent for parent in [output_dir, *output_dir.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        replaced = next(
            (path / REPLACED for path in [output_dir, *output_dir.parents] if (path / REPLACED).is_dir()), None
        )
        more = f", for example what gemma2-post clean {replaced.parent} lists," if replaced else ""
        raise UserError(
            f"{key} {output_dir}: no space left on the device for the output "
            f"({free / 1e6:,.0f} MB free, about {needed / 1e6:,.0f} MB needed); free some{more} or write elsewhere"
        )


def missing(folder: Path, num_bytes: float) -> float:
    """Bytes of an output that are not on the disk yet: a run that resumes has a part of them."""
    return max(0.0, num_bytes - size_of(folder))


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
