"""The mistakes of users: one sentence on stderr and an exit status that is not 1, which a crash has."""

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

    status = 2
    """Exit status of the command."""


class OneProcessError(UserError):
    """One that a single process may meet, because it depends on that process's rows or weights; it is the one to say
    so. The launcher ends the others."""


@contextmanager
def reported() -> Iterator[None]:
    """Turns a `UserError`, and a full disk, into one sentence (from one process a machine) and its exit status."""
    try:
        yield
    except OneProcessError as error:
        _exit(str(error), is_alone=True)
    except UserError as error:
        _exit(str(error), error.status)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        _exit("no space left on the device while writing; free some, then the same command goes on from there")


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk is behind it; safetensors (Rust) and torch (C++) report it in words of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        if "os error 28" in str(error) or "iostream error" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit(message: str, status: int = UserError.status, is_alone: bool = False) -> None:
    if is_alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
        if EXIT_STATUS_FILE in os.environ:
            Path(os.environ[EXIT_STATUS_FILE]).write_text(str(status))
    raise SystemExit(status)
