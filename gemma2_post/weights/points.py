"""Opens the inputs of a merge and writes its points as complete models."""

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from gemma2_post.models.folder import absolute, copy_tokenizer
from gemma2_post.models.streaming import ShardWriter
from gemma2_post.models.tokens import BOS, EOS, PAD, STOP_TOKEN_IDS
from gemma2_post.stage import card, contract
from gemma2_post.stage.command import Stage
from gemma2_post.stage.disk import check_space
from gemma2_post.stage.errors import UserError
from gemma2_post.weights import inputs
from gemma2_post.weights.inputs import Adapter, Model
from gemma2_post.weights.keys import MergeArguments, Rule
from gemma2_post.weights.merge import (
    GroupReport,
    LowRank,
    compress_adapter,
    merge_adapters,
    merge_models,
    write_with_adapter,
)

REPORT = "merge.json"


@dataclass
class Merge:
    """A merge whose inputs have been opened and checked."""

    args: MergeArguments
    output_dir: Path
    init: Model
    policies: list[Model]
    """Empty if the policies are adapters."""
    adapters: list[Adapter]
    towards: Model
    tokenizer: Path
    """Folder of the tokenizer to write."""
    device: torch.device

    @property
    def facts(self) -> dict[str, object]:
        """What the stage file records about the output."""
        stage = contract.read_done(self.init.directory, "stage") or {}
        lineage = stage.get("lineage", [stage["base_digest"]] if stage.get("base_digest") else [])
        return {
            "base_model": self.args.init,
            "base_digest": self.init.digest,
            "lineage": [*lineage, self.init.digest],
            "adapter": "adapter" if (self.output_dir / "adapter").is_dir() else None,
            "dtype": self.args.save_dtype,
            **{key: stage[key] for key in ("tokenizer_digest", "template_digest") if key in stage},
        }

    def check_space(self, num_copies: int = 0) -> None:
        """Refuses to begin if the points, and this many copies of one, do not fit on the disk."""
        points = sum(map(len, self.args.sweeps.values())) + num_copies
        num_bytes = sum(tensor.numel() for tensor in self.init.weights.values())
        num_bytes *= getattr(torch, self.args.save_dtype).itemsize * points
        check_space(self.output_dir, 0 if self.args.adapter_only else num_bytes)

    def write(self) -> tuple[dict[Rule, dict[float, Path]], dict[str, float]]:
        """Writes all points; returns their folders by interpolation and eta, and the merge's metrics."""
        points = {rule: write_points(self, rule, etas) for rule, etas in self.args.sweeps.items()}
        return points, json.loads((self.output_dir / REPORT).read_text(encoding="utf-8"))["metrics"]


# --- in ---


def open_merge(args: MergeArguments, stage: Stage) -> Merge:
    """Opens and checks all inputs of a merge.

    Raises:
        UserError: Inputs are missing or damaged, or do not belong together.
    """
    digests, device = stage.fingerprint["inputs"], _device(args.device)
    _check_folders(args, stage.output_dir)
    init = inputs.open_model(args.init, digests)
    towards = inputs.open_model(args.towards, digests) if args.towards else init
    located = [(name, inputs.locate(name)) for name in args.names]
    found = [(name, inputs.adapter_in(directory)) for name, directory in located]
    low_rank = [(name, adapter) for name, adapter in found if adapter]
    whole = [name for name, adapter in found if not adapter]
    if low_rank and whole:
        raise UserError(f"{low_rank[0][0]} is an adapter and {whole[0]} is not; merge adapters, or whole models")
    for name, directory in located:
        inputs.check_start(init, name, directory, args.force)
    if towards is not init:
        inputs.check_start(towards, init.name, init.directory, args.force)
    if whole and (args.rank or args.adapter_only):
        raise UserError(f"rank and adapter_only are for adapters; {whole[0]} is a whole model, remove them")
    adapters = [inputs.open_adapter(name, adapter, init) for name, adapter in low_rank]
    if adapters:
        inputs.check_same_targets(adapters)
    policies = [inputs.open_model(name, digests) for name in whole]
    if args.adapter_only and towards is not init:
        raise UserError(f"adapter_only cannot go towards {args.towards}, on which it is no adapter; remove one")
    models = [init, *([towards] if towards is not init else []), *policies]
    inputs.drop_copied_heads(models)
    for other in models[1:]:
        inputs.check_same_architecture(init, other)
    tokenizer = inputs.check_same_tokenizer([(init.name, init.directory), *located])
    return Merge(args, stage.output_dir, init, policies, adapters, towards, tokenizer, device)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch uses all of these
        raise UserError(
            f"device is {name}, which torch does not find here; write cpu or cuda, or remove it"
        ) from error
    return device


def _check_folders(args: MergeArguments, output_dir: Path) -> None:
    """Refuses a folder that is named twice, and an output in one of the inputs."""
    policies: set[Path] = set()
    for name in args.names:
        if Path(name).resolve() in policies:
            raise UserError(f"policies names {name} twice; name each policy once")
        policies.add(Path(name).resolve())
    if Path(args.init).resolve() in policies and not args.towards:  # towards another start, it is a point between both
        raise UserError(f"policies names init {args.init}; name models that were trained from it")
    for name in (args.init, *args.names, *([args.towards] if args.towards else [])):
        if Path(name).is_dir() and output_dir.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(f"output_dir {output_dir} is in {name}, which is merged; write elsewhere")


# --- out ---


def move_up(point: Path) -> None:
    """Moves the content of an only point to its parent folder, the output."""
    for path in point.iterdir():
        if (point.parent / path.name).is_dir():  # from a run that was interrupted here
            shutil.rmtree(point.parent / path.name)
        path.rename(point.parent / path.name)
    point.rmdir()


def write_points(merge: Merge, rule: Rule, etas: list[float]) -> dict[float, Path]:
    """Writes the models of a sweep, unless all are there from an interrupted run; their folders by eta."""
    prefix = "" if rule == merge.args.interpolation else f"{rule}-"
    points = {eta: merge.output_dir / f"{prefix}eta-{eta:g}" for eta in etas}
    if all(path.is_dir() for path in points.values()):
        return points
    partial = {eta: path.with_name(f".{path.name}") for eta, path in points.items()}
    for path in [*partial.values(), *points.values()]:
        shutil.rmtree(path, ignore_errors=True)
    try:
        for path in partial.values():
            path.mkdir(parents=True)
        groups, metrics = merge_to(partial, merge, rule)
        for eta, path in partial.items():
            write_beside(path, merge, rule, eta)
        if rule == merge.args.interpolation:
            metrics |= summary(groups)
            report = {"interpolation": rule, "angles": merge.args.angles, "metrics": metrics}
            contract.write_json(merge.output_dir / REPORT, report | {"groups": [*map(asdict, groups)]})
            plot(groups, merge.output_dir)
        for eta, path in points.items():
            partial[eta].rename(path)
    finally:
        for path in partial.values():
            shutil.rmtree(path, ignore_errors=True)
    return points


def merge_to(directories: dict[float, Path], merge: Merge, rule: Rule) -> tuple[list[GroupReport], dict[str, float]]:
    """Writes weights and adapters of the points; returns what happened to each group, and additional metrics."""
    args, init, towards = merge.args, merge.init, merge.towards
    dtype, device = getattr(torch, args.save_dtype), merge.device
    with ExitStack() as stack:
        shapes = {name: tensor.shape for name, tensor in init.weights.items()}
        writers = {
            eta: stack.enter_context(ShardWriter(directory, shapes, dtype))
            for eta, directory in directories.items()
            if not args.adapter_only
        }
        if not merge.adapters:
            return merge_models(init, merge.policies, towards, rule, args.angles, writers, device), {}
        metrics = {}
        merged, groups = merge_adapters(init, merge.adapters, rule, args.angles)
        if args.rank:
            merged, metrics["compression_error"] = compress_adapter(merged, args.rank)
        if towards is init:
            for eta, directory in directories.items():
                write_adapter(directory / "adapter", merge, merged, eta)
        if writers:
            write_with_adapter(init, merged, towards, writers, device)
        return groups, metrics


def write_adapter(directory: Path, merge: Merge, merged: LowRank, eta: float) -> None:
    """Writes the adapter as PEFT loads it; its scale is 1, and B includes all scaling."""
    directory.mkdir()
    tensors = {}
    for name, (b, a) in merged.items():
        module = name.removesuffix(".weight")
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = (eta * b).contiguous()
    rank = max(len(a) for _, a in merged.values())
    config = merge.adapters[0].config | {
        "base_model_name_or_path": absolute(merge.init.name),
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "target_modules": sorted({name.removesuffix(".weight").rpartition(".")[2] for name in merged}),
        "modules_to_save": None,
        "inference_mode": True,
    }
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    contract.write_json(directory / inputs.ADAPTER, config)


def write_beside(directory: Path, merge: Merge, rule: Rule, eta: float) -> None:
    """Writes config, generation config, tokenizer with its template, and a card that says how the model was made."""
    copy_tokenizer(merge.tokenizer, directory)
    config = merge.init.config
    if config["model_type"] == "gemma2":
        config = config | {"eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD}
        stops = {"bos_token_id": BOS, "eos_token_id": STOP_TOKEN_IDS, "pad_token_id": PAD}
        contract.write_json(directory / "generation_config.json", stops)
    elif (merge.tokenizer / "generation_config.json").is_file():
        shutil.copyfile(merge.tokenizer / "generation_config.json", directory / "generation_config.json")
    if not merge.args.adapter_only:
        forgotten = ("cache_implementation", "torch_dtype")  # dropped by transformers 5, and renamed to dtype
        config = {key: value for key, value in config.items() if key not in forgotten}
        contract.write_json(directory / "config.json", config | {"use_cache": True, "dtype": merge.args.save_dtype})
    init, towards = card.shown(merge.init.name), card.shown(merge.towards.name)
    number = len(merge.args.names)
    account = (
        f"{number} {'policy' if number == 1 else 'policies'}, trained from `{init}`, merged by `{rule}` of their task "
        f"vectors with one angle for each {merge.args.angles}; then (1 - eta) `{towards}` + eta merged, with eta\n"
        f"{eta:g} ([WARP](https://arxiv.org/abs/2406.16768)).\nComputed in fp32, rounded once to "
        f"{merge.args.save_dtype}."
    )
    card.begin(directory, "A WARP merge", merge.init.name, "warp", account)


def summary(groups: list[GroupReport]) -> dict[str, float]:
    """Unweighted means over the groups, and norms of the whole model."""
    cosines = [cosine for group in groups for cosine in group.cosines if cosine is not None]
    kept = [group.norm_kept for group in groups if group.norm_kept is not None]
    norms = [math.hypot(*each) for each in zip(*(group.norms for group in groups), strict=True)]
    found = {f"norm/policy-{i}": norm for i, norm in enumerate(norms)}
    found["merged_norm"] = math.hypot(*(group.norm for group in groups))
    if cosines:
        found["mean_cosine"] = sum(cosines) / len(cosines)
    if kept:
        found["mean_norm_kept"] = sum(kept) / len(kept)
    return found


def plot(groups: list[GroupReport], output_dir: Path) -> None:
    """Writes `angles.png` and `norms.png`: angles between task vectors and their norms, over groups in model order."""
    from matplotlib.figure import Figure

    pictures = {name: Figure(figsize=(5.5, 4), layout="constrained") for name in ("angles", "norms")}
    angles, norms = (figure.subplots() for figure in pictures.values())
    places = range(len(groups))
    for pair in np.array([group.angles for group in groups], dtype=float).T:  # None becomes NaN
        angles.plot(places, pair, marker="o")
    angles.axhline(90, color="0.7", linestyle="--")
    angles.set(xlabel="layer", ylabel="degrees between the task vectors", ylim=(0, 180), yticks=range(0, 181, 30))
    for policy in range(len(groups[0].norms)):
        norms.plot(places, [group.norms[policy] for group in groups], marker="o", label=f"policy {policy}")
    norms.plot(places, [group.norm for group in groups], marker="o", color="black", label="merged")
    norms.set(xlabel="layer", ylabel="norm of the task vector", ylim=(0, None))
    norms.legend()
    if len(groups) <= 40:
        labels = [
            each.group.rpartition("layers.")[2].removeprefix("model.").removesuffix(".weight") for each in groups
        ]
        for axes in (angles, norms):
            axes.set_xticks(places, labels, rotation=45, ha="right", fontsize=8)
    for name, figure in pictures.items():
        figure.savefig(output_dir / f"{name}.png", dpi=150)
