"""FLOPs, bytes and layers of passes through a Gemma 2 model. Pure arithmetic on its config.

A product of matrices takes two FLOPs per weight and token. A backward pass takes two products for each one forward,
one where a weight is frozen. Looking up embeddings is free; the tied head is not, and it has 0.6 of Gemma 2 2B's 2.6
billion weights. (arXiv 2001.08361, section 2.1.) Norms, activations and the softmax count by the bytes that they move;
the optimizer is not counted.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma2_post.models import cost
from gemma2_post.models.cost import BF16, FP32, Adapted, Compute
from gemma2_post.models.shapes import linear_shapes
from gemma2_post.stage.work import Lengths, Pass, batches

if TYPE_CHECKING:
    from transformers import Gemma2Config


@dataclass(frozen=True)
class Model:
    """A model and how it computes."""

    config: "Gemma2Config"
    compute: Compute
    quantization: str | None = None
    """4bit, 8bit or None."""
    adapted: Adapted | None = None
    """The adapter that it computes with, which alone is trained."""


# --- FLOPs ---


def linear_parameters(config: "Gemma2Config") -> int:
    """Number of weights in the matrices of all layers."""
    return config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in linear_shapes(config).values())


def _adapter_parameters(model: Model) -> int:
    adapted = model.adapted
    return cost.adapter_parameters(model.config, adapted.rank, list(adapted.target_modules)) if adapted else 0


def attention_flops(model: Model, rows: float, queries: float, keys: float) -> float:
    """The products with keys and with values, in all layers; only eager attention computes what the mask removes."""
    config = model.config
    each = 4 * rows * config.num_attention_heads * config.head_dim * queries * keys
    computed = 1 if model.compute.attention == "eager" or queries == 1 else 0.5
    return config.num_hidden_layers * each * computed


def head_flops(config: "Gemma2Config", tokens: float) -> float:
    """The logits of these tokens."""
    return 2 * tokens * config.hidden_size * config.vocab_size


def forward_flops(model: Model, rows: float, length: float) -> float:
    """A forward pass up to the last hidden state."""
    parameters = linear_parameters(model.config) + _adapter_parameters(model)
    return 2 * rows * length * parameters + attention_flops(model, rows, length, length)


def backward_flops(model: Model, rows: float, length: float, checkpoints: bool) -> float:
    """A backward pass from the last hidden state; with gradient checkpointing, the layers run forward once more."""
    linear = (1 if model.adapted else 2) * linear_parameters(model.config) + 2 * _adapter_parameters(model)
    found = 2 * rows * length * linear + 2 * attention_flops(model, rows, length, length)
    return found + (forward_flops(model, rows, length) if checkpoints else 0)


# --- bytes ---


def _weight_bytes(model: Model) -> float:
    """What a pass reads; quantized matrices are written and read as bf16 before they are multiplied."""
    dequantized = 2 * BF16 * linear_parameters(model.config) if model.quantization else 0
    return cost.weights(model.config, model.compute.itemsize, model.quantization) + dequantized


def _activation_bytes(model: Model, rows: float, length: float) -> float:
    """What the layers write in a forward pass and read again; a backward pass moves twice as much."""
    layer = cost.saved_by_layer(model.config, rows, length, model.compute, model.adapted)
    return 2 * model.config.num_hidden_layers * layer


def logit_bytes(model: Model, tokens: float, copies: int) -> float:
    """Copies of these tokens' logits in fp32, each written and read."""
    return 2 * FP32 * tokens * model.config.vocab_size * copies


@dataclass(frozen=True)
class Loss:
    """What a loss over the vocabulary takes, with its backward pass."""

    flops: float = 0
    num_bytes: float = 0


def fused_loss(model: Model, tokens: float) -> Loss:
    """Log-probabilities; the backward pass computes the logits again (TRL's `kernels/chunked_logprob.py`)."""
    flops = (3 if model.adapted else 4) * head_flops(model.config, tokens)
    return Loss(flops, logit_bytes(model, tokens, sum(copies(model))))


def divergence_loss(student: Model, teacher: Model, tokens: float, beta: float) -> Loss:
    """Divergence of student and teacher; the divergences between the two KLs take their logits once more.

    (TRL's `kernels/chunked_divergence.py`.) The passes of the teacher that it follows are not counted here.
    """
    both = head_flops(student.config, tokens) + head_flops(teacher.config, tokens)
    passes = 3 if 0 < beta < 1 else 2
    gradients = (1 if student.adapted else 2) * head_flops(student.config, tokens)
    return Loss(passes * both + gradients, logit_bytes(student, tokens, 2 * sum(copies(student))))


def copies(model: Model) -> tuple[int, int]:
    """Copies of the logits in fp32 that a loss makes, one after another, in its forward and in its backward pass.

    Triton's kernels work where the logits are; without Triton each operation of TRL's `_forward_tile` and
    `_backward_tile` makes one.
    """
    return (10, 18) if model.compute.on_cpu else (1, 2)


def _layers(model: Model) -> float:
    """Layers to start, with their adapters: about 5 operations for each adapted matrix beside 50 in a layer."""
    adapted = model.adapted
    return model.config.num_hidden_layers * (1 + 0.1 * len(adapted.target_modules) if adapted else 1)


# --- passes ---


def reading(
    model: Model, number: float, rows: float, lengths: Lengths, logits: float = 0, padded: float | None = None
) -> Pass:
    """Forward passes over `number` texts, at most `rows` at once.

    Args:
        logits: Tokens of each text whose log-probabilities are computed.
        padded: The length that texts are padded to; None for that of the longest in a batch.
    """
    count = batches(number, rows)
    rows, config = number / count if count else 0, model.config
    length = padded or lengths.longest(rows)
    flops = forward_flops(model, rows, length) + head_flops(config, rows * logits)
    num_bytes = _weight_bytes(model) + _activation_bytes(model, rows, length)
    num_bytes += logit_bytes(model, rows * logits, copies(model)[0])
    return Pass(config, model.compute.itemsize, count, rows * lengths.mean, 0, flops, num_bytes, _layers(model))


def training(
    model: Model, rows: int, lengths: Lengths, loss: Loss, checkpoints: bool, padded: float | None = None
) -> Pass:
    """One forward and backward pass over a batch.

    Args:
        padded: See `reading`.
    """
    length, config = padded or lengths.longest(rows), model.config
    flops = forward_flops(model, rows, length) + backward_flops(model, rows, length, checkpoints) + loss.flops
    layers = (4 if checkpoints else 3) * _layers(model)
    num_bytes = (3 if checkpoints else 2) * _weight_bytes(model) + loss.num_bytes
    num_bytes += (4 if checkpoints else 3) * _activation_bytes(model, rows, length)
    return Pass(config, model.compute.itemsize, 1, rows * lengths.mean, 0, flops, num_bytes, layers)


CONCURRENT = 256
"""Conversations that vLLM answers at a time, at most (`evaluation/answering/vllm_server.py`)."""


def sampling(
    model: Model,
    number: float,
    rows: float,
    prompts: Lengths,
    answers: Lengths,
    is_served: bool = False,
    padded: float | None = None,
) -> list[Pass]:
    """Answers to `number` prompts, at most `rows` at once: the prompts in one pass, then a pass for each token of the
    longest answer in the batch.

    Args:
        is_served: Whether vLLM samples, which starts the layers of a step as one CUDA graph.
        padded: The length that prompts are padded to; None for that of the longest in a batch.
    """
    count = batches(number, rows)
    if not count:
        return []
    rows, config = number / count, model.config
    prompt, steps = padded or prompts.longest(rows), answers.longest(rows)
    itemsize, layers = model.compute.itemsize, 0 if is_served else _layers(model)
    weights, head = _weight_bytes(model), head_flops(config, rows)
    weights += logit_bytes(model, rows, 4)
    read = weights + _activation_bytes(model, rows, prompt)
    first = forward_flops(model, rows, prompt) + head
    length = prompt + steps / 2  # on the average step
    parameters = linear_parameters(config) + _adapter_parameters(model)
    each = 2 * rows * parameters + attention_flops(model, rows, 1, length) + head
    cache = cost.kv_cache(config, 1, round(length), itemsize) * rows
    generated = rows * answers.mean / steps
    return [
        Pass(config, itemsize, count, rows * prompts.mean, 0, first, read, layers),
        Pass(config, itemsize, count * steps, 0, generated, each, weights + cache, layers),
    ]
