"""What a process of a stage holds in memory at its peak, from its recipe and the configs of its models alone.

Pure arithmetic: bytes of one process, on its GPU or, of a run on the CPU, of the process. Lengths are the longest that
the recipe lets through, so data of shorter rows needs less. Not counted are the CUDA context, NCCL's buffers and holes
between tensors; that a card of "80 GB" has 85 GB (GiB are not GB) leaves room for them.

Sources: transformers' `modeling_gemma2.py` (what a layer saves), TRL's `kernels/chunked_*.py` (logits in tiles) and
`rloo_trainer.py`, DeepSpeed's ZeRO (arXiv 1910.02054) and the defaults in its `runtime/zero/config.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import Gemma2Config

from gemma2_post.core import contract, gemma
from gemma2_post.core.launcher import Launcher
from gemma2_post.pipeline.check import CheckedStep

Parts = dict[str, float]
"""Bytes by what they hold."""

FP32, BF16 = 4, 2
ADAMW = 8
"""Bytes for each trained parameter: two moments in fp32."""
TILE_TOKENS, TILE_COLUMNS = 4096, 32768
"""Logits that TRL's losses hold at once (`TOKEN_CHUNK_SIZE`, `VOCAB_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""
DIVERGENCE_TOKENS = 128
"""Positions whose probabilities are in fp32 at once (`evaluation/divergence.py`)."""
JUDGE_BATCH, JUDGE_QUESTION = 8, 200
"""Pairs that a judge reads at once, and the tokens of its question beside them (`evaluation/judge.py`)."""
BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at once, in elements (`reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Gathered parameters that ZeRO-3 keeps at most, and those whose optimizer step it makes at once
(`stage3_max_live_parameters`, `sub_group_size`)."""
ONEDNN_KERNELS = 1024 * 0.72e6
"""On a CPU, bf16 matrix products are compiled for each shape (0.72 MB, measured over 200 shapes with torch 2.13), and
the newest 1024 kept (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`); lengths of batches vary enough to fill that."""


# --- a model's weights ---


def linear_shapes(config: Gemma2Config) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's matrices, which are what is quantised and adapted."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "q_proj": (hidden, heads),
        "k_proj": (hidden, kv_heads),
        "v_proj": (hidden, kv_heads),
        "o_proj": (heads, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def weights(config: Gemma2Config, itemsize: int, quantization: str | None = None, nested: bool = False) -> float:
    """Of a whole model.

    Args:
        quantization: 4bit (nf4: half a byte, and an fp32 constant for each 64), 8bit (LLM.int8) or None; embedding and
            norms stay as they are.
        nested: whether the constants of nf4 are quantised, too, to a byte and an fp32 constant for each 256.
    """
    total = gemma.num_parameters(config)
    if quantization is None:
        return total * itemsize
    shapes = linear_shapes(config).values()
    linear = config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in shapes)
    constants = (1 + FP32 / 256) / 64 if nested else FP32 / 64
    each = 0.5 + constants if quantization == "4bit" else 1
    return (total - linear) * itemsize + linear * each


def adapter_parameters(config: Gemma2Config, rank: int, target_modules: list[str]) -> int:
    shapes = linear_shapes(config)
    return config.num_hidden_layers * sum(rank * sum(shapes[name]) for name in target_modules)


def kv_cache(config: Gemma2Config, rows: int, length: int, itemsize: int) -> float:
    """Keys and values; sliding layers keep no more than their window."""
    lengths = [
        min(length, config.sliding_window) if kind == "sliding_attention" else length for kind in config.layer_types
    ]
    return 2 * rows * sum(lengths) * config.num_key_value_heads * config.head_dim * itemsize


# --- a pass through a model ---


@dataclass(frozen=True)
class Compute:
    """How a model computes."""

    itemsize: int
    """Of its activations: 2 in bf16, also by autocast."""
    attention: str = "eager"
    on_cpu: bool = False


@dataclass(frozen=True)
class Adapted:
    """What LoRA adds to each token that goes through a model."""

    rank: int
    target_modules: tuple[str, ...]
    input_itemsize: int
    """Of an adapter's copy of its input: fp32 as its weights, unless autocast or DeepSpeed makes it bf16."""
    has_dropout: bool = False


def _scores(config: Gemma2Config, rows: int, length: int) -> int:
    return rows * config.num_attention_heads * length**2


def masks(rows: int, length: int, compute: Compute) -> float:
    """Eager attention adds one for the sliding and one for the full layers."""
    return 2 * rows * length**2 * compute.itemsize if compute.attention == "eager" else 0


def saved_by_layer(
    config: Gemma2Config, rows: int, length: int, compute: Compute, adapted: Adapted | None = None
) -> float:
    """What a layer keeps of its forward pass for its backward pass.

    Args:
        adapted: if the layer's own weights are frozen.
    """
    tokens, itemsize = rows * length, compute.itemsize
    hidden, inner = tokens * config.hidden_size, tokens * config.intermediate_size
    heads = tokens * config.num_attention_heads * config.head_dim
    kv_heads = tokens * config.num_key_value_heads * config.head_dim
    # Each of the four norms: its input in fp32, and for its weight's gradient the normed input.
    saved = 4 * FP32 * hidden * (1 if adapted else 2)
    # What q/k/v/o, gate/up and down multiply.
    if adapted:
        shapes = linear_shapes(config)
        inputs = sum(shapes[name][0] for name in adapted.target_modules)
        saved += tokens * inputs * (adapted.input_itemsize + adapted.has_dropout)
        saved += tokens * len(adapted.target_modules) * adapted.rank * adapted.input_itemsize
    else:
        saved += itemsize * (2 * hidden + heads + inner)
    saved += itemsize * 3 * inner  # of GeGLU: the gate, its GELU, the other factor
    if compute.attention == "eager":
        # Queries, keys and values, the latter repeated for each head; of the scores their tanh, the softmax in fp32,
        # and in bf16 its rounding: 8 bytes each in both.
        return saved + itemsize * 3 * heads + 8 * _scores(config, rows, length)
    return saved + itemsize * (2 * heads + 2 * kv_heads) + FP32 * tokens * config.num_attention_heads


def backward_working(config: Gemma2Config, rows: int, length: int, compute: Compute) -> float:
    """What a layer's backward pass needs beside what was saved: gradients of GeGLU; then, when what GeGLU saved is
    gone, the softmax's two in fp32, of which bf16's rounding gives back a part."""
    mlp = 3 * rows * length * config.intermediate_size * compute.itemsize
    if compute.attention != "eager":
        return mlp
    return max(mlp, (8 if compute.itemsize == FP32 else 6) * _scores(config, rows, length) - mlp)


def saved(
    config: Gemma2Config,
    rows: int,
    length: int,
    compute: Compute,
    checkpoints: bool,
    adapted: Adapted | None = None,
) -> float:
    """What a forward pass keeps for the backward pass, up to the last hidden state, masks not counted: with gradient
    checkpointing the input of each layer only."""
    hidden = rows * length * config.hidden_size
    last_norm = FP32 * hidden * (1 if adapted else 2)
    layer = hidden * compute.itemsize if checkpoints else saved_by_layer(config, rows, length, compute, adapted)
    return config.num_hidden_layers * layer + last_norm


def backward(
    config: Gemma2Config,
    rows: int,
    length: int,
    compute: Compute,
    checkpoints: bool,
    adapted: Adapted | None = None,
) -> float:
    """What the backward pass needs beside that; with gradient checkpointing a layer is computed again first."""
    again = saved_by_layer(config, rows, length, compute, adapted) if checkpoints else 0
    return again + backward_working(config, rows, length, compute)


def forward(config: Gemma2Config, rows: int, length: int, compute: Compute) -> float:
    """What a pass that keeps nothing needs: the widest place of a layer, and the hidden states around it."""
    tokens, itemsize = rows * length, compute.itemsize
    hidden, inner = tokens * config.hidden_size, tokens * config.intermediate_size
    heads = tokens * config.num_attention_heads * config.head_dim
    attention = 3 * heads * itemsize
    if compute.attention == "eager":  # the masked scores, their fp32 copy (of bf16), the softmax in fp32
        attention += _scores(config, rows, length) * (itemsize + FP32 + (FP32 if itemsize == BF16 else 0))
    around = hidden * (itemsize + 3 * FP32)  # the residual; a norm's input, square and product
    return around + max(attention, 3 * inner * itemsize) + masks(rows, length, compute)


def sampling(config: Gemma2Config, rows: int, prompt: int, new: int, compute: Compute) -> Parts:
    """Answering prompts with a cache: the prompt at once, then a token at a time, which sees repeated keys and
    values; the logits of one position in fp32, and three copies on the way to a sample."""
    heads = config.num_attention_heads * config.head_dim
    one_layer = 2 * rows * (prompt + new) * heads * compute.itemsize
    return {
        "KV cache": kv_cache(config, rows, prompt + new, compute.itemsize),
        "activations": max(forward(config, rows, prompt, compute), one_layer),
        "logits": 4 * FP32 * rows * config.vocab_size,
    }


# --- losses and measurements over the vocabulary ---


def _tile(config: Gemma2Config, tokens: int, itemsize: int, on_cpu: bool) -> float:
    # On a CPU only what is written becomes resident; a GPU's allocator hands out all columns.
    columns = min(config.vocab_size, TILE_COLUMNS) if on_cpu else TILE_COLUMNS
    return min(tokens, TILE_TOKENS) * columns * itemsize


def fused_loss(config: Gemma2Config, tokens: int, compute: Compute, trains_all: bool) -> float:
    """Log-probabilities of tokens, by tiles of logits; their gradient is summed up in fp32.

    Without Triton a tile is worked on in nine fp32 copies (`_backward_tile`).
    """
    copies = 9 * _tile(config, tokens, FP32, on_cpu=True) if compute.on_cpu else 0
    of_hidden = tokens * config.hidden_size * (FP32 + 2 * compute.itemsize)  # its gradient, itself and a copy
    return _tile(config, tokens, compute.itemsize, compute.on_cpu) + copies + of_hidden + _head(config, trains_all)


def divergence_loss(config: Gemma2Config, tokens: int, compute: Compute, trains_all: bool) -> float:
    """Between student and teacher: two tiles, always in fp32; ten copies of one without Triton."""
    tile = _tile(config, tokens, FP32, compute.on_cpu)
    of_hidden = tokens * config.hidden_size * (FP32 + 2 * compute.itemsize)
    return (12 if compute.on_cpu else 2) * tile + of_hidden + _head(config, trains_all)


def _head(config: Gemma2Config, trains_all: bool) -> float:
    """The head's gradient: summed up in fp32, beside the one of the embedding, which it is tied to."""
    return config.vocab_size * config.hidden_size * FP32 if trains_all else 0


def divergence(config: Gemma2Config, rows: int, answer: int, itemsize: int) -> float:
    """Measuring how far two models are apart: both's logits of whole answers, one in two copies (soft-cap), and of
    some positions the probabilities in fp32, seven times."""
    logits = rows * (answer + 1) * config.vocab_size * itemsize
    return 3 * logits + 7 * min(DIVERGENCE_TOKENS, answer) * config.vocab_size * FP32


# --- stages ---


def unknown(checked: CheckedStep) -> list[str]:
    """The models whose shapes are not known, by their keys."""
    loaded = ("model_name_or_path", "teacher_model_name_or_path", "reward_model", "init", "policies")
    if checked.step.stage in ("warp", "evaluate"):
        loaded = ("reward_model", "init", "judge") if _is_measured(checked) else ("init",)
    return [key for key in loaded if key in checked.models and checked.models[key] is None]


def _is_measured(checked: CheckedStep) -> bool:
    return checked.step.stage != "warp" or len(checked.built) > 1


def parts(checked: CheckedStep, libraries: float = 0, num_gpus: int = 1) -> Parts:
    """The parts at the peak of the stage, which is that of its largest phase.

    Args:
        libraries: resident bytes of a process that has imported what a stage imports; counted on a CPU.
        num_gpus: over which a stage of one process that measures models spreads each of them.
    """
    largest = max(phases(checked, num_gpus).values(), key=lambda phase: sum(phase.values()))
    largest = {name: size for name, size in largest.items() if size}
    if checked.launcher.use_cpu:
        largest |= {"Python and libraries": libraries}
        if _computes_in_bf16_on_cpu(checked):
            largest |= {"oneDNN kernels": ONEDNN_KERNELS}
    return largest


def phases(checked: CheckedStep, num_gpus: int = 1) -> dict[str, Parts]:
    """What is held in each phase of a stage, by the phase's name."""
    stage = checked.step.stage
    if stage == "synthesize":
        return _synthesize(checked)
    if stage in ("warp", "evaluate"):
        return _measure(checked, num_gpus)
    return _train(checked)


def _computes_in_bf16_on_cpu(checked: CheckedStep) -> bool:
    return checked.step.stage in TRAINING and _compute(checked).itemsize == BF16


TRAINING = ["sft", "distill", "reward", "rlhf"]


def _compute(checked: CheckedStep) -> Compute:
    in_bf16 = checked.get("dtype") == "bfloat16" or checked.get("bf16")
    return Compute(BF16 if in_bf16 else FP32, checked.get("attn_implementation"), checked.launcher.use_cpu)


def _adapted(checked: CheckedStep) -> Adapted | None:
    if not checked.get("use_peft"):
        return None
    in_bf16 = checked.get("bf16") or checked.launcher.zero_stage
    return Adapted(
        checked.get("lora_r"),
        tuple(checked.get("lora_target_modules") or gemma.LORA_TARGET_MODULES),
        BF16 if in_bf16 else FP32,
        checked.get("lora_dropout") > 0,
    )


def _quantization(checked: CheckedStep, prefix: str = "") -> str | None:
    return next((bits for bits in ("4bit", "8bit") if checked.get(f"{prefix}load_in_{bits}")), None)


def _shared(size: float, launcher: Launcher, stage: int) -> float:
    """Of what ZeRO spreads over the processes from a stage on: this one's share."""
    return size / launcher.num_processes if launcher.zero_stage >= stage else size


def trained_parameters(checked: CheckedStep) -> int:
    config, adapted = checked.models["model_name_or_path"], _adapted(checked)
    score_head = config.hidden_size if checked.step.stage == "reward" else 0
    if adapted:
        return adapter_parameters(config, adapted.rank, list(adapted.target_modules)) + score_head
    return gemma.num_parameters(config) + score_head


def policy_weights(checked: CheckedStep) -> float:
    """Of the model that is trained, before ZeRO-3 spreads it."""
    itemsize = FP32 if checked.get("dtype") == "float32" and not checked.launcher.zero_stage else BF16
    config = checked.models["model_name_or_path"]
    return weights(config, itemsize, _quantization(checked), checked.get("use_bnb_nested_quant"))


def frozen(checked: CheckedStep) -> Parts:
    """The other models that a training stage holds all along."""
    launcher, config = checked.launcher, checked.models["model_name_or_path"]
    if checked.step.stage == "distill":
        itemsize = FP32 if checked.get("teacher_dtype") == "float32" and not launcher.zero_stage else BF16
        teacher = weights(checked.models["teacher_model_name_or_path"], itemsize, _quantization(checked, "teacher_"))
        return {"teacher": _shared(teacher, launcher, 3)}
    if checked.step.stage != "rlhf":
        return {}
    found = {}
    if "reward_model" in checked.models:  # in bf16 where there is a GPU for it
        found["reward model"] = _shared(
            weights(checked.models["reward_model"], FP32 if launcher.use_cpu else BF16), launcher, 3
        )
    anchor, trained = checked.get("anchor"), trained_parameters(checked)
    shadow = _shared(FP32 * trained, launcher, 2) if anchor == "ema" else 0
    if checked.get("use_peft"):  # reference and start are the policy with another adapter, or with none
        return found | {"anchor": shadow + (FP32 * trained if anchor != "none" else 0)}
    model = _shared(weights(config, FP32 if _keeps_fp32(checked) else BF16), launcher, 3)
    found["anchor"] = shadow + (model if anchor != "none" else 0)
    found["start"] = model if anchor != "start" else 0  # else it is the reference itself
    return found


def _keeps_fp32(checked: CheckedStep) -> bool:
    return checked.get("dtype") == "float32" and not checked.launcher.zero_stage


def optimizer(checked: CheckedStep) -> float:
    """AdamW's moments, and under DeepSpeed the fp32 masters."""
    launcher, trained = checked.launcher, trained_parameters(checked)
    if launcher.zero_stage and launcher.offloads_optimizer:
        return 0
    moments = 2 if "8bit" in str(checked.get("optim")) else ADAMW
    return _shared(trained * (moments + (FP32 if launcher.zero_stage else 0)), launcher, 1)


def gradients(checked: CheckedStep) -> float:
    launcher, trained = checked.launcher, trained_parameters(checked)
    if not launcher.zero_stage:  # in fp32; DDP's buckets are a second copy
        return FP32 * trained * (2 if launcher.num_processes > 1 else 1)
    buckets = BF16 * min(BUCKET, trained) * (2 if launcher.zero_stage == 2 else 1)
    return _shared(BF16 * trained, launcher, 2) + buckets


def _gathered(checked: CheckedStep, config: Gemma2Config) -> float:
    """Of ZeRO-3, whole parameters while a pass goes through a model: the embedding and what is kept for reuse."""
    if checked.launcher.zero_stage < 3:
        return 0
    return BF16 * min(gemma.num_parameters(config), config.vocab_size * config.hidden_size + LIVE)


def _dequantized(checked: CheckedStep, config: Gemma2Config, prefix: str = "") -> float:
    """The matrix of a quantised model that is multiplied just now, in bf16."""
    shapes = linear_shapes(config).values()
    return BF16 * max(i * o for i, o in shapes) if _quantization(checked, prefix) else 0


def _lengths(checked: CheckedStep) -> tuple[int, int]:
    """Longest prompt and answer of a stage that samples while it trains, in tokens."""
    answer = checked.get("max_completion_length")
    positions = min(config.max_position_embeddings for config in checked.models.values() if config)
    return checked.get("max_prompt_length") or positions - answer, answer


def _train(checked: CheckedStep) -> dict[str, Parts]:
    stage, launcher, config = checked.step.stage, checked.launcher, checked.models["model_name_or_path"]
    compute, adapted = _compute(checked), _adapted(checked)
    trained, trains_all = trained_parameters(checked), adapted is None
    train_rows, eval_rows = (checked.get(f"per_device_{mode}_batch_size") for mode in ("train", "eval"))
    checkpoints = checked.get("gradient_checkpointing")
    held = {
        "weights": _shared(policy_weights(checked), launcher, 3),
        "adapter": 0 if trains_all else trained * (BF16 if launcher.zero_stage else FP32),
        **frozen(checked),
        "optimizer": optimizer(checked),
    }
    if launcher.zero_stage:  # whose buffers stay
        held["gradients"] = gradients(checked)
    if trains_all and compute.itemsize == BF16 and _keeps_fp32(checked):  # autocast keeps a copy of each matrix
        held["weights"] += weights(config, BF16)
    if launcher.zero_stage == 3 and launcher.offloads_parameters:
        held["weights"] = 0

    # A training step.
    if stage in ("sft", "reward"):
        length, rows = checked.get("max_length") or config.max_position_embeddings, train_rows
        prompt, answer = length, checked.get("max_new_tokens")
        rows *= 2 if stage == "reward" else 1  # chosen and rejected beside each other
    else:
        prompt, answer = _lengths(checked)
        length, rows = prompt + answer, train_rows
    tokens = rows * (length if stage in ("sft", "reward") or compute.on_cpu else answer)
    beside = [backward(config, rows, length, compute, checkpoints, adapted) + _dequantized(checked, config)]
    loss = 0.0
    if stage in ("sft", "rlhf"):
        loss = fused_loss(config, tokens, compute, trains_all)
    elif stage == "distill":
        teacher = checked.models["teacher_model_name_or_path"]
        loss = divergence_loss(config, rows * answer, compute, trains_all)
        teacher_compute = Compute(
            FP32 if checked.get("teacher_dtype") == "float32" else BF16, compute.attention, compute.on_cpu
        )
        beside += [forward(teacher, rows, length, teacher_compute) + _dequantized(checked, teacher, "teacher_")]
    kept = saved(config, rows, length, compute, checkpoints, adapted) + masks(rows, length, compute)
    gathered = max(_gathered(checked, each) for each in checked.models.values() if each)
    step = {
        **held,
        "gradients": gradients(checked),
        "activations": kept + (max(beside) if max(beside) > loss else 0),
        "logits": loss if loss >= max(beside) else 0,
        "gathered": gathered,
    }
    found = {"training step": step}
    if launcher.zero_stage:  # the share's gradients in fp32, when the activations are gone
        share = min(trained / launcher.num_processes, LIVE if launcher.zero_stage == 3 else trained)
        found["optimizer step"] = {**held, "gradients": gradients(checked) + FP32 * share}

    # Answers: to held-out prompts, and of a stage that trains on its own answers a step's at once.
    whole = weights(config, BF16) if launcher.zero_stage == 3 else 0
    if stage == "reward":
        if policy := checked.models.get("policies"):  # before the reward model is loaded
            itemsize = FP32 if launcher.use_cpu else BF16
            policy_compute = Compute(itemsize, "eager", launcher.use_cpu)
            found["answers of policies"] = {"policies": weights(policy, itemsize)} | sampling(
                policy, eval_rows, prompt, answer, policy_compute
            )
        scoring = {"activations": forward(config, eval_rows, length, compute), "gathered": gathered}
        return found | {"scoring": held | scoring}
    sampled_rows = eval_rows if checked.get("num_samples") else 0
    if stage in ("distill", "rlhf") and not checked.get("use_vllm"):
        sampled_rows = max(sampled_rows, checked.get("global_batch_size") // launcher.num_processes)
    if sampled_rows:
        found["sampling"] = held | {"gathered": whole} | sampling(config, sampled_rows, prompt, answer, compute)
    if stage in ("distill", "rlhf") and checked.get("num_samples"):
        # accelerate hands over logits in fp32 where autocast computes.
        itemsize = FP32 if checked.get("bf16") and not launcher.zero_stage else compute.itemsize
        found["divergence"] = held | {
            "activations": forward(config, eval_rows, length, compute),
            "logits": divergence(config, eval_rows, answer, itemsize),
            "gathered": gathered,
        }
    if stage == "rlhf" and "reward_model" in checked.models:
        reward_compute = Compute(FP32 if launcher.use_cpu else BF16, "eager", launcher.use_cpu)
        conversations = max(eval_rows, checked.get("reward_batch_size"))
        scored = forward(checked.models["reward_model"], conversations, length, reward_compute)
        found["rewards"] = held | {"activations": scored, "gathered": gathered}
    return found


def _measure(checked: CheckedStep, num_gpus: int) -> dict[str, Parts]:
    """Of a merge or an evaluation: a model at a time answers beside the start; then the reward model, alone."""
    config, on_cpu = checked.models["init"], checked.launcher.use_cpu
    if not _is_measured(checked):  # slices of a few MB for each core (`weights/streaming.py`)
        return {"merging": {}}
    compute = Compute(FP32 if on_cpu else BF16, "eager", on_cpu)
    rows, (prompt, answer) = checked.get("batch_size"), _lengths(checked)
    share = weights(config, compute.itemsize) / (1 if on_cpu else num_gpus)
    two = {"weights": share, "start": share}
    found = {
        "sampling": two | sampling(config, rows, prompt, answer, compute),
        "divergence": two
        | {
            "activations": forward(config, rows, prompt + answer, compute),
            "logits": divergence(config, rows, answer, compute.itemsize),
        },
    }
    if scorer := checked.models.get("reward_model"):
        found["rewards"] = {
            "reward model": weights(scorer, compute.itemsize),
            "activations": forward(scorer, checked.get("reward_batch_size"), prompt + answer, compute),
        }
    if judge := checked.models.get("judge"):  # held while models answer the safety prompts
        held = {"judge": weights(judge, compute.itemsize)} | (
            {"weights": share} if checked.get("safety_datasets") else {}
        )
        question = JUDGE_QUESTION + prompt + 2 * answer
        found["judge"] = held | sampling(judge, JUDGE_BATCH, question, checked.get("judge_max_tokens"), compute)
    return found


def _synthesize(checked: CheckedStep) -> dict[str, Parts]:
    if checked.get("endpoint"):
        return {"asking": {}}
    config, on_cpu = checked.models["model_name_or_path"], checked.launcher.use_cpu
    itemsize = BF16 if checked.get("dtype") == "bfloat16" else FP32
    answer = checked.get("max_new_tokens")
    prompt = checked.get("max_prompt_length") or config.max_position_embeddings - answer
    held = {"weights": weights(config, itemsize, _quantization(checked), checked.get("use_bnb_nested_quant"))}
    if scorer := checked.models.get("reward_model"):
        held["reward model"] = weights(scorer, FP32 if on_cpu else BF16)
    compute = Compute(itemsize, checked.get("attn_implementation"), on_cpu)
    return {"sampling": held | sampling(config, checked.get("batch_size"), prompt, answer, compute)}


# --- beside the GPU ---


def host(checked: CheckedStep) -> float:
    """Memory of the machine that a stage on a GPU needs in its first process: to load, to merge an adapter, to gather
    what is saved; and in all processes for what ZeRO offloads, this one's share."""
    if checked.step.stage not in TRAINING:
        return 0
    config, launcher = checked.models["model_name_or_path"], checked.launcher
    total = gemma.num_parameters(config)
    offloaded = 0.0
    if launcher.offloads_optimizer:  # masters, moments, and gradients in fp32
        offloaded += _shared(trained_parameters(checked) * (ADAMW + 2 * FP32), launcher, 1)
    if launcher.offloads_parameters:
        offloaded += _shared(BF16 * total, launcher, 3)
    # An adapter is merged into the base in fp32; else the weights are loaded, and handed over to be saved.
    return offloaded + total * (FP32 if checked.get("use_peft") or _keeps_fp32(checked) else BF16)


def disk(checked: CheckedStep) -> tuple[float, float]:
    """Of the output, and of the most checkpoints that there are at once."""
    stage = checked.step.stage
    if stage not in (*TRAINING, "warp"):
        return 0, 0
    itemsize = FP32 if checked.get("save_dtype") == "float32" else BF16
    if stage == "warp":
        eta = checked.get("eta")
        points = len(eta) if isinstance(eta, list) else 1
        points += len(checked.get("compare_with") or []) * points + _is_measured(checked)
        return (
            0 if checked.get("adapter_only") else points * itemsize * gemma.num_parameters(checked.models["init"])
        ), 0
    trained = trained_parameters(checked)
    anchor = FP32 * trained if stage == "rlhf" and checked.get("anchor") == "ema" else 0
    output = itemsize * gemma.num_parameters(checked.models["model_name_or_path"]) + anchor
    each = trained * (FP32 + ADAMW + (BF16 if checked.launcher.zero_stage else 0)) + anchor
    if checked.get("use_peft"):
        output += FP32 * trained
    if checked.get("save_strategy") == "no":
        return output, 0
    return output, each * ((checked.get("save_total_limit") or 2) + 1)  # the oldest goes when the newest is there


def check_disk(where: str, run_dir: Path, checked: list[CheckedStep]) -> None:
    """Refuses a chain whose outputs and checkpoints do not fit beside what is there; of models whose shapes are not
    known nothing is."""
    num_bytes = 0.0
    for each in checked:
        if not (each.step.folder / contract.DONE).is_file() and not unknown(each):
            there = sum(path.stat().st_size for path in each.step.folder.rglob("*") if path.is_file())
            num_bytes += max(0, sum(disk(each)) - there)
    contract.check_space(where, run_dir, int(num_bytes))
