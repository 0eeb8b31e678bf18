"""What a run does with each step, and why: nothing, measure, go on, or make it again.

The rules are those of `contract.State`; the user's choice comes before them. What a new output replaces goes to
`RUN/replaced`, and comes back if the recipe does.
"""

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gemma2_post.pipeline.steps import Pipeline, Step
from gemma2_post.stage import contract
from gemma2_post.stage.contract import State
from gemma2_post.stage.disk import REPLACED
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.fingerprint import Fingerprint, made_by

_DATE = re.compile(r"\d{4}-\d\d-\d\d-\d{6}(-\d+)?")


class Choice(enum.Enum):
    """What the user says about a stage."""

    RERUN = "rerun"
    """Make it again, whatever is there; an unfinished run goes on."""
    KEEP = "keep"
    """Keep what is finished, whatever has changed."""
    FRESH = "fresh"
    """Start over."""


class Action(enum.Enum):
    """What a run does with a step."""

    KEEP = enum.auto()
    RESTORE = enum.auto()
    """Bring back an output that was replaced."""
    MEASURE = enum.auto()
    RESUME = enum.auto()
    RUN = enum.auto()

    @property
    def makes(self) -> bool:
        """Whether the step's output may change."""
        return self in (Action.RESTORE, Action.RESUME, Action.RUN)


@dataclass(frozen=True)
class Decision:
    """What a run does with a step, and why."""

    action: Action
    why: str = ""
    """In words, without the step's name; empty where there is nothing to say."""
    replaced: Path | None = None
    """The folder that comes back."""


def choices_of(pipeline: Pipeline, named: dict[Choice, list[str]]) -> dict[str, Choice]:
    """The user's choices by label of the step; a stage's name stands for all of its steps.

    Raises:
        UserError: There is no such stage, or it is named twice.
    """
    all_steps = [step for _, steps in pipeline.steps() for step in steps]
    found: dict[str, Choice] = {}
    for choice, names in named.items():
        for name in names:
            labels = [step.label for step in all_steps if name in (step.label, step.entry)]
            if not labels:
                pipeline.check_name(name)
            for label in labels:
                if found.setdefault(label, choice) != choice:
                    raise UserError(f"--{choice.value} {name}: it is named with --{found[label].value}, too; decide")
    return found


def decide(pipeline: Pipeline, step: Step, wanted: Fingerprint, choice: Choice | None) -> Decision:
    """What to do with a step whose inputs are as they will be.

    Raises:
        UserError: The user wants to keep what is not finished, or a file of the contract is damaged.
    """
    state, found = contract.state_of(step.folder, wanted)
    is_finished = (step.folder / contract.DONE).is_file()
    changes = found.output + found.measurements
    if choice == Choice.FRESH and state != State.NEW:
        return Decision(Action.RUN, "starts over, because --fresh says so")
    if choice == Choice.KEEP:
        if not is_finished:
            raise UserError(f"--keep {step.label}: it is not finished, so there is nothing to keep; remove that")
        why = "; ".join(changes + found.updates)
        return Decision(Action.KEEP, f"kept, because --keep says so, although {why}" if why else "")
    if choice == Choice.RERUN and is_finished:
        return Decision(Action.RUN, "runs again, because --rerun says so")
    if state == State.DONE:
        return Decision(Action.KEEP, _kept(step, found.updates))
    if state == State.UNMEASURED:
        return Decision(Action.MEASURE, f"measures again, because {'; '.join(found.measurements)}")
    if state == State.INTERRUPTED:
        begun = contract.read_begun(step.folder)
        assert begun is not None, "it was interrupted"
        by = f", which {made_by(begun['fingerprint'], found.updates)} has begun" if found.updates else ""
        return Decision(Action.RESUME, f"resumes{by}")
    if choice is None and (earlier := replaced_version(pipeline, step, wanted)):
        return Decision(Action.RESTORE, "what was replaced comes back", earlier)
    return Decision(Action.RUN, f"runs again, because {'; '.join(changes)}" if changes else "")


def _kept(step: Step, updates: list[str]) -> str:
    if not updates:
        return ""
    done = contract.read_done(step.folder)
    assert done is not None, "it is finished"
    return f"kept, made by {made_by(done['fingerprint'], updates)}; --rerun {step.entry} makes it again"


def forecast(
    pipeline: Pipeline, until: str | None, choices: dict[str, Choice]
) -> list[tuple[Step, Decision, list[str]]]:
    """What a run would do with each step, with the labels of the steps that it would have to wait for."""
    made: dict[str, str] = {}
    found = []
    for _, steps in pipeline.steps(until):
        for step in steps:
            named = [each for value in step.values.values() for each in _named(value)] + [*map(str, step.after)]
            reads = sorted(label for folder, label in made.items() if any(_is_in(folder, each) for each in named))
            decision = decide(pipeline, step, step.command.fingerprint(step.keys), choices.get(step.label))
            if (reads and choices.get(step.label) != Choice.KEEP) or decision.action.makes:
                made[str(step.folder)] = step.label
            found.append((step, decision, reads))
    return found


def _named(value: object) -> list[object]:
    """The paths that a key may name: of a model, of several, or of sources of data."""
    listed = value if isinstance(value, list) else [value]
    return [each.get("path") if isinstance(each, dict) else each for each in listed]


def _is_in(folder: str, named: object) -> bool:
    """Whether a key names a folder, or a model or file in it."""
    return isinstance(named, str) and Path(named).is_relative_to(folder)


# --- what was replaced ---


def replaced_folders(run_dir: Path) -> list[Path]:
    """The outputs that were replaced, the oldest first."""
    found = [path for path in (run_dir / REPLACED).glob("*") if path.is_dir()]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def replaced_version(pipeline: Pipeline, step: Step, wanted: Fingerprint) -> Path | None:
    """The newest replaced output that is wanted and finished, however it was measured; else one to resume."""
    name = f"{_name(pipeline, step)}-"
    versions = [
        folder
        for folder in reversed(replaced_folders(pipeline.run_dir))
        if folder.name.startswith(name) and _DATE.fullmatch(folder.name.removeprefix(name))
    ]
    states = [contract.state_of(folder, wanted)[0] for folder in versions]
    for usable in ((State.DONE, State.UNMEASURED), (State.INTERRUPTED,)):
        for folder, state in zip(versions, states, strict=True):
            if state in usable:
                return folder
    return None


def replace(pipeline: Pipeline, step: Step) -> Path | None:
    """Moves a step's folder to the replaced ones; returns where it is, None if there is nothing worth it."""
    if not ((step.folder / contract.DONE).is_file() or contract.has_progress(step.folder)):
        contract.discard(step.folder)
        return None
    folder = pipeline.run_dir / REPLACED
    folder.mkdir(exist_ok=True)
    stem = f"{_name(pipeline, step)}-{datetime.now():%Y-%m-%d-%H%M%S}"
    target = next(path for path in _numbered(folder / stem) if not path.exists())
    step.folder.rename(target)
    return target


def _numbered(path: Path) -> Iterable[Path]:
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in range(2, 1000))


def _name(pipeline: Pipeline, step: Step) -> str:
    return str(step.folder.relative_to(pipeline.run_dir)).replace("/", "-")
