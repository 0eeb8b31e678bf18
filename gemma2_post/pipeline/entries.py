"""The entries of a pipeline recipe, as they are written."""

import re
from dataclasses import dataclass, field
from typing import Any

from gemma2_post.stage.bounds import COUNT, SEED, Bounds
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.overrides import Overrides
from gemma2_post.stage.paths import data_keys, model_keys
from gemma2_post.stage.recipe import build, key, keys_of
from gemma2_post.stage.recipe_file import renamed
from gemma2_post.stage.stages import STAGES, command_of
from gemma2_post.training.keys import TrainingRecipe


@dataclass
class PipelineRecipe:
    """The keys of a pipeline recipe."""

    run_dir: str = key(help="Folder of the run; each stage writes a folder of its own in it.")
    launch: str = key(help="Accelerate config of the stages.")
    stages: dict[str, dict] = key(help="The stages by name, in their order.")


@dataclass(kw_only=True)
class StageEntry:
    """A stage of the pipeline; keys of its recipe, as additional keys, name the earlier stages that it reads."""

    recipe: str = key(help="The stage's recipe, a file beside the pipeline recipe.")
    stage: str | None = key(None, "Which stage it is, if its name does not say so.")
    launch: str | None = key(None, "Its accelerate config; without it, the pipeline's.")
    members: int | list[dict[str, Any]] | None = key(
        None,
        "How many times it runs, or what each run overrides in its recipe; each writes a folder of its own. For rlhf "
        "also called policies.",
        bounds=Bounds(at_least=1, is_filled=True),
    )
    num_policies: int | None = key(None, "The same as a number of members.", bounds=COUNT)
    gates: dict[str, str] | None = key(
        None, 'Metric to bound, such as ">= 0.65": what its output must reach before the next stage starts.'
    )
    merges: str | None = key(
        None, "For a merge: the earlier stage whose policies it merges, if its recipe's policies do not say so."
    )
    iterations: int | None = key(
        None,
        "For a merge: how often policies are trained, each time from a point on the way to the last merge (WARP's I).",
        bounds=COUNT,
    )
    next_eta: float = key(0.3, "For a merge: which point that is (WARP's eta).")
    reads: dict[str, str | list[str]] = field(default_factory=dict)
    """The earlier stages that it reads, by key of its recipe."""

    @property
    def overrides(self) -> list[Overrides]:
        """What each of its members overrides; empty if it has no members."""
        return self.members if isinstance(self.members, list) else [{} for _ in range(self.members or 0)]


_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_TAKEN = ("logs", "replaced", "measured", "report.html", "report.md", "summary.json", "status.json", "judgments.jsonl")
"""What else a run writes into its folder."""
MODEL = "model"
"""An entry's name for `model_name_or_path`."""
OF_PIPELINE = ("output_dir", "policy", "training_seed")
"""Keys that a pipeline sets for each member."""


def entry_of(name: str, values: dict[str, object]) -> StageEntry:
    """An entry of the recipe; its keys are those of `StageEntry` and the stage's keys that name models."""
    with located(repr(name) if not name.strip() else name):
        if not _NAME.fullmatch(name) or name in _TAKEN:
            raise UserError(
                f"a stage cannot be called {name!r}, because its folder has its name; use letters, digits, _, - and, "
                f"inside, a dot, but none of {', '.join(_TAKEN)}"
            )
        if not isinstance(values, dict):
            raise UserError(f"the entry is {values!r}; write a mapping, for example `{{recipe: sft.yaml}}`")
        if (stage := values.get("stage") or name) not in STAGES:
            raise UserError(f"there is no stage {stage}; write stage: and one of {', '.join(STAGES)}")
        values = _with_members(values, stage)
        reads = {read: value for read, value in values.items() if read in names_of_outputs()}
        for read, value in reads.items():
            if not all(isinstance(each, str) for each in listed(value)):
                raise UserError(f"{read} is {value!r}; write the name of an earlier stage, or a list of names")
        return build(StageEntry, {read: values[read] for read in values if read not in reads} | {"reads": reads})


def _with_members(values: dict[str, Any], stage: str) -> dict[str, Any]:
    """The keys of an entry, with its members as `members`: they may also be called policies, or num_policies.

    Raises:
        UserError: What the members override cannot be right, whatever their recipe says.
    """
    found, policies = dict(values), values.get("policies")
    is_members = isinstance(policies, int) or any(isinstance(each, dict) for each in listed(policies))
    if is_members:
        found["members"] = found.pop("policies")
    given = [name for name in ("members", "policies", "num_policies") if name in values]
    given = given if is_members or "policies" not in given else [name for name in given if name != "policies"]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} say the same; keep one of them")
    if "num_policies" in found:
        build(StageEntry, {"recipe": "", "num_policies": found["num_policies"]})
        found["members"] = found.pop("num_policies")
    if given and not issubclass(command_of(stage).recipe, TrainingRecipe):
        raise UserError(f"{given[0]} is for a stage that trains, and {stage} does not; remove it")
    if isinstance(found.get("members"), list):
        what = member_of(stage)
        found["members"] = [override(each, f"{what} {i}") for i, each in enumerate(found["members"])]
    return found


def override(overrides: object, label: str) -> Overrides:
    """What one member, or candidate, overrides in its recipe, with present names of keys."""
    if not isinstance(overrides, dict):
        raise UserError(f"{label} is {overrides!r}; write a mapping of keys, for example {{learning_rate: 1e-4}}")
    found = renamed(overrides, label)
    for name in OF_PIPELINE:
        if name in found:
            advice = "write seed" if name == "training_seed" else "remove it"
            raise UserError(f"{label}: {name} is set by the pipeline; {advice}")
    if MODEL in found and "model_name_or_path" in found:
        raise UserError(f"{label}: {MODEL} and model_name_or_path say the same; keep one of them")
    seed = found.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or SEED.problem(seed):
        raise UserError(f"{label}: seed is {seed!r}; write a whole number, {SEED.words}")
    return found


def member_of(stage: str) -> str:
    """What a member of an entry is called, in labels and in the name of its folder."""
    return "policy" if "policy" in keys_of(command_of(stage).recipe, of_libraries=False) else "member"


def names_of_outputs() -> list[str]:
    """The keys by which an entry may name earlier stages: every stage's keys that name models or data."""
    recipes = [command_of(name).recipe for name in STAGES]
    return list(dict.fromkeys([MODEL, *(key for each in recipes for key in [*model_keys(each), *data_keys(each)])]))


def listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def first_of(name: object) -> str:
    """The entry in `ENTRY` or `ENTRY/FOLDER`."""
    return str(name).partition("/")[0]
