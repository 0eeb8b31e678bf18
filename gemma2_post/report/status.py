"""Shows what a run does now, from the files in its folder: also from another machine of a shared disk."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gemma2_post.pipeline import processes
from gemma2_post.report.terminal import RUNNING, STATUS, STYLES, Row, duration
from gemma2_post.stage import contract
from gemma2_post.stage.command import first_grader
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.fingerprint import keys_in
from gemma2_post.stage.stages import STAGES, command_of

SILENT = 120.0
"""Seconds without a sign of life after which it is missed: many times the run's, and what a shared disk may delay."""
_APART = 2.0
"""Seconds between two looks."""
_KEYS: contract.Keys = {
    "state": str, "process": str, "began": contract.NUMBER, "time": contract.NUMBER, "steps": dict
}  # fmt: skip
_HOW_FAR_KEYS: contract.Keys = {
    **dict.fromkeys(("time", "step", "max_steps", "seconds_left", "memory_gb"), contract.NUMBER),
    "logged": dict,
}


def show(run_dir: Path, console: Console, follows: bool) -> None:
    """Prints what a run does; or keeps it on the screen until the run ends or is lost, or until Ctrl-C.

    Raises:
        UserError: There is no run in the folder, or one of its files is damaged.
    """
    status = read(run_dir)
    if not follows:
        console.print(page(run_dir, status))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(page(run_dir, status), console=console) as live:
        while status["state"] == RUNNING and not is_lost(status):
            time.sleep(_APART)
            status = read(run_dir)
            live.update(page(run_dir, status))


def read(run_dir: Path) -> dict[str, Any]:
    """What the run last wrote about itself, with its steps as `Row`s."""
    advice = "remove it; the next run writes it again"
    status = contract.read_json(run_dir / STATUS, _KEYS, advice)
    if status is None:
        raise UserError(f"{run_dir}: there is no {STATUS}, which a run writes; name the run_dir of a run")
    try:
        rows = {label: Row(**row) for label, row in status["steps"].items()}
    except TypeError as error:
        raise UserError(f"{run_dir / STATUS}: the file is damaged (in its steps); {advice}") from error
    if strange := [row.stage for row in rows.values() if row.stage not in STAGES]:
        raise UserError(f"{run_dir / STATUS}: {strange[0]} is no stage; {advice}")
    return status | {"steps": rows}


def is_lost(status: Mapping[str, Any]) -> bool:
    """Whether a run that has not ended gives no sign of life any more: it was killed, or its machine is gone."""
    return status["state"] == RUNNING and time.time() - status["time"] > SILENT


def page(run_dir: Path, status: Mapping[str, Any]) -> Group:
    """The state of the run, and a table of its steps."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "state", "time", "progress", "left", "tokens/s", "peak GB", "last measured"):
        table.add_column(name, justify="right" if name in ("time", "left", "tokens/s", "peak GB") else "left")
    now = status["time"] if is_lost(status) else time.time()
    for label, row in status["steps"].items():
        state = "lost" if row.state == RUNNING and is_lost(status) else row.state
        seconds = now - row.began if row.state == RUNNING else row.seconds
        cells = _of_running(run_dir, row) if row.state == RUNNING else ["", "", "", "", row.note]
        took = "" if seconds is None else duration(seconds)
        table.add_row(label, Text(state, STYLES.get(state, "dim")), took, *map(Text, cells))
    return Group(Text(_headline(run_dir, status)), table)


def _headline(run_dir: Path, status: Mapping[str, Any]) -> str:
    silent = time.time() - status["time"]
    if is_lost(status):
        return f"{run_dir}: no sign of life for {_long(silent)} from {status['process']}; the same command resumes it"
    if status["state"] == RUNNING:
        return f"{run_dir}: running for {duration(time.time() - status['began'])} as {status['process']}"
    return f"{run_dir}: {status['state']} after {duration(status['time'] - status['began'])}, {_long(silent)} ago"


def _of_running(run_dir: Path, row: Row) -> list[str]:
    """Progress, time left, tokens per second, peak memory, and the last measurement of a step."""
    folder, log = run_dir / row.folder, run_dir / row.log
    how_far = contract.read_json(folder / contract.HOW_FAR, _HOW_FAR_KEYS)
    if how_far and how_far["time"] < row.began:  # of an attempt before this one
        how_far = None
    measured = _last_measured(folder, row, how_far)
    signs = [row.began, how_far["time"] if how_far else 0, log.stat().st_mtime if log.is_file() else 0]
    if (silent := time.time() - max(signs)) > SILENT:
        measured = f"no output for {_long(silent)}" + (f"; {measured}" if measured else "")
    if not how_far:
        progress, _, left = (processes.progress(log) or "starting").partition(", ")
        return [progress, left.removesuffix(" left"), "", "", measured]
    speed = how_far.get("tokens_per_second")
    return [
        f"{how_far['step']}/{how_far['max_steps']}",
        duration(how_far["seconds_left"]) if how_far["step"] < how_far["max_steps"] else "",
        f"{speed:,.0f}" if speed else "",
        f"{how_far['memory_gb']:.1f}",
        measured,
    ]


def _last_measured(folder: Path, row: Row, how_far: Mapping[str, Any] | None) -> str:
    """The newest values of the stage's curves: held out, if it watches itself as it trains, else of its last log."""
    begun = contract.read_begun(folder)
    recipe = keys_in(begun["fingerprint"]) if begun else {}
    watched = contract.read_lines(folder / "watch.jsonl", {"step": int}, is_appended_to=False)
    file, record = "watch.jsonl", watched[-1] if watched else {}
    if not watched:
        file, record = "log.jsonl", how_far["logged"] if how_far else {}
    keys = [each.key.format(grader=first_grader(recipe)) for each in command_of(row.stage).curves if each.file == file]
    values = ", ".join(f"{key} {record[key]:.3g}" for key in keys if isinstance(record.get(key), int | float))
    return f"{values} at step {record['step']}" if values and "step" in record else values


def _long(seconds: float) -> str:
    """A duration in its largest unit: `12 min`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
