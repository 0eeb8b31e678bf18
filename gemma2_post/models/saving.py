"""Saving Gemma 2 models as plain Hugging Face directories, one tensor at a time."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from transformers import Gemma2Config, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gemma2_post.models.folder import ADAPTER, absolute, read_object
from gemma2_post.models.loading import generation_config
from gemma2_post.models.shapes import LM_HEAD, SCORE_HEAD
from gemma2_post.models.streaming import read_tensor, write_tensors
from gemma2_post.models.tokens import BOS, EOS, PAD
from gemma2_post.stage import contract


def save_model(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], output_dir: Path, dtype: torch.dtype
) -> None:
    """Writes a directory that its `Auto` class loads: weights, config, and for a language model the generation config.

    The layout is canonical: only the embedding is saved, not the tied head; each tensor is rounded once to `dtype`; a
    reward model's score head is in fp32.
    """
    head, embedding = state_dict.get(LM_HEAD), state_dict["model.embed_tokens.weight"]
    if head is not None and not torch.equal(head, embedding):
        raise RuntimeError("lm_head and embed_tokens differ: training has untied them")
    shapes = {name: tensor.shape for name, tensor in state_dict.items() if name != LM_HEAD}
    write_tensors(output_dir, shapes, dtype, state_dict.__getitem__, {SCORE_HEAD})
    save_configs(type(model), model.config, output_dir, dtype)


def save_configs(
    model_class: type[PreTrainedModel], config: Gemma2Config, output_dir: Path, dtype: torch.dtype
) -> None:
    """Writes the config files that belong to weights saved in `dtype`, whatever the dtype of the model."""
    if model_class.can_generate():
        generation_config().save_pretrained(output_dir)
    config.architectures = [model_class.__name__]
    config.__dict__.pop("cache_implementation", None)  # "hybrid" in Google's files, which transformers 5 dropped
    config.update({"use_cache": True, "dtype": dtype, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD})
    config.save_pretrained(output_dir)


def save_adapter(model: PeftModel, state_dict: dict[str, torch.Tensor], directory: Path) -> None:
    """Writes the adapter `default` as PEFT loads it from anywhere: a local base is named by its absolute path.

    Args:
        state_dict: Its tensors, by the names of the model's parameters.
    """
    model.save_pretrained(directory, state_dict=state_dict, selected_adapters=["default"])
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's card, which names a local base by its path
    config = read_object(directory / ADAPTER)
    contract.write_json(
        directory / ADAPTER, config | {"base_model_name_or_path": absolute(config["base_model_name_or_path"])}
    )


def save_sum(
    model_class: type[PreTrainedModel],
    config: Gemma2Config,
    base: dict[str, Path],
    adapter_dir: Path,
    output_dir: Path,
    dtype: torch.dtype,
) -> None:
    """Writes the sum of the unquantized base and an adapter, computed by PEFT in fp32 for one matrix at a time.

    Merging into a 4-bit base would quantize the sum again; bf16 would round away part of the update.

    Args:
        config: The base's, with the changes of the trained model.
        base: The file of each of the base's tensors.
    """
    unset_hf_deepspeed_config()  # else ZeRO-3 would shard this model, too
    with torch.device("meta"):
        empty = model_class._from_config(config)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    tensor_of = _summed(empty, base, adapter_dir)
    write_tensors(output_dir, shapes, dtype, tensor_of, {SCORE_HEAD})
    save_configs(model_class, config, output_dir, dtype)


def _summed(empty: PreTrainedModel, base: dict[str, Path], adapter_dir: Path) -> Callable[[str], torch.Tensor]:
    """Returns the tensors of the sum by name, each once.

    Args:
        empty: The model without memory for its weights.
    """
    peft_config = PeftConfig.from_pretrained(adapter_dir)
    peft_config.base_model_name_or_path = None  # else PEFT warns that the empty model has another name
    adapted = get_peft_model(empty, peft_config, low_cpu_mem_usage=True)
    modules = dict(adapted.get_base_model().named_modules())
    layers = {f"{name}.weight": each for name, each in modules.items() if isinstance(each, BaseTunerLayer)}
    nothing = torch.nn.Parameter(torch.empty(0))  # fp32 on the CPU, where PEFT then puts the adapter
    for layer in layers.values():
        layer.get_base_layer().weight = nothing
    set_peft_model_state_dict(adapted, load_peft_weights(str(adapter_dir), "cpu"), low_cpu_mem_usage=True)
    whole = {
        f"{name}.{key}": parameter
        for name, each in modules.items()
        if isinstance(each, ModulesToSaveWrapper)
        for key, parameter in each.modules_to_save["default"].named_parameters()
    }

    @torch.no_grad()
    def tensor_of(name: str) -> torch.Tensor:
        if name in whole:
            return whole[name]
        if name not in layers:
            return read_tensor(base[name], name)
        layer = layers.pop(name)
        matrix = layer.get_base_layer()
        matrix.weight = torch.nn.Parameter(read_tensor(base[name], name).to(torch.float32, copy=True))
        layer.merge()
        summed, matrix.weight = matrix.weight, nothing
        return summed

    return tensor_of
