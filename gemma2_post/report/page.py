"""The report of a run as a page: one self-contained HTML file, and the same in Markdown for a model card."""

import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from gemma2_post.pipeline.gates import passes
from gemma2_post.report import curation, models
from gemma2_post.report.files import Files
from gemma2_post.report.terminal import duration
from gemma2_post.stage import contract
from gemma2_post.stage.command import first_grader
from gemma2_post.stage.fingerprint import keys_in
from gemma2_post.stage.overrides import in_words
from gemma2_post.stage.stages import command_of

HTML, MARKDOWN = "report.html", "report.md"


@dataclass
class Stage:
    """What the page says about one run of a stage."""

    name: str
    """Its folder in the run's and, of a member, what it overrides."""
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


def write(run_dir: Path, summary: dict, rows: list[dict], files: Files) -> list[Path]:
    """Writes both files and returns their paths.

    Args:
        summary: Content of the run's `summary.json`.
        rows: Conversations to show, with the models' answers by name.
        files: Reads the files of the stages.
    """
    environment = Environment(
        loader=PackageLoader("gemma2_post.report", "templates"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    done = {name: found for name in summary["stages"] if (found := files.done(run_dir / name))}
    stages = [
        _stage(run_dir, name, found, summary["stages"][name], summary["headlines"].get(name, ""), files)
        for name, found in done.items()
    ]
    content = {
        "run": summary["run"],
        "status": summary["status"],
        "recipe": summary["recipe"],
        "took": duration(summary["wall_seconds"]),
        "date": date.today().isoformat(),
        "stages": stages,
        "pictured": [stage for stage in reversed(stages) if stage.pictures],
        "curations": [
            removed
            for name, each in done.items()
            if each["stage"] == "curate" and (removed := curation.read(name, run_dir / name, files))
        ],
        "grader": summary["grader"],
        "models": [models.title(name, summary["models"]) for name in summary["models"]],
        "measures": models.measures(summary["models"], summary["grader"]),
        "additional": models.additional(summary["models"], summary["grader"]),
        "notes": models.notes(summary["models"]),
        "contests": models.contests(summary["models"]),
        "facts": models.facts(summary),
        "gains": models.gains(summary),
        "known_sets": models.known_sets(summary),
        "selections": models.selections(summary),
        "releases": summary["releases"],
        "failed": summary["failed"],
        "conversations": [_conversation(row) for row in rows],
        "versions": [*done.values()][-1]["fingerprint"]["versions"] if done else {},
        "commit": next((commit for each in done.values() if (commit := each.get("git_commit"))), None),
    }
    paths = [run_dir / HTML, run_dir / MARKDOWN]
    for path in paths:
        contract.write_text(path, environment.get_template(path.name).render(content))
    return paths


def _stage(run_dir: Path, name: str, done: dict, recorded: dict, headline: str, files: Files) -> Stage:
    """What the page says about a finished step.

    Args:
        done: Its stage file; pictures and curves are in its folder, too.
        recorded: What the run's `summary.json` says about it.
    """
    folder, metrics = run_dir / name, done["metrics"]
    command, grader = command_of(done["stage"]), first_grader(keys_in(done["fingerprint"]))
    shown: dict[str, str] = {}
    for pattern, what in command.pictures.items():
        for path in sorted(folder.glob(pattern)):
            shown.setdefault(path.name, what)
    pictures = [
        (f"{name}/{file}", content, what) for file, what in shown.items() if (content := files.picture(folder / file))
    ]
    curves = []
    for each in command.curves:
        points = _series(files.lines(folder / each.file, {"step": contract.NUMBER}), each.key.format(grader=grader))
        if len(points) > 1:
            curves.append((each.title.format(grader=grader), curve(points)))
    overrides = recorded.get("overrides")
    return Stage(
        f"{name} ({in_words(overrides)})" if overrides else name,
        duration(done["wall_seconds"]),
        headline.replace("->", "→"),
        [
            f"{metric} {bound}"
            for metric, bound in recorded.get("gates", {}).items()
            if metric in metrics and passes(metrics[metric], bound)
        ],
        yaml.safe_dump(keys_in(done["fingerprint"]), sort_keys=False, allow_unicode=True),
        done["output"],
        curves,
        pictures,
    )


def _series(entries: list[dict], key: str) -> list[tuple[float, float]]:
    """The finite values of a key, with their steps."""
    points = [(entry["step"], entry.get(key)) for entry in entries]
    return [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]


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
