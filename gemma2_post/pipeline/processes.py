"""Runs a stage as a separate process, started by `accelerate launch`, with its output in a log file."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

import psutil

from gemma2_post.pipeline import slurm
from gemma2_post.pipeline.devices import PORT
from gemma2_post.pipeline.steps import Step
from gemma2_post.stage.errors import EXIT_STATUS_FILE
from gemma2_post.stage.launcher import Launcher

RUN_DIR = "GEMMA2_POST_RUN_DIR"
"""Environment variable by which all processes of a run are found, even those whose parents are gone."""
_GRACE = 45.0
"""Seconds between SIGTERM and SIGKILL; srun takes half a minute to end processes on other nodes."""
_PAIR = re.compile(r"\\\\|\\u(d[89ab]..)\\ud[c-f]..")
"""Two escapes of JSON for one character; an escaped backslash is no beginning of one."""
_BAR = re.compile(r"(?:^|[\r\n])(?:([^\r\n|]+?): +)?\s*\d+%\|[^|]*\| (\d+)/(\d+) \[[^<\]]*<([^,\]]+)")


def launch(step: Step, config: str, launcher: Launcher, environment: dict[str, str], run_dir: Path, log: Path) -> int:
    """Runs a step to its end; returns its exit status.

    Args:
        config: The launcher's accelerate config.
        environment: Variables that assign devices to the step.
        log: File to which the step's output is appended.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if launcher.num_machines > 1:
        command = slurm.srun(launcher.num_machines)
    command += ["--quiet", "--config_file", config]
    command += ["--main_process_port", environment[PORT]] if PORT in environment else []
    command += ["-m", step.command.module, *(["--config", str(step.config)] if step.config else [])]
    command += assignments(step.values)
    with logged(command, log) as output, tempfile.TemporaryDirectory(dir=log.parent, prefix=".") as directory:
        # accelerate turns every failure into exit status 1. All machines of the stage can write to this folder.
        status_file = Path(directory) / "status"
        variables = environment | {EXIT_STATUS_FILE: str(status_file), RUN_DIR: str(run_dir.resolve())}
        # In a new session, so that Ctrl-C reaches only the chain, which then ends what it has started.
        finished = subprocess.run(
            command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        return int(status_file.read_text()) if status_file.is_file() else finished.returncode


def assignments(values: dict[str, object]) -> list[str]:
    """Keys of a recipe as arguments of a stage's command: `--key=value`, in YAML."""
    return [f"--{key}={_PAIR.sub(_one_character, json.dumps(value))}" for key, value in values.items()]


def _one_character(found: re.Match) -> str:
    """An emoji, which JSON writes as two escapes that YAML would read as two characters, as one escape of YAML."""
    if found[1] is None:
        return found[0]
    (character,) = json.loads('"' + found[0] + '"')
    return f"\\U{ord(character):08x}"


@contextlib.contextmanager
def logged(command: list[str], log: Path) -> Iterator[TextIO]:
    """A log file, open for the output of a command, which it names first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as output:
        output.write(f"\n--- {datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(command)}\n")
        output.flush()
        yield output


def end_all(run_dir: Path) -> bool:
    """Ends every process of a run on this machine, even if the run was killed; returns whether there were any."""
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
    """Ids of all processes on this machine that a run has started, directly or indirectly."""
    marker = str(run_dir.resolve())
    return [
        each.pid
        for each in psutil.process_iter(["environ"])
        if (each.info["environ"] or {}).get(RUN_DIR) == marker and each.pid != os.getpid()
    ]


def _signal(processes: list[int], which: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, which)


def _tail(log: Path, num_bytes: int) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
        return file.read().decode("utf-8", errors="replace")


def progress(log: Path) -> str | None:
    """State of the newest progress bar in a log: `23/60, 1:05 left`."""
    if not log.is_file():
        return None
    bars = _BAR.findall(_tail(log, 4096).rpartition("\n--- ")[2])
    if not bars:
        return None
    what, done, total, left = bars[-1]
    return f"{what + ' ' if what else ''}{done}/{total}" + (f", {left} left" if "?" not in left else "")


def last_words(log: Path) -> list[str]:
    """The last words of a failed step: the user's mistake, or the last lines of its log."""
    lines = [line.rpartition("\r")[2] for line in _tail(log, 20000).rpartition("\n--- ")[2].splitlines()[1:]]
    mistakes = [line for line in lines if line.startswith("error: ")]
    return mistakes[-1:] or lines[-15:]
