"""Weights on disk, a slice at a time: read as they are mapped, written as they are computed."""

import json
import os
import re
import threading
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

Weights = dict[str, torch.Tensor]
"""By name; mapped from the files, so that nothing is read before it is used."""

CHUNK = 1 << 20
"""Elements of a tensor that are in memory at once, on each core, times a few copies: 4 MB in fp32, about a cache."""
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def open_weights(directory: Path, file: str = "model.safetensors") -> Weights:
    """All tensors of a directory with one file of weights, or with shards and their index."""
    index = directory / f"{file}.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [file]
    weights: Weights = {}
    for file in files:
        if not (directory / file).is_file():
            raise UserError(f"{directory} has no {file}; name a folder with weights in safetensors")
        try:
            with safe_open(directory / file, "pt") as shard:
                weights |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                f"{directory / file} cannot be read ({error}): it is cut off or damaged; get it again"
            ) from error
    weights = dict(sorted(weights.items(), key=lambda item: _by_number(item[0])))
    quantised = next((name for name, tensor in weights.items() if not tensor.is_floating_point()), None)
    if quantised:
        raise UserError(
            f"{directory}: {quantised} is {weights[quantised].dtype}, not a floating-point tensor; name the "
            "unquantised model"
        )
    return weights


def _by_number(name: str) -> list[str | int]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


_scratch = threading.local()


def scratch(use: str, num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of this thread for one use at a time; to ask the system anew for each slice costs more than the sums."""
    found = _scratch.__dict__.get(use)
    if found is None or found.numel() < num_elements or (found.dtype, found.device) != (dtype, device):
        found = torch.empty(max(num_elements, CHUNK), dtype=dtype, device=device)
        setattr(_scratch, use, found)
    return found[:num_elements]


def row_slices(shape: torch.Size) -> Iterator[slice]:
    """Slices of the first dimension of about `CHUNK` elements; one row at least."""
    step = max(1, CHUNK // max(1, prod(shape[1:])))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


class ShardWriter:
    """`model.safetensors`, or several with an index, whose tensors may be written by slices, in any order and thread.

    The whole size is reserved at once, so that a full disk shows before the work and not after it.
    """

    def __init__(
        self, directory: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, shard_bytes: int = 5_000_000_000
    ):
        self.directory, self.dtype = directory, dtype
        self.plan = split_state_dict_into_shards_factory(
            {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()},
            get_storage_size=lambda num_bytes: num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_bytes,
        )
        self.places: dict[str, tuple[int, int]] = {}
        """Of each tensor: its file, and where in it its data begins."""
        self.files: list[int] = []
        self.lock = threading.Lock()
        """One writes at a time: the system lets two into one file in turns anyway, and the other one spins."""
        for file, names in self.plan.filename_to_tensors.items():
            self._create(directory / file, {name: shapes[name] for name in names})

    def _create(self, path: Path, shapes: dict[str, torch.Size]) -> None:
        """The file with its header, as the format wants it: eight bytes of length, JSON padded to eight, data."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + prod(shape) * self.dtype.itemsize
            header[name] = {"dtype": _DTYPES[self.dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.files.append(file)
        os.posix_fallocate(file, 0, 8 + len(text) + end)
        os.pwrite(file, len(text).to_bytes(8, "little") + text, 0)
        for name in shapes:
            self.places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, first_element: int, values: torch.Tensor) -> None:
        """A run of a tensor's elements, rounded to the writer's type here and nowhere else."""
        file, start = self.places[name]
        rounded = scratch("rounded", values.numel(), self.dtype, torch.device("cpu")).copy_(values)
        with self.lock:
            os.pwrite(file, rounded.view(torch.uint8).numpy().data, start + first_element * self.dtype.itemsize)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            os.close(file)
        if error is None and self.plan.is_sharded:
            index = {"metadata": self.plan.metadata, "weight_map": self.plan.tensor_to_filename}
            contract.write_json(self.directory / "model.safetensors.index.json", index)
