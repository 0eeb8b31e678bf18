"""Checks a whole pipeline without running it: keys, references, paths, lengths, batches, gates, devices.

What it needs are the dataclasses and the checks of the stages, which it imports by name; no weights are loaded, and
nothing is asked of the network.
"""

import warnings
from collections import Counter
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import torch
from transformers import Gemma2Config

from gemma2_post.core import data, gemma, preferences, recipe
from gemma2_post.core import launcher as launchers
from gemma2_post.core.command import Command
from gemma2_post.core.data import DataArguments
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.pipeline import gates, slurm
from gemma2_post.pipeline.steps import Pipeline, Step

_MODEL_KEYS = [
    *("model_name_or_path", "teacher_model_name_or_path", "reward_model"),
    *("init", "towards", "baseline", "base", "policies", "runs", "models", "judge"),
]
"""Recipe keys that name models."""
_FURTHER_DATA = {"safety_datasets": data.PROMPT_FORMATS, "corpus": data.FORMATS}
"""Recipe keys of data beside what is trained on, and its formats."""
_FUNCTION_KEYS = ["graders", "noise_ceiling", "reward_functions"]


@dataclass
class CheckedStep:
    """A step that may start, and what is known of it before it does."""

    step: Step
    launcher: Launcher
    built: dict[type, object]
    """The recipe's dataclasses by their classes."""
    values: dict[str, object]
    models: dict[str, Gemma2Config | None]
    """By recipe key: the configs of the models that it names; None for one that is known to the Hub only."""

    def get(self, key: str) -> object:
        """The value of a key, its default included."""
        return next(getattr(part, key) for part in self.built.values() if key in {each.name for each in fields(part)})


def check(pipeline: Pipeline, until: str | None = None, is_here: bool = False) -> list[CheckedStep]:
    """Checks every step, as far as that can be done before the ones before it have run.

    Args:
        is_here: whether it is to run on this machine, with its devices.

    Raises:
        UserError: what is wrong.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # of what transformers 6 will rename
    made: dict[str, Gemma2Config | None] = {}
    return [_check_step(step, launch, made, is_here) for launch, steps in pipeline.steps(until) for step in steps]


def command_of(stage: str, is_measured: bool) -> Command:
    module = import_module(f"gemma2_post.{stage}")
    return module.command(is_measured) if stage == "warp" else module.COMMAND


def _check_step(step: Step, launch: str, made: dict[str, Gemma2Config | None], is_here: bool) -> CheckedStep:
    """
    Args:
        made: folders that earlier steps make, with the configs of what will be in them; this one's is added.
    """
    where = str(step.config or step.label)
    values = (recipe.load_yaml(step.config) if step.config else {}) | step.values
    launcher = launchers.read(launch)
    if is_here:
        _check_devices(launch, launcher)
    command = command_of(step.stage, is_measured=step.config is not None)
    # Without a GPU the dataclasses refuse bf16, which this machine may only be asked about.
    on_cpu = {"use_cpu": True} if any("use_cpu" in {each.name for each in fields(c)} for c in command.classes) else {}
    _, built = command.build(where, values | on_cpu, launcher)
    gates.check_metrics(where, step.gates, command.metrics(*built))
    by_class = {type(part): part for part in built}
    if DataArguments in by_class:
        _check_data(where, step.stage, by_class[DataArguments])
    for key in _FUNCTION_KEYS:
        for function in _listed(values.get(key)):
            data.load_function(where, function)
    for key, formats in _FURTHER_DATA.items():
        if values.get(key):
            data.check_sources(where, next(getattr(part, key) for part in built if hasattr(part, key)), [], formats)
    keys = [key for key in _MODEL_KEYS if key != "judge" or not values.get("judge_endpoint")]
    models = {key: _config(where, key, name, made) for key in keys for name in _listed(values.get(key))}
    _check_lengths(where, values, models)
    made[str(step.folder)] = models.get("model_name_or_path") or models.get("init")
    return CheckedStep(step, launcher, by_class, values, models)


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_devices(launch: str, launcher: Launcher) -> None:
    if launcher.num_machines > 1:
        slurm.srun(launcher.num_machines)  # refuses too few
    if launcher.use_cpu:
        return
    per_machine, here = launcher.num_processes // launcher.num_machines, torch.cuda.device_count()
    if per_machine > here:
        raise UserError(
            f"{launch}: starts {per_machine} processes on this machine, which shows {here} GPUs; run it where there "
            "are enough, or name another accelerate config as launch (accelerate_configs/cpu.yaml needs none)"
        )


def _config(where: str, key: str, name: str, made: dict[str, Gemma2Config | None]) -> Gemma2Config | None:
    if name in made:
        return made[name]
    if Path(name).is_dir():
        return None if key in ("runs", "policies", "models") else gemma.load_config(where, name)
    if name.count("/") > 1 or name.startswith((".", "/")):
        raise UserError(f"{where}: {key} is {name}, which no earlier stage makes, and there is no such folder")
    return gemma.SHAPES.get(name.removesuffix("-it"))


def _check_data(where: str, stage: str, data_args: DataArguments) -> None:
    formats = {
        "sft": data.FORMATS,
        "reward": preferences.FORMATS,
        "warp": data.QUESTION_FORMATS,
        "evaluate": data.QUESTION_FORMATS,
    }.get(stage, data.PROMPT_FORMATS)
    for sources in (data_args.datasets, data_args.held_out_datasets or []):
        data.check_sources(where, sources, data_args.columns or [], formats)


def _check_lengths(where: str, values: dict[str, object], models: dict[str, Gemma2Config | None]) -> None:
    known = [config for config in models.values() if config]
    if not known:
        return
    shortest = min(known, key=lambda config: config.max_position_embeddings)
    if "max_length" in values:
        gemma.check_length(where, values["max_length"], shortest)
    if "max_completion_length" in values:
        gemma.check_prompt_length(
            where,
            values.get("max_prompt_length"),
            "max_completion_length",
            values["max_completion_length"],
            shortest.max_position_embeddings,
        )


def report(checked: list[CheckedStep]) -> str:
    """What would run, in a sentence."""
    stages = Counter(each.step.stage for each in checked)
    runs = ", ".join(stage if count == 1 else f"{stage} ({count} runs)" for stage, count in stages.items())
    unknown = {
        name
        for each in checked
        for key, config in each.models.items()
        if config is None
        for name in _listed(each.values[key])
        if not Path(name).exists() and name.count("/") == 1
    }
    return f"can start: {runs}" + (f"; not looked at: {', '.join(sorted(unknown))}" if unknown else "")
