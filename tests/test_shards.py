"""Weights that are written shard by shard are read by transformers as they were."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma2_post.models.saving import save_configs
from gemma2_post.models.streaming import write_tensors
from tests.conftest import random_model


@pytest.mark.parametrize(("shard_bytes", "is_sharded"), [(100_000, True), (10**9, False)])
def test_from_pretrained_reads_what_was_written(shard_bytes: int, is_sharded: bool, tmp_path: Path) -> None:
    model = random_model(300)
    parameters = dict(model.named_parameters())
    shapes = {name: each.shape for name, each in parameters.items()}
    tensor_of = {name: each.detach() for name, each in parameters.items()}.__getitem__
    write_tensors(tmp_path, shapes, torch.float32, tensor_of, shard_bytes=shard_bytes)
    save_configs(type(model), model.config, tmp_path, torch.float32)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == is_sharded == (tmp_path / "model.safetensors.index.json").is_file()
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(each, parameters[name]) for name, each in read.named_parameters())


def test_a_process_that_writes_nothing_is_asked_for_every_tensor_in_the_same_order(tmp_path: Path) -> None:
    shapes = dict.fromkeys("abcde", torch.Size([10]))
    asked: dict[bool, list[str]] = {True: [], False: []}
    for writes in (True, False):

        def tensor_of(name: str, writes: bool = writes) -> torch.Tensor:
            asked[writes].append(name)
            return torch.zeros(10)

        write_tensors(tmp_path / "out" if writes else None, shapes, torch.float32, tensor_of, shard_bytes=80)
    assert asked[True] == asked[False] == list("abcde")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3 and [*tmp_path.iterdir()] == [tmp_path / "out"]
