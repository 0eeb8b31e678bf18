"""Work on many rows in parts, on all cores: each finished part is a file, so a run that was killed goes on.

Few parts are in memory at a time, however many there are.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from gemma2_post.stage.digests import num_cores
from gemma2_post.stage.errors import UserError

T = TypeVar("T")
_DIES_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl."""


def on_all_cores(work: Callable[[T], int], items: Iterable[T], doing: str, total: int | None = None) -> None:
    """Calls a function for each item, in forked processes; shows how many rows are done.

    Args:
        work: Returns the number of rows that it has done.
        items: May be made one by one; only a few of them exist at a time.
        doing: What is done, for the progress bar.
        total: Number of rows, if it is known.
    """
    with (
        tqdm(desc=doing, total=total, unit=" rows", delay=1) as bar,
        ProcessPoolExecutor(num_cores(), multiprocessing.get_context("fork"), _begin, (work,)) as pool,
    ):
        waiting: deque[Future[int]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) > 2 * num_cores():
                    bar.update(waiting.popleft().result())
            while waiting:
                bar.update(waiting.popleft().result())
        except BrokenProcessPool as error:
            raise UserError(
                f"the system killed a process while {doing}, perhaps because memory ran out; run it with fewer cores "
                "(taskset), or with more memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable
"""Of a forked process."""


def _begin(work: Callable) -> None:
    global _work
    _work = work
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    os.environ["RAYON_NUM_THREADS"] = "1"  # there is a process for each core
    gc.freeze()
    gc.disable()  # rows make no cycles


def _call(item: object) -> int:
    return _work(item)
