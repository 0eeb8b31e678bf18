"""Saving Gemma 2 models as plain Hugging Face directories."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig

from gemma2_post.models.loading import generation_config
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.models.tokens import BOS, EOS, PAD


def save_model(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], output_dir: Path, dtype: torch.dtype
) -> None:
    """Writes a directory that its `Auto` class loads: weights, config, and of a language model the generation config.

    One canonical layout: a language model's head is the embedding (ZeRO-1 and 2 hand both over), each tensor is
    rounded once to `dtype`, and a reward model's score head is in fp32.
    """
    head, embedding = state_dict.pop("lm_head.weight", None), state_dict["model.embed_tokens.weight"]
    if head is not None and not torch.equal(head, embedding):
        raise RuntimeError("lm_head and embed_tokens differ: training has untied them")
    empty = [name for name, tensor in state_dict.items() if tensor.numel() == 0]
    if empty:
        raise RuntimeError(f"{empty[0]} is empty: the shards of the model were not gathered")
    rounded = {name: tensor.to(torch.float32 if name == SCORE_HEAD else dtype) for name, tensor in state_dict.items()}
    model.save_pretrained(output_dir, state_dict=rounded)
    save_configs(model, output_dir, dtype)


def save_configs(model: PreTrainedModel, output_dir: Path, dtype: torch.dtype) -> None:
    """Writes what stands beside weights that are saved in `dtype`, whatever the type of the model."""
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
    """The unquantised base with the adapter added in fp32, on the CPU.

    Merging into the 4-bit base would quantise the sum again; in bf16 a part of the update would be rounded away.

    Args:
        config: what the model's config has in place of the base's.
    """
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard this model, too
    base = model_class.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=torch.float32,
        attn_implementation=model_args.attn_implementation,
        **config,
    )
    return PeftModel.from_pretrained(base, adapter_dir, torch_device="cpu").merge_and_unload()
