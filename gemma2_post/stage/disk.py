"""Folders for outputs and disk space, checked before the work starts."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from gemma2_post.stage.errors import UserError


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


def check_space(output_dir: Path, num_bytes: int) -> None:
    """Raises a `UserError` if `num_bytes` do not fit on the disk of `output_dir`."""
    existing = next(parent for parent in [output_dir, *output_dir.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"output_dir {output_dir}: no space left on the device for the output "
            f"({free / 1e6:,.0f} MB free, about {num_bytes / 1e6:,.0f} MB needed); free some or write elsewhere"
        )


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
