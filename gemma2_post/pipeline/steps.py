"""What a pipeline recipe says: its stages, what each reads from which, and the runs that follow from that."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gemma2_post.pipeline import gates
from gemma2_post.stage.command import Command
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.paths import model_keys
from gemma2_post.stage.recipe import build, key
from gemma2_post.stage.recipe_file import load_recipe, load_yaml
from gemma2_post.stage.stages import STAGES, command_of


@dataclass(kw_only=True)
class StageEntry:
    """A stage of the chain; its other keys name, by key of its recipe, the earlier stages whose outputs it reads."""

    recipe: str = key(help="The stage's recipe, a file beside the pipeline recipe.")
    stage: str | None = key(None, "Which stage it is, if its name does not say so.")
    launch: str | None = key(None, "Its accelerate config; without it, the pipeline's.")
    num_policies: int | None = key(
        None, "How many times it runs, as policy 0, 1, ...; each writes a folder of its own."
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
    )
    next_eta: float = key(0.3, "For a merge: which point that is (WARP's eta).")
    reads: dict[str, str | list[str]] = field(default_factory=dict)
    """By key of its recipe: the stages that its other keys name."""


MODEL = "model"
"""What an entry calls `model_name_or_path`."""


@dataclass
class PipelineRecipe:
    """The keys of a pipeline recipe."""

    run_dir: str = key(help="Folder of the run; each stage writes a folder of its own in it.")
    launch: str = key(help="Accelerate config of the stages.")
    stages: dict[str, dict] = key(help="The stages by name, in their order.")


@dataclass
class Pipeline:
    run_dir: Path
    launch: str
    entries: dict[str, StageEntry]
    path: Path
    """Of its recipe; the recipes of the stages lie beside it."""
    named_dir: Path
    """The run folder that the recipes name; `run_dir` may be another one."""
    overrides: dict[str, dict[str, object]]
    """By stage: keys that take the place of its recipe's."""

    def steps(self, until: str | None = None) -> list[tuple[str, list["Step"]]]:
        """The rounds of all entries, or of those up to and including one."""
        if until:
            self.check_name(until)
        names = list(self.entries)
        names = names[: names.index(until) + 1] if until else names
        return [each for name in names for each in rounds(self, name)]

    def check_name(self, name: str) -> None:
        if name not in self.entries:
            raise UserError(f"{self.path}: there is no stage {name}; it has {', '.join(self.entries)}")

    def launch_of(self, name: str) -> str:
        return self.entries[name].launch or self.launch

    def config_of(self, name: str) -> Path:
        return self.path.parent / self.entries[name].recipe

    def stage_of(self, name: str) -> str:
        return self.entries[name].stage or name

    def values_of(self, name: str) -> dict[str, object]:
        """The recipe's keys with the overrides, without what the pipeline adds."""
        return load_recipe(self.config_of(name)) | self.overrides.get(name, {})

    def outputs_of(self, name: str) -> list[str]:
        """The folders that hold what an entry has made: its own, or one for each policy."""
        folder, num_policies = self.run_dir / name, self.entries[name].num_policies
        return [str(folder / f"policy-{i}") for i in range(num_policies)] if num_policies else [str(folder)]

    def named_by(self, value: object) -> str | None:
        """The entry that made the folder which a recipe names, if one did."""
        if isinstance(value, str) and (folder := Path(os.path.normpath(value))).is_relative_to(self.named_dir):
            first = folder.relative_to(self.named_dir).parts[:1]
            return first[0] if first and first[0] in self.entries else None
        return None

    def reads_of(self, name: str) -> Iterator[tuple[str, str]]:
        """The keys by which an entry reads what others made, each with the name of one of them."""
        entry, values = self.entries[name], self.values_of(name)
        if entry.merges:
            yield "merges", entry.merges
        for read, names in entry.reads.items():
            yield from ((read, other) for other in (names if isinstance(names, list) else [names]))
        for read in model_keys(command_of(self.stage_of(name)).recipe):
            if read not in entry.reads and not (read == "model_name_or_path" and MODEL in entry.reads):
                for value in _listed(values.get(read)):
                    if other := self.named_by(value):
                        yield read, other

    def references_of(self, name: str) -> dict[str, object]:
        """The recipe's keys that name outputs of earlier stages, with their folders in this run."""
        entry, values = self.entries[name], self.values_of(name)
        found: dict[str, object] = {}
        for read in model_keys(command_of(self.stage_of(name)).recipe):
            if any(map(self.named_by, _listed(values.get(read)))):
                found[read] = self._moved(values[read])
        for read, names in entry.reads.items():
            read = "model_name_or_path" if read == MODEL else read
            if isinstance(names, list):
                found[read] = [folder for other in names for folder in self.outputs_of(other)]
            else:
                found[read] = str(self.run_dir / names)
        return found

    def _moved(self, value: object) -> object:
        """What a recipe names, in this run's folder; of an entry in a list, the folders of all its policies."""
        if isinstance(value, list):
            return [folder for each in value for folder in self._folders(each)]
        return self._folders(value, expands=False)[0]

    def _folders(self, value: object, expands: bool = True) -> list:
        name = self.named_by(value)
        if name is None:
            return [value]
        rest = Path(os.path.normpath(str(value))).relative_to(self.named_dir)
        return self.outputs_of(name) if expands and rest.parts == (name,) else [str(self.run_dir / rest)]

    def merged_by(self, name: str) -> str | None:
        """The entry whose policies a merge merges; None for an entry that is no merge of policies trained here."""
        entry = self.entries[name]
        if entry.merges or entry.iterations is None:
            return entry.merges
        named = [self.named_by(value) for value in _listed(self.values_of(name).get("policies"))]
        if not named or None in named or len(set(named)) > 1:
            raise UserError(f"{name}: iterations is for a merge of policies that one stage trains; name it in merges")
        return named[0]


@dataclass
class Step:
    """One run of a stage."""

    label: str
    stage: str
    folder: Path
    """What it writes: the recipe's output_dir, or the folder of one policy in it."""
    config: Path | None
    """Its recipe; None if all its keys are `values`."""
    values: dict[str, object]
    """Keys that take the place of the recipe's."""
    gates: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> Command:
        return command_of(self.stage)

    @property
    def keys(self) -> dict[str, object]:
        """All keys, as the stage will read them."""
        return (load_recipe(self.config) if self.config else {}) | self.values


def load_pipeline(
    path: Path,
    run_dir: Path | None = None,
    seed: int | None = None,
    overrides: dict[str, dict[str, object]] | None = None,
) -> Pipeline:
    """A pipeline recipe, its structure checked: what it names exists, and nothing waits for itself.

    Args:
        run_dir: in place of the recipe's.
        seed: of every stage, in place of the recipes'.
        overrides: stage name to keys that take the place of its recipe's.
    """
    with located(path):
        file = build(PipelineRecipe, load_yaml(path))
        if not file.stages:
            raise UserError("stages is empty; name one, for example `sft: {recipe: sft.yaml}`")
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
    """An entry of the recipe, whose keys are those of `StageEntry` and the stage's that name models."""
    with located(name):
        if not isinstance(values, dict):
            raise UserError(f"the entry is {values!r}; write a mapping, for example `{{recipe: sft.yaml}}`")
        if (stage := values.get("stage") or name) not in STAGES:
            raise UserError(f"there is no stage {stage}; write stage: and one of {', '.join(STAGES)}")
        reads = {read: value for read, value in values.items() if read in names_of_models()}
        for read, value in reads.items():
            if not all(isinstance(each, str) for each in _listed(value)):
                raise UserError(f"{read} is {value!r}; write the name of an earlier stage, or a list of names")
        return build(StageEntry, {read: values[read] for read in values if read not in reads} | {"reads": reads})


def names_of_models() -> list[str]:
    """The keys by which an entry may name earlier stages: those of every stage's recipe that name models."""
    return list(dict.fromkeys([MODEL, *(key for name in STAGES for key in model_keys(command_of(name).recipe))]))


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
    """Whether a stage needs another one, or is it."""
    reached: set[str] = set()
    to_visit = [name]
    while to_visit:
        if (current := to_visit.pop()) not in reached and current in pipeline.entries:
            reached.add(current)
            to_visit += [needed for _, needed in pipeline.reads_of(current)]
    return other in reached


def _check_merge(pipeline: Pipeline, name: str) -> None:
    merged, iterations = pipeline.merged_by(name), pipeline.entries[name].iterations
    if iterations is not None and iterations < 1:
        raise UserError(f"{name}: iterations is {iterations}; write 1 or more")
    if not pipeline.entries[merged].num_policies:
        raise UserError(f"{name}: merges {merged}, which trains no policies; give that num_policies")
    values = pipeline.values_of(merged)
    if not values.get("use_peft") and values.get("save_dtype") != "float32":
        raise UserError(
            f"{name}: merges {merged}, whose recipe saves all weights in bfloat16, which rounds most of "
            f"what RLHF changes away; write save_dtype: float32 in {pipeline.config_of(merged)}"
        )


def rounds(pipeline: Pipeline, name: str) -> Iterator[tuple[str, list[Step]]]:
    """What an entry of the pipeline runs, in order: accelerate configs, each with steps that need not wait for each
    other."""
    entry, output = pipeline.entries[name], pipeline.run_dir / name
    if entry.merges or entry.iterations is not None:
        yield from _warp_rounds(pipeline, name)
    elif entry.num_policies:
        yield pipeline.launch_of(name), _policies(pipeline, name, name, 0)
    else:
        values = pipeline.references_of(name) | pipeline.overrides.get(name, {}) | {"output_dir": str(output)}
        step = Step(name, pipeline.stage_of(name), output, pipeline.config_of(name), values, entry.gates or {})
        yield pipeline.launch_of(name), [step]


def _policies(pipeline: Pipeline, name: str, output: str, first: int, model: str | None = None) -> list[Step]:
    """
    Args:
        output: the folder in `run_dir` that holds theirs.
        first: the number of the first policy.
        model: the folder that they start from, if it is another one than the entry's.
    """
    folder, entry = pipeline.run_dir / output, pipeline.entries[name]
    values = pipeline.references_of(name) | ({"model_name_or_path": model} if model else {})
    values |= pipeline.overrides.get(name, {}) | {"output_dir": str(folder)}
    return [
        Step(
            f"{output} policy {number}",
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

    The first policies are those of the entry that is merged. The point after iteration i is in `NAME-i`, the policies
    that start there are in `MERGED-(i + 1)`. The last sweep goes towards the very first start.
    """
    entry, launch, stage = pipeline.entries[name], pipeline.launch_of(name), pipeline.stage_of(name)
    merged = pipeline.merged_by(name)
    num_policies, config = pipeline.entries[merged].num_policies, pipeline.values_of(name)
    how = {read: config[read] for read in ("interpolation", "angles") if read in config}
    references = pipeline.references_of(merged)
    first = references.get("model_name_or_path") or pipeline.values_of(merged)["model_name_or_path"]
    start, policies = first, _folders(_policies(pipeline, merged, merged, 0))
    runs = list(policies)
    for iteration in range(1, entry.iterations or 1):
        folder = pipeline.run_dir / f"{name}-{iteration}"
        values = {"init": start, "policies": policies, "eta": entry.next_eta, "save_dtype": "float32", **how}
        yield launch, [Step(folder.name, stage, folder, None, values | {"output_dir": str(folder)})]
        steps = _policies(pipeline, merged, f"{merged}-{iteration + 1}", iteration * num_policies, str(folder))
        yield pipeline.launch_of(merged), steps
        start, policies = str(folder), _folders(steps)
        runs += policies
    values = {"init": start, "policies": policies, "runs": runs}
    if start != first:
        values["towards"] = first
    if "reward_model" in references:
        values["reward_model"] = references["reward_model"]
    output = pipeline.run_dir / name
    values |= pipeline.overrides.get(name, {}) | {"output_dir": str(output)}
    yield launch, [Step(name, stage, output, pipeline.config_of(name), values, entry.gates or {})]


def _folders(steps: list[Step]) -> list[str]:
    return [str(step.folder) for step in steps]
