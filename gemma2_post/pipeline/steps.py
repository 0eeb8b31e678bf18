"""What a pipeline recipe says: its stages, what each reads from which, and the runs that follow from that."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gemma2_post.core import recipe
from gemma2_post.core.errors import UserError
from gemma2_post.pipeline import gates

STAGES = ["synthesize", "sft", "distill", "reward", "rlhf", "warp", "evaluate"]


@dataclass
class StageEntry:
    recipe: str
    """A file beside the pipeline recipe."""
    stage: str | None = None
    """Which stage it is, if its name does not say so."""
    launch: str | None = None
    """Its accelerate config; without it, the pipeline's."""
    model: str | None = None
    """The earlier stage whose output is its model; without it, the recipe's model_name_or_path."""
    init: str | None = None
    """Of an evaluation: the earlier stage from whose output KL is measured."""
    baseline: str | None = None
    """Of an evaluation: the earlier stage against which answers win or lose."""
    models: list[str] | None = None
    """Of an evaluation: the earlier stages whose outputs, each policy's, it measures."""
    policies: list[str] | None = None
    """The earlier stages whose outputs are its policies; without it, the recipe's policies."""
    reward_model: str | None = None
    """The earlier stage whose output is its reward model; without it, the recipe's reward_model."""
    num_policies: int | None = None
    """How often it runs, as policy 0, 1, ...; each writes a folder of its own."""
    gates: dict[str, str] = field(default_factory=dict)
    """Metric to bound, such as ">= 0.65": what its output, or each policy's, must reach before the next starts."""
    merges: str | None = None
    """Of a merge: the earlier stage whose policies it merges; their start and their reward model are its own, too."""
    iterations: int = 1
    """Of a merge: how often policies are trained, each time from a point on the way to the last merge (WARP's I)."""
    next_eta: float = 0.3
    """Of a merge: which point that is (WARP's eta)."""


@dataclass
class _File:
    """The keys of a pipeline recipe."""

    run_dir: str
    launch: str
    stages: dict[str, dict]


@dataclass
class Pipeline:
    run_dir: Path
    launch: str
    entries: dict[str, StageEntry]
    path: Path
    """Of its recipe; those of the stages lie beside it."""
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

    def values_of(self, name: str) -> dict[str, object]:
        """The recipe's keys with the overrides, without what the pipeline adds."""
        return recipe.load_yaml(self.config_of(name)) | self.overrides.get(name, {})


@dataclass
class Step:
    """One run of a stage."""

    label: str
    stage: str
    folder: Path
    """What it writes; the recipe's output_dir, or the folder of one policy in it."""
    config: Path | None
    """Its recipe; None if all its keys are `values`."""
    values: dict[str, object]
    """Keys that take the place of the recipe's."""
    gates: dict[str, str] = field(default_factory=dict)


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
    (file,) = recipe.build(str(path), recipe.load_yaml(path), [_File], {})
    if not file.stages:
        raise UserError(f"{path}: stages is empty; name one, for example `sft: {{recipe: sft.yaml}}`")
    entries = {
        name: recipe.build(f"{path}: {name}", entry, [StageEntry], {})[0] for name, entry in file.stages.items()
    }
    pipeline = Pipeline(run_dir or Path(file.run_dir), file.launch, entries, path, {})
    for name, values in (overrides or {}).items():
        pipeline.check_name(name)
        if "output_dir" in values:
            raise UserError(f"--set {name}.output_dir: a stage writes to its own folder in the run's; set --run_dir")
    seeds = {} if seed is None else {"seed": seed}
    pipeline.overrides = {name: seeds | (overrides or {}).get(name, {}) for name in entries}
    for name, entry in entries.items():
        where = f"{path}: {name}"
        if (stage := entry.stage or name) not in STAGES:
            raise UserError(f"{where}: there is no stage {stage}; write stage: and one of {', '.join(STAGES)}")
        _check_references(where, entries, name)
        gates.check_bounds(where, entry.gates)
        if not pipeline.config_of(name).is_file():
            raise UserError(f"{where}: there is no recipe {pipeline.config_of(name)}; write it, or mend its name")
        if entry.merges:
            _check_merge(path, pipeline, name)
    folders = Counter(str(step.folder) for _, steps in pipeline.steps() for step in steps)
    folder, count = folders.most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: {folder} would be the output of {count} stages; rename one of them")
    return pipeline


def _references_of(entry: StageEntry) -> list[tuple[str, str]]:
    """The keys of an entry that name stages, each with one that it names."""
    one = [(key, getattr(entry, key)) for key in ("model", "reward_model", "merges", "init", "baseline")]
    several = [(key, name) for key in ("policies", "models") for name in getattr(entry, key) or []]
    return [(key, name) for key, name in [*one, *several] if name is not None]


def _check_references(where: str, entries: dict[str, StageEntry], name: str) -> None:
    names = list(entries)
    earlier = names[: names.index(name)]
    for key, other in _references_of(entries[name]):
        if other not in entries:
            raise UserError(f"{where}: {key} names {other}, which is no stage of it; it has {', '.join(names)}")
        if other not in earlier:
            raise UserError(
                f"{where}: {key} names {other}, which waits for {name} itself; break the circle"
                if _waits_for(entries, other, name)
                else f"{where}: {key} names {other}, which comes later; put it before {name}"
            )


def _waits_for(entries: dict[str, StageEntry], name: str, other: str) -> bool:
    """Whether a stage needs another one, or is it."""
    reached, to_visit = set(), [name]
    while to_visit:
        if (current := to_visit.pop()) not in reached and current in entries:
            reached.add(current)
            to_visit += [needed for _, needed in _references_of(entries[current])]
    return other in reached


def _check_merge(path: Path, pipeline: Pipeline, name: str) -> None:
    entry = pipeline.entries[name]
    if entry.iterations < 1:
        raise UserError(f"{path}: {name}: iterations is {entry.iterations}; write 1 or more")
    if not pipeline.entries[entry.merges].num_policies:
        raise UserError(f"{path}: {name}: merges {entry.merges}, which trains no policies; give that num_policies")
    values = pipeline.values_of(entry.merges)
    if not values.get("use_peft") and values.get("save_dtype") != "float32":
        raise UserError(
            f"{path}: {name}: merges {entry.merges}, whose recipe saves all weights in bfloat16, which rounds most of "
            f"what RLHF changes away; write save_dtype: float32 in {pipeline.config_of(entry.merges)}"
        )


def rounds(pipeline: Pipeline, name: str) -> Iterator[tuple[str, list[Step]]]:
    """What an entry of the pipeline runs, in order: accelerate configs, each with steps that need not wait for each
    other."""
    entry, output = pipeline.entries[name], pipeline.run_dir / name
    if entry.merges:
        yield from _warp_rounds(pipeline, name)
    elif entry.num_policies:
        yield pipeline.launch_of(name), _policies(pipeline, name, name, 0, entry.model)
    else:
        values = _references(pipeline, name, entry.model) | pipeline.overrides.get(name, {})
        values |= {"output_dir": str(output)}
        stage = entry.stage or name
        yield pipeline.launch_of(name), [Step(name, stage, output, pipeline.config_of(name), values, entry.gates)]


def _policies(pipeline: Pipeline, name: str, output: str, first: int, model: str | None) -> list[Step]:
    """
    Args:
        output: the folder in `run_dir` that holds theirs.
        first: the number of the first policy.
        model: the folder in `run_dir` that they begin as, if not the recipe's model.
    """
    folder = pipeline.run_dir / output
    values = _references(pipeline, name, model) | pipeline.overrides.get(name, {}) | {"output_dir": str(folder)}
    return [
        Step(
            f"{output} policy {number}",
            pipeline.entries[name].stage or name,
            folder / f"policy-{number}",
            pipeline.config_of(name),
            values | {"policy": number},
            pipeline.entries[name].gates,
        )
        for number in range(first, first + pipeline.entries[name].num_policies)
    ]


def _warp_rounds(pipeline: Pipeline, name: str) -> Iterator[tuple[str, list[Step]]]:
    """WARP's loop (arXiv 2406.16768, algorithm 1): merge, train again from a point on the way to it, ..., sweep.

    The first policies are those of the entry that is merged. The point after iteration i is in `NAME-i`, the policies
    that begin there are in `MERGES-(i + 1)`. The last sweep goes towards the very first start.
    """
    entry, launch = pipeline.entries[name], pipeline.launch_of(name)
    stage = entry.stage or name
    rlhf, trained = entry.merges, pipeline.entries[entry.merges]
    config = pipeline.values_of(name)
    how = {key: config[key] for key in ("interpolation", "angles") if key in config}
    first = _references(pipeline, rlhf, trained.model).get("model_name_or_path")
    first = first or pipeline.values_of(rlhf)["model_name_or_path"]
    start, policies = first, _folders(_policies(pipeline, rlhf, rlhf, 0, trained.model))
    runs = list(policies)
    for iteration in range(1, entry.iterations):
        folder = pipeline.run_dir / f"{name}-{iteration}"
        values = {"init": start, "policies": policies, "eta": entry.next_eta, "save_dtype": "float32", **how}
        yield launch, [Step(folder.name, stage, folder, None, values | {"output_dir": str(folder)})]
        steps = _policies(pipeline, rlhf, f"{rlhf}-{iteration + 1}", iteration * trained.num_policies, folder.name)
        yield pipeline.launch_of(rlhf), steps
        start, policies = str(folder), _folders(steps)
        runs += policies
    values = {"init": start, "policies": policies, "runs": runs}
    if start != first:
        values["towards"] = first
    if trained.reward_model:
        values["reward_model"] = str(pipeline.run_dir / trained.reward_model)
    output = pipeline.run_dir / name
    values |= pipeline.overrides.get(name, {}) | {"output_dir": str(output)}
    yield launch, [Step(name, stage, output, pipeline.config_of(name), values, entry.gates)]


def _outputs(pipeline: Pipeline, name: str) -> list[str]:
    """The folders that hold what an entry has made: its own, or one for each policy."""
    folder = pipeline.run_dir / name
    num_policies = pipeline.entries[name].num_policies
    return [str(folder / f"policy-{i}") for i in range(num_policies)] if num_policies else [str(folder)]


def _folders(steps: list[Step]) -> list[str]:
    return [str(step.folder) for step in steps]


def _references(pipeline: Pipeline, name: str, model: str | None) -> dict[str, object]:
    """The recipe keys that name outputs of earlier stages."""
    entry, run_dir = pipeline.entries[name], pipeline.run_dir
    references: dict[str, object] = {}
    if model:
        references["model_name_or_path"] = str(run_dir / model)
    if entry.reward_model:
        references["reward_model"] = str(run_dir / entry.reward_model)
    for key in ("init", "baseline"):
        if value := getattr(entry, key):
            references[key] = str(run_dir / value)
    for key in ("policies", "models"):
        if values := getattr(entry, key):
            references[key] = [folder for value in values for folder in _outputs(pipeline, value)]
    return references
