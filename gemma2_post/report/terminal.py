"""Shows a run as it goes: a live table on a terminal, a line for each event anywhere else, and a file for others."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gemma2_post.pipeline import processes
from gemma2_post.pipeline.steps import Step
from gemma2_post.stage import contract

STATUS = "status.json"
"""File in a run's folder with the states of its steps, for `gemma2-post status`."""
RUNNING = "running"
STYLES = {RUNNING: "cyan", "done": "green", "up to date": "green", "failed": "red", "below its gate": "red"}


@dataclass
class Row:
    """The state of a step."""

    stage: str
    folder: str
    """Its output, in the run's folder."""
    log: str
    """Its log, in the run's folder."""
    state: str = "waiting"
    began: float = 0.0
    """Seconds since the epoch; 0 if it has not begun."""
    seconds: float | None = None
    note: str = ""


def duration(seconds: float) -> str:
    """A duration as `1:02:03`, or `2:03` if it is less than an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def terminal() -> Console:
    """The console; 140 columns wide if it is no terminal, because rich's default of 80 would squeeze tables."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


class View:
    """Shows the progress of a run; see `pipeline.run.View`."""

    def __init__(self, console: Console):
        self.console = console
        self.rows: dict[str, Row] = {}
        """The steps by label."""
        self._writing = Lock()

    def begin(self, run_dir: Path, steps: list[tuple[Step, Path]]) -> None:
        """Begins with the steps of a run, each with its log."""
        self.run_dir, self.began, self.status = run_dir, time.time(), RUNNING
        self.rows = {
            step.label: Row(step.stage, str(step.folder.relative_to(run_dir)), str(log.relative_to(run_dir)))
            for step, log in steps
        }
        self.beat()

    def set(self, label: str, state: str, note: str | None = None, seconds: float | None = None) -> None:
        """Shows a step's new state; keeps its note unless given a new one."""
        row = self.rows[label]
        note = row.note if note is None else note
        row.state, row.note, row.seconds = state, note, seconds
        if state == RUNNING:
            row.began = time.time()
        self.beat()
        if not self.console.is_terminal:
            took = f" in {duration(seconds)}" if seconds is not None and state == "done" else ""
            self.say(f"{label}: {state}{took}{f'; {note}' if note else ''}")

    def say(self, line: str) -> None:
        """Prints a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def beat(self) -> None:
        """Writes the states and the time to `status.json`; from any thread."""
        with self._writing, contextlib.suppress(OSError):  # a full disk ends what cannot go on, not this
            content = {
                "state": self.status,
                "process": f"process {os.getpid()} on {socket.gethostname()}",
                "began": self.began,
                "time": time.time(),
                "steps": {label: asdict(row) for label, row in self.rows.items()},
            }
            contract.write_text(self.run_dir / STATUS, json.dumps(content) + "\n")

    def end(self, status: str) -> None:
        """Ends with the status of the run; what still seems to run was interrupted."""
        self.status = status
        for row in self.rows.values():
            if row.state == RUNNING:
                row.state, row.seconds = "interrupted", time.time() - row.began
        self.beat()

    def table(self) -> Table:
        """All steps with their states."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("stage", "state", "time", ""):
            table.add_column(name, justify="right" if name == "time" else "left", overflow="fold")
        for label, row in self.rows.items():
            seconds, note = row.seconds, row.note
            if row.state == RUNNING:
                seconds = time.time() - row.began
                note = processes.progress(self.run_dir / row.log) or "starting"
            took = duration(seconds) if seconds is not None else ""
            table.add_row(label, f"[{STYLES.get(row.state, 'dim')}]{row.state}[/]", took, note)
        return table

    @contextmanager
    def live(self) -> Iterator[None]:
        """Keeps the table on a terminal up to date."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.table, console=self.console, refresh_per_second=2):
            yield

    def finish(self, run_dir: Path, has_begun: bool) -> None:
        """Prints the table, unless it has been visible all along, and where the numbers are."""
        if not has_begun:
            self.say(f"nothing to do; {run_dir / 'summary.json'} has the numbers")
            return
        if not self.console.is_terminal:
            self.console.print(self.table())
        self.say(f"all numbers: {run_dir / 'summary.json'}")
