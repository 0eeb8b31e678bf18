"""A stage as a command: its recipe, its checks, its main function, and the facts that other code needs about it."""

import gc
import inspect
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gemma2_post.stage import card, contract, fingerprint, launcher, recipe
from gemma2_post.stage.command_line import read
from gemma2_post.stage.contract import State
from gemma2_post.stage.disk import check_folder
from gemma2_post.stage.errors import UserError, located, reported
from gemma2_post.stage.fingerprint import Fingerprint
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.paths import Reference, with_members
from gemma2_post.stage.quiet import silence_libraries
from gemma2_post.stage.recipe import R
from gemma2_post.stage.reference import describe_keys, wrapped
from gemma2_post.stage.work import Pass, Rows

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import Gemma2Config

R_co = TypeVar("R_co", bound="DataclassInstance", covariant=True)

Parts = dict[str, float]
"""Memory in bytes, by what it holds."""
GRADER = "{grader}"
"""Placeholder in a headline or a curve: the recipe's first grader, or the metric that its key `headline` names."""


@dataclass
class Stage:
    """One run of a stage: its name, where its recipe comes from, and what its output depends on."""

    name: str
    where: str
    """The recipe's file; error messages begin with it."""
    output_dir: Path
    fingerprint: Fingerprint
    began: float = field(default_factory=time.monotonic)

    @property
    def is_made(self) -> bool:
        """Whether its output is there already, so that it only has to be measured in another way."""
        return (self.output_dir / contract.DONE).is_file()

    def finish(self, facts: dict[str, object], metrics: dict[str, float], summary: str = "") -> None:
        """Marks the output as done, ends its model card, and prints a line; see `contract.finish`."""
        seconds = time.monotonic() - self.began
        contract.finish(self.output_dir, self.name, self.fingerprint, seconds, facts, metrics)
        card.end(self.output_dir)
        print(f"{self.output_dir}: done in {seconds:.0f} s" + (f"; {summary}" if summary else ""))


@dataclass(frozen=True)
class Curve:
    """A curve over a stage's steps, for the report."""

    file: str
    """File in the stage's output, one JSON record per line."""
    key: str
    title: str


@dataclass(frozen=True)
class Checked(Generic[R_co]):
    """A recipe that has passed its checks, and what they found."""

    recipe: R_co
    launcher: Launcher
    models: "dict[str, Gemma2Config | None]"
    """Configs of the models that it names, by key; None if a config is only on the Hub."""
    num_gpus: int = 1
    """GPUs over which a single-process stage spreads each model."""


@dataclass(frozen=True)
class Command(Generic[R]):
    """A stage as a command, and all facts about the stage; they are stated here and nowhere else."""

    name: str
    recipe: type[R]
    main: Callable[[Stage, R], None]
    metrics: Callable[[R], set[str]]
    """Names of the metrics it will measure, without breakdowns such as `accuracy/names`."""
    check: Callable[[R, Launcher], None]
    """Refuses combinations that cannot work."""
    complete: Callable[[R, Launcher], None] = lambda recipe, launcher: None
    """Fills in what follows from the recipe and the launcher."""
    implied: Callable[[dict[str, object]], dict[str, object]] = lambda values: {}
    """Keys that follow from the recipe's keys and override them."""
    decisive: Callable[[dict[str, object]], dict[str, object]] = lambda values: {}
    """Keys, with their values, that decide the output given the recipe's keys, although they usually only measure."""
    digest_of: Callable[[Reference], str | None] = lambda named: contract.input_digest(named.name)
    """Content hash of what a key names, as far as it decides the output; None if it is not on this machine."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Keys that must not be set, with the reason."""
    needs_config: bool = True
    """Whether a recipe file is required; if not, the command line can give all keys."""
    row_formats: Mapping[str, Any] = field(default_factory=dict)
    """For each key that names data: the `RowFormat` (of `data/rows.py`) that its rows are read as."""
    is_filter: bool = False
    """Whether it reads its data only to remove rows from it: invalid ones, and what other stages test on."""
    is_test: bool = False
    """Whether it measures on prompts that no earlier stage of a pipeline may have read."""
    is_selection: bool = False
    """Whether it selects models on prompts that no earlier stage of a pipeline may have trained on."""
    headline: Sequence[str] = ()
    """The metrics that can say how the stage went; the first one that was measured is used."""
    below_gate: str = "See its metrics.json."
    """What to look at when a gate fails."""
    curves: Sequence[Curve] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Image files in its output that the report shows, with their captions."""
    needed_models: Sequence[str] = ("model_name_or_path",)
    """Keys of the models whose shapes determine its memory."""
    memory: Callable[[Checked[R]], dict[str, Parts]] = lambda checked: {"working": {}}
    """Memory of one process in each phase."""
    disk: Callable[[Checked[R]], tuple[float, float]] = lambda checked: (0, 0)
    """Bytes of its output, and the most bytes that its checkpoints take at once."""
    work: Callable[[Checked[R], Rows], list[Pass]] = lambda checked, rows: []
    """The passes of one process through models; raises `UnknownRows` if they depend on an unknown number of rows."""

    @property
    def documentation(self) -> str:
        """The docstring of the stage's module."""
        return inspect.getdoc(inspect.getmodule(self.main)) or ""

    @property
    def module(self) -> str:
        """The full name of the stage's module."""
        return self.main.__module__

    def launch(self) -> None:
        """What `python -m` does: runs the stage, unless its output is already there."""
        if "--help" in sys.argv or "-h" in sys.argv:
            print(wrapped(self.documentation), describe_keys(self.recipe, self.refused), sep="\n\n")
            return
        silence_libraries()
        with reported():
            gc.disable()  # an eighth of the start: imports make half a million objects that stay
            stage, recipe = self.parse(sys.argv[1:])
            gc.freeze()
            gc.enable()
            state, found = contract.state_of(stage.output_dir, stage.fingerprint)
            if state == State.DONE:
                kept = f"is kept, although {'; '.join(found.updates)}; move it away to make it again"
                print(f"{stage.output_dir} {kept if found.updates else 'is up to date'}")
            else:
                self.run(stage, recipe)
            launcher.leave()

    def parse(self, arguments: Sequence[str]) -> tuple[Stage, R]:
        """The stage and its recipe, with every key and combination checked; loads no models and no data."""

        def is_boolean(name: str) -> bool | None:
            key = recipe.keys_of(self.recipe).get(name)
            return recipe.is_boolean(key.hint) if key else None

        where, values = read(arguments, self.needs_config, is_boolean)
        values = with_members(self.recipe, values)
        with located(where):
            output_dir, built = self.build(values)
        return Stage(self.name, where, output_dir, self.fingerprint(values)), built

    def build(self, values: dict[str, object], launched_by: Launcher | None = None) -> tuple[Path, R]:
        """The output folder and the recipe, checked and completed.

        Args:
            launched_by: How the stage will be started, if not as this process was.
        """
        recipe.refuse(values, self.refused)
        more = self.implied(values)
        refused = {key: reason for key, reason in self.refused.items() if key not in more}
        built = recipe.build(self.recipe, values | more, refused)
        if not values.get("output_dir"):
            raise UserError(f"output_dir is missing; add `output_dir: runs/NAME/{self.name}`")
        output_dir = Path(str((values | more)["output_dir"]))
        check_folder(output_dir, "output_dir")
        launched_by = launched_by or launcher.of_this_process(getattr(built, "training", None))
        self.check(built, launched_by)
        self.complete(built, launched_by)
        return output_dir, built

    def run(self, stage: Stage, built: R) -> None:
        """Runs a checked recipe; refuses a folder with the output or checkpoints of another recipe."""
        with located(stage.where):
            state, found = contract.state_of(stage.output_dir, stage.fingerprint)
            # Without checkpoints, the stage itself knows what it can use of an unfinished run.
            if state == State.OTHER and (stage.is_made or contract.checkpoints(stage.output_dir)):
                raise UserError(
                    f"output_dir {stage.output_dir} was made by a different recipe ({'; '.join(found.output[:3])}); "
                    "choose another output_dir, or move that folder away"
                )
            _announce(stage, built, state)
            self.main(stage, built)

    def fingerprint(self, values: dict[str, object]) -> Fingerprint:
        """What the output depends on, given these keys."""
        decisive = self.decisive(values)
        return fingerprint.fingerprint(self.recipe, self.main, values, self.digest_of, decisive)

    def headline_of(self, values: dict[str, object], metrics: dict[str, float]) -> str:
        """The most important metric, before and after: `accuracy 0.57 -> 0.82`.

        Args:
            values: The keys of the recipe.
        """
        for name in (each.format(grader=first_grader(values)) for each in self.headline):
            if name in metrics:
                before = f"{metrics[f'{name}_before']:.3g} -> " if f"{name}_before" in metrics else ""
                return f"{name} {before}{metrics[name]:.3g}"
        return ""


def _announce(stage: Stage, built: object, state: State) -> None:
    """Prints what begins here, and on what; once on each machine."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    verb = {State.INTERRUPTED: "goes on", State.UNMEASURED: "is measured again"}.get(state, "begins")
    training = getattr(built, "training", None)
    num_processes = launcher.of_this_process(training).num_processes
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    device = f" on {training.device.type}" if training else ""
    # Flushed, so that it also comes first where a library's progress bar goes to the same file.
    print(f"{stage.output_dir}: {stage.name} {verb}, from {stage.where}, with {processes}{device}", flush=True)


def first_grader(values: dict[str, object]) -> str | None:
    """The value of the recipe's key `headline`, or the name of its first grader."""
    if values.get("headline"):
        return str(values["headline"])
    graders = values.get("graders")
    return str(graders[0]).rpartition(":")[2] if isinstance(graders, list) and graders else None
