"""Loading Gemma 2 models: their configs first, so that what is wrong shows before weights are read."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, get_quantization_config

from gemma2_post.models.tokens import BOS, PAD, STOP_TOKEN_IDS
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError


def load_config(path: str, revision: str | None = None) -> Gemma2Config:
    """The model's config: read before its weights are downloaded, so that what is wrong shows early."""
    local = Path(path)
    if (local / "adapter_config.json").is_file() and not (local / "config.json").is_file():
        raise UserError(f"{path} is an adapter, not a model; merge it into its base first, or name a merged model")
    if local.is_dir() and not (local / "config.json").is_file():
        raise UserError(f"{path} has no config.json; name the output of a finished stage or a Hub model")
    if (local / contract.BEGUN).is_file() and not (local / contract.DONE).is_file():
        raise UserError(f"{path} is not finished; run the stage that makes it to its end")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        raise load_error(path, error) from error
    if config.model_type != "gemma2":
        raise UserError(f"{path} is a {config.model_type} model; this pipeline is for gemma2")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{path} is quantised; name the unquantised model and set load_in_4bit instead")
    return config


def load_error(path: str, error: OSError) -> UserError | OSError:
    """What to do when a model cannot be loaded; a full disk is left to speak for itself."""
    if error.errno == errno.ENOSPC:
        return error
    reason = str(error).strip().splitlines()[0]
    if Path(path).is_dir():
        return UserError(f"{path} cannot be loaded ({reason}); name the output of a finished stage")
    return UserError(
        f"cannot get {path}: it is no local directory, and the Hub does not hand it out; if it is gated, "
        f"accept its licence at https://huggingface.co/{path} and log in with `hf auth login` (a token alone does not "
        f"do); if this machine is offline, download it elsewhere and give the directory ({reason})"
    )


def load_for_training(model_args: ModelConfig, training_args: TrainingArguments) -> PreTrainedModel:
    """The causal language model for a trainer: a quantised one on its device, any other where the trainer moves it
    from (or shards it, under ZeRO-3)."""
    quantized = model_args.load_in_4bit or model_args.load_in_8bit
    return load_model(model_args, device_map={"": training_args.device} if quantized else None)


@contextmanager
def unsharded(training_args: TrainingArguments) -> Iterator[None]:
    """Within it a model is loaded whole, also under ZeRO-3, which otherwise shards each model that is loaded."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training_args.deepspeed_plugin:
            training_args.deepspeed_plugin.set_deepspeed_weakref()


def load_model(model_args: ModelConfig, device_map: str | dict | None) -> PreTrainedModel:
    """The causal language model as the recipe wants it."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=getattr(torch, model_args.dtype),
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
            device_map=device_map,
        )
    except OSError as error:
        raise load_error(model_args.model_name_or_path, error) from error
    disable_cpu_repacking(model)
    model.generation_config = generation_config()
    return model


def disable_cpu_repacking(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in an evaluation forward on a CPU with AVX512-BF16.

    The repacked weights are then read as if they were not: later gradients and merges are wrong, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def generation_config() -> GenerationConfig:
    """Both stop tokens, always: a Gemma 2 turn ends with `<end_of_turn>`, a conversation with `<eos>`."""
    return GenerationConfig(bos_token_id=BOS, eos_token_id=STOP_TOKEN_IDS, pad_token_id=PAD)
