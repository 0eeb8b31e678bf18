"""Weights written as safetensors shards, so that no more than one shard of a model is in memory."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemma2_post.core import contract

SHARD_BYTES = 5_000_000_000


def write_shards(
    output_dir: Path | None,
    sizes: dict[str, int],
    tensor_of: Callable[[str], torch.Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or several with an index, as `from_pretrained` reads them.

    Args:
        output_dir: None on a process that takes part in gathering the tensors, but writes nothing.
        sizes: bytes of each tensor, in the order in which they are asked for, the same on each process.
        tensor_of: the tensor of a name, in the type in which it is stored.
    """
    shards = _plan(sizes, shard_bytes)
    file_of = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        file_of |= dict.fromkeys(names, file)
        tensors = {name: tensor_of(name) for name in names}
        if output_dir:
            output_dir.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, output_dir / file, {"format": "pt"}
            )
    if output_dir and len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        contract.write_json(output_dir / "model.safetensors.index.json", index)


def _plan(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """The names by shard: in order, each shard as full as it gets."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, num_bytes in sizes.items():
        if shards[-1] and filled + num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards
