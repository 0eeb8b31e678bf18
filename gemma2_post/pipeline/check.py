"""Checks a whole pipeline without running it: keys, references, paths, lengths, batches, gates, devices.

It loads no weights and uses no network.
"""

from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2Config

from gemma2_post.data.functions import load_function
from gemma2_post.data.keys import Source
from gemma2_post.data.overlap import check_unseen
from gemma2_post.data.rows import RowFormat
from gemma2_post.data.sources import check_sources
from gemma2_post.evaluation.rewards import as_trained
from gemma2_post.models.arguments import check_length, check_lora_modules, check_prompt_length
from gemma2_post.models.folder import LANGUAGE_MODEL, REWARD_MODEL
from gemma2_post.models.loading import load_config
from gemma2_post.models.shapes import known_config
from gemma2_post.pipeline import gates, slurm
from gemma2_post.pipeline.steps import Pipeline, Step
from gemma2_post.planning.memory import Job
from gemma2_post.stage import launcher as launchers
from gemma2_post.stage.command import Checked, Command
from gemma2_post.stage.disk import check_folder
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.paths import Kind, references
from gemma2_post.stage.recipe import keys_of, values_of
from gemma2_post.training.checks import check_vllm
from gemma2_post.weights import average

Models = dict[str, Gemma2Config | None]
_MADE_FROM = ("model_name_or_path", "init", "models", "reward_models")
"""Keys of the models whose shape a stage's output has."""
_REWARD_MODELS = ("reward_model", "reward_models", "score_head")
"""Keys that name reward models; the others name language models."""
_MAKE_REWARD_MODELS = ("reward", "warm")
"""The stages that make reward models; the others make language models, or none."""


def check(pipeline: Pipeline, until: str | None = None, to_run: Container[str] = ()) -> list[Job]:
    """Checks every step, as thoroughly as is possible before earlier steps have run.

    Args:
        to_run: Labels of the steps that will run on this machine, with its devices.

    Raises:
        UserError: What is wrong.
    """
    check_folder(pipeline.run_dir, "run_dir")
    made: Models = {}
    jobs: list[Job] = []
    for launch, steps in pipeline.steps(until):
        for step in steps:
            job = _check_step(step, launch, made, step.label in to_run)
            with located(step.where):
                if job.command.is_test or job.command.is_selection:
                    _check_unseen(job, jobs, jobs)
                _check_rewards(job, jobs)
                _check_kinds(job, jobs)
                _check_average(job, jobs)
            jobs.append(job)
    return jobs


def _check_step(step: Step, launch: str, made: Models, is_here: bool) -> Job:
    """Checks one step.

    Args:
        made: Folders that earlier steps make, with the configs of their models; this step's folder is added.
        is_here: Whether it will run on this machine.
    """
    launcher, command = launchers.read(launch), step.command
    if is_here:
        _check_devices(launch, launcher)
    values = step.keys
    with located(step.where):
        # Without a GPU the dataclasses refuse bf16, but the pipeline may run on another machine.
        on_cpu = {"use_cpu": True} if "use_cpu" in keys_of(command.recipe) else {}
        _, built = command.build(values | on_cpu, launcher)
        gates.check_metrics(step.gates, command.metrics(built))
        if is_here:
            _check_engine(values_of(built))
        models = _check_paths(command, built, values, made)
        _check_lengths(values, models)
        if (config := models.get("model_name_or_path")) and built.model.use_peft:
            check_lora_modules(built.model, config)
    made[str(step.folder)] = next((models[key] for key in _MADE_FROM if models.get(key)), None)
    return Job(step.label, step.config, step.folder, command, Checked(built, launcher, models), values, step.overrides)


def _check_unseen(job: Job, readers: list[Job], earlier: list[Job]) -> None:
    """Refuses test prompts that a reader trains on or selects by, and selection prompts that one trains on."""
    read: dict[str, tuple[list[Source], RowFormat, str]] = {}
    made = {str(each.folder) for each in earlier}
    for each in readers:
        if not each.command.is_test and not each.command.is_filter:
            recipe = values_of(each.checked.recipe)
            for key, row_format in each.command.row_formats.items():
                is_trained = key == "datasets" and each.trains
                does = "trains on" if is_trained else "selects by"
                for source in (recipe.get(key) or []) if is_trained or job.command.is_test else []:
                    if _is_to_be_made(source, made):
                        continue  # when it has been made, the stage before it has removed what is asked here
                    read.setdefault(f"{source} {row_format}", ([source], row_format, f"{each.label} {does}"))
    asked = [each for each in values_of(job.checked.recipe)["datasets"] if not _is_to_be_made(each, made)]
    check_unseen(asked, job.command.row_formats["datasets"], read.values())


def _check_rewards(job: Job, earlier: list[Job]) -> None:
    """Refuses a front that rewards answers in another way than the policies that it merges."""
    release = getattr(job.checked.recipe, "release", None)
    if release:
        policies = set(job.checked.recipe.merge.names)
        for each in earlier:
            if str(each.folder) in policies:
                as_trained(release.measured.rewards, each.values, each.label)


def _check_kinds(job: Job, earlier: list[Job]) -> None:
    """Refuses an earlier stage's reward model where a language model is read, and the other way round."""
    stages = {str(each.folder): each.command.name for each in earlier}
    for named in references(job.command.recipe, job.values):
        stage, is_reward_model = stages.get(named.name), named.key in _REWARD_MODELS
        if named.kind == Kind.MODEL and stage and is_reward_model != (stage in _MAKE_REWARD_MODELS):
            made = "no reward model" if is_reward_model else "a reward model, which answers nothing"
            raise UserError(f"{named.key} names {named.name}, and {stage} makes {made}; name another stage")


def _check_average(job: Job, earlier: list[Job]) -> None:
    """Refuses a mean of reward models that do not belong together, or that is measured on pairs they trained on."""
    recipe = values_of(job.checked.recipe)
    if names := recipe.get("reward_models"):
        average.check_number(names)
        members = [each for each in earlier if str(each.folder) in names]
        if not recipe["force"]:
            heads = [each.values.get("score_head") for each in members]
            average.check_heads([str(each.folder) for each in members], heads, force=False)
        _check_unseen(job, members, earlier)


def _check_devices(launch: str, launcher: Launcher) -> None:
    if launcher.num_machines > 1:
        slurm.srun(launcher.num_machines)  # raises if there are too few
    if launcher.use_cpu:
        return
    per_machine, here = launcher.num_processes // launcher.num_machines, torch.cuda.device_count()
    if per_machine > here:
        raise UserError(
            f"{launch}: starts {per_machine} processes on this machine, which shows {here} GPUs; run it where there "
            "are enough, or name another accelerate config as launch (accelerate_configs/cpu.yaml needs none)"
        )


def _check_engine(values: dict[str, Any]) -> None:
    """Refuses vLLM where it is not installed."""
    if values.get("use_vllm"):
        check_vllm()
    for prefix in ("", "judge_"):
        if values.get(f"{prefix}engine") == "vllm":
            from gemma2_post.evaluation.answering import vllm_server  # a slow import

            vllm_server.check_program(values[f"{prefix}vllm_program"], prefix)


def _check_paths(command: Command, built: Any, values: dict[str, Any], made: Models) -> Models:
    """Refuses missing data, functions, files and models; returns the configs of the models by key, None if unknown."""
    recipe = values_of(built)
    for key, row_format in command.row_formats.items():
        # What an earlier stage makes is checked by the stage that reads it.
        if sources := [source for source in recipe.get(key) or [] if not _is_made(source.path, made)]:
            columns = recipe["columns"] or [] if key in ("datasets", "held_out_datasets") else []
            check_sources(sources, columns, row_format, recipe["max_invalid_share"])
    models: Models = {}
    for named in references(command.recipe, values):
        if named.kind == Kind.FUNCTION:
            load_function(named.name)
        elif named.kind == Kind.FILE and not Path(named.name).exists():
            raise UserError(
                f"{named.key} is {named.name}, and there is no such file; paths start where the command is run"
            )
        elif named.kind == Kind.OTHER_MODEL and not Path(named.name).is_dir() and named.name.count("/") != 1:
            raise UserError(
                f"{named.key} names {named.name}, and there is no such folder; give one, or a name on the Hub"
            )
        elif named.kind == Kind.MODEL:
            models[named.key] = _config(named.key, named.name, isinstance(values[named.key], list), made)
    return models


def _is_made(path: str, made: Container[str]) -> bool:
    """Whether a path is the folder of an earlier stage, or in one."""
    return any(str(each) in made for each in (Path(path), *Path(path).parents))


def _is_to_be_made(source: Source, made: Container[str]) -> bool:
    """Whether an earlier stage will make the rows of a source."""
    return _is_made(source.path, made) and not Path(source.path).exists()


def _config(key: str, name: str, is_one_of_many: bool, made: Models) -> Gemma2Config | None:
    """The config of a model that exists or will be made; None for the folder of a run in a list of many."""
    if name in made:
        return made[name]
    if Path(name).is_dir():
        if is_one_of_many and not (Path(name) / "config.json").is_file():
            return None
        return load_config(name, wanted=REWARD_MODEL if key in _REWARD_MODELS else LANGUAGE_MODEL)
    if name.count("/") > 1 or name.startswith((".", "/")):
        raise UserError(f"{key} is {name}, which no earlier stage makes, and there is no such folder")
    return known_config(name)


def _check_lengths(values: dict[str, Any], models: Models) -> None:
    known = [config for config in models.values() if config]
    if not known:
        return
    shortest = min(known, key=lambda config: config.max_position_embeddings)
    if "max_length" in values:
        check_length(values["max_length"], shortest)
    for key in ("max_completion_length", "max_new_tokens"):
        if key in values:
            positions = shortest.max_position_embeddings
            check_prompt_length(values.get("max_prompt_length"), key, values[key], positions)


def report(jobs: list[Job]) -> str:
    """What would run, in one sentence."""
    stages = Counter(job.command.name for job in jobs)
    runs = ", ".join(stage if count == 1 else f"{stage} ({count} runs)" for stage, count in stages.items())
    unknown = {
        named.name
        for job in jobs
        for named in references(job.command.recipe, job.values)
        if named.kind == Kind.MODEL and job.checked.models[named.key] is None
        if not Path(named.name).exists() and named.name.count("/") == 1
    }
    return f"can start: {runs}" + (f"; not looked at: {', '.join(sorted(unknown))}" if unknown else "")
