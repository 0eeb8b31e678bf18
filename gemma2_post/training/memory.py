"""What one process of a training stage holds in memory, computed only from the recipe and the models' configs.

All sizes are bytes of one process: on its GPU or, if the stage runs on the CPU, in the machine's memory. Lengths are
the longest that the recipe allows; shorter rows need less. The CUDA context, NCCL's buffers and fragmentation are not
counted; an "80 GB" card has 85 GB (GiB are not GB), which leaves room for them.

Sources: DeepSpeed's ZeRO (arXiv 1910.02054) and the defaults in its `runtime/zero/config.py`; `models/cost.py`.
"""

from collections.abc import Iterable
from math import ceil
from typing import TYPE_CHECKING

from gemma2_post.models import cost
from gemma2_post.models.arguments import LORA_TARGET_MODULES, attention_of
from gemma2_post.models.cost import ADAMW, BF16, FP32, Adapted, Compute
from gemma2_post.models.shapes import linear_shapes, num_parameters
from gemma2_post.stage.command import Checked, Parts
from gemma2_post.stage.launcher import Launcher
from gemma2_post.training.keys import TrainingRecipe

if TYPE_CHECKING:
    from transformers import Gemma2Config, TrainingArguments

BUCKET = 500_000_000
"""Gradient elements that DeepSpeed reduces at once (`reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Most parameters that ZeRO-3 keeps gathered (`stage3_max_live_parameters`), and the number that it updates at once
(`sub_group_size`)."""

Training = Checked[TrainingRecipe]


# --- what follows from the recipe ---


def config_of(checked: Training) -> "Gemma2Config":
    """The config of the trained model."""
    config = checked.models["model_name_or_path"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    return config


def compute_of(checked: Training) -> Compute:
    """The trained model's compute type, attention and device."""
    recipe = checked.recipe
    in_bf16 = recipe.model.dtype == "bfloat16" or recipe.training.bf16
    return Compute(BF16 if in_bf16 else FP32, attention_of(recipe.model), checked.launcher.use_cpu)


def adapted_of(checked: Training) -> Adapted | None:
    """The trained adapter; None in full fine-tuning."""
    model = checked.recipe.model
    if not model.use_peft:
        return None
    in_bf16 = checked.recipe.training.bf16 or checked.launcher.zero_stage
    targets = tuple(model.lora_target_modules or LORA_TARGET_MODULES)
    return Adapted(model.lora_r, targets, BF16 if in_bf16 else FP32, model.lora_dropout > 0)


def shared(size: float, launcher: Launcher, zero_stage: int) -> float:
    """This process's share of what ZeRO spreads over the processes from stage `zero_stage` on."""
    return size / launcher.num_processes if launcher.zero_stage >= zero_stage else size


def trained_parameters(checked: Training) -> int:
    """Number of parameters that the optimizer updates."""
    config, adapted = config_of(checked), adapted_of(checked)
    score_head = config.hidden_size if checked.recipe.trains_score_head else 0
    if not checked.recipe.trains_model:
        return score_head
    if adapted:
        return cost.adapter_parameters(config, adapted.rank, list(adapted.target_modules)) + score_head
    return num_parameters(config) + score_head


def keeps_fp32(checked: Training) -> bool:
    """Whether float32 weights stay in float32; DeepSpeed's engine casts them to bf16."""
    return checked.recipe.model.dtype == "float32" and not checked.launcher.zero_stage


# --- what is held throughout ---


def held(checked: Training, frozen: Parts | None = None) -> Parts:
    """The model's weights, adapter and optimizer, and the other models.

    Args:
        frozen: The models that are only read.
    """
    recipe, launcher, config = checked.recipe, checked.launcher, config_of(checked)
    adapted, trained = adapted_of(checked), trained_parameters(checked)
    itemsize = FP32 if keeps_fp32(checked) else BF16
    weights = cost.weights(config, itemsize, recipe.quantization, recipe.model.use_bnb_nested_quant)
    parts = {
        "weights": shared(weights, launcher, 3),
        "adapter": trained * (BF16 if launcher.zero_stage else FP32) if adapted else 0,
        **(frozen or {}),
        "optimizer": optimizer(checked),
    }
    if launcher.zero_stage:  # its gradient buffers stay
        parts["gradients"] = gradients(checked)
    if not adapted and recipe.training.bf16 and keeps_fp32(checked):  # autocast keeps a copy of each matrix
        parts["weights"] += cost.weights(config, BF16)
    if launcher.zero_stage == 3 and launcher.offloads_parameters:
        parts["weights"] = 0
    return parts


def optimizer(checked: Training) -> float:
    """AdamW's moments and, under DeepSpeed, the fp32 masters."""
    launcher, trained = checked.launcher, trained_parameters(checked)
    if launcher.zero_stage and launcher.offloads_optimizer:
        return 0
    moments = 2 if "8bit" in str(checked.recipe.training.optim) else ADAMW
    return shared(trained * (moments + (FP32 if launcher.zero_stage else 0)), launcher, 1)


def gradients(checked: Training) -> float:
    """The gradients of a step, with the buckets that reduce them."""
    launcher, trained = checked.launcher, trained_parameters(checked)
    if not launcher.zero_stage:  # in fp32; DDP's buckets are a second copy
        return FP32 * trained * (2 if launcher.num_processes > 1 else 1)
    buckets = BF16 * min(BUCKET, trained) * (2 if launcher.zero_stage == 2 else 1)
    return shared(BF16 * trained, launcher, 2) + buckets


def gathered(checked: Training) -> float:
    """Parameters that ZeRO-3 gathers during a pass through a model: the embedding, and what it keeps for reuse."""
    if checked.launcher.zero_stage < 3:
        return 0
    configs = [config for config in checked.models.values() if config]
    return max(BF16 * min(num_parameters(each), each.vocab_size * each.hidden_size + LIVE) for each in configs)


# --- phases ---


def training_step(
    checked: Training, held: Parts, rows: int, length: int, loss: float = 0.0, beside: Iterable[float] = ()
) -> dict[str, Parts]:
    """A training step and, under ZeRO, the optimizer's part of it as a phase of its own.

    Args:
        held: What is held throughout.
        rows: Rows at once, each of `length` tokens.
        loss: Bytes that the loss needs over the vocabulary.
        beside: Bytes of each other pass that runs while the activations are kept.
    """
    config, launcher, adapted = config_of(checked), checked.launcher, adapted_of(checked)
    compute, checkpoints = compute_of(checked), checked.recipe.training.activation_checkpointing
    backward = cost.backward(config, rows, length, compute, checkpoints, adapted)
    largest = max(backward + cost.dequantized(config, checked.recipe.quantization), *beside, 0.0)
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
    # The activations are gone; this process's share of the gradients is cast to fp32.
    trained = trained_parameters(checked)
    share = min(trained / launcher.num_processes, LIVE if launcher.zero_stage == 3 else trained)
    return {"training step": step, "optimizer step": {**held, "gradients": gradients(checked) + FP32 * share}}


def sampling(
    checked: Training, held: Parts, prompt: int, answer: int, trains_on_answers: bool = False
) -> dict[str, Parts]:
    """Sampling answers to held-out prompts and, in a stage that trains on its own answers, those of a whole step."""
    recipe, launcher, config = checked.recipe, checked.launcher, config_of(checked)
    rows = recipe.training.per_device_eval_batch_size if recipe.samples.num_samples else 0
    if trains_on_answers and not recipe.training.use_vllm:
        rows = max(rows, recipe.global_batch_size // launcher.num_processes)
    if not rows:
        return {}
    whole = cost.weights(config, BF16) if launcher.zero_stage == 3 else 0
    return {"sampling": held | {"gathered": whole} | cost.sampling(config, rows, prompt, answer, compute_of(checked))}


def rollouts(checked: Training, prompt: int, answer: int) -> Parts:
    """What vLLM needs beside the trainer for this process's answers of a step; nothing if it is a server elsewhere.

    Its share of the weights in bf16, the KV cache of all answers at once, the logits of one position, and what
    `rollouts.exact_base` keeps.
    """
    recipe, launcher, config = checked.recipe, checked.launcher, config_of(checked)
    training = recipe.training
    if not training.use_vllm or training.vllm_mode == "server":
        return {}
    rows, parallel = ceil(recipe.global_batch_size / launcher.num_processes), training.vllm_tensor_parallel_size
    itemsize = FP32 if launcher.use_cpu else BF16
    cache = cost.kv_cache(
        config, rows, prompt + answer, itemsize
    )  # of `parallel` processes' answers, spread over them
    logits = 2 * FP32 * rows * parallel * config.vocab_size
    found = {"vLLM": cost.weights(config, itemsize) / parallel + cache + logits}
    if (adapted := adapted_of(checked)) and launcher.zero_stage < 3:
        matrices = [i * o for name, (i, o) in linear_shapes(config).items() if name in adapted.target_modules]
        found["adapted weights"] = itemsize * config.num_hidden_layers * sum(matrices)
    return found


def divergence(checked: Training, held: Parts, prompt: int, answer: int) -> dict[str, Parts]:
    """Measuring the divergence of the model from another one on its held-out answers."""
    if not checked.recipe.samples.num_samples:
        return {}
    config, compute = config_of(checked), compute_of(checked)
    rows = checked.recipe.training.per_device_eval_batch_size
    # Under autocast, accelerate returns logits in fp32.
    in_fp32 = checked.recipe.training.bf16 and not checked.launcher.zero_stage
    parts = {
        "activations": cost.forward(config, rows, prompt + answer, compute),
        "logits": cost.divergence(config, rows, answer, FP32 if in_fp32 else compute.itemsize)
        + cost.copied_head(config, rows, compute),
        "gathered": gathered(checked),
    }
    return {"divergence": held | parts}


# --- outside the GPU ---


def host(checked: Training) -> float:
    """Host memory that the first process of a stage on a GPU needs: to load the model, or later to save it, one tensor
    at a time; plus its share of what ZeRO offloads."""
    launcher, config, recipe = checked.launcher, config_of(checked), checked.recipe
    total = num_parameters(config)
    offloaded = 0.0
    if launcher.offloads_optimizer:  # masters, moments, and gradients in fp32
        offloaded += shared(trained_parameters(checked) * (ADAMW + 2 * FP32), launcher, 1)
    if launcher.offloads_parameters:
        offloaded += shared(BF16 * total, launcher, 3)
    # A quantized model is loaded onto the GPU tensor by tensor, any other one wholly, and then moved.
    loading = 0 if recipe.quantization else total * (FP32 if recipe.model.dtype == "float32" else BF16)
    embedding = config.vocab_size * config.hidden_size
    summed = 2 * max(i * o for i, o in linear_shapes(config).values()) if recipe.model.use_peft else 0
    return offloaded + max(loading, FP32 * max(embedding, summed))


def disk(checked: Training, has_anchor: bool = False, saves_every: int | None = None) -> tuple[float, float]:
    """Bytes of the output, and of the checkpoints at their most.

    Args:
        has_anchor: Whether the output and each checkpoint hold another fp32 copy of what is trained.
        saves_every: Steps between checkpoints, if not the recipe's `save_steps`.
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
    return output, each * _checkpoints(recipe.training, saves_every)


def _checkpoints(training: "TrainingArguments", saves_every: int | None) -> int:
    """How many checkpoints there are at most.

    Without a limit all of them stay; where the number of steps follows from rows that are not counted here, three are.
    """
    if training.save_total_limit:
        return training.save_total_limit + 1  # the oldest goes once the newest is written
    if saves_every is None and training.save_strategy == "epoch":
        return ceil(training.num_train_epochs)
    every = saves_every or training.save_steps
    if training.max_steps < 1:
        return 3
    return training.max_steps // every if every >= 1 else round(1 / every)
