"""Saving Gemma 2 models as plain Hugging Face directories."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig

from gemma2_post.models.loading import generation_config
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.models.shards import check_finite
from gemma2_post.models.tokens import BOS, EOS, PAD


def save_model(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], output_dir: Path, dtype: torch.dtype
) -> None:
    """Writes a directory that its `Auto` class loads: weights, config, and for a language model the generation config.

    The layout is canonical: only the embedding is saved, not the tied head (ZeRO-1 and 2 gather both); each tensor is
    rounded once to `dtype`; a reward model's score head is in fp32.
    """
    check_finite(state_dict)
    head, embedding = state_dict.pop("lm_head.weight", None), state_dict["model.embed_tokens.weight"]
    if head is not None and not torch.equal(head, embedding):
        raise RuntimeError("lm_head and embed_tokens differ: training has untied them")
    if empty := [name for name, tensor in state_dict.items() if tensor.numel() == 0]:
        raise RuntimeError(f"{empty[0]} is empty: the shards of the model were not gathered")
    rounded = {name: tensor.to(torch.float32 if name == SCORE_HEAD else dtype) for name, tensor in state_dict.items()}
    model.save_pretrained(output_dir, state_dict=rounded)
    save_configs(model, output_dir, dtype)


def save_configs(model: PreTrainedModel, output_dir: Path, dtype: torch.dtype) -> None:
    """Writes the config files that belong to weights saved in `dtype`, whatever the dtype of `model`."""
    if model.can_generate():
        generation_config().save_pretrained(output_dir)
    config = model.config
    config.architectures = [type(model).__name__]
    config.__dict__.pop("cache_implementation", None)  # "hybrid" in Google's files, which transformers 5 dropped
    config.update({"use_cache": True, "dtype": dtype, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD})
    config.save_pretrained(output_dir)


def merge_adapter(
    adapter_dir: Path, model_args: ModelConfig, model_class: type[PreTrainedModel], **config: object
) -> PreTrainedModel:
    """The unquantized base model with the adapter merged in fp32, on the CPU.

    Merging into the 4-bit base would quantize the sum again; bf16 would round away part of the update.

    Args:
        config: Values that override the base model's config.
    """
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard this model too
    base = model_class.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=torch.float32,
        attn_implementation=model_args.attn_implementation,
        **config,
    )
    return PeftModel.from_pretrained(base, adapter_dir, torch_device="cpu").merge_and_unload()
