"""The inputs of a merge: models and adapters, on disk or on the Hub, checked against each other before any work."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

from gemma2_post.models.folder import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    absolute,
    check_folder,
    is_hub_name,
    open_folder,
    read_object,
)
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.models.streaming import Weights, open_weights
from gemma2_post.models.templates import template_digest
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PLAIN = set(
    "task_type peft_type peft_version auto_mapping base_model_name_or_path revision inference_mode r lora_alpha "
    "target_modules exclude_modules lora_dropout bias use_rslora init_lora_weights layers_to_transform layers_pattern "
    "megatron_core qalora_group_size runtime_config".split()
)
"""Keys of an adapter's config that may have a value; any other one that PEFT knows makes another kind of adapter."""
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_BOOKKEEPING = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "cache_implementation"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings"),
}
"""Config keys that do not affect what the model computes (the weights themselves show whether they are tied)."""


@dataclass
class Model:
    """A whole model."""

    name: str
    """Its name as the user wrote it."""
    directory: Path
    config: dict[str, Any]
    """The content of its config.json."""
    weights: Weights
    digest: str
    """Content hash."""


@dataclass
class Adapter:
    """A LoRA adapter."""

    name: str
    directory: Path
    config: dict[str, Any]
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """B (out, r), times the adapter's scale, and A (r, in), both fp32, by the name of the weight that they update."""


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a local model or adapter, or of a Hub model, which is downloaded.

    Raises:
        UserError: There is no such folder or Hub model, or its stage is not finished.
    """
    if not is_hub_name(name):
        check_folder(name)
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED))
    except OSError as error:
        raise UserError(
            f"{name} is no local folder, and the Hub does not provide it; accept its license on its page "
            f"and log in with `hf auth login`, or give a folder ({str(error).strip().splitlines()[0]})"
        ) from error


def adapter_in(directory: Path) -> Path | None:
    """The adapter in a folder, or next to the (rounded) merged model that a stage saved; None if there is none."""
    stage = contract.read_done(directory, "stage")
    folder = directory / stage["adapter"] if stage and stage.get("adapter") else directory
    return folder if (folder / ADAPTER).is_file() else None


def open_model(name: str, digests: dict[str, Any]) -> Model:
    """A whole model.

    Args:
        digests: Known content hashes, by name.
    """
    directory = locate(name)
    opened = open_folder(str(directory))
    digest = digests.get(name) or contract.input_digest(str(directory))
    assert digest is not None, "a folder has a hash"
    return Model(name, directory, opened.config, open_weights(directory), digest)


def open_adapter(name: str, directory: Path, init: Model) -> Adapter:
    """A LoRA adapter on `init`.

    Raises:
        UserError: It is no plain LoRA adapter, is damaged, or does not fit `init`.
    """
    config = read_object(directory / ADAPTER)
    has_head = SCORE_HEAD in init.weights
    _check_plain(name, config | ({"modules_to_save": None} if has_head else {}))  # others than the head are left over
    weights = open_weights(directory, ADAPTER_WEIGHTS)
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))
    updates = {}
    left = dict(weights)
    for key in [key for key in weights if key.endswith(".lora_A.weight")]:
        a, b = left.pop(key), left.pop(key.replace(".lora_A.", ".lora_B."), None)
        if b is None:
            raise UserError(f"{name} has {key} without its lora_B; its file is incomplete, get it again")
        target = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == config["r"]:
            raise UserError(
                f"{name} has {target} as {list(b.shape)} x {list(a.shape)}, and its {ADAPTER} says r {config['r']}; "
                "get it again"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"{name} has NaN or infinite values in {key}; name an adapter without any")
        if target not in init.weights or init.weights[target].shape != (len(b), a.shape[1]):
            raise UserError(
                f"{name} adapts {target} of shape {[len(b), a.shape[1]]}, which {init.name} does not have; name "
                "the model that it was trained on"
            )
        updates[target] = (scale * b.float(), a.float())
    if has_head and (head := left.pop(f"base_model.model.{SCORE_HEAD}", None)) is not None:
        # A product, too, because the head has one row.
        updates[SCORE_HEAD] = (torch.ones(1, 1), head.float() - init.weights[SCORE_HEAD].float())
    if left:
        raise UserError(
            f"{name} has {min(left)}, which is no part of a product B A; merge the adapter into its base and name the "
            "merged models"
        )
    if not updates:
        raise UserError(f"{name} adapts nothing; name an adapter with weights")
    return Adapter(name, directory, config, updates)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter whose update is a product B A, but for a score head."""
    return (folder / ADAPTER).is_file() and not _beyond_lora(read_object(folder / ADAPTER) | {"modules_to_save": None})


def _beyond_lora(config: dict[str, Any]) -> str | None:
    """What of an adapter's config makes its update another one than the product B A; None if nothing does."""
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    if str(config.get("init_lora_weights", True)) not in ("True", "False", "gaussian", "orthogonal"):
        return f"init_lora_weights {config['init_lora_weights']}, which changes the base"
    if config.get("bias", "none") != "none":
        return "bias"
    return next((key for key, value in config.items() if value and key not in _PLAIN), None)


def _check_plain(name: str, config: dict[str, Any]) -> None:
    """Refuses an adapter whose update is not the product B A, or is zero."""
    if what := _beyond_lora(config):
        raise UserError(
            f"{name} is not a plain LoRA adapter ({what}), so its update is not a product B A; merge it into its "
            "base and name the merged models"
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or not math.isfinite(value):
            raise UserError(f"{name}: its {ADAPTER} says {key} {value!r}; it must be a number above 0")


# --- do they belong together ---


def check_same_targets(adapters: list[Adapter]) -> None:
    """Refuses adapters of different modules: some of their updates would be lost."""
    first = adapters[0]
    for other in adapters[1:]:
        for name in sorted(first.updates.keys() ^ other.updates.keys()):
            has, lacks = (first, other) if name in first.updates else (other, first)
            raise UserError(
                f"{has.name} adapts {name}, which {lacks.name} does not; merge adapters of the same modules"
            )


def check_start(start: Model, name: str, directory: Path, force: bool) -> None:
    """Refuses a model that does not record `start` as the model it was trained from.

    Args:
        force: Whether to print a warning instead.
    """
    stage = contract.read_done(directory, "stage") or contract.read_done(directory.parent, "stage")
    if stage:
        known = {stage.get("base_digest"), *stage.get("lineage", [])}
        if start.digest in known:
            return
        found = f"was trained from {stage.get('base_model')}, or from an earlier version of it"
    elif (directory / ADAPTER).is_file():
        base = read_object(directory / ADAPTER).get("base_model_name_or_path")
        if base in (start.name, absolute(start.name), str(start.directory)):
            return
        found = f"was trained on {base}"
    else:
        found = "records no start (it is no output of this project's stages)"
    message = f"{name} {found}; nothing shows that it began as {start.name}"
    if not force:
        raise UserError(f"{message}; name the model that it began as, or add --force true")
    print(f"warning: {message}; if it did not, its task vector means little", flush=True)


def check_same_architecture(model: Model, other: Model) -> None:
    """Refuses models that differ in their configs, tensor names or shapes; reports the first difference."""
    ours, theirs = _without_bookkeeping(model.config), _without_bookkeeping(other.config)
    if ours != theirs:  # perhaps only as written: another version, or explicit defaults
        from transformers import AutoConfig  # a slow import

        ours, theirs = (
            _without_bookkeeping(AutoConfig.from_pretrained(each.directory).to_dict()) for each in (model, other)
        )
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{model.name} and {other.name} are different architectures: {key} is {ours.get(key)} and "
                f"{theirs.get(key)}; merge models that were trained from one start"
            )
    for name in sorted(model.weights.keys() | other.weights.keys()):
        for has, lacks in ((model, other), (other, model)):
            if name not in lacks.weights:
                raise UserError(f"{has.name} has {name}, which {lacks.name} lacks; they cannot be merged")
        shape, other_shape = list(model.weights[name].shape), list(other.weights[name].shape)
        if shape != other_shape:
            raise UserError(
                f"{name} has the shape {shape} in {model.name} and {other_shape} in {other.name}; they cannot be "
                "merged"
            )


def _without_bookkeeping(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _BOOKKEEPING}


def drop_copied_heads(models: list[Model]) -> None:
    """Drops heads that are copies of the embeddings, as transformers does; refuses to mix tied and untied models."""
    if all(HEAD in model.weights for model in models) and not _has_copied_head(models[0]):
        return
    for model in models:
        if HEAD in model.weights and not _has_copied_head(model):
            raise UserError(
                f"{model.name} has a head that differs from its embeddings, and {models[0].name} has one that is "
                "tied to them; training has untied it, and they cannot be merged"
            )
        model.weights.pop(HEAD, None)
        model.config["tie_word_embeddings"] = True


def _has_copied_head(model: Model) -> bool:
    embeddings = model.weights.get(EMBEDDING)
    return HEAD in model.weights and embeddings is not None and torch.equal(model.weights[HEAD], embeddings)


def check_same_tokenizer(directories: list[tuple[str, Path]]) -> Path:
    """Refuses different vocabularies or chat templates; returns the folder with the tokenizer to write.

    Args:
        directories: Names and folders. The first, the start, may lack a template, as base models do; folders without a
            tokenizer, such as adapters, are skipped.
    """
    having = [(name, folder) for name, folder in directories if (folder / "tokenizer.json").is_file()]
    if not having:
        raise UserError(
            f"{directories[0][0]} has no tokenizer.json, nor has any policy; copy the tokenizer's files there"
        )
    (first, source), *others = reversed(having)  # a policy's, which has the template
    for name, folder in others:
        if (folder / "tokenizer.json").read_bytes() != (source / "tokenizer.json").read_bytes():
            _compare_vocabularies((first, source), (name, folder))
        formats = [_format(each) for each in (source, folder)]
        if formats[0] != formats[1] and not (formats[1] is None and name == directories[0][0]):
            raise UserError(
                f"{first} and {name} have different chat templates; they were trained on different formats"
            )
    return source


def _compare_vocabularies(one: tuple[str, Path], other: tuple[str, Path]) -> None:
    vocabularies = [Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() for _, folder in (one, other)]
    ours, theirs = ({token_id: token for token, token_id in each.items()} for each in vocabularies)
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            raise UserError(
                f"id {token_id} is {ours.get(token_id)!r} in {one[0]} and {theirs.get(token_id)!r} in "
                f"{other[0]}; merge models with one tokenizer"
            )


def _format(directory: Path) -> str | None:
    """Hash of the chat format of a folder's template; None without a template."""
    if (file := directory / "chat_template.jinja").is_file():
        return template_digest(file.read_text(encoding="utf-8"))
    template = (contract.read_json(directory / "tokenizer_config.json") or {}).get("chat_template")
    return None if template is None else template_digest(str(template))
