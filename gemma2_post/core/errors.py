"""The mistakes of users: one sentence on stderr and exit status 2."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_STATUS_FILE = "GEMMA2_POST_EXIT_STATUS_FILE"
"""Environment variable: where to leave the exit status for a parent behind a launcher that does not pass it on."""


class UserError(Exception):
    """Something that the user can put right; the message says where, what was found, and what to do."""


@contextmanager
def reported() -> Iterator[None]:
    """Turns a `UserError`, and a full disk, into one sentence (from one process a machine) and exit status 2."""
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except Exception as error:
        # safetensors writes in Rust and reports a full disk as an error of its own, with the system's number in it.
        if not (isinstance(error, OSError) and error.errno == errno.ENOSPC) and "os error 28" not in str(error):
            raise
        _exit("no space left on the device while writing: free some, then run the same command; it goes on from there")


def _exit(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
        if EXIT_STATUS_FILE in os.environ:
            Path(os.environ[EXIT_STATUS_FILE]).write_text("2")
    raise SystemExit(2)
