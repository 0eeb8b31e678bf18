"""Pipeline recipes: the stages, what each reads from which, and the runs that follow from them."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from gemma2_post.pipeline import gates
from gemma2_post.select import Selected, candidates_of, share_of
from gemma2_post.stage import contract
from gemma2_post.stage.bounds import COUNT, SEED, Bounds
from gemma2_post.stage.command import Command
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.overrides import Overrides, in_words
from gemma2_post.stage.paths import data_keys, model_keys
from gemma2_post.stage.recipe import build, key, keys_of
from gemma2_post.stage.recipe_file import load_recipe, load_yaml, renamed
from gemma2_post.stage.stages import STAGES, command_of
from gemma2_post.training.keys import SEEDS_APART, TrainingRecipe


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
_OF_PIPELINE = ("output_dir", "policy", "training_seed")
"""Keys that a pipeline sets for each member."""
DEFAULT_SEED = 42
"""The seed of transformers, for recipes that set none."""
DEFAULT_EPOCHS = 3.0
"""The number of epochs of transformers, for recipes that set neither that nor steps."""


@dataclass
class PipelineRecipe:
    """The keys of a pipeline recipe."""

    run_dir: str = key(help="Folder of the run; each stage writes a folder of its own in it.")
    launch: str = key(help="Accelerate config of the stages.")
    stages: dict[str, dict] = key(help="The stages by name, in their order.")


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
            yield from ((read, _first(other)) for other in _listed(names))
        for i, overrides in enumerate(entry.overrides):
            for read, named in self._named_in(name, overrides):
                yield f"{member_of(self.stage_of(name))} {i}: {read}", named
        recipe = command_of(self.stage_of(name)).recipe
        for read in [*model_keys(recipe), *data_keys(recipe)]:
            if read not in entry.reads and not (read == "model_name_or_path" and MODEL in entry.reads):
                for value in _listed(values.get(read)):
                    if other := self.named_by(value):
                        yield read, other

    def references_of(self, name: str) -> dict[str, object]:
        """The recipe's keys that name outputs of earlier stages, with the folders of these in this run."""
        entry, values = self.entries[name], self.values_of(name)
        found: dict[str, object] = {}
        recipe = command_of(self.stage_of(name)).recipe
        for read in model_keys(recipe):
            if any(map(self.named_by, _listed(values.get(read)))):
                found[read] = self._moved(values[read])
        for read in data_keys(recipe):
            if any(map(self.named_by, _listed(values.get(read)))):
                found[read] = [self._moved_source(source) for source in values[read]]
        for read, names in entry.reads.items():
            read = "model_name_or_path" if read == MODEL else read
            if read in data_keys(recipe):
                found[read] = [{"path": str(self.run_dir / other)} for other in _listed(names)]
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
        for read in model_keys(command_of(self.stage_of(name)).recipe):
            for value in _listed(overrides.get(read)):
                if other := self.named_by(value) or (_first(value) if _first(value) in self.entries else None):
                    yield read, other
        if MODEL in overrides:
            yield MODEL, _first(overrides[MODEL])

    def resolved(self, name: str, overrides: Overrides) -> Overrides:
        """Overrides as keys of an entry's recipe: what names an earlier stage becomes a folder of this run."""
        keys, found = model_keys(command_of(self.stage_of(name)).recipe), {}
        for read, value in overrides.items():
            if read in (MODEL, *keys):
                is_list = isinstance(value, list)
                folders = [folder for each in _listed(value) for folder in self._resolved(each, expands=is_list)]
                found["model_name_or_path" if read == MODEL else read] = folders if is_list else folders[0]
            else:
                found[read] = value
        return found

    def _resolved(self, value: object, expands: bool) -> list:
        if _first(value) not in self.entries:
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
        named = {self.named_by(value) for value in _listed(self.values_of(name).get("policies"))}
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
        return (load_recipe(self.config) if self.config else {}) | self.values


def load_pipeline(
    path: Path,
    run_dir: Path | None = None,
    seed: int | None = None,
    overrides: dict[str, dict[str, object]] | None = None,
) -> Pipeline:
    """A pipeline recipe with its structure checked: what it names exists, and no stage waits for itself.

    Args:
        run_dir: Run folder that overrides the recipe's.
        seed: Seed for every stage; it overrides the recipes'.
        overrides: Keys that override a recipe's, by stage.

    Raises:
        UserError: What is wrong.
    """
    with located(path):
        keys = load_yaml(path)
        stages = keys.get("stages")
        if "stages" in keys and not (isinstance(stages, dict) and stages):
            raise UserError(
                f"stages is {'empty' if stages in ({}, []) else repr(stages)}; write a mapping, for example "
                "`sft: {recipe: sft.yaml}`"
            )
        file = build(PipelineRecipe, keys)
        if not file.run_dir:
            raise UserError("run_dir is empty; write a folder, for example runs/tiny")
    return _loaded(path, file, run_dir or Path(file.run_dir), seed, overrides or {})


def load_selection(
    path: Path, launch: str | None, run_dir: Path | None, seed: int | None, keys: dict[str, object]
) -> Pipeline:
    """A selection as a pipeline of its own, from its recipe alone; it runs beside the folder of the recipe's run.

    Args:
        launch: Accelerate config of the candidates and the selection; None: of one CPU or one GPU, as their recipe
            says.
        keys: Keys that override the recipe's.

    Raises:
        UserError: What is wrong.
    """
    values = load_recipe(path) | keys
    with located(path):
        output = Path(str(values.get("output_dir") or ""))
        if not output.name:
            raise UserError("output_dir is missing; add `output_dir: runs/NAME/select`")
        recipe = path.parent / str(values.get("recipe") or f"{values.get('select')}.yaml")
        on_cpu = recipe.is_file() and load_recipe(recipe).get("use_cpu")
        launch = launch or f"accelerate_configs/{'cpu' if on_cpu else 'single_gpu'}.yaml"
        entries: dict[str, dict] = {output.name: {"recipe": path.name, "stage": "select"}}
        file = PipelineRecipe(str(output.parent), launch, entries)
    folder = run_dir or output.parent.with_name(f"{output.parent.name}-{output.name}")
    return _loaded(path, file, folder, seed, {output.name: keys} if keys else {})


def _loaded(
    path: Path, file: PipelineRecipe, run_dir: Path, seed: int | None, overrides: dict[str, dict[str, object]]
) -> Pipeline:
    seeds = {} if seed is None else {"seed": seed}
    with located(path):
        entries = {name: _entry(name, values) for name, values in file.stages.items()}
        pipeline = Pipeline(run_dir, file.launch, entries, path, Path(file.run_dir), {})
        for name in entries:
            with located(name):
                if not pipeline.config_of(name).is_file():
                    raise UserError(f"there is no recipe {pipeline.config_of(name)}; write it, or correct its name")
        pipeline.set_keys = {name: {**values} for name, values in overrides.items()}
        pipeline.entries = {}
        for name in entries:
            with located(name):
                pipeline.entries |= _with_candidates(pipeline, name, entries)
    for name, values in pipeline.set_keys.items():
        pipeline.check_name(name)
        if "output_dir" in values:
            raise UserError(f"--set {name}.output_dir: a stage writes to its own folder in the run's; set --run_dir")
    pipeline.set_keys = {name: seeds | pipeline.set_keys.get(name, {}) for name in pipeline.entries}
    with located(path):
        for name, entry in pipeline.entries.items():
            with located(name):
                _check_references(pipeline, name)
                gates.check_bounds(entry.gates or {})
                _check_members(pipeline, name)
            if entry.merges or entry.iterations is not None:
                _check_merge(pipeline, name)
        folders = Counter(str(step.folder) for _, steps in pipeline.steps() for step in steps)
        folder, count = folders.most_common(1)[0]
        if count > 1:
            raise UserError(f"{folder} would be the output of {count} stages; rename one of them")
    return pipeline


def _with_candidates(pipeline: Pipeline, name: str, entries: dict[str, StageEntry]) -> dict[str, StageEntry]:
    """An entry; of a selection also the entry of its candidates, which are members that have the recipe's seed.

    With a share of the steps there are three: the candidates, the selection, and under the selection's own name the
    stage that trains what was chosen.
    """
    entry = entries[name]
    if (entry.stage or name) != "select":
        return {name: entry}
    values: dict[str, Any] = load_recipe(pipeline.path.parent / entry.recipe) | pipeline.set_keys.get(name, {})
    stage, recipe = str(values.get("select")), values.get("recipe")
    if stage not in get_args(Selected):
        raise UserError(f"{entry.recipe}: select is {stage}; write one of {', '.join(get_args(Selected))}")
    recipe = recipe or f"{stage}.yaml"
    if not isinstance(recipe, str) or not (pipeline.path.parent / recipe).is_file():
        raise UserError(f"{entry.recipe}: there is no recipe {recipe} beside it; write the file that is overridden")
    with located(entry.recipe):
        overrides = [_override(each, f"candidate {i}") for i, each in enumerate(candidates_of(values))]
        share = share_of(values)
    candidates, selection = f"{name}-candidates", f"{name}-choice" if share else name
    for taken in {candidates, selection} - {name}:
        if taken in entries:
            raise UserError(f"the entry {taken} would have the folder of what {name} selects from; rename it")
    of_stage = [MODEL, *model_keys(command_of(stage).recipe)]
    trained = {read: names for read, names in entry.reads.items() if read in of_stage}
    of_selection = model_keys(command_of("select").recipe)
    compared = {read: names for read, names in entry.reads.items() if read in of_selection or read not in of_stage}
    found = {candidates: StageEntry(recipe=recipe, stage=stage, members=overrides, reads=trained)}
    found[selection] = replace(entry, stage="select", reads=compared | {"models": [candidates]})
    pipeline.shares[candidates] = share
    if selection != name:
        pipeline.chosen_by[name] = selection
        pipeline.set_keys[selection] = pipeline.set_keys.pop(name, {})
        found[selection] = replace(found[selection], gates=None)
        found[name] = StageEntry(recipe=recipe, stage=stage, gates=entry.gates, reads=trained)
    return found


def _entry(name: str, values: dict[str, object]) -> StageEntry:
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
            if not all(isinstance(each, str) for each in _listed(value)):
                raise UserError(f"{read} is {value!r}; write the name of an earlier stage, or a list of names")
        return build(StageEntry, {read: values[read] for read in values if read not in reads} | {"reads": reads})


def _with_members(values: dict[str, Any], stage: str) -> dict[str, Any]:
    """The keys of an entry, with its members as `members`: they may also be called policies, or num_policies.

    Raises:
        UserError: What the members override cannot be right, whatever their recipe says.
    """
    found, policies = dict(values), values.get("policies")
    is_members = isinstance(policies, int) or any(isinstance(each, dict) for each in _listed(policies))
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
        found["members"] = [_override(each, f"{what} {i}") for i, each in enumerate(found["members"])]
    return found


def _override(overrides: object, label: str) -> Overrides:
    """What one member, or candidate, overrides in its recipe, with present names of keys."""
    if not isinstance(overrides, dict):
        raise UserError(f"{label} is {overrides!r}; write a mapping of keys, for example {{learning_rate: 1e-4}}")
    found = renamed(overrides, label)
    for name in _OF_PIPELINE:
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


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _first(name: object) -> str:
    """The entry in `ENTRY` or `ENTRY/FOLDER`."""
    return str(name).partition("/")[0]


def _check_references(pipeline: Pipeline, name: str) -> None:
    names = list(pipeline.entries)
    earlier = names[: names.index(name)]
    for read, other in pipeline.reads_of(name):
        if other not in names:
            raise UserError(f"{read} names {other}, which is no stage of it; it has {', '.join(names)}")
        if other not in earlier:
            raise UserError(
                f"{read} names {other}, which waits for {name} itself; break the circle"
                if _waits_for(pipeline, other, name)
                else f"{read} names {other}, which comes later; put it before {name}"
            )


def _waits_for(pipeline: Pipeline, name: str, other: str) -> bool:
    """Whether a stage needs another one, directly or indirectly, or is it."""
    reached: set[str] = set()
    to_visit = [name]
    while to_visit:
        if (current := to_visit.pop()) not in reached and current in pipeline.entries:
            reached.add(current)
            to_visit += [needed for _, needed in pipeline.reads_of(current)]
    return other in reached


def _check_members(pipeline: Pipeline, name: str) -> None:
    """Refuses members of an entry that would be trained in the same way."""
    steps = _members(pipeline, name, name, 0)
    made: dict[str, Step] = {}
    for step in steps:
        number = int(step.folder.name.rpartition("-")[2])
        keys = {key: value for key, value in step.keys.items() if key not in _OF_PIPELINE}
        keys["seed"] = step.keys.get("training_seed", _seed(step.keys) + _apart(pipeline, name) * number)
        same = made.setdefault(json.dumps(keys, sort_keys=True), step)
        if same is not step:
            raise UserError(
                f"{same.label} and {step.label} are the same ({in_words(step.overrides)}); change a key, or the seed, "
                "of one of them"
            )


def _seed(values: dict[str, Any]) -> int:
    """The seed of a recipe."""
    return values.get("seed", DEFAULT_SEED)


def _check_merge(pipeline: Pipeline, name: str) -> None:
    merged = pipeline.merged_by(name)
    if not pipeline.entries[merged].overrides:
        raise UserError(f"{name}: merges {merged}, which trains no policies; give that policies")
    for step in _members(pipeline, merged, merged, 0):
        if {MODEL, "model_name_or_path"} & step.overrides.keys():
            raise UserError(
                f"{name}: {step.label} begins from a model of its own, and a merge with merges or iterations goes "
                "back to one start; name init and policies in its recipe, without them"
            )
        if not step.keys.get("use_peft") and step.keys.get("save_dtype") != "float32":
            raise UserError(
                f"{name}: merges {merged}, whose recipe saves all weights in bfloat16, which rounds most of "
                f"what RLHF changes away; write save_dtype: float32 in {pipeline.config_of(merged)}"
            )


def rounds(pipeline: Pipeline, name: str) -> Iterator[tuple[str, list[Step]]]:
    """The rounds of an entry, in order: each an accelerate config and steps that need not wait for each other."""
    entry, output = pipeline.entries[name], pipeline.run_dir / name
    if entry.merges or entry.iterations is not None:
        yield from _warp_rounds(pipeline, name)
    elif entry.overrides:
        yield pipeline.launch_of(name), _members(pipeline, name, name, 0)
    else:
        values = pipeline.references_of(name) | pipeline.set_keys.get(name, {})
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


def _members(pipeline: Pipeline, name: str, output: str, first: int, model: str | None = None) -> list[Step]:
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
    shared = pipeline.references_of(name) | ({"model_name_or_path": model} if model else {})
    shared |= pipeline.set_keys.get(name, {})
    recipe, steps = pipeline.values_of(name), []
    for number, overrides in enumerate(entry.overrides, start=first):
        values = shared | _own_keys(pipeline, name, overrides, SEEDS_APART * first)
        values |= _shortened(recipe | values, share) if share else {}
        if "training_seed" not in values and (what == "policy") == (name in pipeline.shares):
            values["training_seed"] = _seed(recipe) + _apart(pipeline, name) * number
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


def _apart(pipeline: Pipeline, name: str) -> int:
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
    first = references.get("model_name_or_path") or pipeline.values_of(merged)["model_name_or_path"]
    start, policies = first, [str(step.folder) for step in _members(pipeline, merged, merged, 0)]
    runs = list(policies)
    for iteration in range(1, entry.iterations or 1):
        folder = pipeline.run_dir / f"{name}-{iteration}"
        values = {"init": start, "policies": policies, "eta": entry.next_eta} | how | {"output_dir": str(folder)}
        yield launch, [Step(folder.name, name, stage, folder, None, values)]
        steps = _members(pipeline, merged, f"{merged}-{iteration + 1}", len(runs), str(folder))
        yield pipeline.launch_of(merged), steps
        start, policies = str(folder), [str(step.folder) for step in steps]
        runs += policies
    values = {"init": start, "policies": policies, "runs": runs}
    if start != first:
        values["towards"] = first
    if "reward_model" in references:
        values["reward_model"] = references["reward_model"]
    output = pipeline.run_dir / name
    values |= pipeline.set_keys.get(name, {}) | {"output_dir": str(output)}
    yield launch, [Step(name, name, stage, output, pipeline.config_of(name), values, entry.gates or {})]
