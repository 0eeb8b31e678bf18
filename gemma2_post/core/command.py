"""From a command line to a stage's `main`: the recipe is read and checked; what is up to date is not made again."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2_post.core import contract, recipe
from gemma2_post.core.errors import UserError, reported
from gemma2_post.core.launcher import Launcher


@dataclass
class Stage:
    """One run of a stage: its name, the recipe it was given, and what its output depends on."""

    name: str
    where: str
    output_dir: Path
    fingerprint: dict
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Command:
    """A stage as a command: the keys of its recipe, its checks, and what it does."""

    name: str
    main: Callable[..., None]
    """Called with the `Stage` and the dataclasses."""
    classes: Sequence[type]
    """Whose fields are the recipe's keys: a TRL config, `ModelConfig`, `StageArguments`, ..."""
    documentation: str | None
    metrics: Callable[..., set[str]]
    """Of the dataclasses: the names of what it will have measured, those broken down (`accuracy/names`) left out."""
    check: Callable[..., None]
    """Of the recipe's name, the launcher (None: as this process was started) and the dataclasses: refuses what cannot
    work together, fills in what follows."""
    refused: dict[str, str] = field(default_factory=dict)
    """Keys that must not be set, with the reason."""
    implied: Callable[[str, dict[str, object]], dict[str, object]] = lambda where, values: {}
    """Of the recipe's name and keys: further keys that follow from them, and take their place."""
    needs_config: bool = True
    """Whether keys must come from a file; they may come from the command line alone otherwise."""

    def launch(self) -> None:
        """What `python -m` does: `main`, unless the output is already there."""
        if "--help" in sys.argv or "-h" in sys.argv:
            print(self.documentation, recipe.describe_keys(self.classes), sep="\n")
            return
        with reported():
            stage, built = self.parse(sys.argv[1:])
            if contract.is_done(stage.output_dir, stage.fingerprint):
                print(f"{stage.output_dir} is up to date")
                return
            refuse_foreign_output(stage)
            self.main(stage, *built)

    def parse(self, arguments: Sequence[str]) -> tuple[Stage, tuple]:
        """The stage and its dataclasses, every key and combination checked; nothing is loaded."""
        where, values = recipe.read(arguments, self.needs_config)
        output_dir, built = self.build(where, values)
        return Stage(self.name, where, output_dir, contract.fingerprint(self.name, values)), built

    def build(self, where: str, values: dict[str, object], launcher: Launcher | None = None) -> tuple[Path, tuple]:
        """The folder of the output and the dataclasses of a recipe, checked.

        Args:
            launcher: that will start it, if it is not what has started this process.
        """
        recipe.refuse(where, values, self.refused)
        more = self.implied(where, values)
        refused = {key: reason for key, reason in self.refused.items() if key not in more}
        built = recipe.build(where, values | more, self.classes, refused)
        if not values.get("output_dir"):
            raise UserError(f"{where}: output_dir is missing; add `output_dir: runs/NAME/{self.name}`")
        self.check(where, launcher, *built)
        return Path((values | more)["output_dir"]), built


def refuse_foreign_output(stage: Stage) -> None:
    """Refuses a folder with the output, or the checkpoints, of another recipe."""
    changes = contract.what_changed(stage.output_dir, stage.fingerprint)
    if changes:
        raise UserError(
            f"{stage.where}: output_dir {stage.output_dir} was made by a different recipe ({'; '.join(changes[:3])}); "
            "choose another output_dir, or move that folder away"
        )
