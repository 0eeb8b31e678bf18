"""The lock of a run folder: one run at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from gemma2_post.stage.disk import check_folder
from gemma2_post.stage.errors import UserError

FILE = ".lock"


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds the run folder's lock, which the system releases when the process ends, even if it is killed.

    Raises:
        UserError: Another process holds the lock, or the folder cannot be written to.
    """
    check_folder(run_dir, "run_dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{run_dir} is in use by {holder}; wait for it, or stop it, or give another --run_dir"
            ) from error
        os.truncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%H:%M}\n".encode(), 0)
        yield
    finally:
        os.close(file)
