"""How a stage's processes are started, from an accelerate config or from the running process."""

import atexit
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2_post.stage.errors import UserError
from gemma2_post.stage.recipe_file import load_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Launcher:
    """The settings of accelerate that a stage's checks and estimates need."""

    num_processes: int = 1
    """Total over all machines."""
    num_machines: int = 1
    use_cpu: bool = False
    mixed_precision: str = "no"
    zero_stage: int = 0
    """0 without DeepSpeed."""
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    names_gpus: bool = False
    """Whether it says itself which GPUs its processes use."""
    saves_16bit_model: bool = False
    """Whether ZeRO-3 gathers the full weights for saving."""


def read(path: str | Path) -> Launcher:
    """The settings in an accelerate config.

    Raises:
        UserError: The file does not exist, or refers to a DeepSpeed config that would hide settings from the checks.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no accelerate config {path}; run from the project's folder, or set launch")
    config: dict[str, Any] = load_yaml(path)
    for key in ("num_processes", "num_machines"):
        if not isinstance(config.get(key, 1), int):
            raise UserError(f"{path}: {key} is {config[key]!r}; write a whole number")
    deepspeed = config.get("deepspeed_config") or {}
    if "deepspeed_config_file" in deepspeed:
        raise UserError(
            f"{path}: deepspeed_config_file hides the ZeRO stage from checks; write its keys here, as in "
            "accelerate_configs/deepspeed_zero3.yaml"
        )
    return Launcher(
        num_processes=config.get("num_processes", 1),
        num_machines=config.get("num_machines", 1),
        use_cpu=config.get("use_cpu", False),
        mixed_precision=config.get("mixed_precision", "no"),
        zero_stage=deepspeed.get("zero_stage", 0),
        names_gpus=config.get("gpu_ids") not in (None, "all"),
        offloads_optimizer=deepspeed.get("offload_optimizer_device", "none") != "none",
        offloads_parameters=deepspeed.get("offload_param_device", "none") != "none",
        saves_16bit_model=deepspeed.get("zero3_save_16bit_model", False),
    )


def of_this_process(training_args: "TrainingArguments | None") -> Launcher:
    """How the running process was started; only what a stage's checks need.

    Args:
        training_args: The arguments of a stage that trains; they hold accelerate's settings.
    """
    if training_args is None:
        return Launcher(num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    plugin = training_args.deepspeed_plugin
    return Launcher(
        num_processes=training_args.world_size,
        mixed_precision=training_args.mixed_precision,
        zero_stage=plugin.zero_stage if plugin else 0,
        saves_16bit_model=bool(plugin and plugin.zero3_save_16bit_model),
    )


def leave() -> None:
    """Ends this process if it is one of several: what runs at the end runs, but the interpreter is not taken down.

    That aborts now and then ("terminate called without an active exception"): gloo's threads still release tensors,
    for which they ask for Python's lock, and Python before 3.12 then ends such a thread in the middle of C++ code.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()  # trackers finish here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
