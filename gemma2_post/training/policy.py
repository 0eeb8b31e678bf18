"""The models of RLHF: the initial policy, the frozen models next to it, and the saved anchor."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed
from trl import ModelConfig, RLOOConfig, get_peft_config
from trl.models.utils import prepare_deepspeed

from gemma2_post.models.loading import load_for_training
from gemma2_post.models.saving import save_adapter, save_configs
from gemma2_post.models.streaming import write_tensors
from gemma2_post.models.tokenizer import save_tokenizer
from gemma2_post.training.watch import WithAdapter
from gemma2_post.weights.anchor import REFERENCE_ADAPTER, EmaAnchor

if TYPE_CHECKING:
    from trl import RLOOTrainer


def load_policy(model_args: ModelConfig, training_args: RLOOConfig) -> PreTrainedModel | PeftModel:
    """The initial policy; with adapters, TRL keeps a copy of the new one as the reference `ref`."""
    policy = load_for_training(model_args, training_args)
    peft_config = get_peft_config(model_args)
    if peft_config is None:
        return policy
    set_seed(training_args.seed)  # for the new adapter
    # Under ZeRO-3 all parameters share one dtype: its gathering buffers have that of the first parameter.
    plugin = training_args.deepspeed_plugin
    sharded = plugin is not None and plugin.zero_stage == 3
    return get_peft_model(policy, peft_config, autocast_adapter_dtype=not sharded)


def prepare_frozen(trainer: "RLOOTrainer", model: PreTrainedModel) -> torch.nn.Module:
    """Freezes a model that is only read, and moves it to the trainer's device or shards it like the policy."""
    model.requires_grad_(False)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True).eval()  # computes in the policy's dtype


def models_beside(
    trainer: "RLOOTrainer", model_args: ModelConfig, is_moving: bool
) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The initial policy, and the reference to which TRL computes the KL.

    Args:
        is_moving: Whether the reference moves or there is none, so that the initial policy needs a model of its own.
    """
    if model_args.use_peft:
        return WithAdapter(trainer, None), WithAdapter(trainer, REFERENCE_ADAPTER)
    if not is_moving:
        return trainer.ref_model, trainer.ref_model
    return prepare_frozen(trainer, load_for_training(model_args, trainer.args)), trainer.ref_model


def save_anchor(trainer: "RLOOTrainer", anchor: EmaAnchor) -> None:
    """Saves the anchor, the EMA of the policy's weights, in fp32 as a model or adapter of its own."""
    directory, is_main = Path(trainer.args.output_dir) / "anchor", trainer.is_world_process_zero()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(policy, PeftModel):
        weights = {name: anchor.whole(name) for name in anchor.shadows}
        if is_main:
            save_adapter(policy, weights, directory)
        return
    write_tensors(directory if is_main else None, anchor.shapes(), torch.float32, anchor.whole)
    if is_main:
        save_configs(type(policy), policy.config, directory, torch.float32)
        save_tokenizer(trainer.processing_class, directory)
