"""The report of a run as a page: one self-contained HTML file, and the same in Markdown for a model card."""

import base64
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from gemma2_post.pipeline.gates import passes
from gemma2_post.report import models
from gemma2_post.report.terminal import duration
from gemma2_post.stage import contract
from gemma2_post.stage.command import first_grader
from gemma2_post.stage.stages import command_of

HTML, MARKDOWN = "report.html", "report.md"


@dataclass
class Stage:
    """What the page says about one run of a stage."""

    name: str
    seconds: str
    headline: str
    gates: list[str]
    """The gates that it passed, with their bounds."""
    recipe: str
    output: str
    curves: list[tuple[str, Markup]]
    """Titles and pictures."""
    pictures: list[tuple[str, str, str]]
    """Paths in the run folder, contents in base64, and captions."""


def write(run_dir: Path, summary: dict, rows: list[dict]) -> list[Path]:
    """Writes both files and returns their paths.

    Args:
        summary: Content of the run's `summary.json`.
        rows: Conversations to show, with the models' answers by name.
    """
    environment = Environment(
        loader=PackageLoader("gemma2_post.report", "templates"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stages = [
        _stage(run_dir, name, each.get("gates", {}), summary["headlines"].get(name, ""))
        for name, each in summary["stages"].items()
        if (run_dir / name / contract.DONE).is_file()
    ]
    done = [contract.read_done(run_dir / stage.name) for stage in stages]
    content = {
        "run": summary["run"],
        "status": summary["status"],
        "recipe": summary["recipe"],
        "took": duration(summary["wall_seconds"]),
        "date": date.today().isoformat(),
        "stages": stages,
        "pictured": [stage for stage in reversed(stages) if stage.pictures],
        "grader": summary["grader"],
        "models": [models.title(name, summary["models"]) for name in summary["models"]],
        "measures": models.measures(summary["models"], summary["grader"]),
        "additional": models.additional(summary["models"], summary["grader"]),
        "contests": models.contests(summary["models"]),
        "facts": models.facts(summary),
        "conversations": [_conversation(row) for row in rows],
        "versions": done[-1]["fingerprint"]["versions"] if done else {},
        "commit": next((each["git_commit"] for each in done if each["git_commit"]), None),
    }
    paths = [run_dir / HTML, run_dir / MARKDOWN]
    for path in paths:
        contract.write_text(path, environment.get_template(path.name).render(content))
    return paths


def _stage(run_dir: Path, name: str, gates: dict[str, str], headline: str) -> Stage:
    """What the page says about a finished step, from the files in its folder."""
    folder = run_dir / name
    done = contract.read_done(folder)
    command, grader = command_of(done["stage"]), first_grader(done["fingerprint"]["recipe"])
    shown: dict[str, str] = {}
    for pattern, what in command.pictures.items():
        for path in sorted(folder.glob(pattern)):
            shown.setdefault(path.name, what)
    pictures = [
        (f"{name}/{file}", base64.b64encode((folder / file).read_bytes()).decode(), what)
        for file, what in shown.items()
    ]
    curves = []
    for each in command.curves:
        points = _series(folder / each.file, each.key.format(grader=grader))
        if len(points) > 1:
            curves.append((each.title.format(grader=grader), curve(points)))
    return Stage(
        name,
        duration(done["wall_seconds"]),
        headline.replace("->", "→"),
        [f"{metric} {bound}" for metric, bound in gates.items() if passes(done["metrics"][metric], bound)],
        yaml.safe_dump(done["fingerprint"]["recipe"], sort_keys=False, allow_unicode=True),
        done["output"],
        curves,
        pictures,
    )


def _series(path: Path, key: str) -> list[tuple[float, float]]:
    if not path.is_file():
        return []
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(entry["step"], entry[key]) for entry in entries if key in entry]


def curve(points: list[tuple[float, float]], width: int = 260, height: int = 84) -> Markup:
    """A line with its first and last value, as an SVG in the colors of the page."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    spread, length = high - low or 1.0, steps[-1] - steps[0] or 1
    places = [
        (4 + (width - 8) * (step - steps[0]) / length, height - 30 - (height - 44) * (value - low) / spread)
        for step, value in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    (first_x, first_y), (last_x, last_y) = places[0], places[-1]
    first_label = first_y + 13 if places[1][1] < first_y else first_y - 6  # below a curve that rises
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img"><polyline points="{line}"/>'
        f'<circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="3"/>'
        f'<text x="{first_x:.1f}" y="{first_label:.1f}">{values[0]:.3g}</text>'
        f'<text x="{last_x:.1f}" y="{last_y - 6:.1f}" text-anchor="end">{values[-1]:.3g}</text>'
        f'<text x="{first_x:.1f}" y="{height - 3}">step {steps[0]:g}</text>'
        f'<text x="{last_x:.1f}" y="{height - 3}" text-anchor="end">{steps[-1]:g}</text></svg>'
    )


def _conversation(row: dict) -> dict[str, object]:
    names = list(row["answers"])
    return {
        "turns": [(turn["role"], turn["content"]) for turn in row["prompt"]],
        "answers": [(name, row["answers"][name]) for name in dict.fromkeys([names[0], names[-1]])],
    }
