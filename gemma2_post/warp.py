"""WARP's merges: policies that began as one model become one again, and the way back to that start is a front.

Reads a start and policies that were trained from it (models, or LoRA adapters, which merge exactly); writes plain
Hugging Face models. In WARP (arXiv 2406.16768) stage 2 interpolates the policies' task vectors spherically, with one
angle for each layer (`slerp`), and stage 3 goes back towards a start: (1 - eta) start + eta merged. One `eta` makes
one model, in `output_dir`; several make `output_dir/eta-ETA` each, from one reading of the inputs.

As a tool, on any models of one architecture:

    python -m gemma2_post.warp --init DIR --policies DIR DIR --eta 0.3 --output_dir DIR

As the last stage of a pipeline, with a recipe, the points are measured beside the runs that they are made of, and the
best one under a KL budget is released to `output_dir`:

    python -m gemma2_post.warp --config recipes/tiny/warp.yaml
"""

import json
import math
import os
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file

from gemma2_post.core import contract
from gemma2_post.core.command import Command, Stage
from gemma2_post.core.errors import UserError
from gemma2_post.core.tokens import BOS, EOS, PAD, STOP_TOKEN_IDS
from gemma2_post.weights import inputs, merge
from gemma2_post.weights.inputs import Adapter, Model
from gemma2_post.weights.interpolation import Angles, Rule
from gemma2_post.weights.streaming import ShardWriter

if TYPE_CHECKING:
    from gemma2_post.core.launcher import Launcher
    from gemma2_post.evaluation.front import FrontArguments

REPORT = "merge.json"
TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
]


@dataclass
class WarpArguments:
    init: str = field(metadata={"help": "The model that the policies were trained from; a folder or a Hub model."})
    policies: list[str] | str = field(metadata={"help": "Models, or LoRA adapters on init; folders or Hub models."})
    output_dir: str = field(metadata={"help": "Folder of the output."})
    eta: list[float] | float = field(
        default=0.3, metadata={"help": "How far from the start; 0 is the start, 1 the merge; several for a sweep."}
    )
    towards: str | None = field(
        default=None,
        metadata={"help": "The start that eta goes back to, if not init: WARP's sweep goes to the very first one."},
    )
    interpolation: Rule = field(
        default="slerp",
        metadata={"help": "slerp (the paper's), spherical_mean (symmetric in more than two policies) or linear."},
    )
    angles: Angles = field(default="layer", metadata={"help": "One angle for each layer, tensor, or the model."})
    save_dtype: Literal["float32", "bfloat16"] = field(
        default="bfloat16", metadata={"help": "Type of the output, rounded to once; float32 if it is trained further."}
    )
    compare_with: list[Rule] | None = field(
        default=None, metadata={"help": "Further interpolations whose points are written, too, as RULE-eta-ETA."}
    )
    rank: int | None = field(
        default=None, metadata={"help": "Compress merged adapters to this rank; None for the sum of their ranks."}
    )
    adapter_only: bool = field(
        default=False, metadata={"help": "Of adapters, write the merged adapter without its sum with init."}
    )
    force: bool = field(default=False, metadata={"help": "Merge also what does not record init as its start."})
    device: str | None = field(default=None, metadata={"help": "That computes; None for a GPU if there is one."})


@dataclass
class Inputs:
    """Opened and checked."""

    init: Model
    policies: list[Model] | list[Adapter]
    towards: Model
    tokenizer: Path
    """Folder of the tokenizer to write."""

    @property
    def are_adapters(self) -> bool:
        return isinstance(self.policies[0], Adapter)


def main(stage: Stage, args: WarpArguments, front_args: "FrontArguments | None" = None, *measuring: object) -> None:
    etas = etas_of(args)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if front_args:
        from gemma2_post.evaluation.front import Front  # slow to import, and not needed to merge

        front = Front(stage, args.towards or args.init, front_args, *measuring)
    opened = open_inputs(stage, args)
    # At 0 all rules are the start.
    sweeps = {args.interpolation: etas} | {rule: [eta for eta in etas if eta] for rule in args.compare_with or []}
    num_points = sum(map(len, sweeps.values())) + (front_args is not None)
    num_bytes = sum(tensor.numel() for tensor in opened.init.weights.values())
    num_bytes *= getattr(torch, args.save_dtype).itemsize * num_points
    contract.check_space(stage.where, stage.output_dir, 0 if args.adapter_only else num_bytes)
    contract.begin_afresh(stage.output_dir, stage.fingerprint)

    points = {rule: write_points(stage, args, opened, rule, sweep) for rule, sweep in sweeps.items()}
    report = contract.read_json(stage.output_dir / REPORT)
    metrics = dict(report["metrics"])
    if front_args:
        released, front_metrics = front.measure(points)
        metrics |= front_metrics
        shutil.copytree(released, stage.output_dir, dirs_exist_ok=True)
    elif num_points == 1:
        (point,) = points[args.interpolation].values()
        for path in point.iterdir():
            if (stage.output_dir / path.name).is_dir():  # of a run that was interrupted here
                shutil.rmtree(stage.output_dir / path.name)
            path.rename(stage.output_dir / path.name)
        point.rmdir()
    facts = {
        "base_model": args.init,
        "base_digest": opened.init.digest,
        "lineage": [*lineage(opened.init), opened.init.digest],
        "adapter": "adapter" if (stage.output_dir / "adapter").is_dir() else None,
        "dtype": args.save_dtype,
        **recorded_digests(opened),
    }
    seconds = time.monotonic() - stage.began
    contract.finish(stage.output_dir, stage.name, stage.fingerprint, seconds, facts, metrics)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name)
    print(f"{stage.output_dir}: done in {seconds:.0f} s; {numbers}")


def check(where: str, launcher: "Launcher | None", args: WarpArguments, *measuring: object) -> None:
    if isinstance(args.policies, str):
        args.policies = [args.policies]
    etas = etas_of(args)
    if not etas or not args.policies:
        raise UserError(f"{where}: {'policies' if etas else 'eta'} is empty; write one or more")
    for eta in etas:
        if not math.isfinite(eta):
            raise UserError(f"{where}: eta is {eta}, which is no number; write one, usually from 0 to 1")
    if len(set(etas)) < len(etas):
        raise UserError(f"{where}: eta has {max(etas, key=etas.count):g} more than once; write it once")
    if args.interpolation in (args.compare_with or []):
        raise UserError(
            f"{where}: compare_with names {args.interpolation}, which is the interpolation itself; name another"
        )
    if (launcher.num_processes if launcher else int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"{where}: warp is one process; start it with accelerate_configs/single_gpu.yaml or cpu.yaml")
    if args.rank is not None and args.rank < 1:
        raise UserError(f"{where}: rank is {args.rank}; write 1 or more, or remove it")
    if measuring:
        front_args, answer_args, _, sample_args, reward_args = measuring
        if front_args.kl_budget is not None and not front_args.kl_budget >= 0:
            raise UserError(f"{where}: kl_budget is {front_args.kl_budget:g} nats; write 0 or more, or remove it")
        if front_args.kl_budget is not None and 0 not in etas:
            raise UserError(f"{where}: with a kl_budget, eta needs 0, which is always within it; add it")
        from gemma2_post.evaluation import measure  # slow to import

        measure.check_arguments(where, answer_args, sample_args, reward_args)


def etas_of(args: WarpArguments) -> list[float]:
    return args.eta if isinstance(args.eta, list) else [args.eta]


# --- in ---


def open_inputs(stage: Stage, args: WarpArguments) -> Inputs:
    where, digests = stage.where, stage.fingerprint["inputs"]
    init = inputs.open_model(where, args.init, digests)
    towards = inputs.open_model(where, args.towards, digests) if args.towards else init
    located = [(name, inputs.locate(where, name)) for name in args.policies]
    adapters = [inputs.adapter_in(directory) for _, directory in located]
    if any(adapters) and not all(adapters):
        (one, _), (other, _) = located[adapters.index(None)], located[[*map(bool, adapters)].index(True)]
        raise UserError(f"{where}: {other} is an adapter and {one} is not; merge adapters, or whole models")
    for name, directory in located:
        inputs.check_start(where, init, name, directory, args.force)
    if towards is not init:
        inputs.check_start(where, towards, init.name, init.directory, args.force)
    if all(adapters):
        policies = [
            inputs.open_adapter(where, name, adapter, init)
            for (name, _), adapter in zip(located, adapters, strict=True)
        ]
        inputs.check_same_targets(where, policies)
    else:
        if args.rank or args.adapter_only:
            raise UserError(
                f"{where}: rank and adapter_only are for adapters; {args.policies[0]} is a whole model, remove them"
            )
        policies = [inputs.open_model(where, name, digests) for name in args.policies]
    if args.adapter_only and towards is not init:
        raise UserError(
            f"{where}: adapter_only cannot go towards {args.towards}, on which it is no adapter; remove one"
        )
    models = [init, *([towards] if towards is not init else []), *(() if all(adapters) else policies)]
    inputs.drop_copied_heads(where, models)
    for other in models[1:]:
        inputs.check_same_architecture(where, init, other)
    tokenizer = inputs.check_same_tokenizer(where, [(init.name, init.directory), *located])
    return Inputs(init, policies, towards, tokenizer)


def lineage(model: Model) -> list[str]:
    """Content hashes of the models that it comes from, as far as stages have recorded them."""
    stage = contract.read_json(model.directory / contract.DONE) or {}
    return stage.get("lineage", [stage["base_digest"]] if stage.get("base_digest") else [])


def recorded_digests(opened: Inputs) -> dict[str, str]:
    stage = contract.read_json(opened.init.directory / contract.DONE) or {}
    return {key: stage[key] for key in ("tokenizer_digest", "template_digest") if key in stage}


# --- out ---


def write_points(
    stage: Stage, args: WarpArguments, opened: Inputs, rule: Rule, etas: list[float]
) -> dict[float, Path]:
    """The models of a sweep, by eta; those of an interrupted run if they are complete."""
    prefix = "" if rule == args.interpolation else f"{rule}-"
    points = {eta: stage.output_dir / f"{prefix}eta-{eta:g}" for eta in etas}
    if all(path.is_dir() for path in points.values()):
        return points
    partial = {eta: path.with_name(f".{path.name}") for eta, path in points.items()}
    for path in [*partial.values(), *points.values()]:
        shutil.rmtree(path, ignore_errors=True)
    try:
        for path in partial.values():
            path.mkdir(parents=True)
        groups, metrics = merge_to(partial, stage.where, args, opened, rule)
        for eta, path in partial.items():
            write_beside(path, stage, args, opened, rule, eta)
        if rule == args.interpolation:
            metrics |= summary(groups)
            report = {"interpolation": rule, "angles": args.angles, "metrics": metrics}
            contract.write_json(stage.output_dir / REPORT, report | {"groups": [*map(asdict, groups)]})
            plot(groups, stage.output_dir)
        for eta, path in points.items():
            partial[eta].rename(path)
    finally:
        for path in partial.values():
            shutil.rmtree(path, ignore_errors=True)
    return points


def merge_to(
    directories: dict[float, Path], where: str, args: WarpArguments, opened: Inputs, rule: Rule
) -> tuple[list[merge.GroupReport], dict[str, float]]:
    """Writes weights and adapters of the points; what happened to each group, and further numbers."""
    dtype, device = getattr(torch, args.save_dtype), torch.device(args.device)
    with ExitStack() as stack:
        writers = {
            eta: stack.enter_context(ShardWriter(directory, opened.init.shapes, dtype))
            for eta, directory in directories.items()
            if not args.adapter_only
        }
        if not opened.are_adapters:
            groups = merge.merge_models(
                where, opened.init, opened.policies, opened.towards, rule, args.angles, writers, device
            )
            return groups, {}
        metrics = {}
        merged, groups = merge.merge_adapters(opened.init, opened.policies, rule, args.angles)
        if args.rank:
            merged, metrics["compression_error"] = merge.compress_adapter(merged, args.rank)
        if opened.towards is opened.init:
            for eta, directory in directories.items():
                write_adapter(directory / "adapter", opened, merged, eta)
        if writers:
            merge.write_with_adapter(where, opened.init, merged, opened.towards, writers, device)
        return groups, metrics


def write_adapter(directory: Path, opened: Inputs, merged: merge.LowRank, eta: float) -> None:
    """As PEFT loads it, with a scale of 1 and all that scales in B."""
    directory.mkdir()
    tensors, targets = {}, set()
    for name, (b, a) in merged.items():
        module = name.removesuffix(".weight")
        targets.add(module.rpartition(".")[2])
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = (eta * b).contiguous()
    rank = max(len(a) for _, a in merged.values())
    config = opened.policies[0].config | {
        "base_model_name_or_path": opened.init.name,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    contract.write_json(directory / inputs.ADAPTER, config)


def write_beside(directory: Path, stage: Stage, args: WarpArguments, opened: Inputs, rule: Rule, eta: float) -> None:
    """Config, generation config, tokenizer with its template, and a card that says how the model was made."""
    for file in TOKENIZER_FILES:
        if (opened.tokenizer / file).is_file():
            shutil.copyfile(opened.tokenizer / file, directory / file)
    config = opened.init.config
    if config["model_type"] == "gemma2":
        config |= {"eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD}
        stops = {"bos_token_id": BOS, "eos_token_id": STOP_TOKEN_IDS, "pad_token_id": PAD}
        contract.write_json(directory / "generation_config.json", stops)
    elif (opened.tokenizer / "generation_config.json").is_file():
        shutil.copyfile(opened.tokenizer / "generation_config.json", directory / "generation_config.json")
    if not args.adapter_only:
        forgotten = ("cache_implementation", "torch_dtype")  # what transformers 5 dropped, and dtype's earlier name
        config = {key: value for key, value in config.items() if key not in forgotten}
        contract.write_json(directory / "config.json", config | {"use_cache": True, "dtype": args.save_dtype})
    names = [opened.init.name, *(policy.name for policy in opened.policies)]
    card = f"""---
library_name: transformers
base_model: {json.dumps(names)}
tags: [merge, warp]
---

# A WARP merge

{len(opened.policies)} policies, trained from `{opened.init.name}`, merged by `{rule}` of their task vectors with one
angle for each {args.angles}; then (1 - eta) `{opened.towards.name}` + eta merged, with eta {eta:g}
([WARP](https://arxiv.org/abs/2406.16768)). Computed in fp32, rounded once to {args.save_dtype}.

```json
{json.dumps(stage.fingerprint["recipe"], indent=2)}
```
"""
    contract.write_text(directory / "README.md", card)


def summary(groups: list[merge.GroupReport]) -> dict[str, float]:
    """Over the groups, weighted by nothing but for the norms, which are of the whole model."""
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


def plot(groups: list[merge.GroupReport], output_dir: Path) -> None:
    """Over the groups, in the model's order: `angles.png` between the task vectors, and `norms.png` of these."""
    from matplotlib.figure import Figure

    pictures = {name: Figure(figsize=(5.5, 4), layout="constrained") for name in ("angles", "norms")}
    angles, norms = (figure.subplots() for figure in pictures.values())
    places = range(len(groups))
    for pair in range(len(groups[0].angles)):
        angles.plot(places, [group.angles[pair] for group in groups], marker="o", label=f"pair {pair}")
    angles.axhline(90, color="0.7", linestyle="--")
    angles.set(xlabel="layer", ylabel="degrees between the task vectors", ylim=(0, 180), yticks=range(0, 181, 30))
    for policy in range(len(groups[0].norms)):
        norms.plot(places, [group.norms[policy] for group in groups], marker="o", label=f"policy {policy}")
    norms.plot(places, [group.norm for group in groups], marker="o", color="black", label="merged")
    norms.set(xlabel="layer", ylabel="norm of the task vector", ylim=(0, None))
    norms.legend()
    if len(groups) <= 40:
        labels = [
            group.group.rpartition("layers.")[2].removeprefix("model.").removesuffix(".weight") for group in groups
        ]
        for axes in (angles, norms):
            axes.set_xticks(places, labels, rotation=45, ha="right", fontsize=8)
    for name, figure in pictures.items():
        figure.savefig(output_dir / f"{name}.png", dpi=150)


def metrics(args: WarpArguments, *measuring: object) -> set[str]:
    found = {"merged_norm", "mean_cosine", "mean_norm_kept"} | ({"compression_error"} if args.rank else set())
    if measuring:
        from gemma2_post.evaluation import measure

        *_, sample_args, _ = measuring
        found |= {"eta"} | measure.MEASURES | {path.rpartition(":")[2] for path in sample_args.graders or []}
    return found


def command(is_measured: bool) -> Command:
    """The stage, which measures what it merges, or the tool, which does not and starts faster."""
    classes: list[type] = [WarpArguments]
    if is_measured:
        from gemma2_post.evaluation import front  # slow to import

        classes += front.ARGUMENTS
    return Command("warp", main, classes, __doc__, metrics, check, needs_config=False)


if __name__ == "__main__":
    command(is_measured=any(argument.partition("=")[0] == "--config" for argument in sys.argv)).launch()
