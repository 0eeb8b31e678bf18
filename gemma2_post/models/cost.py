"""Memory of a Gemma 2 model in bytes: weights, activations, caches, logits. Pure arithmetic on its config.

Sources: transformers' `modeling_gemma2.py` (what a layer saves), TRL's `kernels/chunked_*.py` (logits in tiles) and
`rloo_trainer.py`. `rows` and `length` are those of a batch; `itemsize` is in bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma2_post.models.shapes import linear_shapes, num_parameters
from gemma2_post.stage.command import Parts

if TYPE_CHECKING:
    from transformers import Gemma2Config

FP32, BF16 = 4, 2
ADAMW = 8
"""Bytes per trained parameter: two moments in fp32."""
TILE_TOKENS, TILE_COLUMNS = 4096, 32768
"""Tile of logits in TRL's losses (`TOKEN_CHUNK_SIZE`, `VOCAB_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""
DIVERGENCE_TOKENS = 128
"""Positions whose probabilities are held in fp32 at once (`evaluation/divergence.py`)."""
ONEDNN_KERNELS = 1024 * 0.72e6
"""Compiled bf16 matrix products on a CPU: 0.72 MB per shape (measured over 200 shapes with torch 2.13); oneDNN keeps
1024 of them (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`), and batch lengths vary enough to reach that."""


# --- a model's weights ---


def weights(config: "Gemma2Config", itemsize: int, quantization: str | None = None, nested: bool = False) -> float:
    """Weights of a whole model.

    Args:
        quantization: "4bit" (nf4: half a byte per weight, an fp32 constant per 64 weights), "8bit" (LLM.int8) or
            None. Embedding and norms are never quantized.
        nested: Whether nf4's constants are quantized too, to one byte each and an fp32 constant per 256 of them.
    """
    total = num_parameters(config)
    if quantization is None:
        return total * itemsize
    linear = config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in linear_shapes(config).values())
    constants = (1 + FP32 / 256) / 64 if nested else FP32 / 64
    each = 0.5 + constants if quantization == "4bit" else 1
    return (total - linear) * itemsize + linear * each


def dequantized(config: "Gemma2Config", quantization: str | None) -> float:
    """The largest matrix of a quantized model, which is dequantized to bf16 to be multiplied."""
    return BF16 * max(i * o for i, o in linear_shapes(config).values()) if quantization else 0


def adapter_parameters(config: "Gemma2Config", rank: int, target_modules: list[str]) -> int:
    """Number of LoRA parameters (arXiv 2106.09685), two matrices per target module and layer."""
    shapes = linear_shapes(config)
    return config.num_hidden_layers * sum(rank * sum(shapes[name]) for name in target_modules)


def kv_cache(config: "Gemma2Config", rows: int, length: int, itemsize: int) -> float:
    """Keys and values; sliding layers keep only their window."""
    lengths = [
        min(length, config.sliding_window) if kind == "sliding_attention" else length for kind in config.layer_types
    ]
    return 2 * rows * sum(lengths) * config.num_key_value_heads * config.head_dim * itemsize


def longest_prompt(configs: "Iterable[Gemma2Config | None]", max_prompt_length: int | None, answer: int) -> int:
    """The longest prompt in tokens: the recipe's, or what the longest answer leaves of all known models' positions."""
    positions = min(config.max_position_embeddings for config in configs if config)
    return max_prompt_length or positions - answer


# --- a pass through a model ---


@dataclass(frozen=True)
class Compute:
    """How a model computes."""

    itemsize: int
    """Bytes per activation: 2 in bf16, including autocast."""
    attention: str = "eager"
    on_cpu: bool = False


@dataclass(frozen=True)
class Adapted:
    """The LoRA settings that determine what an adapter saves per token."""

    rank: int
    target_modules: tuple[str, ...]
    input_itemsize: int
    """Bytes per value in an adapter's copy of its input: fp32 like its weights, or bf16 with autocast or DeepSpeed."""
    has_dropout: bool = False


def _scores(config: "Gemma2Config", rows: float, length: float) -> float:
    return rows * config.num_attention_heads * length**2


def masks(rows: int, length: int, compute: Compute) -> float:
    """Attention masks: eager attention needs one for the sliding and one for the full layers."""
    return 2 * rows * length**2 * compute.itemsize if compute.attention == "eager" else 0


def saved_by_layer(
    config: "Gemma2Config", rows: float, length: float, compute: Compute, adapted: Adapted | None = None
) -> float:
    """What a layer saves in its forward pass for its backward pass.

    Args:
        adapted: The LoRA settings if the layer's own weights are frozen.
    """
    tokens, itemsize = rows * length, compute.itemsize
    hidden, inner = tokens * config.hidden_size, tokens * config.intermediate_size
    heads = tokens * config.num_attention_heads * config.head_dim
    kv_heads = tokens * config.num_key_value_heads * config.head_dim
    # Each of the four norms saves its input in fp32, and for its weight's gradient also the normalized input.
    saved = 4 * FP32 * hidden * (1 if adapted else 2)
    # Inputs of the matrices: of q/k/v, o, gate/up and down.
    if adapted:
        shapes = linear_shapes(config)
        inputs = sum(shapes[name][0] for name in adapted.target_modules)
        saved += tokens * inputs * (adapted.input_itemsize + adapted.has_dropout)
        saved += tokens * len(adapted.target_modules) * adapted.rank * adapted.input_itemsize
    else:
        saved += itemsize * (2 * hidden + heads + inner)
    saved += itemsize * 3 * inner  # GeGLU: the gate, its GELU, the other factor
    if compute.attention == "eager":
        # Queries, and keys and values repeated for each head. Per score 8 bytes: in fp32 its tanh and its softmax; in
        # bf16 its tanh, its softmax in fp32, and that rounded to bf16.
        return saved + itemsize * 3 * heads + 8 * _scores(config, rows, length)
    return saved + itemsize * (2 * heads + 2 * kv_heads) + FP32 * tokens * config.num_attention_heads


def backward_working(config: "Gemma2Config", rows: int, length: int, compute: Compute) -> float:
    """What a layer's backward pass needs in addition to what was saved.

    First the gradients of GeGLU; later, when what GeGLU saved is freed, two gradients of the softmax in fp32, minus
    what the rounded bf16 softmax frees.
    """
    mlp = 3 * rows * length * config.intermediate_size * compute.itemsize
    if compute.attention != "eager":
        return mlp
    return max(mlp, (8 if compute.itemsize == FP32 else 6) * _scores(config, rows, length) - mlp)


def saved(
    config: "Gemma2Config", rows: int, length: int, compute: Compute, checkpoints: bool, adapted: Adapted | None = None
) -> float:
    """What a forward pass saves for the backward pass, up to the last hidden state, without masks.

    With gradient checkpointing (`checkpoints`) that is only the input of each layer.
    """
    hidden = rows * length * config.hidden_size
    last_norm = FP32 * hidden * (1 if adapted else 2)
    layer = hidden * compute.itemsize if checkpoints else saved_by_layer(config, rows, length, compute, adapted)
    return config.num_hidden_layers * layer + last_norm


def backward(
    config: "Gemma2Config", rows: int, length: int, compute: Compute, checkpoints: bool, adapted: Adapted | None = None
) -> float:
    """What the backward pass needs in addition; gradient checkpointing first recomputes what a layer saves."""
    recomputed = saved_by_layer(config, rows, length, compute, adapted) if checkpoints else 0
    return recomputed + backward_working(config, rows, length, compute)


def forward(config: "Gemma2Config", rows: int, length: int, compute: Compute) -> float:
    """What a forward pass without gradients needs: the widest part of a layer, and the hidden states around it."""
    tokens, itemsize = rows * length, compute.itemsize
    hidden, inner = tokens * config.hidden_size, tokens * config.intermediate_size
    heads = tokens * config.num_attention_heads * config.head_dim
    attention = 3 * heads * itemsize
    if compute.attention == "eager":  # the masked scores, their fp32 copy (of bf16), the softmax in fp32
        attention += _scores(config, rows, length) * (itemsize + FP32 + (FP32 if itemsize == BF16 else 0))
    around = hidden * (itemsize + 3 * FP32)  # the residual; a norm's input, square and product
    return around + max(attention, 3 * inner * itemsize) + masks(rows, length, compute)


def sampling(config: "Gemma2Config", rows: int, prompt: int, new: int, compute: Compute) -> Parts:
    """Sampling answers with a KV cache: first the whole prompt, then one token at a time, for which each layer repeats
    keys and values for all heads. Logits of one position in fp32, in four copies.

    Args:
        prompt: Length of the prompts in tokens.
        new: Length of the answers in tokens.
    """
    heads = config.num_attention_heads * config.head_dim
    one_layer = 2 * rows * (prompt + new) * heads * compute.itemsize
    return {
        "KV cache": kv_cache(config, rows, prompt + new, compute.itemsize),
        "activations": max(forward(config, rows, prompt, compute), one_layer),
        "logits": max(4 * FP32 * rows * config.vocab_size, copied_head(config, rows, compute)),
    }


def copied_head(config: "Gemma2Config", rows: int, compute: Compute) -> float:
    """Copies of the head, one for each row: on a CPU in bf16, torch 2.13 makes them to multiply a slice of the hidden
    states, such as the last of each row. Counted for every head, although torch does not copy one that is trained."""
    copies = rows if compute.on_cpu and compute.itemsize == BF16 else 0
    return copies * config.vocab_size * config.hidden_size * BF16


# --- losses and measurements over the vocabulary ---


def _tile(config: "Gemma2Config", tokens: int, itemsize: int, on_cpu: bool) -> float:
    # On a CPU only memory that is written becomes resident; a GPU's allocator reserves all columns.
    columns = min(config.vocab_size, TILE_COLUMNS) if on_cpu else TILE_COLUMNS
    return min(tokens, TILE_TOKENS) * columns * itemsize


def fused_loss(config: "Gemma2Config", tokens: int, compute: Compute, trains_all: bool) -> float:
    """Log-probabilities of `tokens` tokens, in tiles of logits; their gradient is accumulated in fp32.

    Without Triton, a tile takes nine fp32 copies (`_backward_tile`).
    """
    copies = 9 * _tile(config, tokens, FP32, on_cpu=True) if compute.on_cpu else 0
    of_hidden = tokens * config.hidden_size * (FP32 + 2 * compute.itemsize)  # its fp32 gradient, itself and a copy
    return _tile(config, tokens, compute.itemsize, compute.on_cpu) + copies + of_hidden + _head(config, trains_all)


def divergence_loss(config: "Gemma2Config", tokens: int, compute: Compute, trains_all: bool) -> float:
    """Divergence between student and teacher: two fp32 tiles, and ten more copies of one without Triton."""
    tile = _tile(config, tokens, FP32, compute.on_cpu)
    of_hidden = tokens * config.hidden_size * (FP32 + 2 * compute.itemsize)
    return (12 if compute.on_cpu else 2) * tile + of_hidden + _head(config, trains_all)


def _head(config: "Gemma2Config", trains_all: bool) -> float:
    """The head's gradient, accumulated in fp32 in addition to the gradient of the tied embedding."""
    return config.vocab_size * config.hidden_size * FP32 if trains_all else 0


def divergence(config: "Gemma2Config", rows: int, answer: int, itemsize: int) -> float:
    """Measuring the divergence of two models: three copies of the logits of whole answers (the soft-cap copies one
    model's), and seven fp32 copies of the probabilities at `DIVERGENCE_TOKENS` positions."""
    logits = rows * (answer + 1) * config.vocab_size * itemsize
    return 3 * logits + 7 * min(DIVERGENCE_TOKENS, answer) * config.vocab_size * FP32
