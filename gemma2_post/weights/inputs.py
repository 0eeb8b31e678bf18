"""What a merge reads: models and adapters, on disk or on the Hub, checked against each other before the work."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.weights.streaming import Weights, open_weights

ADAPTER = "adapter_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_BOOKKEEPING = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "cache_implementation"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings"),
}
"""Keys of a config that do not change what the weights compute (ties are checked on the weights themselves)."""


@dataclass
class Model:
    name: str
    """As the user wrote it."""
    directory: Path
    config: dict[str, object]
    """As it stands in its file."""
    weights: Weights
    digest: str
    """Of its content."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.weights.items()}


@dataclass
class Adapter:
    name: str
    directory: Path
    config: dict[str, object]
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """By the name of the weight that it adds to: B (out, r), times the adapter's scale, and A (r, in), both fp32."""


def locate(name: str) -> Path:
    """The folder of a local model, of an adapter, or of a downloaded Hub model."""
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        if not Path(name).is_dir():
            raise UserError(f"there is no folder {name}; name a model's folder or a Hub model")
        if (Path(name) / contract.BEGUN).is_file() and not (Path(name) / contract.DONE).is_file():
            raise UserError(f"{name} is not finished; run the stage that makes it to its end")
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except OSError as error:
        raise UserError(
            f"{name} is no local folder, and the Hub does not hand it out; accept its licence on its page "
            f"and log in with `hf auth login`, or give a folder ({str(error).strip().splitlines()[0]})"
        ) from error


def adapter_in(directory: Path) -> Path | None:
    """The adapter that a folder is, or that a stage trained and left beside the sum; exact where a sum is rounded."""
    stage = contract.read_json(directory / contract.DONE)
    folder = directory / stage["adapter"] if stage and stage.get("adapter") else directory
    return folder if (folder / ADAPTER).is_file() else None


def open_model(name: str, digests: dict[str, str]) -> Model:
    """
    Args:
        digests: content hashes that are known already, by name.
    """
    directory = locate(name)
    if (directory / ADAPTER).is_file() and not (directory / "config.json").is_file():
        raise UserError(f"{name} is an adapter; name the model that it was trained on, or a merged one")
    if not (directory / "config.json").is_file():
        raise UserError(f"{name} has no config.json; name a model's folder")
    weights = open_weights(directory)
    digest = digests.get(name) or contract.input_digest(str(directory))
    return Model(name, directory, json.loads((directory / "config.json").read_text()), weights, digest)


def open_adapter(name: str, directory: Path, init: Model) -> Adapter:
    """A LoRA adapter on `init`, as updates B A of its weights."""
    config = json.loads((directory / ADAPTER).read_text())
    unsupported = ["use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias"]
    extra = next((key for key in unsupported if config.get(key)), None)
    if config.get("peft_type") != "LORA" or extra or config.get("bias", "none") != "none":
        what = extra or ("bias" if config.get("peft_type") == "LORA" else config.get("peft_type"))
        raise UserError(
            f"{name} is not a plain LoRA adapter ({what}), so its update is no product B A; merge it into "
            "its base and name the merged models"
        )
    weights = open_weights(directory, "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))
    updates = {}
    for key, a in weights.items():
        if key.endswith(".lora_A.weight"):
            b = weights[key.replace(".lora_A.", ".lora_B.")]
            target = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            updates[target] = (scale * b.float(), a.float())
            if not (updates[target][0].isfinite().all() and a.isfinite().all()):
                raise UserError(f"{name} has NaN or infinite values in {key}; name an adapter without any")
            if init.shapes.get(target) != (len(b), a.shape[1]):
                raise UserError(
                    f"{name} adapts {target} of the shape {[len(b), a.shape[1]]}, which {init.name} has not; "
                    "name the model that it was trained on"
                )
    return Adapter(name, directory, config, updates)


# --- do they belong together ---


def check_same_targets(adapters: list[Adapter]) -> None:
    """Refuses adapters of different modules, whose updates would be dropped or missing."""
    first = adapters[0]
    for other in adapters[1:]:
        for name in sorted(first.updates.keys() ^ other.updates.keys()):
            has, lacks = (first, other) if name in first.updates else (other, first)
            raise UserError(
                f"{has.name} adapts {name}, which {lacks.name} does not; merge adapters of the same modules"
            )


def check_start(start: Model, name: str, directory: Path, force: bool) -> None:
    """Refuses a model that was not trained from `start`, as far as its stage has recorded that.

    Args:
        force: whether a model that records another start, or none, is taken all the same.
    """
    stage = contract.read_json(directory / contract.DONE) or contract.read_json(directory.parent / contract.DONE)
    if stage:
        known = {stage.get("base_digest"), *stage.get("lineage", [])}
        if start.digest in known:
            return
        found = f"was trained from {stage.get('base_model')}, or from an earlier version of it"
    elif (directory / ADAPTER).is_file():
        base = json.loads((directory / ADAPTER).read_text())["base_model_name_or_path"]
        if base in (start.name, str(start.directory)):
            return
        found = f"was trained on {base}"
    else:
        found = "records no start (it is no output of this project's stages)"
    message = f"{name} {found}, and not, that we know, from {start.name}"
    if not force:
        raise UserError(f"{message}; name the model that it began as, or add --force true")
    print(f"warning: {message}; its task vector means little if it did not begin there", flush=True)


def check_same_architecture(model: Model, other: Model) -> None:
    """Refuses the first difference of configs, names of tensors or shapes."""
    ours, theirs = _without_bookkeeping(model.config), _without_bookkeeping(other.config)
    if ours != theirs:  # perhaps only in words: another version, or defaults that are written out
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
        shapes = [each.shapes.get(name) for each in (model, other)]
        if None in shapes:
            has, lacks = (model, other) if shapes[1] is None else (other, model)
            raise UserError(f"{has.name} has {name}, which {lacks.name} lacks; they cannot be merged")
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{name} has the shape {list(shapes[0])} in {model.name} and {list(shapes[1])} in "
                f"{other.name}; they cannot be merged"
            )


def _without_bookkeeping(config: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in _BOOKKEEPING}


def drop_copied_heads(models: list[Model]) -> None:
    """One layout for tied models: a head that is a copy of the embeddings is dropped, as transformers saves it."""
    if all(HEAD in model.weights for model in models) and not _has_copied_head(models[0]):
        return
    for model in models:
        if HEAD in model.weights and not _has_copied_head(model):
            raise UserError(
                f"{model.name} has a head that differs from its embeddings, and {models[0].name} one that is "
                "tied to them; training has untied it, and they cannot be merged"
            )
        model.weights.pop(HEAD, None)
        model.config["tie_word_embeddings"] = True


def _has_copied_head(model: Model) -> bool:
    embeddings = model.weights.get(EMBEDDING)
    return HEAD in model.weights and embeddings is not None and torch.equal(model.weights[HEAD], embeddings)


def check_same_tokenizer(directories: list[tuple[str, Path]]) -> Path:
    """Refuses the first difference of vocabularies or chat templates; the folder with the tokenizer to write.

    The first one, the start, may lack a template (as base models do) or a tokenizer.

    Args:
        directories: names and folders; those without a tokenizer (adapters) are left out.
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
        templates = [_template(each) for each in (source, folder)]
        if templates[0] != templates[1] and not (templates[1] is None and name == directories[0][0]):
            raise UserError(
                f"{first} and {name} have different chat templates; they were trained on different formats"
            )
    return source


def _compare_vocabularies(one: tuple[str, Path], other: tuple[str, Path]) -> None:
    ours, theirs = (
        {
            token_id: token
            for token, token_id in Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().items()
        }
        for _, folder in (one, other)
    )
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            raise UserError(
                f"id {token_id} is {ours.get(token_id)!r} in {one[0]} and {theirs.get(token_id)!r} in "
                f"{other[0]}; merge models with one tokenizer"
            )


def _template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = contract.read_json(directory / "tokenizer_config.json") or {}
    return config.get("chat_template")
