"""One run at a time in a run folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from gemma2_post.core.errors import UserError

FILE = ".lock"


@contextmanager
def held(run_dir: Path) -> Iterator[int]:
    """The run folder is this process's; its file descriptor, to be passed on to the stages.

    The system lets go of it when the last process that has it is gone, however that ended: what a killed run leaves
    is no lock, and a stage that outlives its parent still holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{run_dir} is in use by {holder}; wait for it, or stop it and its stages, or give another --run_dir"
            ) from error
        os.truncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%H:%M}\n".encode(), 0)
        yield file
    finally:
        os.close(file)
