"""What a process of a training stage holds in memory, from its recipe and the configs of its models alone.

Pure arithmetic: bytes of one process, on its GPU or, where a stage runs on the CPU, in the machine's memory. Lengths
are the longest that the recipe allows, so data of shorter rows needs less. Not counted are the CUDA context, NCCL's
buffers and holes between tensors; a card of "80 GB" has 85 GB (GiB are not GB), which leaves room for them.

Sources: DeepSpeed's ZeRO (arXiv 1910.02054) and the defaults in its `runtime/zero/config.py`; `models/cost.py`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gemma2_post.models import cost
from gemma2_post.models.arguments import LORA_TARGET_MODULES, attention_of
from gemma2_post.models.cost import ADAMW, BF16, FP32, Adapted, Compute
from gemma2_post.models.shapes import linear_shapes, num_parameters
from gemma2_post.stage.command import Checked, Parts
from gemma2_post.stage.launcher import Launcher
from gemma2_post.training.keys import TrainingRecipe

if TYPE_CHECKING:
    from transformers import Gemma2Config

BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once, in elements (`reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Gathered parameters that ZeRO-3 keeps at most, and those whose optimizer step it makes at once
(`stage3_max_live_parameters`, `sub_group_size`)."""

Training = Checked[TrainingRecipe]


# --- what follows from the recipe ---


def config_of(checked: Training) -> "Gemma2Config":
    """The config of the model that is trained."""
    config = checked.models["model_name_or_path"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    return config


def compute_of(checked: Training) -> Compute:
    """How the model computes."""
    recipe = checked.recipe
    in_bf16 = recipe.model.dtype == "bfloat16" or recipe.training.bf16
    return Compute(BF16 if in_bf16 else FP32, attention_of(recipe.model), checked.launcher.use_cpu)


def adapted_of(checked: Training) -> Adapted | None:
    """The adapter that is trained; None in full fine-tuning."""
    model = checked.recipe.model
    if not model.use_peft:
        return None
    in_bf16 = checked.recipe.training.bf16 or checked.launcher.zero_stage
    targets = tuple(model.lora_target_modules or LORA_TARGET_MODULES)
    return Adapted(model.lora_r, targets, BF16 if in_bf16 else FP32, model.lora_dropout > 0)


def shared(size: float, launcher: Launcher, zero_stage: int) -> float:
    """This process's share of what ZeRO spreads over the processes from a stage on."""
    return size / launcher.num_processes if launcher.zero_stage >= zero_stage else size


def trained_parameters(checked: Training) -> int:
    """Parameters that the optimizer updates."""
    config, adapted = config_of(checked), adapted_of(checked)
    score_head = config.hidden_size if checked.recipe.trains_score_head else 0
    if adapted:
        return cost.adapter_parameters(config, adapted.rank, list(adapted.target_modules)) + score_head
    return num_parameters(config) + score_head


def keeps_fp32(checked: Training) -> bool:
    """Whether the weights of a model in float32 stay so; DeepSpeed's engine makes them bf16."""
    return checked.recipe.model.dtype == "float32" and not checked.launcher.zero_stage


# --- what is held all along ---


def held(checked: Training, frozen: Parts | None = None) -> Parts:
    """Weights, adapter and optimizer of the model, and the other models.

    Args:
        frozen: the models that are only read.
    """
    recipe, launcher, config = checked.recipe, checked.launcher, config_of(checked)
    adapted, trained = adapted_of(checked), trained_parameters(checked)
    parts = {
        "weights": shared(policy_weights(checked), launcher, 3),
        "adapter": trained * (BF16 if launcher.zero_stage else FP32) if adapted else 0,
        **(frozen or {}),
        "optimizer": optimizer(checked),
    }
    if launcher.zero_stage:  # whose buffers stay
        parts["gradients"] = gradients(checked)
    if not adapted and recipe.training.bf16 and keeps_fp32(checked):  # autocast keeps a copy of each matrix
        parts["weights"] += cost.weights(config, BF16)
    if launcher.zero_stage == 3 and launcher.offloads_parameters:
        parts["weights"] = 0
    return parts


def policy_weights(checked: Training) -> float:
    """Of the model that is trained, before ZeRO-3 spreads it."""
    itemsize = FP32 if keeps_fp32(checked) else BF16
    recipe = checked.recipe
    return cost.weights(config_of(checked), itemsize, recipe.quantization, recipe.model.use_bnb_nested_quant)


def optimizer(checked: Training) -> float:
    """AdamW's moments, and under DeepSpeed the fp32 masters."""
    launcher, trained = checked.launcher, trained_parameters(checked)
    if launcher.zero_stage and launcher.offloads_optimizer:
        return 0
    moments = 2 if "8bit" in str(checked.recipe.training.optim) else ADAMW
    return shared(trained * (moments + (FP32 if launcher.zero_stage else 0)), launcher, 1)


def gradients(checked: Training) -> float:
    """Those of a step."""
    launcher, trained = checked.launcher, trained_parameters(checked)
    if not launcher.zero_stage:  # in fp32; DDP's buckets are a second copy
        return FP32 * trained * (2 if launcher.num_processes > 1 else 1)
    buckets = BF16 * min(BUCKET, trained) * (2 if launcher.zero_stage == 2 else 1)
    return shared(BF16 * trained, launcher, 2) + buckets


def gathered(checked: Training) -> float:
    """Whole parameters under ZeRO-3 while a pass goes through a model: the embedding, and what is kept for reuse."""
    if checked.launcher.zero_stage < 3:
        return 0
    configs = [config for config in checked.models.values() if config]
    return max(BF16 * min(num_parameters(each), each.vocab_size * each.hidden_size + LIVE) for each in configs)


def dequantized(config: "Gemma2Config", quantization: str | None) -> float:
    """The matrix of a quantized model that is being multiplied, in bf16."""
    return BF16 * max(i * o for i, o in linear_shapes(config).values()) if quantization else 0


# --- phases ---


def training_step(
    checked: Training, held: Parts, rows: int, length: int, loss: float = 0.0, beside: Iterable[float] = ()
) -> dict[str, Parts]:
    """A step, and under ZeRO the optimizer's part of it.

    Args:
        held: all along.
        rows: at once, of `length` tokens.
        loss: bytes that the loss needs over the vocabulary.
        beside: bytes of other passes that are made while the activations are kept.
    """
    config, launcher, adapted = config_of(checked), checked.launcher, adapted_of(checked)
    compute, checkpoints = compute_of(checked), checked.recipe.training.gradient_checkpointing
    backward = cost.backward(config, rows, length, compute, checkpoints, adapted)
    largest = max(backward + dequantized(config, checked.recipe.quantization), *beside, 0.0)
    kept = cost.saved(config, rows, length, compute, checkpoints, adapted) + cost.masks(rows, length, compute)
    step = {
        **held,
        "gradients": gradients(checked),
        "activations": kept + (largest if largest > loss else 0),
        "logits": loss if loss >= largest else 0,
        "gathered": gathered(checked),
    }
    if not launcher.zero_stage:
        return {"training step": step}
    # The share's gradients in fp32, when the activations are gone.
    trained = trained_parameters(checked)
    share = min(trained / launcher.num_processes, LIVE if launcher.zero_stage == 3 else trained)
    return {"training step": step, "optimizer step": {**held, "gradients": gradients(checked) + FP32 * share}}


def sampling(
    checked: Training, held: Parts, prompt: int, answer: int, trains_on_answers: bool = False
) -> dict[str, Parts]:
    """Answers to held-out prompts, and of a stage that trains on its own answers a step's at once."""
    recipe, launcher, config = checked.recipe, checked.launcher, config_of(checked)
    rows = recipe.training.per_device_eval_batch_size if recipe.samples.num_samples else 0
    if trains_on_answers and not recipe.training.use_vllm:
        rows = max(rows, recipe.global_batch_size // launcher.num_processes)
    if not rows:
        return {}
    whole = cost.weights(config, BF16) if launcher.zero_stage == 3 else 0
    return {"sampling": held | {"gathered": whole} | cost.sampling(config, rows, prompt, answer, compute_of(checked))}


def divergence(checked: Training, held: Parts, prompt: int, answer: int) -> dict[str, Parts]:
    """Measuring how far the model is from another one, on its held-out answers."""
    if not checked.recipe.samples.num_samples:
        return {}
    config, compute = config_of(checked), compute_of(checked)
    rows = checked.recipe.training.per_device_eval_batch_size
    # accelerate hands over logits in fp32 where autocast computes.
    in_fp32 = checked.recipe.training.bf16 and not checked.launcher.zero_stage
    parts = {
        "activations": cost.forward(config, rows, prompt + answer, compute),
        "logits": cost.divergence(config, rows, answer, FP32 if in_fp32 else compute.itemsize),
        "gathered": gathered(checked),
    }
    return {"divergence": held | parts}


# --- beside the GPU ---


def host(checked: Training) -> float:
    """Memory of the machine that a stage on a GPU needs in its first process: to load, to merge an adapter, to gather
    what is saved; and in all processes for what ZeRO offloads, this one's share."""
    launcher, total = checked.launcher, num_parameters(config_of(checked))
    offloaded = 0.0
    if launcher.offloads_optimizer:  # masters, moments, and gradients in fp32
        offloaded += shared(trained_parameters(checked) * (ADAMW + 2 * FP32), launcher, 1)
    if launcher.offloads_parameters:
        offloaded += shared(BF16 * total, launcher, 3)
    # An adapter is merged into the base in fp32; else the weights are loaded, and handed over to be saved.
    return offloaded + total * (FP32 if checked.recipe.model.use_peft or keeps_fp32(checked) else BF16)


def disk(checked: Training, has_anchor: bool = False) -> tuple[float, float]:
    """Bytes of the output, and of the most checkpoints that exist at once.

    Args:
        has_anchor: whether there is another fp32 copy of what is trained, in the output and in each checkpoint.
    """
    recipe, trained = checked.recipe, trained_parameters(checked)
    anchor = FP32 * trained if has_anchor else 0
    itemsize = FP32 if recipe.save_dtype == "float32" else BF16
    output = itemsize * num_parameters(config_of(checked)) + anchor
    each = trained * (FP32 + ADAMW + (BF16 if checked.launcher.zero_stage else 0)) + anchor
    if recipe.model.use_peft:
        output += FP32 * trained
    if recipe.training.save_strategy == "no":
        return output, 0
    return output, each * ((recipe.training.save_total_limit or 2) + 1)  # the oldest goes when the newest is there
