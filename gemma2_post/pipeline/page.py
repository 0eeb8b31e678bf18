"""The report of a run as a page: one HTML file that needs nothing else, and the same in Markdown for a model card."""

import base64
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gemma2_post.core import contract
from gemma2_post.pipeline.gates import passes
from gemma2_post.pipeline.view import duration, headline

HTML, MARKDOWN = "report.html", "report.md"
_PICTURES = {
    "front-reward.png": "Reward over KL to the start: the merge, from the start to its end, the policies, their "
    "averages.",
    "front-gold.png": "The same in gold, which nothing here was trained or chosen by. Do they agree?",
    "angles.png": "How far apart the policies had moved, by layer. At 90 degrees they share nothing.",
    "norms.png": "How far each had moved, and how far the merge moves.",
    "calibration.png": "Is the reward model as sure of held-out pairs as it is right?",
    "turns.png": "Is it as often right in longer conversations?",
}
"""By the name of a stage's picture: what it shows."""
_CURVES = {
    "sft": [("log.jsonl", "loss", "loss")],
    "distill": [("log.jsonl", "loss", "loss")],
    "reward": [("log.jsonl", "accuracy", "accuracy on the pairs it learns from")],
    "rlhf": [
        ("log.jsonl", "reward", "reward on the prompts it learns from"),
        ("watch.jsonl", "reward", "reward, held out"),
        ("watch.jsonl", "gold", "gold, held out"),
        ("watch.jsonl", "kl_to_start", "KL to the start, nats"),
    ],
}
"""By stage: the file, the key and the title of what is drawn over its steps."""
_MEASURES = {
    "gold": ("gold", "{:.2f}"),
    "reward": ("reward", "{:.2f}"),
    "kl_to_init": ("KL, nats", "{:.2f}"),
    "stop_rate": ("ends by itself", "{:.0%}"),
    "mean_tokens": ("tokens", "{:.1f}"),
    "distinct_bigrams": ("distinct bigrams", "{:.0%}"),
}
"""Of answers to the held-out prompts: title and format."""
_FURTHER = {
    "violations": "violations of safety",
    "memorised_exact": "memorised, exactly",
    "memorised_approximate": "memorised, within 10 %",
}


@dataclass
class Stage:
    """What the page says of one run of a stage."""

    name: str
    seconds: str
    headline: str
    gates: list[str]
    """That it has passed, with their bounds."""
    recipe: str
    output: str
    curves: list[tuple[str, Markup]]
    """Title and picture."""
    pictures: list[tuple[str, str, str]]
    """Path in the run folder, content in base64, and what it shows."""


def write(run_dir: Path, summary: dict, rows: list[dict]) -> list[Path]:
    """Writes both files.

    Args:
        rows: conversations to show, with the answers of the models by name.
    """
    environment = Environment(
        loader=PackageLoader("gemma2_post.pipeline", "templates"),
        autoescape=lambda name: name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stages = [
        _stage(run_dir, name, each.get("gates", {}))
        for name, each in summary["stages"].items()
        if (run_dir / name / contract.DONE).is_file()
    ]
    done = [contract.read_json(run_dir / stage.name / contract.DONE) for stage in stages]
    content = {
        "run": summary["run"],
        "status": summary["status"],
        "recipe": summary["recipe"],
        "took": duration(summary["wall_seconds"]),
        "date": date.today().isoformat(),
        "stages": stages,
        "pictured": [stage for stage in reversed(stages) if stage.pictures],
        "models": [title(name, summary["models"]) for name in summary["models"]],
        "measures": _measures(summary["models"]),
        "further": _further(summary["models"]),
        "contests": _contests(summary["models"]),
        "facts": _facts(summary),
        "conversations": [_conversation(row) for row in rows],
        "versions": done[-1]["fingerprint"]["versions"] if done else {},
        "commit": next((each["git_commit"] for each in done if each["git_commit"]), None),
    }
    paths = [run_dir / HTML, run_dir / MARKDOWN]
    for path in paths:
        contract.write_text(path, environment.get_template(path.name).render(content))
    return paths


def _stage(run_dir: Path, name: str, gates: dict[str, str]) -> Stage:
    folder = run_dir / name
    done = contract.read_json(folder / contract.DONE)
    pictures = [
        (f"{name}/{file}", base64.b64encode((folder / file).read_bytes()).decode(), what)
        for file, what in _PICTURES.items()
        if (folder / file).is_file()
    ]
    curves = [
        (title, curve(_series(folder / file, key)))
        for file, key, title in _CURVES.get(done["stage"], [])
        if len(_series(folder / file, key)) > 1
    ]
    recipe = yaml.safe_dump(done["fingerprint"]["recipe"], sort_keys=False, allow_unicode=True)
    return Stage(
        name,
        duration(done["wall_seconds"]),
        headline(done["stage"], done["metrics"]).replace("->", "→"),
        [f"{metric} {bound}" for metric, bound in gates.items() if passes(done["metrics"][metric], bound)],
        recipe,
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
    """A line with its first and its last value, as an SVG that takes the colours of the page."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    spread, length = high - low or 1.0, steps[-1] - steps[0] or 1
    places = [
        (4 + (width - 8) * (step - steps[0]) / length, height - 30 - (height - 44) * (value - low) / spread)
        for step, value in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    (first_x, first_y), (last_x, last_y) = places[0], places[-1]
    first_label = first_y + 13 if places[1][1] < first_y else first_y - 6  # below what rises
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img"><polyline points="{line}"/>'
        f'<circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="3"/>'
        f'<text x="{first_x:.1f}" y="{first_label:.1f}">{values[0]:.3g}</text>'
        f'<text x="{last_x:.1f}" y="{last_y - 6:.1f}" text-anchor="end">{values[-1]:.3g}</text>'
        f'<text x="{first_x:.1f}" y="{height - 3}">step {steps[0]:g}</text>'
        f'<text x="{last_x:.1f}" y="{height - 3}" text-anchor="end">{steps[-1]:g}</text></svg>'
    )


# --- models ---


def title(name: str, models: dict[str, dict[str, float]]) -> str:
    """A model's name; of the means over policies, that they are."""
    return f"{name}, mean" if any(other.startswith(f"{name}/") for other in models) else name


@dataclass
class Cell:
    """What is measured of a model, to read; empty where it is not measured of this one."""

    value: str = ""
    interval: str = ""
    """Of 95 %."""
    place: float = 0.0
    """Between the lowest and the highest model, from 0 to 1."""


def _measures(models: dict[str, dict[str, float]]) -> dict[str, list[Cell]]:
    """By title: a cell for each model."""
    measured = [(key, title, form) for key, (title, form) in _MEASURES.items()]
    return {title: _cells(models, key, form) for key, title, form in measured if _is_measured(models, key)}


def _further(models: dict[str, dict[str, float]]) -> dict[str, list[Cell]]:
    """Likewise: by number of turns, safety, memorisation, benchmarks."""
    keys = dict.fromkeys(key for each in models.values() for key in each)
    best = "gold" if _is_measured(models, "gold") else "reward"
    by_turns = [key for key in keys if key.startswith(f"{best}/turns-")]
    found = {}
    for key in by_turns if len(by_turns) > 1 else []:
        turns = key.rpartition("-")[2]
        found[f"{best}, {turns} turn{'s' if turns != '1' else ''}"] = _cells(models, key, "{:.2f}")
    for key, title in _FURTHER.items():
        if key in keys:
            found[title] = _cells(models, key, "{:.1%}")
    for key in keys:
        if key.startswith("benchmarks/") and key.count("/") == 1:
            found[key.removeprefix("benchmarks/")] = _cells(models, key, "{:.1%}")
    return found


def _is_measured(models: dict[str, dict[str, float]], key: str) -> bool:
    return any(key in each for each in models.values())


def _cells(models: dict[str, dict[str, float]], key: str, form: str) -> list[Cell]:
    values = [each[key] for each in models.values() if key in each]
    spread = max(values) - min(values) or 1
    return [
        Cell(form.format(each[key]), _interval(each, key, form), (each[key] - min(values)) / spread)
        if key in each
        else Cell()
        for each in models.values()
    ]


def _interval(model: dict[str, float], key: str, form: str) -> str:
    if error := model.get(f"{key}/standard_error"):
        return f"± {form.format(1.96 * error)}"
    if f"{key}/low" in model and model[f"{key}/low"] < model[f"{key}/high"]:
        return f"{form.format(model[f'{key}/low'])} to {form.format(model[f'{key}/high'])}"
    return ""


@dataclass
class Contest:
    """Who wins over the baseline, says one judge."""

    judge: str
    baseline: str
    wins: dict[str, dict[str, float]]
    """By model, in percent: rate, low, high, and where they are known length_controlled, and a judge's disagreement;
    and how many pairs it has given no verdict on."""


def win_rates(models: dict[str, dict[str, float]]) -> list[str]:
    """The keys of what has an interval; a baseline's name may have slashes in it."""
    keys = dict.fromkeys(key for each in models.values() for key in each if "win_rate_vs_" in key)
    return [key for key in keys if any(f"{key}/low" in each for each in models.values())]


def _contests(models: dict[str, dict[str, float]]) -> list[Contest]:
    contests = []
    for key in win_rates(models):
        judge, _, baseline = key.partition("win_rate_vs_")
        judge = {"": "the reward", "judge_": "the judge"}.get(judge, judge.removesuffix("_"))
        wins = {
            name: {"rate": 100 * each[key], "missing": each.get(f"{key}/missing", 0)}
            | {part: 100 * each[f"{key}/{part}"] for part in _PARTS if f"{key}/{part}" in each}
            for name, each in models.items()
            if f"{key}/low" in each and name != baseline
        }
        contests.append(Contest(judge, baseline, wins))
    return contests


_PARTS = ("low", "high", "length_controlled", "disagreement")


def _facts(summary: dict) -> list[tuple[str, str]]:
    """The run in a few numbers: what the last model is, beside the one that it is held against."""
    models = list(summary["models"])
    released = next((name for name in reversed(models) if name.startswith("warp")), models[-1] if models else None)
    if released is None:
        return []
    last, facts = summary["models"][released], []
    for key in win_rates(summary["models"]):
        other = key.removeprefix("win_rate_vs_")
        if key.startswith("win_rate_vs_") and other != released:
            facts.append((f"{last[key]:.0%}", f"of the answers of {released} beat those of {other}, says the reward"))
    first = summary["models"][models[0]]
    if "gold" in last and "gold" in first:
        facts.append((f"{first['gold']:.2f} → {last['gold']:.2f}", f"gold reward from {models[0]} to {released}"))
    facts.append((f"{last['kl_to_init']:.2f}", "nats per answer from where RLHF began"))
    facts.append((f"{last['stop_rate']:.0%}", "of its answers end by themselves"))
    return facts


def _conversation(row: dict) -> dict[str, object]:
    names = list(row["answers"])
    last = next((name for name in reversed(names) if name.startswith("warp")), names[-1])
    return {
        "turns": [(turn["role"], turn["content"]) for turn in row["prompt"]],
        "answers": [(name, row["answers"][name]) for name in dict.fromkeys([names[0], last])],
    }
