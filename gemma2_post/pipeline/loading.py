"""Reads a pipeline recipe, or a selection as one, and refuses what cannot run in its order."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from gemma2_post.pipeline import gates
from gemma2_post.pipeline.entries import MODEL, OF_PIPELINE, PipelineRecipe, StageEntry, entry_of, listed, override
from gemma2_post.pipeline.steps import SET_BY_LOOP, Pipeline, Step, apart, members, seed_of
from gemma2_post.select import Selected, candidates_of, share_of
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.overrides import in_words
from gemma2_post.stage.paths import model_keys
from gemma2_post.stage.recipe import build
from gemma2_post.stage.recipe_file import load_recipe, load_yaml
from gemma2_post.stage.stages import command_of


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
        entries = {name: entry_of(name, values) for name, values in file.stages.items()}
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
        _check_run_dir(pipeline)
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
        overrides = [override(each, f"candidate {i}") for i, each in enumerate(candidates_of(values))]
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


def _check_run_dir(pipeline: Pipeline) -> None:
    """Refuses a run_dir in which no recipe reads anything, while recipes read entries of it in another folder."""
    names = list(pipeline.entries)
    if any(True for name in names for _ in pipeline.reads_of(name)):
        return
    for i, name in enumerate(names):
        values = pipeline.values_of(name)
        for key in model_keys(command_of(pipeline.stage_of(name)).recipe):
            for value in listed(values.get(key)):
                if Path(str(value)).name in names[:i] and Path(str(value)).is_dir():
                    raise UserError(
                        f"run_dir is {pipeline.named_dir}, and {pipeline.config_of(name)} reads {value}; leave "
                        "run_dir as the recipes have it and give --run_dir, or change the recipes, too"
                    )


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
    steps = members(pipeline, name, name, 0)
    made: dict[str, Step] = {}
    for step in steps:
        number = int(step.folder.name.rpartition("-")[2])
        keys = {key: value for key, value in step.keys.items() if key not in OF_PIPELINE}
        keys["seed"] = step.keys.get("training_seed", seed_of(step.keys) + apart(pipeline, name) * number)
        same = made.setdefault(json.dumps(keys, sort_keys=True), step)
        if same is not step:
            raise UserError(
                f"{same.label} and {step.label} are the same ({in_words(step.overrides)}); change a key, or the seed, "
                "of one of them"
            )


def _check_merge(pipeline: Pipeline, name: str) -> None:
    merged = pipeline.merged_by(name)
    for read in sorted(pipeline.entries[name].reads.keys() & SET_BY_LOOP):
        raise UserError(f"{name}: {read} is set by merges or iterations; remove it")
    if not pipeline.entries[merged].overrides:
        raise UserError(f"{name}: merges {merged}, which trains no policies; give that policies")
    for step in members(pipeline, merged, merged, 0):
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
