"""Work in several processes, each with its share of the GPUs; they take one item after the other.

An item is done in one process, so its result does not depend on the number of processes.
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import torch

from gemma2_post.stage.digests import num_cores
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.quiet import silence_libraries

Item = TypeVar("Item")
Result = TypeVar("Result")
_DIES_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl."""


def side_by_side(
    items: list[Item], num_processes: int, begin: Callable[[], Callable[[Item], Result]]
) -> Iterator[Result]:
    """The results of all items, as they come.

    Args:
        begin: Called once in each process, which imports it, for example to load a model; returns what is done with
            each item.

    Raises:
        UserError: An item cannot be done, and the other processes finish theirs; or the system killed a process.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    shares: Queue[str] = context.Queue()
    num_processes = min(num_processes, len(items))
    for share in shares_of(num_processes):
        shares.put(share)
    with ProcessPoolExecutor(num_processes, context, _begin, (shares, num_processes, begin)) as pool:
        asked = [pool.submit(_do, item) for item in items]
        try:
            for each in as_completed(asked):
                yield each.result()
        except BrokenProcessPool as error:
            raise UserError(
                "the system killed a process while models answered, perhaps because memory ran out; lower "
                "answer_processes, or give it more memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def shares_of(num_processes: int) -> list[str]:
    """For each process, the GPUs that it sees, as `CUDA_VISIBLE_DEVICES` names them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    devices = visible.split(",")[:count]
    each = max(1, count // num_processes)
    groups = [devices[start : start + each] for start in range(0, count - each + 1, each)]
    return [",".join(groups[i % len(groups)]) if groups else "" for i in range(num_processes)]


# --- in the other processes ---

_begun: Callable[[], Callable[[Any], Any]]
"""What is done with each item; what the first call raises is that item's error, where the pool would hide it."""


def _begin(shares: "Queue[str]", num_processes: int, begin: Callable[[], Callable[[Any], Any]]) -> None:
    global _begun
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if share := shares.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = share
    torch.set_num_threads(max(1, num_cores() // num_processes))
    silence_libraries()
    _begun = cache(begin)


def _do(item: object) -> Any:
    return _begun()(item)
