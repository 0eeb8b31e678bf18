"""Assigns devices to runs that can go side by side."""

import os
import shutil
import socket
import subprocess
from contextlib import ExitStack

from gemma2_post.stage.digests import num_cores
from gemma2_post.stage.launcher import Launcher

PORT = "MASTER_PORT"
"""Environment variable with the port at which the processes of a run meet."""


def places(launcher: Launcher, num_runs: int) -> list[dict[str, str]]:
    """Environment variables for each run that can go at the same time; a single empty one if they must take turns.

    The division follows from the number of all runs, not of those still to do, so a run that resumes alone has the
    devices that it began with.

    Args:
        launcher: Launcher of each run.
    """
    num_processes = launcher.num_processes
    if launcher.num_machines > 1 or launcher.names_gpus:
        return [{}]
    if launcher.use_cpu:
        cores = num_cores()
        num_places = min(num_runs, cores) if num_processes == 1 else 1
        return [{"OMP_NUM_THREADS": str(cores // num_places)}] * num_places if num_places > 1 else [{}]
    gpus = _visible_gpus()
    num_places = min(num_runs, len(gpus) // num_processes)
    if num_places < 2:
        return [{}]
    shares = [gpus[i * num_processes : (i + 1) * num_processes] for i in range(num_places)]
    found = [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]
    if num_processes > 1:
        for place, port in zip(found, _free_ports(num_places), strict=True):
            place[PORT] = str(port)
    return found


def _free_ports(number: int) -> list[int]:
    """Different ports that nothing listens to: side by side, accelerate would use the same one."""
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in opened:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in opened]


def _visible_gpus() -> list[str]:
    """Ids of the GPUs, as in CUDA_VISIBLE_DEVICES."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()
