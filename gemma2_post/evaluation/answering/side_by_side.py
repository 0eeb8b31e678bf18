"""Models that answer side by side: processes take one after the other, each with its share of the GPUs.

A model answers in one process, so its answers do not depend on the number of processes.
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from tqdm import tqdm

from gemma2_post.stage.digests import num_cores
from gemma2_post.stage.quiet import silence_libraries

Answer = Callable[[Path, str], None]
"""Lets a model answer, and keeps its answers under a key."""
_DIES_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl."""


def answer(keys: dict[Path, str], num_processes: int, begin: Callable[[], Answer]) -> None:
    """Lets models answer.

    Args:
        keys: What the answers of each model are kept under.
        begin: Called once in each process, which imports it; returns what answers there.

    Raises:
        UserError: A model cannot be used; the other processes finish theirs.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    shares: Queue[str] = context.Queue()
    num_processes = min(num_processes, len(keys))
    for share in shares_of(num_processes):
        shares.put(share)
    with ProcessPoolExecutor(num_processes, context, _begin, (shares, num_processes, begin)) as pool:
        asked = [pool.submit(_answer, path, key) for path, key in keys.items()]
        try:
            for each in tqdm(as_completed(asked), desc="answers", unit="model", total=len(asked)):
                each.result()
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

_answer_here: Answer


def _begin(shares: "Queue[str]", num_processes: int, begin: Callable[[], Answer]) -> None:
    global _answer_here
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if share := shares.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = share
    torch.set_num_threads(max(1, num_cores() // num_processes))
    silence_libraries()
    _answer_here = begin()


def _answer(path: Path, key: str) -> None:
    _answer_here(path, key)
