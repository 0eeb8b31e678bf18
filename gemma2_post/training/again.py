"""Measures a finished stage again: its weights are loaded into the trainer's model instead of being trained."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2_post.training.finite import Metrics

KEPT = ("tokens_per_second", "peak_memory_gb", "kept_step", "kl_to_anchor", "kl_to_anchor_before")
"""Metrics of the training itself, which stay as they are."""


class MeasuredAgain(Exception):
    """Ends `Trainer.train` before its first step."""


class MeasureFinished(TrainerCallback):
    """Once the start has been measured, loads the finished weights, measures them, and ends the training.

    Only inside `Trainer.train` is the model where it is measured during training: a ZeRO engine exists only there.
    """

    def __init__(self, trainer: Trainer, output_dir: Path, kept_step: int | None, measure: Callable[[], Metrics]):
        self.trainer, self.output_dir, self.kept_step, self.measure = trainer, output_dir, kept_step, measure

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        load_finished(self.trainer, self.output_dir)
        state.global_step = self.kept_step or state.max_steps
        self.after = self.measure()
        raise MeasuredAgain


def load_finished(trainer: Trainer, output_dir: Path) -> None:
    """Copies the weights of a finished stage into the trainer's model, in place; every process calls this."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    folder = output_dir / "adapter" if isinstance(model, PeftModel) else output_dir
    parameters = {_saved_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in _tensors(folder):
        with _gathered(parameters[name]):
            parameters[name].data.copy_(tensor)


def _saved_name(name: str) -> str:
    """A parameter's name in the file of an adapter, in which PEFT leaves out the adapter's own."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                yield name, opened.get_tensor(name)


def _gathered(parameter: torch.nn.Parameter) -> AbstractContextManager:
    """The whole parameter where ZeRO-3 has split it; what the first process writes there reaches all."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed  # slow

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
