"""Whether a pipeline fits a machine, before anything is downloaded: memory and disk of each stage, and remedies.

How long it takes is in `planning/hours.py`.

    gemma2-post plan recipes/gemma-2-9b/pipeline.yaml --gpus 8 --memory 80 --gpu H100
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
from rich.console import Console, JustifyMethod
from rich.table import Table

from gemma2_post.planning import hours, memory
from gemma2_post.planning.memory import Job
from gemma2_post.stage.command import Parts
from gemma2_post.stage.errors import located
from gemma2_post.stage.recipe import values_of, with_values
from gemma2_post.training.checks import accumulation_steps

_BATCHES = ["per_device_train_batch_size", "per_device_eval_batch_size", "reward_batch_size", "batch_size"]
_ZERO_3 = {"zero_stage": 3, "saves_16bit_model": True}
_IN_WORDS = {
    "num_processes": "num_processes: {} in the accelerate config",
    "zero_stage": "launch: accelerate_configs/deepspeed_zero{}.yaml",
    "offloads_optimizer": "offload_optimizer_device: cpu",
    "offloads_parameters": "offload_param_device: cpu",
}
"""How to write a field of `Launcher` in an accelerate config."""


@dataclass
class Row:
    """The plan for a stage."""

    job: Job
    num_runs: int
    """Number of identical runs, such as policies."""
    parts: Parts | None
    """Bytes of one process at its peak; None if a model's shape is unknown."""
    host: float = 0
    """Bytes of host memory, if it runs on a GPU."""
    remedy: str = ""
    """Why it does not fit, and what to change."""

    @property
    def total(self) -> float:
        """Bytes of one process at its peak."""
        return sum((self.parts or {}).values())


@dataclass(frozen=True)
class Change:
    """A change of settings that may make a stage fit."""

    keys: dict[str, Any]
    """Keys of the recipe."""
    launcher: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the launcher."""

    def __str__(self) -> str:
        keys = [f"{key}: {str(value).lower() if value is True else value}" for key, value in self.keys.items()]
        keys += [_IN_WORDS[key].format(value) for key, value in self.launcher.items() if key in _IN_WORDS]
        return ", ".join(keys)

    def apply(self, job: Job) -> Job:
        """The job after the change, which is not checked."""
        launcher = dataclasses.replace(job.checked.launcher, **self.launcher)
        recipe = with_values(job.checked.recipe, self.keys)
        checked = dataclasses.replace(job.checked, recipe=recipe, launcher=launcher)
        return dataclasses.replace(job, checked=checked, values=job.values | self.keys)


def plan(jobs: list[Job], num_gpus: int | None = None, memory_gb: float | None = None) -> list[Row]:
    """What each stage needs, and what would make it fit.

    Args:
        num_gpus: Number of processes of training stages on GPUs, instead of their accelerate configs'; stages that
            measure models spread them over as many GPUs.
        memory_gb: Memory of each GPU, or of the machine for stages on the CPU, in 1e9 bytes.
    """
    from gemma2_post.evaluation import comparison, front  # noqa: F401 - imported code is part of a stage's memory
    from gemma2_post.training import run, watch  # noqa: F401

    libraries = psutil.Process().memory_info().rss
    rows: dict[tuple, Row] = {}
    for job in jobs:
        if num_gpus and job.trains and not job.checked.launcher.use_cpu:
            job = Change({}, {"num_processes": num_gpus}).apply(job)
            recipe = job.checked.recipe
            with located(job.config or job.label):
                accumulation_steps(recipe.global_batch_size, recipe.training.per_device_train_batch_size, num_gpus)
        differs = {name: value for name, value in job.overrides.items() if name != "seed"}
        steps = [job.values.get(name) for name in ("max_steps", "num_train_epochs")]  # a selection's are fewer
        key = (job.config or job.label, job.command.name, json.dumps([differs, steps], sort_keys=True))
        if key in rows:
            rows[key].num_runs += 1
            continue
        job = dataclasses.replace(job, checked=dataclasses.replace(job.checked, num_gpus=num_gpus or 1))
        rows[key] = row = Row(job, 1, None)
        if not job.unknown:
            row.parts, row.host = memory.parts(job, libraries), memory.host(job, libraries)
            if memory_gb and row.total > memory_gb * 1e9:
                row.remedy = f"{row.total / 1e9:.3g} GB of {memory_gb:g} GB; {remedy(job, libraries, memory_gb)[0]}"
    return list(rows.values())


# --- what would make it fit ---


def remedy(job: Job, libraries: float, memory_gb: float) -> tuple[str, Job | None]:
    """The first change that makes a job fit, or several changes together: in words, and the changed job.

    The job is None if nothing makes it fit.
    """

    def total(each: Job) -> float:
        return sum(memory.parts(each, libraries).values())

    for options in _changes(job):
        for change in options:
            changed = change.apply(job)
            if total(changed) <= memory_gb * 1e9:
                return f"{change} makes it {total(changed) / 1e9:.3g} GB", changed
    together: list[str] = []
    for options in _changes(job):
        changed = options[-1].apply(job)
        if total(changed) < total(job):
            together.append(str(options[-1]))
            job = changed
        if total(job) <= memory_gb * 1e9:
            return f"{' and '.join(together)} make it {total(job) / 1e9:.3g} GB", job
    if not together:
        return "no setting makes it smaller", None
    return f"with {' and '.join(together)} it is still {total(job) / 1e9:.3g} GB", None


def _changes(job: Job) -> Iterator[list[Change]]:
    """Possible changes, the cheapest first; each with its options, the mildest first."""
    launcher = job.checked.launcher
    values: dict[str, Any] = values_of(job.checked.recipe)
    for key in _BATCHES:
        if values.get(key, 1) > 1:
            yield [Change({key: values[key] >> i}) for i in range(1, values[key].bit_length())]
    if job.trains and not values["activation_checkpointing"]:
        yield [Change({"activation_checkpointing": True})]
    if values.get("attn_implementation") == "eager" and not launcher.use_cpu:
        yield [Change({"attn_implementation": "flash_attention_2"})]
    quantized = values.get("load_in_4bit") or values.get("load_in_8bit")
    if launcher.zero_stage < 3:  # ZeRO-3 cannot shard quantized weights
        if values.get("teacher_load_in_4bit") is False:
            yield [Change({"teacher_load_in_4bit": True})]
        for key in ("reward_model", "judge"):
            if key in job.checked.models and values.get(f"{key}_load_in", "not a key here") is None:
                yield [Change({f"{key}_load_in": "4bit"})]
        if job.trains and not quantized:
            wanted = {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16"}
            yield [Change({key: value for key, value in wanted.items() if values[key] != value})]
    if not job.trains or launcher.use_cpu:
        return
    if launcher.num_processes > 1 and launcher.zero_stage < 3 and not quantized:
        yield [Change({}, _ZERO_3)]
    if launcher.zero_stage:
        offload = {"offloads_optimizer": True}
        more = [Change({}, offload | {"offloads_parameters": True})] if launcher.zero_stage == 3 else []
        yield [Change({}, offload), *more]
    counts = [launcher.num_processes * factor for factor in (2, 4, 8)]
    per_device, batch = values["per_device_train_batch_size"], values["global_batch_size"]
    if options := [Change({}, {"num_processes": count}) for count in counts if batch % (per_device * count) == 0]:
        yield options


# --- engines ---


def by_engine(rows: list[Row], gpu: str) -> list[str]:
    """How long the stages take with each engine, for those that can sample with either."""
    served, plain = (
        hours.estimate([(_with_engine(row.job, is_served), row.num_runs) for row in rows], gpu)
        for is_served in (True, False)
    )
    return [
        f"{one.job.label}: {hours.duration(*one.seconds)} with vLLM, {hours.duration(*other.seconds)} without"
        for one, other in zip(served, plain, strict=True)
        if one.passes is not None and one.seconds != other.seconds
    ]


def _with_engine(job: Job, is_served: bool) -> Job:
    values, quantized = values_of(job.checked.recipe), job.trains and job.checked.recipe.quantization
    if job.checked.launcher.use_cpu or quantized or values.get("endpoint"):
        return job
    engine = "vllm" if is_served else "transformers"
    keys = {"use_vllm": is_served, "engine": engine}
    if values.get("judge") and not values["judge_endpoint"] and not values["judge_load_in"]:
        keys["judge_engine"] = engine
    return Change({key: value for key, value in keys.items() if key in values}).apply(job)


# --- to read ---


def show(
    jobs: list[Job], console: Console, num_gpus: int | None = None, memory_gb: float | None = None, gpu: str = "H100"
) -> None:
    """Prints memory and disk with the remedies, then tokens and hours on such a GPU with their assumptions."""
    rows = plan(jobs, num_gpus, memory_gb)
    console.print(table(rows, memory_gb))
    for row in rows:
        if row.remedy:
            console.print(f"{row.job.label}: {row.remedy}", markup=False, highlight=False, soft_wrap=True)
    estimates = hours.estimate([(row.job, row.num_runs) for row in rows], gpu)
    console.print()
    console.print(hours.table(estimates))
    for line in [*by_engine(rows, gpu), *hours.summary(estimates)]:
        console.print(line, markup=False, highlight=False)


def table(rows: list[Row], memory_gb: float | None) -> Table:
    """The plan as a table: in GB, a process's peak memory, host memory if it uses a GPU, and disk space."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "processes", "GB", "fits", "of which", "host", "output", "checkpoints"):
        justify: JustifyMethod = "right" if name in ("GB", "host", "output", "checkpoints") else "left"
        found.add_column(name, justify=justify, overflow="fold", min_width=40 if name == "of which" else None)
    for row in rows:
        job, launcher = row.job, row.job.checked.launcher
        name = job.label + (f" ({row.num_runs} runs)" if row.num_runs > 1 else "")
        processes = f"{launcher.num_processes} {'CPU' if launcher.use_cpu else 'GPU'}"
        if row.parts is None:
            models = ", ".join(str(job.values.get(key)) for key in job.unknown)
            found.add_row(name, processes, "?", "?", f"unknown: {models}")
            continue
        fits = "" if memory_gb is None else "[red]no[/]" if row.remedy else "[green]yes[/]"
        largest = sorted(row.parts.items(), key=lambda part: -part[1])
        parts = ", ".join(f"{part} {_gb(size)}" for part, size in largest if size >= 0.01 * row.total)
        sizes = [row.host, *job.command.disk(job.checked)]
        found.add_row(name, processes, _gb(row.total), fits, parts, *(_gb(size) if size else "" for size in sizes))
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
