"""A stage as a process of its own, started by `accelerate launch`, with its output in a log file."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from gemma2_post.pipeline import slurm
from gemma2_post.pipeline.steps import Step
from gemma2_post.stage.errors import EXIT_STATUS_FILE
from gemma2_post.stage.launcher import Launcher

RUN_DIR = "GEMMA2_POST_RUN_DIR"
"""Environment variable by which all processes of a run are found, also those whose parents are gone."""
_GRACE = 45.0
"""Seconds between asking a process to end and making it; srun takes half a minute to end what is on other nodes."""
_BAR = re.compile(r"(?:^|[\r\n])(?:([^\r\n:|]+): +)?\s*\d+%\|[^|]*\| (\d+)/(\d+) \[[^<\]]*<([^,\]]+)")


def launch(step: Step, config: str, launcher: Launcher, environment: dict[str, str], run_dir: Path, log: Path) -> int:
    """Runs a step to its end; its exit status.

    Args:
        config: the file of the launcher.
        environment: variables that say which devices are the step's.
        log: what the step prints is appended to it.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if launcher.num_machines > 1:
        command = slurm.srun(launcher.num_machines)
    command += ["--quiet", "--config_file", config]
    command += ["-m", step.command.module, *(["--config", str(step.config)] if step.config else [])]
    command += [f"--{key}={json.dumps(value)}" for key, value in step.values.items()]  # JSON is YAML
    log.parent.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=log.parent, prefix=".") as directory,
        open(log, "a", encoding="utf-8") as output,
    ):
        # accelerate makes 1 of every exit status of the stage. Where all machines of the stage can write.
        status_file = Path(directory) / "status"
        variables = environment | {EXIT_STATUS_FILE: str(status_file), RUN_DIR: str(run_dir.resolve())}
        output.write(f"\n--- {datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(command)}\n")
        output.flush()
        # In a session of its own, Ctrl-C reaches the chain alone, which then ends what it has started.
        finished = subprocess.run(
            command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        return int(status_file.read_text()) if status_file.is_file() else finished.returncode


def end_all(run_dir: Path) -> bool:
    """Ends every process of a run, on this machine: of one that is interrupted, or of one that was killed.

    Returns:
        Whether there were any.
    """
    found = of_run(run_dir)
    deadline = time.monotonic() + _GRACE
    _signal(found, signal.SIGTERM)
    while (left := of_run(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    while left:
        _signal(left, signal.SIGKILL)
        time.sleep(0.1)
        left = of_run(run_dir)
    return bool(found)


def of_run(run_dir: Path) -> list[int]:
    """The ids of all processes on this machine that a run has started, and theirs."""
    marker = f"{RUN_DIR}={run_dir.resolve()}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:  # another user's, or gone
            continue
    return found


def _signal(processes: list[int], which: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process, which)
        except ProcessLookupError:
            continue


def _tail(log: Path, num_bytes: int) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
        return file.read().decode("utf-8", errors="replace")


def progress(log: Path) -> str | None:
    """What the newest progress bar in a log says: `23/60, 1:05 left`."""
    if not log.is_file():
        return None
    bars = _BAR.findall(_tail(log, 4096).rpartition("\n--- ")[2])
    if not bars:
        return None
    what, done, total, left = bars[-1]
    return f"{what + ' ' if what else ''}{done}/{total}" + (f", {left} left" if "?" not in left else "")


def last_words(log: Path) -> list[str]:
    """What a step that has failed said in the end: the user's mistake, or the last lines."""
    lines = [line.rpartition("\r")[2] for line in _tail(log, 20000).rpartition("\n--- ")[2].splitlines()[1:]]
    mistakes = [line for line in lines if line.startswith("error: ")]
    return mistakes[-1:] or lines[-15:]
