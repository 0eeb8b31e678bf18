"""From a command line to a stage's `main`: the recipe is read and checked; what is up to date is not made again."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2_post.core import contract, recipe
from gemma2_post.core.errors import UserError, reported

Implied = Callable[[str, dict[str, object]], dict[str, object]]
"""Of a recipe's name and keys: further keys that follow from them, and take their place."""
Check = Callable[[str, tuple], None]
"""Of a recipe's name and its dataclasses: refuses what cannot work together, fills in what follows."""


@dataclass
class Stage:
    """One run of a stage: its name, the recipe it was given, and what its output depends on."""

    name: str
    where: str
    output_dir: Path
    fingerprint: dict
    began: float = field(default_factory=time.monotonic)


def launch(
    name: str,
    main: Callable,
    classes: Sequence[type],
    refused: dict[str, str],
    documentation: str | None,
    implied: Implied = lambda where, values: {},
    check: Check = lambda where, built: None,
    needs_config: bool = True,
) -> None:
    """Reads the recipe, checks it, and calls `main(stage, *dataclasses)`; says so if its output is already there.

    Args:
        classes: the dataclasses whose fields are the recipe's keys: a TRL config, `ModelConfig`, `StageArguments`, ...
        refused: keys that must not be set, with the reason.
        needs_config: whether keys must come from a file; they may come from the command line alone otherwise.
    """
    if "--help" in sys.argv or "-h" in sys.argv:
        print(documentation, recipe.describe_keys(classes), sep="\n")
        return
    with reported():
        stage, arguments = parse(name, sys.argv[1:], classes, refused, implied, check, needs_config)
        if contract.is_done(stage.output_dir, stage.fingerprint):
            print(f"{stage.output_dir} is up to date")
            return
        refuse_foreign_output(stage)
        main(stage, *arguments)


def parse(
    name: str,
    arguments: Sequence[str],
    classes: Sequence[type],
    refused: dict[str, str],
    implied: Implied = lambda where, values: {},
    check: Check = lambda where, built: None,
    needs_config: bool = True,
) -> tuple[Stage, tuple]:
    """The stage and its dataclasses, every key and combination checked; nothing is loaded."""
    where, values = recipe.read(arguments, needs_config)
    recipe.refuse(where, values, refused)
    wanted = contract.fingerprint(name, values)
    more = implied(where, values)
    built = recipe.build(where, values | more, classes, {key: refused[key] for key in refused if key not in more})
    if not values.get("output_dir"):
        raise UserError(f"{where}: output_dir is missing; add `output_dir: runs/NAME/{name}`")
    check(where, built)
    return Stage(name, where, Path((values | more)["output_dir"]), wanted), built


def refuse_foreign_output(stage: Stage) -> None:
    """Refuses a folder with the output, or the checkpoints, of another recipe."""
    changes = contract.what_changed(stage.output_dir, stage.fingerprint)
    if changes:
        raise UserError(
            f"{stage.where}: output_dir {stage.output_dir} was made by a different recipe ({'; '.join(changes[:3])}); "
            "choose another output_dir, or move that folder away"
        )
