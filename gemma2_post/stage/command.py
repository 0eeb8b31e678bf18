"""A stage as a command: its recipe, its checks, what it does, and every fact that others ask of it."""

import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from gemma2_post.stage import contract, fingerprint, launcher, recipe
from gemma2_post.stage.command_line import read
from gemma2_post.stage.errors import UserError, located, reported
from gemma2_post.stage.fingerprint import Fingerprint
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.paths import with_policies
from gemma2_post.stage.reference import describe_keys

if TYPE_CHECKING:
    from transformers import Gemma2Config

R = TypeVar("R")
Parts = dict[str, float]
"""Bytes by what they hold."""
GRADER = "{grader}"
"""In a headline or a curve: the recipe's first grader, or the metric that its key `headline` names."""


@dataclass
class Stage:
    """One run of a stage: its name, where its recipe comes from, and what its output depends on."""

    name: str
    where: str
    """The recipe's file, which errors name first."""
    output_dir: Path
    fingerprint: Fingerprint
    began: float = field(default_factory=time.monotonic)

    def finish(self, facts: dict[str, object], metrics: dict[str, float], summary: str = "") -> None:
        """Marks the output as done, and says so; see `contract.finish`."""
        seconds = time.monotonic() - self.began
        contract.finish(self.output_dir, self.name, self.fingerprint, seconds, facts, metrics)
        print(f"{self.output_dir}: done in {seconds:.0f} s" + (f"; {summary}" if summary else ""))


@dataclass(frozen=True)
class Curve:
    """What the report draws of a stage over its steps."""

    file: str
    """Of the stage's output, a record a line."""
    key: str
    title: str


@dataclass
class Checked(Generic[R]):
    """A recipe that may start, and what its checks have found."""

    recipe: R
    launcher: Launcher
    models: "dict[str, Gemma2Config | None]"
    """By key: the configs of the models that it names; None for one that only the Hub knows."""
    num_gpus: int = 1
    """Over which a stage of one process spreads each model."""


@dataclass(frozen=True)
class Command(Generic[R]):
    """A stage as a command, and its facts: what is to be known of a stage stands here and nowhere else."""

    name: str
    recipe: type[R]
    main: Callable[[Stage, R], None]
    metrics: Callable[[R], set[str]]
    """The names of what it will measure; without those broken down, such as `accuracy/names`."""
    check: Callable[[R, Launcher], None]
    """Refuses what cannot work together."""
    complete: Callable[[R, Launcher], None] = lambda recipe, launcher: None
    """Fills in what follows from the recipe and the launcher."""
    implied: Callable[[dict[str, object]], dict[str, object]] = lambda values: {}
    """Keys that follow from the recipe's keys, and take their place."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Keys that must not be set, with the reason."""
    needs_config: bool = True
    """Whether keys must come from a file; without it, they may come from the command line alone."""
    row_formats: Mapping[str, Sequence[set[str]]] = field(default_factory=dict)
    """By key that names data: the columns that make a row of it, one set for each known format."""
    headline: Sequence[str] = ()
    """The metric that says how the stage went: the first of these that it has measured."""
    below_gate: str = "See its metrics.json."
    """What to look at when a gate is not passed."""
    curves: Sequence[Curve] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Files of its output that the report shows, and what each of them says."""
    needed_models: Sequence[str] = ("model_name_or_path",)
    """The keys of the models whose shapes decide its memory."""
    memory: Callable[[Checked[R]], dict[str, Parts]] = lambda checked: {"working": {}}
    """What one process holds in each phase."""
    disk: Callable[[Checked[R]], tuple[float, float]] = lambda checked: (0, 0)
    """Bytes of its output, and of the most checkpoints that exist at once."""

    @property
    def documentation(self) -> str:
        return inspect.getdoc(inspect.getmodule(self.main)) or ""

    @property
    def module(self) -> str:
        return self.main.__module__

    def launch(self) -> None:
        """What `python -m` does: runs the stage, unless its output is already there."""
        if "--help" in sys.argv or "-h" in sys.argv:
            print(self.documentation, describe_keys(self.recipe, self.refused), sep="\n\n")
            return
        with reported():
            stage, recipe = self.parse(sys.argv[1:])
            if contract.is_done(stage.output_dir, stage.fingerprint):
                print(f"{stage.output_dir} is up to date")
                return
            self.run(stage, recipe)

    def parse(self, arguments: Sequence[str]) -> tuple[Stage, R]:
        """The stage and its recipe, every key and combination checked; nothing is loaded."""

        def is_boolean(name: str) -> bool:
            key = recipe.keys_of(self.recipe).get(name)
            return key is not None and recipe.is_boolean(key.hint)

        where, values = read(arguments, self.needs_config, is_boolean)
        values = with_policies(self.recipe, values)
        with located(where):
            output_dir, built = self.build(values)
        return Stage(self.name, where, output_dir, self.fingerprint(values)), built

    def build(self, values: dict[str, object], launched_by: Launcher | None = None) -> tuple[Path, R]:
        """The folder of the output, and the recipe, checked and completed.

        Args:
            launched_by: what will start it, if that is not what has started this process.
        """
        recipe.refuse(values, self.refused)
        more = self.implied(values)
        refused = {key: reason for key, reason in self.refused.items() if key not in more}
        built = recipe.build(self.recipe, values | more, refused)
        if not values.get("output_dir"):
            raise UserError(f"output_dir is missing; add `output_dir: runs/NAME/{self.name}`")
        launched_by = launched_by or launcher.of_this_process(getattr(built, "training", None))
        self.check(built, launched_by)
        self.complete(built, launched_by)
        return Path(str((values | more)["output_dir"])), built

    def run(self, stage: Stage, built: R) -> None:
        """Runs a checked recipe; a folder with the output, or the checkpoints, of another recipe is refused."""
        with located(stage.where):
            if changes := contract.what_changed(stage.output_dir, stage.fingerprint):
                raise UserError(
                    f"output_dir {stage.output_dir} was made by a different recipe ({'; '.join(changes[:3])}); "
                    "choose another output_dir, or move that folder away"
                )
            self.main(stage, built)

    def fingerprint(self, values: dict[str, object]) -> Fingerprint:
        """What the output depends on, with these keys."""
        return fingerprint.fingerprint(self.recipe, self.main, values, contract.input_digest)

    def headline_of(self, values: dict[str, object], metrics: dict[str, float]) -> str:
        """The number that matters, before and after: `accuracy 0.57 -> 0.82`.

        Args:
            values: the keys of the recipe.
        """
        for name in (each.format(grader=first_grader(values)) for each in self.headline):
            if name in metrics:
                before = f"{metrics[f'{name}_before']:.3g} -> " if f"{name}_before" in metrics else ""
                return f"{name} {before}{metrics[name]:.3g}"
        return ""


def first_grader(values: dict[str, object]) -> str | None:
    """What a recipe calls its headline, or the name of its first grader."""
    if values.get("headline"):
        return str(values["headline"])
    graders = values.get("graders")
    return str(graders[0]).rpartition(":")[2] if isinstance(graders, list) and graders else None
