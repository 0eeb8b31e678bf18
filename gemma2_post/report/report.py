"""The report of a run: its models side by side, conversations to read, a page to look at."""

from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gemma2_post.pipeline import summary
from gemma2_post.report import models, page
from gemma2_post.report.files import Files
from gemma2_post.report.terminal import terminal
from gemma2_post.stage.errors import UserError

_COLUMNS = {
    "reward": "{:.2f}", "kl_to_init": "{:.2f}", "stop_rate": "{:.0%}", "mean_tokens": "{:.1f}",
}  # fmt: skip
_LONGEST = 600
"""Characters of a turn that are shown."""
_SHOWN, _ON_PAGE = 2, 5
"""Numbers of conversations on the terminal and on the page."""


def report(run_dir: Path) -> None:
    """Prints the report, and writes it as `report.html` and `report.md`.

    Raises:
        UserError: The folder holds no run.
    """
    found, files, console = _summary(run_dir), Files(), terminal()
    rows = _answers(run_dir, found, files)
    if found["models"]:
        console.print(_models(found["models"], found["grader"]))
    for part, reason in found["failed"].items():
        console.print(f"{part} was not measured: {reason}", markup=False, highlight=False, soft_wrap=True)
    for pair, sentence in models.gains(found):
        console.print(f"{pair}: {sentence}", highlight=False)
    for known, right in models.known_sets(found):
        console.print(f"the reward model is right on {known}: {right}", highlight=False)
    for selection in models.selections(found):
        console.print(_selection(selection))
        console.print(f"{selection.name}: {selection.why}", markup=False, highlight=False, soft_wrap=True)
    for name, why in found["releases"].items():
        console.print(f"{name} released {why}", markup=False, highlight=False, soft_wrap=True)
    for row in to_show(rows, _SHOWN):
        console.print(_conversation(row))
    html, markdown = page.write(run_dir, found, to_show(rows, _ON_PAGE), files)
    console.print(f"to look at: {html}, {markdown}", highlight=False, soft_wrap=True)
    files.warn()


def write(run_dir: Path) -> list[Path]:
    """Writes the page of a run as HTML and as Markdown; returns their paths."""
    found, files = _summary(run_dir), Files()
    paths = page.write(run_dir, found, to_show(_answers(run_dir, found, files), _ON_PAGE), files)
    files.warn()
    return paths


def _summary(run_dir: Path) -> dict[str, Any]:
    """What the run recorded; runs of earlier versions lack some of it."""
    found = summary.read(run_dir)
    if found is None:
        raise UserError(f"{run_dir} has no {summary.FILE}; name the folder of a run, such as runs/tiny")
    return {
        "headlines": {},
        "grader": None,
        "gains": [],
        "reward_model": {},
        "failed": {},
        "selections": {},
        "releases": {},
    } | found


def _answers(run_dir: Path, found: dict, files: Files) -> list[dict]:
    """Prompts with the models' answers from the last evaluation; none if that is out of date or was set aside."""
    if not found["models"]:
        return []
    paths = [path for name in found["stages"] if (path := run_dir / name / "answers.jsonl").is_file()]
    return files.lines(paths[-1], {"prompt": list, "answers": dict}) if paths else []


def to_show(rows: list[dict], num: int) -> list[dict]:
    """Conversations whose answers differ between the first and the last model; first one of each number of turns."""
    changed = [row for row in rows if len({*(_ends(row).values())}) > 1]
    lengths = [len(row["prompt"]) for row in changed]
    first_of_each = sorted({lengths.index(length) for length in lengths})
    others = [i for i in range(len(changed)) if i not in first_of_each]
    return [changed[i] for i in [*first_of_each, *others][:num]]


def _ends(row: dict) -> dict[str, str]:
    """The answers of the first and the last model; none if no model has answered."""
    names = list(row["answers"])
    return {name: row["answers"][name] for name in (*names[:1], *names[-1:])}


def _models(measured: dict[str, dict[str, float]], grader: str | None) -> Table:
    win_rates = [key for key in models.win_rates(measured) if key.startswith("win_rate_vs_")]
    forms = ({grader: "{:.2f}"} if grader else {}) | _COLUMNS
    columns = {key: form for key, form in forms.items() if all(key in each for each in measured.values())}
    columns |= dict.fromkeys(win_rates, "{:.0%}")
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("model")
    for key in columns:
        table.add_column(key.replace("_", " "), justify="right")
    for name, each in measured.items():
        table.add_row(models.title(name, measured), *(form.format(each[key]) for key, form in columns.items()))
    return table


def _selection(selection: models.Selection) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(selection.columns):
        table.add_column(title, justify="right" if i else "left")
    for i, cells in enumerate(selection.rows):
        table.add_row(*cells, style="green" if i == selection.chosen else None)
    return table


def _conversation(row: dict) -> Padding:
    text = Text()
    for turn in row["prompt"]:
        text.append(f"{'>' if turn['role'] == 'user' else ' '} {_cut(turn['content'])}\n", style="bold")
    for name, answer in _ends(row).items():
        text.append(f"  {name}: ", style="dim").append(f"{_cut(answer)}\n")
    return Padding(text, (1, 0, 0, 0))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
