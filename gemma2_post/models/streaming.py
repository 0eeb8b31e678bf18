"""Weights on disk, a slice at a time: mapped for reading, written as they are computed."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Container, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open

from gemma2_post.models.folder import files_of, read_header, read_shapes
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

Weights = dict[str, torch.Tensor]
"""Tensors by name, mapped from the files: data is read only when it is used."""

CHUNK = 1 << 20
"""Elements of a tensor that each core has in memory at once, in a few copies; 4 MB in fp32, about a cache."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def open_weights(directory: Path, file: str = "model.safetensors") -> Weights:
    """All tensors in a directory's file of weights, or in its shards with an index.

    Raises:
        UserError: A file is missing or damaged, or the weights are quantized.
    """
    read_shapes(directory, file)
    weights: Weights = {}
    for path in files_of(directory, file):
        with safe_open(path, "pt") as shard:
            weights |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return dict(sorted(weights.items(), key=lambda item: _by_number(item[0])))


def places_of(directory: Path) -> dict[str, Path]:
    """The file of each tensor in a directory's weights.

    Raises:
        UserError: A file is missing or damaged, or the weights are quantized.
    """
    read_shapes(directory)
    return {name: file for file in files_of(directory) for name in read_header(file)}


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """A tensor, mapped from its file; the mapping ends with it, so no other tensor's pages stay in memory."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _by_number(name: str) -> list[str | int]:
    """Sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


_scratch = threading.local()


def scratch(use: str, num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """This thread's buffer for one use; allocating memory for each slice would cost more than the arithmetic."""
    found = getattr(_scratch, use, None)
    if found is None or found.numel() < num_elements or (found.dtype, found.device) != (dtype, device):
        found = torch.empty(max(num_elements, CHUNK), dtype=dtype, device=device)
        setattr(_scratch, use, found)
    return found[:num_elements]


def row_slices(shape: torch.Size) -> Iterator[slice]:
    """Slices of the first dimension with about `CHUNK` elements each, at least one row."""
    step = max(1, CHUNK // max(1, prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


class ShardWriter:
    """Writes `model.safetensors`, or shards with an index, by slices of tensors, in any order and from any thread.

    The full size is reserved at once, so a full disk shows before the work, not after it. The files are those that the
    safetensors library would write.

    Args:
        dtype: Dtype of the tensors in the files.
        in_fp32: Names of tensors that are written in fp32 instead.
        shard_bytes: Largest size of a shard.
    """

    def __init__(
        self,
        directory: Path,
        shapes: dict[str, torch.Size],
        dtype: torch.dtype,
        in_fp32: Container[str] = (),
        shard_bytes: int = 5_000_000_000,
    ):
        self.directory = directory
        self.dtypes = {name: torch.float32 if name in in_fp32 else dtype for name in shapes}
        self.plan = split_state_dict_into_shards_factory(
            {name: prod(shape) * self.dtypes[name].itemsize for name, shape in shapes.items()},
            get_storage_size=lambda num_bytes: num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_bytes,
        )
        self.places: dict[str, tuple[int, int]] = {}
        """File descriptor and offset of each tensor's data, in bytes."""
        self.files: list[int] = []
        self.lock = threading.Lock()
        """One thread writes at a time: the system serializes writes to a file anyway, and waiters would spin."""
        for file, names in self.plan.filename_to_tensors.items():
            self._create(directory / file, {name: shapes[name] for name in names})

    def _create(self, path: Path, shapes: dict[str, torch.Size]) -> None:
        """Creates a safetensors file with its header: 8 bytes of length, JSON padded to 8 bytes, then the data."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shapes, key=lambda name: (-self.dtypes[name].itemsize, name)):
            start, end = end, end + prod(shapes[name]) * self.dtypes[name].itemsize
            kind, shape = _DTYPES[self.dtypes[name]], list(shapes[name])
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.files.append(file)
        os.posix_fallocate(file, 0, 8 + len(text) + end)
        os.pwrite(file, len(text).to_bytes(8, "little") + text, 0)
        for name in shapes:
            self.places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, first_element: int, values: torch.Tensor) -> bool:
        """Writes consecutive elements of a tensor, rounded to the dtype in the file here and nowhere else.

        Returns:
            Whether the rounded elements are all finite.
        """
        (file, start), dtype = self.places[name], self.dtypes[name]
        rounded = scratch("rounded", values.numel(), dtype, torch.device("cpu")).copy_(values)
        with self.lock:
            os.pwrite(file, rounded.view(torch.uint8).numpy().data, start + first_element * dtype.itemsize)
        return bool(rounded.sum(dtype=torch.float32).isfinite())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for file in self.files:
            os.close(file)
        if error is None and self.plan.is_sharded:
            index = {"metadata": self.plan.metadata, "weight_map": self.plan.tensor_to_filename}
            contract.write_json(self.directory / "model.safetensors.index.json", index)


def write_tensors(
    output_dir: Path | None,
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    tensor_of: Callable[[str], torch.Tensor],
    in_fp32: Container[str] = (),
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `model.safetensors`, or shards with an index, one tensor at a time; replaces what has these names.

    Args:
        output_dir: None on a process that helps gather the tensors but writes nothing.
        shapes: Shapes of the tensors, in the same order on every process.
        dtype: Dtype to which each tensor is rounded.
        tensor_of: Returns the tensor with a given name, on any device.
        in_fp32: Names of tensors that are written in fp32 instead.
        shard_bytes: Largest size of a shard.

    Raises:
        UserError: A tensor has NaN or infinite values; nothing is replaced.
    """
    if output_dir is None:
        for name in shapes:
            tensor_of(name)
        return
    unfinished = output_dir / ".weights"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with ShardWriter(unfinished, shapes, dtype, in_fp32, shard_bytes) as writer:
            for name, shape in shapes.items():
                tensor = tensor_of(name)
                for rows in row_slices(shape):
                    if not writer.write(name, rows.start * prod(shape[1:]), tensor[rows].reshape(-1)):
                        raise UserError(
                            f"{name} has NaN or infinite values, so the model is not saved; lower learning_rate"
                        )
        for file in unfinished.iterdir():
            file.replace(output_dir / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
