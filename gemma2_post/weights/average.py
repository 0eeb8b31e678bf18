"""The mean of reward models' weights (WARM, arXiv 2401.12187, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gemma2_post.models.folder import copy_tokenizer
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.models.streaming import ShardWriter
from gemma2_post.stage import contract
from gemma2_post.stage.disk import check_space
from gemma2_post.stage.errors import UserError
from gemma2_post.weights import inputs
from gemma2_post.weights.inputs import Adapter, Model
from gemma2_post.weights.merge import merge_adapters, merge_models, write_with_adapter


@dataclass
class Average:
    """Reward models that have been opened and checked, and what their mean is written from."""

    start: Model
    """The base of the adapters, with the first one's score head; without adapters, the first model."""
    models: list[Model]
    adapters: list[Adapter]
    """Of all models, if they are adapters on one base: their mean is exact. Else empty."""
    tokenizer: Path
    """Folder of the tokenizer to write."""

    def write(self, output_dir: Path, save_dtype: str) -> None:
        """Writes the mean, with config and tokenizer; computed in fp32, rounded once, the score head not at all."""
        shapes = {name: tensor.shape for name, tensor in self.start.weights.items()}
        dtype, device = getattr(torch, save_dtype), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_space(output_dir, sum(shape.numel() for shape in shapes.values()) * dtype.itemsize)
        for weights in output_dir.glob("model*.safetensors*"):  # of a run that was interrupted
            weights.unlink()
        with ShardWriter(output_dir, shapes, dtype, {SCORE_HEAD}) as writer:
            if self.adapters:
                merged, _ = merge_adapters(self.start, self.adapters, "linear", "layer")
                write_with_adapter(self.start, merged, self.start, {1.0: writer}, device)
            else:
                merge_models(self.start, self.models, self.start, "linear", "layer", {1.0: writer}, device)
        copy_tokenizer(self.tokenizer, output_dir)
        contract.write_json(output_dir / "config.json", self.start.config | {"dtype": save_dtype})


def open_average(names: list[str], digests: dict[str, Any], force: bool) -> Average:
    """Opens and checks the reward models whose weights are averaged.

    Args:
        digests: Known content hashes, by name.
        force: Whether models that do not share a first score head are averaged, with a warning.

    Raises:
        UserError: They are fewer than two, damaged, or do not belong together.
    """
    check_number(names)
    done = [_record(name) for name in names]
    heads = [each["fingerprint"]["inputs"].get(each["fingerprint"]["recipe"].get("score_head")) for each in done]
    check_heads(names, heads, force)
    models = [inputs.open_model(name, digests) for name in names]
    for other in models[1:]:
        inputs.check_same_architecture(models[0], other)
    tokenizer = inputs.check_same_tokenizer([(each.name, each.directory) for each in models])
    folders = [each.directory / "adapter" for each in models]
    if len({_base(each) for each in done}) == 1 and all(map(inputs.is_adapter, folders)):
        start = _open_base(done[0], models[0])
        adapters = [inputs.open_adapter(*each, start) for each in zip(names, folders, strict=True)]
        if all(each.updates.keys() == adapters[0].updates.keys() for each in adapters):
            return Average(start, models, adapters, tokenizer)
    if any(each["dtype"] != "float32" for each in done):
        print(
            "warning: the mean is one of whole models, some of them saved in bfloat16, which rounds what they "
            "differ in; train adapters for the same modules of one base, or write save_dtype: float32",
            flush=True,
        )
    return Average(models[0], models, [], tokenizer)


def _record(name: str) -> dict[str, Any]:
    """The stage file of a member."""
    done = contract.read_done(Path(name))
    if done is None or done["stage"] != "reward":
        raise UserError(
            f"reward_models names {name}, which is no finished output of the reward stage; name such a folder"
        )
    return done


def check_number(names: list[str]) -> None:
    """Refuses fewer than two members, and one that is named twice."""
    if len(names) < 2:
        raise UserError(f"reward_models has {len(names)} model, and a mean needs two; name the others, too")
    folders = [Path(name).resolve() for name in names]
    for name, folder in zip(names, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(f"reward_models names {name} twice; name each once")


def check_heads(names: list[str], heads: Sequence[object], force: bool) -> None:
    """Refuses members that begin with heads of their own: between such models, loss is not low (section 3.2).

    Args:
        heads: What each member's `score_head` is; None if it has none.
    """
    for name, head in zip(names, heads, strict=True):
        if head is None or head != heads[0]:
            message = f"{name} does not begin with the score head of {names[0]}, so their mean may be worse than each"
            if head is None:
                message = f"{name} begins with a score head of its own, so a mean with it may be worse than each"
            if not force:
                raise UserError(f"{message}; train members with one score_head, or write force: true")
            print(f"warning: {message}", flush=True)


def _base(done: dict[str, Any]) -> tuple[object, object]:
    """What the adapter of a finished stage is for: a folder's content, or a model on the Hub."""
    return done["base_digest"] or done["base_model"], done["base_revision"]


def _open_base(done: dict[str, Any], member: Model) -> Model:
    """The base of adapters, with the score head of one member."""
    name, digest = done["base_model"], done["base_digest"]
    directory = inputs.locate(name, done["base_revision"])
    if digest and contract.input_digest(name) != digest:
        raise UserError(f"{name} has changed since {member.name} was trained from it; train the members again")
    base = inputs.open_model(str(directory), {})
    inputs.drop_copied_heads([base])
    head = {SCORE_HEAD: member.weights[SCORE_HEAD]}
    return replace(base, name=name, config=member.config, weights=base.weights | head)
