"""What every training stage checks and fills in before it loads anything."""

from typing import TYPE_CHECKING, Any

from gemma2_post.models.arguments import check_arguments, complete_model_arguments
from gemma2_post.stage.command import Checked, Stage
from gemma2_post.stage.disk import check_space
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher, of_this_process
from gemma2_post.training.keys import TrainingRecipe
from gemma2_post.training.memory import disk

if TYPE_CHECKING:
    from transformers import Gemma2Config, TrainingArguments


def check_training(recipe: TrainingRecipe, launcher: Launcher) -> None:
    """Refuses what no training stage can work with."""
    check_arguments(launcher, recipe.model, recipe.training)
    accumulation_steps(recipe.global_batch_size, recipe.training.per_device_train_batch_size, launcher.num_processes)
    _check_optimizer(recipe.training)
    _check_scheduler(recipe.training)
    _check_trackers(recipe.training.report_to)


def _check_optimizer(training: "TrainingArguments") -> None:
    """Refuses an optimizer that is not installed, or arguments that cannot be read."""
    if training.optim == type(training).optim and not training.optim_args:
        return
    from transformers import Trainer  # a slow import

    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"optim {training.optim.value} cannot be used ({reason}); install it, or remove optim"
        ) from error


def _check_scheduler(training: "TrainingArguments") -> None:
    """Refuses arguments that the scheduler does not take, by making one, or ignores."""
    import torch
    from transformers import get_scheduler

    steps = training.max_steps if training.max_steps > 0 else 1000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    arguments, kind = training.lr_scheduler_kwargs or {}, training.lr_scheduler_type.value
    if kind == "constant" and training.get_warmup_steps(steps):
        raise UserError("warmup_steps has no effect with lr_scheduler_type constant; write constant_with_warmup")
    if kind in ("constant", "constant_with_warmup") and arguments:
        raise UserError(f"lr_scheduler_kwargs has no effect with lr_scheduler_type {kind}; remove it")
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            training.get_warmup_steps(steps),
            steps,
            scheduler_specific_kwargs=arguments,
        )
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"lr_scheduler_type {kind} does not work with lr_scheduler_kwargs {arguments} "
            f"({reason}); correct one of them"
        ) from error


def _check_trackers(names: list[str]) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"report_to is {name}, which transformers does not know; write none, or one of {known}")
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to is {name}, which is not installed; pip install {name}, or write none")


def check_sampling(recipe: TrainingRecipe, launcher: Launcher) -> None:
    """Refuses what cannot work in a stage that trains on the model's own answers."""
    training = recipe.training
    if not training.use_vllm:
        return
    if training.vllm_mode == "server" and launcher.use_cpu:
        raise UserError("vllm_mode is server, whose weights TRL sends only between GPUs; write vllm_mode: colocate")
    if training.vllm_mode == "colocate" and launcher.num_processes % training.vllm_tensor_parallel_size:
        raise UserError(
            f"vllm_tensor_parallel_size {training.vllm_tensor_parallel_size} does not divide {launcher.num_processes} "
            "processes; change it"
        )
    if recipe.quantization:
        raise UserError(
            f"use_vllm with load_in_{recipe.quantization}: TRL would add the adapter to the quantized weights at each "
            "step, which rounds them each time; remove use_vllm, or the quantization"
        )
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    for name, value in neutral.items():
        if getattr(training, name) not in (value, None):
            raise UserError(
                f"{name} is {getattr(training, name)} with use_vllm, so what vLLM samples could not be compared with "
                "the policy; remove it"
            )


def check_vllm() -> None:
    """Refuses to train with a vLLM that is not there."""
    from trl.import_utils import is_vllm_available

    if not is_vllm_available():
        raise UserError(
            "use_vllm is true, but vLLM is not installed; pip install 'gemma2_post[vllm]', or remove use_vllm"
        )


def complete_training(recipe: TrainingRecipe, launcher: Launcher) -> None:
    """Fills in Gemma 2's defaults and the accumulation steps that the global batch needs."""
    complete_model_arguments(recipe.model)
    recipe.training.gradient_accumulation_steps = accumulation_steps(
        recipe.global_batch_size, recipe.training.per_device_train_batch_size, launcher.num_processes
    )
    recipe.training.prediction_loss_only = True  # full logits over 256k tokens would fill the memory
    recipe.training.logging_nan_inf_filter = False  # it would hide a NaN loss


def accumulation_steps(global_batch_size: int, per_device_batch_size: int, num_processes: int) -> int:
    """Micro-batches per optimizer step; they make a recipe mean the same on any number of processes."""
    per_step = per_device_batch_size * num_processes
    if global_batch_size % per_step:
        raise UserError(
            f"global_batch_size {global_batch_size} does not divide by per_device_train_batch_size "
            f"{per_device_batch_size} x {num_processes} processes; change one of them"
        )
    return global_batch_size // per_step


def metrics_of(measured: set[str], additional: set[str]) -> set[str]:
    """The names of a training stage's metrics.

    Args:
        measured: Names measured both before and after training.
        additional: Names measured only afterwards.
    """
    return measured | {f"{name}_before" for name in measured} | additional | {"tokens_per_second", "peak_memory_gb"}


def check_disk(stage: Stage, recipe: TrainingRecipe, config: "Gemma2Config", **more: Any) -> None:
    """Refuses to begin if the disk has no room for what is missing of the output and the checkpoints.

    Args:
        more: See `memory.disk`.
    """
    checked = Checked(recipe, of_this_process(recipe.training), {"model_name_or_path": config})
    check_space(stage.output_dir, sum(disk(checked, **more)))
