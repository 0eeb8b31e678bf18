"""What to run first on a new machine: every check, a table, and a JSON file to attach to a report."""

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from gemma2_post.selftest import environment, numerics, stages, throughput
from gemma2_post.selftest.result import Result, State
from gemma2_post.stage import contract

COLORS: dict[State, str] = {"pass": "green", "fail": "red", "skipped": "dim"}
CPU, ONE_GPU = Path("accelerate_configs/cpu.yaml"), Path("accelerate_configs/single_gpu.yaml")


def selftest(launch: Path | None, json: Path, console: Console) -> bool:
    """Runs all checks, prints a line for each, then what to do; returns whether none has failed.

    Args:
        launch: Accelerate config of the stages; without it, the one for a CPU or for one GPU.
        json: File for all results.

    Raises:
        UserError: The config cannot be used.
    """
    config = launch or (ONE_GPU if torch.cuda.is_available() else CPU)
    began = time.monotonic()
    results: list[tuple[str, Result]] = []
    for part, result in checks(config):
        if not any(part == other for other, _ in results):
            console.print(f"\n{part}", style="bold", highlight=False)
        results.append((part, result))
        state = Text(f"{result.state:9}", COLORS[result.state])
        console.print(state + Text(f"{result.name:36}{result.found}", "default"), soft_wrap=True)
    seconds = time.monotonic() - began
    states = [result.state for _, result in results]
    content = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": environment.installed(),
        "launch": config.read_text(encoding="utf-8"),
        "seconds": seconds,
        "passes": "fail" not in states,
        "results": [{"part": part} | asdict(result) for part, result in results],
    }
    contract.write_json(json, content)
    console.print()
    for _, result in results:
        if result.remedy:
            console.print(
                Text(f"{result.name}: ", COLORS[result.state]) + Text(result.remedy, "default"), soft_wrap=True
            )
    counts = ", ".join(f"{states.count(state)} {state}" for state in COLORS)
    console.print(f"{counts}; {seconds:.0f} s; all of it: {json}", highlight=False)
    return "fail" not in states


def checks(config: Path) -> Iterator[tuple[str, Result]]:
    """The results of all checks, each with its part of the selftest, as they are found."""
    found = stages.checked_launcher(config)
    for check in environment.check(found.num_processes, found.use_cpu):
        yield "environment", tried(check)
    on_gpus = torch.cuda.is_available() and not found.use_cpu
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if on_gpus else ["cpu"]
    for device in devices:
        for check in numerics.check(device):
            yield f"numerics of {device}", tried(check)
    for result in stages.check(config):
        yield f"stages through {config}", result
    for device in devices:
        yield f"speed of {device}", tried(partial(throughput.check, device))
        if on_gpus:
            torch.cuda.empty_cache()


def tried(check: partial[Result]) -> Result:
    """The result of a check; a failure with its name and arguments if it raises."""
    try:
        return check()
    except Exception as error:  # on a machine that is at fault, anything may be raised
        name = " ".join(map(str, [check.func.__name__, *check.args]))
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Result(name, "fail", reason, "install the versions of constraints.txt; if they are, report this")
