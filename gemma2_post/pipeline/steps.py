"""The stages of a pipeline, what each reads from which, and the runs that follow from them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2_post.pipeline.entries import MODEL, StageEntry, first_of, listed, member_of
from gemma2_post.stage import contract
from gemma2_post.stage.bounds import SEED
from gemma2_post.stage.command import Command
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.overrides import Overrides
from gemma2_post.stage.paths import data_keys, model_keys, with_members
from gemma2_post.stage.recipe_file import load_recipe
from gemma2_post.stage.stages import command_of
from gemma2_post.training.keys import SEEDS_APART

DEFAULT_SEED = 42
"""The seed of transformers, for recipes that set none."""
DEFAULT_EPOCHS = 3.0
"""The number of epochs of transformers, for recipes that set neither that nor steps."""

SET_BY_LOOP = {"init", "towards", "policies", "runs"}
"""Keys of a merge that WARP's loop sets."""


@dataclass
class Pipeline:
    """A pipeline recipe, loaded."""

    run_dir: Path
    launch: str
    entries: dict[str, StageEntry]
    path: Path
    """The recipe's file; the stages' recipes are in the same folder."""
    named_dir: Path
    """The run folder that the recipes name; `run_dir` may differ."""
    set_keys: dict[str, dict[str, object]]
    """Keys that the command line sets, by stage; they override a recipe's, and what a member overrides stays."""
    shares: dict[str, float | None] = field(default_factory=dict)
    """The entries of candidates for a selection, each with the share of its recipe's steps that they take, if any."""
    chosen_by: dict[str, str] = field(default_factory=dict)
    """The entries that train what a selection chose, each with the entry of that selection."""

    def steps(self, until: str | None = None) -> list[tuple[str, list["Step"]]]:
        """The rounds of all entries, or of those up to and including `until`; see `rounds`."""
        if until:
            self.check_name(until)
        names = list(self.entries)
        names = names[: names.index(until) + 1] if until else names
        return [each for name in names for each in rounds(self, name)]

    def check_name(self, name: str) -> None:
        """Raises a `UserError` if there is no such stage."""
        if name not in self.entries:
            raise UserError(f"{self.path}: there is no stage {name}; it has {', '.join(self.entries)}")

    def launch_of(self, name: str) -> str:
        """The accelerate config of a stage."""
        return self.entries[name].launch or self.launch

    def config_of(self, name: str) -> Path:
        """The recipe of a stage."""
        return self.path.parent / self.entries[name].recipe

    def stage_of(self, name: str) -> str:
        """Which of `STAGES` an entry is."""
        return self.entries[name].stage or name

    def values_of(self, name: str) -> dict[str, Any]:
        """The recipe's keys with the overrides, but without the keys that the pipeline adds."""
        return load_recipe(self.config_of(name)) | self.set_keys.get(name, {})

    def outputs_of(self, name: str) -> list[str]:
        """The output folders of an entry: its own, or one per member."""
        folder, members = self.run_dir / name, self.entries[name].overrides
        what = member_of(self.stage_of(name))
        return [str(folder / f"{what}-{i}") for i in range(len(members))] or [str(folder)]

    def named_by(self, value: object) -> str | None:
        """The entry whose output folder a recipe names, as a model or as a source; None if it is no entry's."""
        value = value.get("path") if isinstance(value, dict) else value
        if isinstance(value, str) and (folder := Path(os.path.normpath(value))).is_relative_to(self.named_dir):
            first = folder.relative_to(self.named_dir).parts[:1]
            return first[0] if first and first[0] in self.entries else None
        return None

    def reads_of(self, name: str) -> Iterator[tuple[str, str]]:
        """Pairs of a key by which an entry reads an output, and the entry that it reads."""
        entry, values = self.entries[name], self.values_of(name)
        if entry.merges:
            yield "merges", entry.merges
        for read, names in entry.reads.items():
            yield from ((read, first_of(other)) for other in listed(names))
        for i, overrides in enumerate(entry.overrides):
            for read, named in self._named_in(name, overrides):
                yield f"{member_of(self.stage_of(name))} {i}: {read}", named
        recipe = command_of(self.stage_of(name)).recipe
        for read in [*model_keys(recipe), *data_keys(recipe)]:
            if read not in entry.reads and not (read == "model_name_or_path" and MODEL in entry.reads):
                for value in listed(values.get(read)):
                    if other := self.named_by(value):
                        yield read, other

    def references_of(self, name: str) -> dict[str, object]:
        """The recipe's keys that name outputs of earlier stages, with the folders of these in this run."""
        entry, values = self.entries[name], self.values_of(name)
        found: dict[str, object] = {}
        recipe = command_of(self.stage_of(name)).recipe
        for read in model_keys(recipe):
            if any(map(self.named_by, listed(values.get(read)))):
                found[read] = self._moved(values[read])
        for read in data_keys(recipe):
            if any(map(self.named_by, listed(values.get(read)))):
                found[read] = [self._moved_source(source) for source in values[read]]
        for read, names in entry.reads.items():
            read = "model_name_or_path" if read == MODEL else read
            if read in self.set_keys.get(name, {}):
                continue  # what the command line sets comes first
            if read in data_keys(recipe):
                found[read] = [{"path": str(self.run_dir / other)} for other in listed(names)]
            elif isinstance(names, list):
                found[read] = [folder for other in names for folder in self._folders_of(other)]
            else:
                found[read] = str(self.run_dir / names)
        return found

    def _folders_of(self, name: str) -> list[str]:
        """The folders of an entry, or the one folder in it that `ENTRY/FOLDER` names."""
        return self.outputs_of(name) if name in self.entries else [str(self.run_dir / name)]

    def _named_in(self, name: str, overrides: Overrides) -> Iterator[tuple[str, str]]:
        """Pairs of a key by which overrides of an entry read an output, and the entry that they read."""
        recipe = command_of(self.stage_of(name)).recipe
        for read in [*model_keys(recipe), *data_keys(recipe)]:
            for value in listed(overrides.get(read)):
                if other := self.named_by(value) or (first_of(value) if first_of(value) in self.entries else None):
                    yield read, other
        if MODEL in overrides:
            yield MODEL, first_of(overrides[MODEL])

    def resolved(self, name: str, overrides: Overrides) -> Overrides:
        """Overrides as keys of an entry's recipe: what names an earlier stage becomes a folder of this run."""
        recipe = command_of(self.stage_of(name)).recipe
        found: dict[str, object] = {}
        for read, value in overrides.items():
            if value is None:
                found[read] = None
            elif read in data_keys(recipe):
                found[read] = [self._source(each) for each in listed(value)]
            elif read in (MODEL, *model_keys(recipe)):
                is_list = isinstance(value, list)
                folders = [folder for each in listed(value) for folder in self._resolved(each, expands=is_list)]
                found["model_name_or_path" if read == MODEL else read] = folders if is_list else folders[0]
            else:
                found[read] = value
        return found

    def _resolved(self, value: object, expands: bool) -> list:
        if first_of(value) not in self.entries:
            return self._folders(value, expands)
        return self._folders_of(str(value)) if expands else [str(self.run_dir / str(value))]

    def _moved(self, value: object) -> object:
        """A recipe's path or paths, moved to this run's folder; in a list, an entry becomes its policies' folders."""
        if isinstance(value, list):
            return [folder for each in value for folder in self._folders(each)]
        return self._folders(value, expands=False)[0]

    def _moved_source(self, source: object) -> object:
        """A source, with its path moved to this run's folder if it is an entry's output."""
        return source | {"path": self._moved(source["path"])} if isinstance(source, dict) else source

    def _source(self, value: object) -> object:
        """A source of a member: the name of an earlier stage, or what a recipe may write."""
        if isinstance(value, str) and first_of(value) in self.entries:
            return {"path": str(self.run_dir / value)}
        return self._moved_source(value)

    def _folders(self, value: object, expands: bool = True) -> list:
        name = self.named_by(value)
        if name is None:
            return [value]
        rest = Path(os.path.normpath(str(value))).relative_to(self.named_dir)
        return self.outputs_of(name) if expands and rest.parts == (name,) else [str(self.run_dir / rest)]

    def merged_by(self, name: str) -> str:
        """The entry whose policies an entry with `merges` or `iterations` merges."""
        if merges := self.entries[name].merges:
            return merges
        named = {self.named_by(value) for value in listed(self.values_of(name).get("policies"))}
        merged = named.pop() if len(named) == 1 else None
        if merged is None:
            raise UserError(f"{name}: iterations is for a merge of policies that one stage trains; name it in merges")
        return merged


@dataclass
class Step:
    """One run of a stage."""

    label: str
    entry: str
    """The entry of the pipeline that it belongs to."""
    stage: str
    folder: Path
    """Its output: the recipe's output_dir, or one policy's folder in it."""
    config: Path | None
    """Its recipe; None if `values` has all its keys."""
    values: dict[str, object]
    """Keys that override the recipe's."""
    gates: dict[str, str] = field(default_factory=dict)
    overrides: Overrides = field(default_factory=dict)
    """Of a member: what it overrides, as the pipeline recipe says it."""
    after: list[Path] = field(default_factory=list)
    """Folders of steps that decide its keys, although none of its keys names them."""

    @property
    def where(self) -> str:
        """Where its keys are from, for errors: its recipe, and which member, if that overrides some."""
        return ": ".join([*([str(self.config)] if self.config else []), *([self.label] if self.overrides else [])])

    @property
    def command(self) -> Command:
        """The stage as a command."""
        return command_of(self.stage)

    @property
    def keys(self) -> dict[str, object]:
        """All keys that the stage will read."""
        return with_members(self.command.recipe, (load_recipe(self.config) if self.config else {}) | self.values)


def rounds(pipeline: Pipeline, name: str) -> Iterator[tuple[str, list[Step]]]:
    """The rounds of an entry, in order: each an accelerate config and steps that need not wait for each other."""
    entry, output = pipeline.entries[name], pipeline.run_dir / name
    if entry.merges or entry.iterations is not None:
        yield from _warp_rounds(pipeline, name)
    elif entry.overrides:
        yield pipeline.launch_of(name), members(pipeline, name, name, 0)
    else:
        values = pipeline.set_keys.get(name, {}) | pipeline.references_of(name)
        overrides, after = _chosen(pipeline, name)
        values |= _own_keys(pipeline, name, overrides) | {"output_dir": str(output)}
        stage, config, gates = pipeline.stage_of(name), pipeline.config_of(name), entry.gates or {}
        yield pipeline.launch_of(name), [Step(name, name, stage, output, config, values, gates, overrides, after)]


def _chosen(pipeline: Pipeline, name: str) -> tuple[Overrides, list[Path]]:
    """What a selection chose for an entry, and the selection's folder; until it has chosen, the first candidate."""
    if name not in pipeline.chosen_by:
        return {}, []
    folder = pipeline.run_dir / pipeline.chosen_by[name]
    choice = contract.read_json(folder / contract.CHOICE, {"overrides": dict})
    candidates = pipeline.entries[pipeline.chosen_by[name]].reads["models"][0]
    return choice["overrides"] if choice else pipeline.entries[candidates].overrides[0], [folder]


def members(pipeline: Pipeline, name: str, output: str, first: int, model: str | None = None) -> list[Step]:
    """The steps that train the members of an entry.

    A member that names a seed is trained with it; another one with the recipe's, `SEEDS_APART` further for each
    member before it. The mixture and the held-out rows follow the recipe's seed in all of them.

    Args:
        output: Folder in `run_dir` for the members' folders.
        first: Number of the first member.
        model: Folder of the model that they start from, if not the entry's.
    """
    folder, entry, stage = pipeline.run_dir / output, pipeline.entries[name], pipeline.stage_of(name)
    what, share = member_of(stage), pipeline.shares.get(name)
    shared = pipeline.set_keys.get(name, {}) | pipeline.references_of(name)
    shared |= {"model_name_or_path": model} if model else {}
    recipe, steps = pipeline.values_of(name), []
    for number, overrides in enumerate(entry.overrides, start=first):
        values = shared | _own_keys(pipeline, name, overrides, SEEDS_APART * first)
        values |= _shortened(recipe | values, share) if share else {}
        if "training_seed" not in values and (what == "policy") == (name in pipeline.shares):
            values["training_seed"] = seed_of(recipe) + apart(pipeline, name) * number
        own = folder / f"{what}-{number}"
        values |= {"policy": number, "output_dir": str(folder)} if what == "policy" else {"output_dir": str(own)}
        label, config, gates = f"{output} {what} {number}", pipeline.config_of(name), entry.gates or {}
        steps.append(Step(label, name, stage, own, config, values, gates, overrides))
    return steps


def _own_keys(pipeline: Pipeline, name: str, overrides: Overrides, seeds_on: int = 0) -> dict[str, object]:
    """What overrides change in the keys of a step; their seed is that of the training alone."""
    values: dict[str, Any] = pipeline.resolved(name, overrides)
    if "seed" in values:
        values["training_seed"] = values.pop("seed") + seeds_on
    return values


def apart(pipeline: Pipeline, name: str) -> int:
    """Distance between the seeds of an entry's members; candidates differ in their keys alone."""
    return 0 if name in pipeline.shares else SEEDS_APART


def _shortened(values: dict[str, Any], share: float) -> dict[str, object]:
    """The keys with which a recipe takes this share of its steps."""
    steps, epochs, warmup = (values.get(key) for key in ("max_steps", "num_train_epochs", "warmup_steps"))
    if isinstance(steps, str) or isinstance(epochs, str) or isinstance(warmup, str):
        return {}  # the check of the step says what is wrong
    found: dict[str, object] = {"num_train_epochs": share * (epochs or DEFAULT_EPOCHS)}
    if steps and steps > 0:
        found = {"max_steps": max(1, round(share * steps))}
    if warmup and warmup >= 1:  # below 1 it is a share itself
        found["warmup_steps"] = round(share * warmup)
    return found


def _warp_rounds(pipeline: Pipeline, name: str) -> Iterator[tuple[str, list[Step]]]:
    """WARP's loop (arXiv 2406.16768, algorithm 1): merge, train again from a point on the way to it, ..., sweep.

    The first policies are those of the merged entry. The point after iteration i is in `NAME-i`; the policies that
    start there are in `MERGED-(i + 1)`. The last sweep goes towards the very first start.
    """
    entry, launch, stage = pipeline.entries[name], pipeline.launch_of(name), pipeline.stage_of(name)
    merged, config = pipeline.merged_by(name), pipeline.values_of(name)
    how = {"save_dtype": "float32"} | {read: config[read] for read in ("interpolation", "angles") if read in config}
    references = pipeline.references_of(merged)
    first = references.get("model_name_or_path") or pipeline.values_of(merged).get("model_name_or_path")
    if first is None:
        raise UserError(
            f"{pipeline.config_of(merged)}: model_name_or_path is missing; name a directory or a Hub model"
        )
    start, policies = first, [str(step.folder) for step in members(pipeline, merged, merged, 0)]
    runs = list(policies)
    for iteration in range(1, entry.iterations or 1):
        folder = pipeline.run_dir / f"{name}-{iteration}"
        values = {"init": start, "policies": policies, "eta": entry.next_eta} | how | {"output_dir": str(folder)}
        yield launch, [Step(folder.name, name, stage, folder, None, values)]
        steps = members(pipeline, merged, f"{merged}-{iteration + 1}", len(runs), str(folder))
        yield pipeline.launch_of(merged), steps
        start, policies = str(folder), [str(step.folder) for step in steps]
        runs += policies
    values = pipeline.references_of(name) | {"init": start, "policies": policies, "runs": runs}
    if start != first:
        values["towards"] = first
    if "reward_model" in references and "reward_model" not in entry.reads:
        values["reward_model"] = references["reward_model"]
    output = pipeline.run_dir / name
    values |= pipeline.set_keys.get(name, {}) | {"output_dir": str(output)}
    yield launch, [Step(name, name, stage, output, pipeline.config_of(name), values, entry.gates or {})]


def seed_of(values: dict[str, Any]) -> int:
    """The seed of a recipe.

    Raises:
        UserError: It is no whole number.
    """
    seed = values.get("seed", DEFAULT_SEED)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"seed is {seed!r}; write a whole number, {SEED.words}")
    return seed
