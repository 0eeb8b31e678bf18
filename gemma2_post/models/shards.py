"""Writing weights as safetensors shards, with at most one shard of a model in memory."""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raises a `UserError` if a tensor has NaN or infinite values; such a model is not saved."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has NaN or infinite values, so the model is not saved; lower learning_rate")


def write_shards(
    output_dir: Path | None,
    sizes: dict[str, int],
    tensor_of: Callable[[str], torch.Tensor],
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `model.safetensors`, or several with an index, as `from_pretrained` reads them.

    Args:
        output_dir: None on a process that helps gather the tensors but writes nothing.
        sizes: Bytes of each tensor, in the same order on every process.
        tensor_of: Returns the tensor with a given name, in the dtype in which it is stored.
        shard_bytes: Largest size of a shard.
    """
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda num_bytes: num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: tensor_of(name).contiguous() for name in names}
        check_finite(tensors)
        if output_dir:
            output_dir.mkdir(parents=True, exist_ok=True)
            save_file(tensors, output_dir / file, {"format": "pt"})
    if output_dir and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        contract.write_json(output_dir / "model.safetensors.index.json", index)
