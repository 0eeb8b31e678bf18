"""Shows a run as it goes: a live table on a terminal, a line for each event anywhere else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gemma2_post.pipeline import processes

_STYLES = {"running": "cyan", "done": "green", "up to date": "green", "failed": "red", "below its gate": "red"}


@dataclass
class Row:
    """The state of a step."""

    log: Path
    state: str = "waiting"
    began: float = 0.0
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

    def begin(self, logs: dict[str, Path]) -> None:
        """Begins with the steps of a run, each with its log."""
        self.rows = {label: Row(log) for label, log in logs.items()}

    def set(self, label: str, state: str, note: str | None = None, seconds: float | None = None) -> None:
        """Shows a step's new state; keeps its note unless given a new one."""
        row = self.rows[label]
        note = row.note if note is None else note
        row.state, row.note, row.seconds = state, note, seconds
        if state == "running":
            row.began = time.monotonic()
        if not self.console.is_terminal:
            took = f" in {duration(seconds)}" if seconds is not None and state == "done" else ""
            self.say(f"{label}: {state}{took}{f'; {note}' if note else ''}")

    def say(self, line: str) -> None:
        """Prints a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """All steps with their states."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("stage", "state", "time", ""):
            table.add_column(name, justify="right" if name == "time" else "left", overflow="fold")
        for label, row in self.rows.items():
            seconds, note = row.seconds, row.note
            if row.state == "running":
                seconds = time.monotonic() - row.began
                note = processes.progress(row.log) or "starting"
            took = duration(seconds) if seconds is not None else ""
            table.add_row(label, f"[{_STYLES.get(row.state, 'dim')}]{row.state}[/]", took, note)
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
