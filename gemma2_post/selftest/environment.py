"""What the machine offers: GPUs, memory, disk, limits, the Hub, and versions."""

import importlib.metadata
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import psutil
import torch
from torch.utils.cpp_extension import get_default_build_root

from gemma2_post.selftest.result import Result, judged

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "huggingface_hub": "2.4.0",
    "numpy": "2.4.6",
    "pyarrow": "26.0.1",
}
"""Of the versions in constraints.txt, those that training depends on; the file itself is not installed."""
PACKAGE = "gemma2_post"
GATED = "google/gemma-2-2b"
DISK_BYTES, LEAST_DISK = 256 * 2**20, 50e6
"""Bytes that are written, and the least bytes per second: a checkpoint of 5 GB then takes 100 s."""
LEAST_OPEN_FILES = 1024
LEAST_SHARED = 2**29
"""Bytes of /dev/shm; Docker gives 64 MB by default, which NCCL's processes on one machine exceed."""
LONGEST_COMPILATION = 30 * 60
"""Seconds after which a lock of torch's extensions is one that a kill has left."""
LEAST_HOST = 4e9
"""Bytes of host memory; the tiny chain needs less."""


def check(num_processes: int, use_cpu: bool) -> Iterator[partial[Result]]:
    """The checks, to be called one after another.

    Args:
        num_processes: Of the accelerate config that is tested.
        use_cpu: Whether they compute on the processor.
    """
    yield partial(versions, installed(), required())
    for of_gpus in (gpus, bf16, device_memory, nccl):
        yield partial(of_gpus)
    yield partial(host_memory, available_memory())
    yield partial(shared_memory, Path("/dev/shm"), 1 if use_cpu else num_processes)
    yield partial(open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield partial(disk, Path())
    yield partial(compiled_extensions, Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
    yield partial(hub)


# --- versions ---


def installed() -> dict[str, str]:
    """Versions of the packages in `TESTED` that are installed."""
    found = {}
    for name in TESTED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def required() -> list[str]:
    """What this package requires, such as `torch>=2.8`; nothing if it runs without being installed."""
    try:
        found = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [each for each in found if "extra ==" not in each]


def versions(found: Mapping[str, str], requirements: list[str]) -> Result:
    """Fails where a package is missing or outside of what is required; names those that are not the tested ones."""
    from transformers.utils.versions import require_version

    wrong = [f"{name} is missing" for name in TESTED if name not in found]
    for requirement in requirements:
        try:
            require_version(requirement.replace(" ", ""))
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
        except ImportError as error:
            wrong.append(str(error).splitlines()[0])
    others = [
        f"{name} {version} (tested: {TESTED[name]})"
        for name, version in found.items()
        if version.partition("+")[0] != TESTED[name]
    ]
    text = ", ".join(dict.fromkeys([*wrong, *others])) or f"the {len(found)} tested versions"
    return judged("versions", not wrong, text, "pip install -c constraints.txt -e . in the project's folder")


# --- GPUs ---


def gpus() -> Result:
    """Driver, CUDA, and the GPUs that torch sees."""
    driver = _driver()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return Result("driver and CUDA", "pass", f"{kinds}; driver {driver or '?'}, CUDA {torch.version.cuda}")
    if driver is None:
        return Result("driver and CUDA", "skipped", "no NVIDIA driver here; everything runs on the processor")
    text = f"driver {driver}, but torch {torch.__version__} sees no GPU"
    remedy = (
        "if the version ends in +cpu, install a CUDA build of torch; else set CUDA_VISIBLE_DEVICES right, or install "
        f"a driver for CUDA {torch.version.cuda or '12 or newer'}"
    )
    return judged("driver and CUDA", False, text, remedy)


def _driver() -> str | None:
    """Version of NVIDIA's driver; None if it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    finished = subprocess.run(command, capture_output=True, text=True)
    return next(iter(finished.stdout.split()), None) if finished.returncode == 0 else None


def bf16() -> Result:
    """Whether each GPU computes in bf16 itself; Gemma 2 overflows in fp16."""
    if not torch.cuda.is_available():
        return Result("bf16", "skipped", "no GPU here; a processor computes in bf16, but slowly")
    old = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < (8, 0)]
    text = f"GPU {', '.join(map(str, old))} is older than Ampere" if old else "every GPU"
    return judged("bf16", not old, text, "set CUDA_VISIBLE_DEVICES to the other GPUs; Gemma 2 overflows in fp16")


def device_memory() -> Result:
    """Free and whole memory of each GPU."""
    if not torch.cuda.is_available():
        return Result("GPU memory", "skipped", "no GPU here")
    sizes = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    text = ", ".join(f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free" for free, total in sizes)
    passes = all(free > 0.9 * total for free, total in sizes)
    return judged("GPU memory", passes, text, "another process is on that GPU: nvidia-smi names it; end it, or wait")


def nccl() -> Result:
    """The version of NCCL; whether its processes reach each other is tested through the accelerate config."""
    if not torch.cuda.is_available():
        return Result("NCCL", "skipped", "no GPU here")
    if not torch.distributed.is_nccl_available():
        return judged("NCCL", False, "this build of torch has none", "install a CUDA build of torch")
    return Result("NCCL", "pass", ".".join(map(str, torch.cuda.nccl.version())))


# --- memory, disk, limits ---


def available_memory() -> float:
    """Bytes that this machine, or the limit of its container, leaves."""
    available = float(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        available = min(available, int(most) - int(used.read_text()))
    return available


def host_memory(available: float) -> Result:
    """The host memory that is left, in bytes."""
    text = f"{available / 1e9:.0f} GB available, on {os.cpu_count()} cores"
    return judged("host memory", available >= LEAST_HOST, text, "free some; the tiny chain alone needs 4 GB")


def shared_memory(folder: Path, num_gpu_processes: int) -> Result:
    """The size of /dev/shm, which matters where several processes with GPUs talk to each other."""
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    text = f"{size / 1e9:.2g} GB in {folder}"
    remedy = "start the container with --shm-size=8g or --ipc=host"
    return judged("shared memory", num_gpu_processes == 1 or size >= LEAST_SHARED, text, remedy)


def open_files(limit: int) -> Result:
    """How many files a process may open."""
    text = "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}"
    passes = limit == resource.RLIM_INFINITY or limit >= LEAST_OPEN_FILES
    return judged("open files", passes, text, "run ulimit -n 65536 before, or raise nofile in limits.conf")


def disk(folder: Path) -> Result:
    """How fast a folder's disk takes data, and what is free there."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        speed = DISK_BYTES / (time.perf_counter() - began)
    free = shutil.disk_usage(folder).free
    text = f"{speed / 1e6:,.0f} MB/s written, {free / 1e9:,.0f} GB free in this folder"
    remedy = "checkpoints would take minutes: set run_dir to a faster disk"
    return judged("disk", speed >= LEAST_DISK, text, remedy, bytes_per_second=speed)


def compiled_extensions(folder: Path) -> Result:
    """Whether a compilation of DeepSpeed's extensions was killed: its lock makes every later start wait forever."""
    now = time.time()
    stale = [lock for lock in sorted(folder.rglob("lock")) if now - lock.stat().st_mtime > LONGEST_COMPILATION]
    text = ", ".join(map(str, stale)) or f"no lock in {folder}"
    remedy = f"a compilation was killed, and DeepSpeed waits for it: rm {' '.join(map(str, stale))}"
    return judged("compiled extensions", not stale, text, remedy)


# --- the Hub ---


def hub() -> Result:
    """Whether the Hub hands out Gemma's weights; without a network or a login this is no failure."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    name, login = f"Hub, {GATED}", f"accept the license at https://huggingface.co/{GATED}, then run hf auth login"
    if constants.HF_HUB_OFFLINE:
        return Result(name, "skipped", "HF_HUB_OFFLINE is set", "name folders of weights that are on this machine")
    try:
        HfApi().auth_check(GATED)
    except GatedRepoError:
        from huggingface_hub import get_token

        if get_token() is None:
            return Result(name, "skipped", "not logged in", login)
        return judged(name, False, "logged in, but this account may not read it", login)
    except HfHubHTTPError as error:
        return Result(name, "skipped", f"the Hub answers {error.response.status_code}", login)
    except Exception as error:  # each HTTP library has errors of its own for a missing network
        reason = type(error).__name__
        return Result(
            name, "skipped", f"no answer from the Hub ({reason})", "offline: name folders of weights instead"
        )
    return Result(name, "pass", "may be downloaded")
