"""What a pipeline recipe says: its stages, what each reads from which, and the runs that follow from that."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gemma2_post.core import recipe
from gemma2_post.core.errors import UserError
from gemma2_post.pipeline import gates


@dataclass
class StageEntry:
    recipe: str
    """A file beside the pipeline recipe."""
    launch: str | None = None
    """Its accelerate config; without it, the pipeline's."""
    model: str | None = None
    """The earlier stage whose output is its model; without it, the recipe's model_name_or_path."""
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
    folder: Path
    """Of the stages' recipes."""
    overrides: dict[str, dict[str, object]]
    """By stage: keys that take the place of its recipe's."""

    def launch_of(self, name: str) -> str:
        return self.entries[name].launch or self.launch

    def config_of(self, name: str) -> Path:
        return self.folder / self.entries[name].recipe

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


def load_pipeline(path: Path) -> Pipeline:
    (file,) = recipe.build(str(path), recipe.load_yaml(path), [_File], {})
    entries = {
        name: recipe.build(f"{path}: {name}", entry, [StageEntry], {})[0] for name, entry in file.stages.items()
    }
    pipeline = Pipeline(Path(file.run_dir), file.launch, entries, path.parent, {})
    names = list(entries)
    for i, (name, entry) in enumerate(entries.items()):
        earlier = names[:i]
        named = [("model", entry.model), ("reward_model", entry.reward_model), ("merges", entry.merges)]
        named += [("policies", policy) for policy in entry.policies or []]
        for key, value in named:
            if value is not None and value not in earlier:
                raise UserError(
                    f"{path}: {name}: {key} names {value}, which is no earlier stage ({', '.join(earlier) or 'none'})"
                )
        gates.check_bounds(f"{path}: {name}", entry.gates)
        if entry.merges:
            _check_merge(path, pipeline, name)
    return pipeline


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
        yield pipeline.launch_of(name), [Step(name, name, output, pipeline.config_of(name), values, entry.gates)]


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
            name,
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
        yield launch, [Step(folder.name, name, folder, None, values | {"output_dir": str(folder)})]
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
    yield launch, [Step(name, name, output, pipeline.config_of(name), values, entry.gates)]


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
    if entry.policies:
        references["policies"] = [str(run_dir / policy) for policy in entry.policies]
    return references
