"""Pipeline recipes: the stages, what each reads from which, and the runs that follow from them."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma2_post.pipeline import gates
from gemma2_post.stage.bounds import COUNT
from gemma2_post.stage.command import Command
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.paths import data_keys, model_keys
from gemma2_post.stage.recipe import build, key
from gemma2_post.stage.recipe_file import load_recipe, load_yaml
from gemma2_post.stage.stages import STAGES, command_of


@dataclass(kw_only=True)
class StageEntry:
    """A stage of the pipeline; keys of its recipe, as additional keys, name the earlier stages that it reads."""

    recipe: str = key(help="The stage's recipe, a file beside the pipeline recipe.")
    stage: str | None = key(None, "Which stage it is, if its name does not say so.")
    launch: str | None = key(None, "Its accelerate config; without it, the pipeline's.")
    num_policies: int | None = key(
        None, "How many times it runs, as policy 0, 1, ...; each writes a folder of its own.", bounds=COUNT
    )
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


_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_TAKEN = ("logs", "replaced", "measured", "report.html", "report.md", "summary.json", "status.json", "judgments.jsonl")
"""What else a run writes into its folder."""
MODEL = "model"
"""An entry's name for `model_name_or_path`."""


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
    overrides: dict[str, dict[str, object]]
    """Keys that override a recipe's, by stage."""

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
        return load_recipe(self.config_of(name)) | self.overrides.get(name, {})

    def outputs_of(self, name: str) -> list[str]:
        """The output folders of an entry: its own, or one per policy."""
        folder, num_policies = self.run_dir / name, self.entries[name].num_policies
        return [str(folder / f"policy-{i}") for i in range(num_policies)] if num_policies else [str(folder)]

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
            yield from ((read, other) for other in (names if isinstance(names, list) else [names]))
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
                found[read] = [folder for other in names for folder in self.outputs_of(other)]
            else:
                found[read] = str(self.run_dir / names)
        return found

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
        entries = {name: _entry(name, values) for name, values in file.stages.items()}
    pipeline = Pipeline(run_dir or Path(file.run_dir), file.launch, entries, path, Path(file.run_dir), {})
    for name, values in (overrides or {}).items():
        pipeline.check_name(name)
        if "output_dir" in values:
            raise UserError(f"--set {name}.output_dir: a stage writes to its own folder in the run's; set --run_dir")
    seeds = {} if seed is None else {"seed": seed}
    pipeline.overrides = {name: seeds | (overrides or {}).get(name, {}) for name in entries}
    with located(path):
        for name in entries:
            with located(name):
                if not pipeline.config_of(name).is_file():
                    raise UserError(f"there is no recipe {pipeline.config_of(name)}; write it, or correct its name")
        for name, entry in entries.items():
            with located(name):
                _check_references(pipeline, name)
                gates.check_bounds(entry.gates or {})
            if entry.merges or entry.iterations is not None:
                _check_merge(pipeline, name)
        folders = Counter(str(step.folder) for _, steps in pipeline.steps() for step in steps)
        folder, count = folders.most_common(1)[0]
        if count > 1:
            raise UserError(f"{folder} would be the output of {count} stages; rename one of them")
    return pipeline


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
        reads = {read: value for read, value in values.items() if read in names_of_outputs()}
        for read, value in reads.items():
            if not all(isinstance(each, str) for each in _listed(value)):
                raise UserError(f"{read} is {value!r}; write the name of an earlier stage, or a list of names")
        return build(StageEntry, {read: values[read] for read in values if read not in reads} | {"reads": reads})


def names_of_outputs() -> list[str]:
    """The keys by which an entry may name earlier stages: every stage's keys that name models or data."""
    recipes = [command_of(name).recipe for name in STAGES]
    return list(dict.fromkeys([MODEL, *(key for each in recipes for key in [*model_keys(each), *data_keys(each)])]))


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


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


def _check_merge(pipeline: Pipeline, name: str) -> None:
    merged = pipeline.merged_by(name)
    if not pipeline.entries[merged].num_policies:
        raise UserError(f"{name}: merges {merged}, which trains no policies; give that num_policies")
    values = pipeline.values_of(merged)
    if not values.get("use_peft") and values.get("save_dtype") != "float32":
        raise UserError(
            f"{name}: merges {merged}, whose recipe saves all weights in bfloat16, which rounds most of "
            f"what RLHF changes away; write save_dtype: float32 in {pipeline.config_of(merged)}"
        )


def rounds(pipeline: Pipeline, name: str) -> Iterator[tuple[str, list[Step]]]:
    """The rounds of an entry, in order: each an accelerate config and steps that need not wait for each other."""
    entry, output = pipeline.entries[name], pipeline.run_dir / name
    if entry.merges or entry.iterations is not None:
        yield from _warp_rounds(pipeline, name)
    elif entry.num_policies:
        yield pipeline.launch_of(name), _policies(pipeline, name, name, 0)
    else:
        values = pipeline.references_of(name) | pipeline.overrides.get(name, {}) | {"output_dir": str(output)}
        step = Step(name, name, pipeline.stage_of(name), output, pipeline.config_of(name), values, entry.gates or {})
        yield pipeline.launch_of(name), [step]


def _policies(pipeline: Pipeline, name: str, output: str, first: int, model: str | None = None) -> list[Step]:
    """The steps that train the policies of an entry.

    Args:
        output: Folder in `run_dir` for the policies' folders.
        first: Number of the first policy.
        model: Folder of the model that they start from, if not the entry's.
    """
    folder, entry = pipeline.run_dir / output, pipeline.entries[name]
    values = pipeline.references_of(name) | ({"model_name_or_path": model} if model else {})
    values |= pipeline.overrides.get(name, {}) | {"output_dir": str(folder)}
    return [
        Step(
            f"{output} policy {number}",
            name,
            pipeline.stage_of(name),
            folder / f"policy-{number}",
            pipeline.config_of(name),
            values | {"policy": number},
            entry.gates or {},
        )
        for number in range(first, first + (entry.num_policies or 0))
    ]


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
    start, policies = first, [str(step.folder) for step in _policies(pipeline, merged, merged, 0)]
    runs = list(policies)
    for iteration in range(1, entry.iterations or 1):
        folder = pipeline.run_dir / f"{name}-{iteration}"
        values = {"init": start, "policies": policies, "eta": entry.next_eta} | how | {"output_dir": str(folder)}
        yield launch, [Step(folder.name, name, stage, folder, None, values)]
        steps = _policies(pipeline, merged, f"{merged}-{iteration + 1}", len(runs), str(folder))
        yield pipeline.launch_of(merged), steps
        start, policies = str(folder), [str(step.folder) for step in steps]
        runs += policies
    values = {"init": start, "policies": policies, "runs": runs}
    if start != first:
        values["towards"] = first
    if "reward_model" in references:
        values["reward_model"] = references["reward_model"]
    output = pipeline.run_dir / name
    values |= pipeline.overrides.get(name, {}) | {"output_dir": str(output)}
    yield launch, [Step(name, name, stage, output, pipeline.config_of(name), values, entry.gates or {})]
