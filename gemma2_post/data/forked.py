"""Calls a function for many items in forked processes, on all cores.

Forked processes share what is large, such as a tokenizer; they never use torch, its threads or a GPU. Few items are in
memory at a time, however many there are.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from gemma2_post.stage.digests import num_cores
from gemma2_post.stage.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
_DIES_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl."""


def on_all_cores(work: Callable[[Item], Result], items: Iterable[Item], doing: str) -> Iterator[Result]:
    """The results of a function for each item, in their order.

    Args:
        items: May be made one by one; only a few of them exist at a time.
        doing: What is done, for an error.

    Raises:
        UserError: The system killed a process.
    """
    with ProcessPoolExecutor(num_cores(), multiprocessing.get_context("fork"), _begin, (work,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) > 2 * num_cores():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
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
    # There is a process for each core.
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()
    gc.disable()  # rows make no cycles


def _call(item: object) -> Any:
    return _work(item)
