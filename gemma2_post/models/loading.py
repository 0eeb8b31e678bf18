"""Loading Gemma 2 models: configs first, so that mistakes show before any weights are read."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
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

from gemma2_post.models.folder import LANGUAGE_MODEL, check_kind, is_hub_name, open_folder, read_object
from gemma2_post.models.shapes import tensor_shapes
from gemma2_post.models.streaming import places_of
from gemma2_post.models.tokens import BOS, PAD, STOP_TOKEN_IDS
from gemma2_post.stage.errors import UserError

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "config.json"]
"""What `from_pretrained` has downloaded of a model on the Hub, at least."""


def load_config(path: str, revision: str | None = None, wanted: str = LANGUAGE_MODEL) -> Gemma2Config:
    """The model's config, checked; a folder is checked wholly, see `open_folder`.

    Args:
        wanted: `LANGUAGE_MODEL` or `REWARD_MODEL`.

    Raises:
        UserError: It is no finished, unquantized Gemma 2 model of this kind, or cannot be loaded.
    """
    if not is_hub_name(path):
        folder = open_folder(path)
        if folder.config.get("model_type") == "gemma2":
            check_kind(folder, wanted)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        raise load_error(path, error) from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the config.json of {path} cannot be read ({reason}); get the model again") from error
    if config.model_type != "gemma2":
        raise UserError(f"{path} is a {config.model_type} model; this pipeline is for gemma2")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{path} is quantized; name the unquantized model and set load_in_4bit instead")
    if [type(value) for value in (config.sliding_window, config.max_position_embeddings)] != [int, int]:
        raise UserError(f"{path}: sliding_window or max_position_embeddings in its config.json is no whole number")
    return config


def load_error(path: str, error: OSError) -> UserError | OSError:
    """The error to raise when a model cannot be loaded: what to do about it, or `error` itself if the disk is full."""
    if error.errno == errno.ENOSPC:
        return error
    reason = str(error).strip().splitlines()[0]
    if Path(path).is_dir():
        return UserError(f"{path} cannot be loaded ({reason}); name the output of a finished stage")
    return UserError(
        f"cannot get {path}: it is no local directory, and the Hub does not hand it out; if it is gated, "
        f"accept its license at https://huggingface.co/{path} and log in with `hf auth login` (a token alone does not "
        f"do); if this machine is offline, download it elsewhere and give the directory ({reason})"
    )


def find_weights(model_args: ModelConfig) -> dict[str, Path]:
    """The file of each tensor of the unquantized model that a recipe names, local or downloaded.

    Raises:
        UserError: It has no whole weights in safetensors.
    """
    path = model_args.model_name_or_path
    folder = Path(path)
    if is_hub_name(path):
        folder = Path(snapshot_download(path, revision=model_args.model_revision, allow_patterns=_WEIGHTS))
    places = places_of(folder)
    for name in tensor_shapes(read_object(folder / "config.json"), path):
        if name not in places:
            raise UserError(f"{path} lacks the tensor {name}, which its config needs; get the model again")
    return places


def load_for_training(model_args: ModelConfig, training_args: TrainingArguments) -> PreTrainedModel:
    """The causal language model for a trainer."""
    return load_model(model_args, training_device_map(model_args, training_args))


def training_device_map(model_args: ModelConfig, training_args: TrainingArguments) -> dict | None:
    """A quantized model must be loaded on the trainer's device; the trainer moves or shards any other itself."""
    return {"": training_args.device} if model_args.load_in_4bit or model_args.load_in_8bit else None


@contextmanager
def unsharded(training_args: TrainingArguments) -> Iterator[None]:
    """Context in which a model is loaded whole even under ZeRO-3, which otherwise shards every model while loading."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training_args.deepspeed_plugin:
            training_args.deepspeed_plugin.set_deepspeed_weakref()


def load_model(model_args: ModelConfig, device_map: str | dict | None) -> PreTrainedModel:
    """The causal language model that the recipe describes."""
    model = load_pretrained(AutoModelForCausalLM, model_args, device_map)
    model.generation_config = generation_config()
    return model


def frozen_arguments(path: str, dtype: str, quantization: str | None = None) -> ModelConfig:
    """How a model that is only read is loaded.

    Args:
        dtype: "bfloat16" or "float32".
        quantization: "4bit" (NF4), "8bit" (LLM.int8), or None.
    """
    return ModelConfig(
        model_name_or_path=path,
        dtype=dtype,
        attn_implementation="eager",
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
    )


def load_pretrained(
    auto_class: Any, model_args: ModelConfig, device_map: dict | str | None, **config: object
) -> PreTrainedModel:
    """The model that the recipe describes, as `auto_class` loads it.

    Args:
        config: Values that override the model's config.

    Raises:
        UserError: It cannot be loaded.
    """
    try:
        model = auto_class.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=getattr(torch, model_args.dtype),
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
            device_map=device_map,
            **config,
        )
    except OSError as error:
        raise load_error(model_args.model_name_or_path, error) from error
    disable_cpu_repacking(model)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        _unmap(model)
    return model


def _unmap(model: PreTrainedModel) -> None:
    """Copies what a quantized model on a CPU still maps from its file: embedding and norms.

    The mapping would keep every page of the file in memory that loading has read, for a model of 2b 5.2 GB.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def disable_cpu_repacking(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in an evaluation forward pass on a CPU with AVX512-BF16.

    It later reads the repacked weights as if they were not repacked: gradients and merges would be silently wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def generation_config() -> GenerationConfig:
    """The generation config, always with both stop tokens; see `STOP_TOKEN_IDS`."""
    return GenerationConfig(bos_token_id=BOS, eos_token_id=STOP_TOKEN_IDS, pad_token_id=PAD)
