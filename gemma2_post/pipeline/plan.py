"""Whether a pipeline fits its machine, before anything is downloaded: memory and disk of each stage, what to change.

gemma2-post plan recipes/gemma-2-9b/pipeline.yaml --gpus 8 --memory 80
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
from rich.table import Table

from gemma2_post.core.launcher import Launcher
from gemma2_post.core.training import accumulation_steps
from gemma2_post.pipeline import memory
from gemma2_post.pipeline.check import CheckedStep
from gemma2_post.pipeline.memory import Parts
from gemma2_post.pipeline.view import terminal

_BATCHES = ["per_device_train_batch_size", "per_device_eval_batch_size", "reward_batch_size", "batch_size"]
_ZERO_3 = {"zero_stage": 3, "saves_16bit_model": True}
_IN_WORDS = {
    "num_processes": "num_processes: {} in the accelerate config",
    "zero_stage": "launch: accelerate_configs/deepspeed_zero{}.yaml",
    "offloads_optimizer": "offload_optimizer_device: cpu",
    "offloads_parameters": "offload_param_device: cpu",
}
"""How an accelerate config says what a `Launcher` knows."""


@dataclass
class Row:
    """What is planned of a stage."""

    checked: CheckedStep
    num_runs: int
    """How many are alike, such as policies."""
    parts: Parts | None
    """Bytes of one process at its peak; None where a model's shape is not known."""
    remedy: str = ""
    """Why it does not fit, and what to change."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Change:
    keys: dict[str, object]
    """Of the recipe."""
    launcher: dict[str, object] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        keys = [f"{key}: {str(value).lower() if value is True else value}" for key, value in self.keys.items()]
        return ", ".join(
            [*keys, *(_IN_WORDS[key].format(value) for key, value in self.launcher.items() if key in _IN_WORDS)]
        )

    def apply(self, checked: CheckedStep) -> CheckedStep:
        """The step with another recipe, as if it had been checked."""
        built = {kind: copy.copy(part) for kind, part in checked.built.items()}
        for part in built.values():
            names = {each.name for each in dataclasses.fields(part)}
            vars(part).update({key: value for key, value in self.keys.items() if key in names})
        launcher = dataclasses.replace(checked.launcher, **self.launcher)
        return dataclasses.replace(checked, launcher=launcher, built=built, values=checked.values | self.keys)


def plan(checked: list[CheckedStep], num_gpus: int | None = None, memory_gb: float | None = None) -> list[Row]:
    """
    Args:
        num_gpus: processes of the training stages that use GPUs, in place of their accelerate configs'; what measures
            models spreads them over as many.
        memory_gb: of each GPU, or of the machine where a stage runs on the CPU; in 1e9 bytes.
    """
    libraries = psutil.Process().memory_info().rss  # a stage imports what checking it has imported
    rows: dict[tuple, Row] = {}
    for each in checked:
        if num_gpus and each.step.stage in memory.TRAINING and not each.launcher.use_cpu:
            each = Change({}, {"num_processes": num_gpus}).apply(each)
            _check_batch(each)
        key = (each.step.config or each.step.label, each.step.stage)
        if key in rows:
            rows[key].num_runs += 1
            continue
        rows[key] = row = Row(each, 1, None)
        if not memory.unknown(each):
            row.parts = memory.parts(each, libraries, num_gpus or 1)
            if memory_gb and row.total > memory_gb * 1e9:
                row.remedy = f"{row.total / 1e9:.3g} GB of {memory_gb:g} GB; {remedy(each, libraries, memory_gb)[0]}"
    return list(rows.values())


def _check_batch(checked: CheckedStep) -> None:
    accumulation_steps(
        str(checked.step.config),
        checked.get("global_batch_size"),
        checked.get("per_device_train_batch_size"),
        checked.launcher.num_processes,
    )


# --- what would make it fit ---


def remedy(checked: CheckedStep, libraries: float, memory_gb: float) -> tuple[str, CheckedStep | None]:
    """The first change after which it fits, or the first few of them together; in words, and the step with it."""

    def total(each: CheckedStep) -> float:
        return sum(memory.parts(each, libraries).values())

    for options in _changes(checked):
        for change in options:
            changed = change.apply(checked)
            if total(changed) <= memory_gb * 1e9:
                return f"{change} makes it {total(changed) / 1e9:.3g} GB", changed
    together: list[str] = []
    for options in _changes(checked):
        changed = options[-1].apply(checked)
        if total(changed) < total(checked):
            together.append(str(options[-1]))
            checked = changed
        if total(checked) <= memory_gb * 1e9:
            return f"{' and '.join(together)} make it {total(checked) / 1e9:.3g} GB", checked
    if not together:
        return "no setting makes it smaller", None
    return f"with {' and '.join(together)} it is still {total(checked) / 1e9:.3g} GB", None


def _changes(checked: CheckedStep) -> Iterator[list[Change]]:
    """What may be changed, the cheapest first; each with its options, the mildest first."""
    launcher, names = (
        checked.launcher,
        {each.name for part in checked.built.values() for each in dataclasses.fields(part)},
    )
    trains = checked.step.stage in memory.TRAINING
    for key in _BATCHES:
        if key in names and checked.get(key) > 1:
            halves = [checked.get(key) >> i for i in range(1, checked.get(key).bit_length())]
            yield [Change({key: value}) for value in halves]
    if trains and not checked.get("gradient_checkpointing"):
        yield [Change({"gradient_checkpointing": True})]
    if "attn_implementation" in names and checked.get("attn_implementation") == "eager" and not launcher.use_cpu:
        yield [Change({"attn_implementation": "flash_attention_2"})]
    quantized = "load_in_4bit" in names and (checked.get("load_in_4bit") or checked.get("load_in_8bit"))
    if launcher.zero_stage < 3:  # which cannot shard what is quantised
        if "teacher_load_in_4bit" in names and not checked.get("teacher_load_in_4bit"):
            yield [Change({"teacher_load_in_4bit": True})]
        if trains and not quantized:
            wanted = {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16"}
            yield [Change({key: value for key, value in wanted.items() if checked.get(key) != value})]
    if not trains or launcher.use_cpu:
        return
    if launcher.num_processes > 1 and launcher.zero_stage < 3 and not quantized:
        yield [Change({}, _ZERO_3)]
    if launcher.zero_stage:
        offload = {"offloads_optimizer": True}
        yield [
            Change({}, offload),
            *([Change({}, offload | {"offloads_parameters": True})] * (launcher.zero_stage == 3)),
        ]
    yield from _more_gpus(checked, launcher)


def _more_gpus(checked: CheckedStep, launcher: Launcher) -> Iterator[list[Change]]:
    per_device, batch = checked.get("per_device_train_batch_size"), checked.get("global_batch_size")
    counts = [launcher.num_processes * factor for factor in (2, 4, 8)]
    options = [Change({}, {"num_processes": count}) for count in counts if batch % (per_device * count) == 0]
    if options:
        yield options


# --- to read ---


def show(checked: list[CheckedStep], num_gpus: int | None = None, memory_gb: float | None = None) -> None:
    """Prints the table and the remedies."""
    rows, console = plan(checked, num_gpus, memory_gb), terminal()
    console.print(table(rows, memory_gb))
    for row in rows:
        if row.remedy:
            console.print(f"{row.checked.step.label}: {row.remedy}", markup=False, highlight=False, soft_wrap=True)


def table(rows: list[Row], memory_gb: float | None) -> Table:
    """In GB: of a process at its peak, of the machine's memory beside its GPU, and of the disk."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in [
        *(("stage", "left"), ("processes", "left"), ("GB", "right"), ("fits", "left"), ("of which", "left")),
        *(("host", "right"), ("output", "right"), ("checkpoints", "right")),
    ]:
        found.add_column(name, justify=justify, overflow="fold", min_width=40 if name == "of which" else None)
    for row in rows:
        step, launcher = row.checked.step, row.checked.launcher
        name = step.label + (f" ({row.num_runs} runs)" if row.num_runs > 1 else "")
        processes = f"{launcher.num_processes} {'CPU' if launcher.use_cpu else 'GPU'}"
        if row.parts is None:
            keys = memory.unknown(row.checked)
            models = ", ".join(str(row.checked.values.get(key)) for key in keys)
            found.add_row(name, processes, "?", "?", f"unknown: {models}")
            continue
        fits = "" if memory_gb is None else "[red]no[/]" if row.remedy else "[green]yes[/]"
        largest = sorted(row.parts.items(), key=lambda part: -part[1])
        parts = ", ".join(f"{part} {_gb(size)}" for part, size in largest if size >= 0.01 * row.total)
        sizes = [*([0] if launcher.use_cpu else [memory.host(row.checked)]), *memory.disk(row.checked)]
        found.add_row(name, processes, _gb(row.total), fits, parts, *(_gb(size) if size else "" for size in sizes))
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"
