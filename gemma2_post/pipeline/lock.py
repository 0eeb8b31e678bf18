"""One run at a time in a run folder."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from gemma2_post.stage.errors import UserError

FILE = ".lock"


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """The run folder is this process's.

    The system lets go of the lock when the process is gone, however it ended: what a killed run leaves is no lock.
    """
    file = _open(run_dir)
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


def _open(run_dir: Path) -> int:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"{run_dir} cannot be written to ({os.strerror(error.errno).lower()}); mend that, or give another "
                "--run_dir"
            ) from error
        raise
