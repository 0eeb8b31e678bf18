"""Disk space, checked before the work starts."""

import shutil
from pathlib import Path

from gemma2_post.stage.errors import UserError


def check_space(output_dir: Path, num_bytes: int) -> None:
    """Raises a `UserError` if `num_bytes` do not fit on the disk of `output_dir`."""
    existing = next(parent for parent in [output_dir, *output_dir.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"output_dir {output_dir}: no space left on the device for the output "
            f"({free / 1e6:,.0f} MB free, about {num_bytes / 1e6:,.0f} MB needed); free some or write elsewhere"
        )
