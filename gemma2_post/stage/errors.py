"""User mistakes: one sentence on stderr, and an exit status that differs from the 1 of a crash."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_STATUS_FILE = "GEMMA2_POST_EXIT_STATUS_FILE"
"""Environment variable with the path of a file for the exit status, which some launchers do not pass on."""
_NOT_USABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EXDEV),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Errors of the system at a path that the user has chosen."""


class UserError(Exception):
    """A mistake that the user can fix; the message says where it is, what was found, and what to do."""

    status = 2
    """Exit status of the command."""


class PlacedError(UserError):
    """A mistake whose message names its place itself: a file, or the command line."""


class OneProcessError(UserError):
    """A mistake that a single process may find because it depends on that process's rows or weights.

    That process reports it; the launcher stops the others.
    """


@contextmanager
def located(place: object) -> Iterator[None]:
    """Prefixes the message of a `UserError` raised inside with a place, such as a recipe's file or a key.

    A `PlacedError` keeps its message.
    """
    try:
        yield
    except PlacedError:
        raise
    except UserError as error:
        error.args = (f"{place}: {error}",)
        raise


@contextmanager
def reported() -> Iterator[None]:
    """Turns mistakes into one sentence (one process per machine prints it) and an exit status.

    Mistakes are a `UserError`, a full disk, and a file that the system does not let this user read or write.
    """
    try:
        yield
    except OneProcessError as error:
        _exit(str(error), is_alone=True)
    except UserError as error:
        _exit(str(error), error.status)
    except Exception as error:
        if _is_full_disk(error):
            _exit("no space left on the device while writing; free some, then run the same command again to resume")
        if isinstance(error, OSError) and error.filename is not None and error.errno in _NOT_USABLE:
            why = os.strerror(error.errno).lower()
            _exit(f"{error.filename}: {why}; correct the path, or its permissions, then run the same command again")
        raise


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk caused the error; safetensors (Rust) and torch (C++) report one in their own words."""
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
