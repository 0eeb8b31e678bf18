"""What a Gemma 2 model costs in memory: weights, activations, caches, logits. Pure arithmetic on its config.

Sources: transformers' `modeling_gemma2.py` (what a layer saves), TRL's `kernels/chunked_*.py` (logits in tiles) and
`rloo_trainer.py`.
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
"""Bytes for each trained parameter: two moments in fp32."""
TILE_TOKENS, TILE_COLUMNS = 4096, 32768
"""Logits that TRL's losses hold at once (`TOKEN_CHUNK_SIZE`, `VOCAB_CHUNK_SIZE`, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""
DIVERGENCE_TOKENS = 128
"""Positions whose probabilities are in fp32 at once (`evaluation/divergence.py`)."""
ONEDNN_KERNELS = 1024 * 0.72e6
"""On a CPU, bf16 matrix products are compiled for each shape (0.72 MB, measured over 200 shapes with torch 2.13), and
the newest 1024 kept (`ONEDNN_PRIMITIVE_CACHE_CAPACITY`); lengths of batches vary enough to fill that."""


# --- a model's weights ---


def weights(config: "Gemma2Config", itemsize: int, quantization: str | None = None, nested: bool = False) -> float:
    """Of a whole model.

    Args:
        quantization: 4bit (nf4: half a byte, and an fp32 constant for each 64), 8bit (LLM.int8) or None; embedding and
            norms stay as they are.
        nested: whether the constants of nf4 are quantised, too, to a byte and an fp32 constant for each 256.
    """
    total = num_parameters(config)
    if quantization is None:
        return total * itemsize
    shapes = linear_shapes(config).values()
    linear = config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in shapes)
    constants = (1 + FP32 / 256) / 64 if nested else FP32 / 64
    each = 0.5 + constants if quantization == "4bit" else 1
    return (total - linear) * itemsize + linear * each


def adapter_parameters(config: "Gemma2Config", rank: int, target_modules: list[str]) -> int:
    shapes = linear_shapes(config)
    return config.num_hidden_layers * sum(rank * sum(shapes[name]) for name in target_modules)


def kv_cache(config: "Gemma2Config", rows: int, length: int, itemsize: int) -> float:
    """Keys and values; sliding layers keep no more than their window."""
    lengths = [
        min(length, config.sliding_window) if kind == "sliding_attention" else length for kind in config.layer_types
    ]
    return 2 * rows * sum(lengths) * config.num_key_value_heads * config.head_dim * itemsize


def longest_prompt(configs: "Iterable[Gemma2Config | None]", max_prompt_length: int | None, answer: int) -> int:
    """In tokens: the recipe's, or what the longest answer leaves of the positions of every model that is known."""
    positions = min(config.max_position_embeddings for config in configs if config)
    return max_prompt_length or positions - answer


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


def _scores(config: "Gemma2Config", rows: int, length: int) -> int:
    return rows * config.num_attention_heads * length**2


def masks(rows: int, length: int, compute: Compute) -> float:
    """Eager attention adds one for the sliding and one for the full layers."""
    return 2 * rows * length**2 * compute.itemsize if compute.attention == "eager" else 0


def saved_by_layer(
    config: "Gemma2Config", rows: int, length: int, compute: Compute, adapted: Adapted | None = None
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


def backward_working(config: "Gemma2Config", rows: int, length: int, compute: Compute) -> float:
    """What a layer's backward pass needs beside what was saved: gradients of GeGLU; then, when what GeGLU saved is
    gone, the softmax's two in fp32, of which bf16's rounding gives back a part."""
    mlp = 3 * rows * length * config.intermediate_size * compute.itemsize
    if compute.attention != "eager":
        return mlp
    return max(mlp, (8 if compute.itemsize == FP32 else 6) * _scores(config, rows, length) - mlp)


def saved(
    config: "Gemma2Config", rows: int, length: int, compute: Compute, checkpoints: bool, adapted: Adapted | None = None
) -> float:
    """What a forward pass keeps for the backward pass, up to the last hidden state, masks not counted: with gradient
    checkpointing the input of each layer only."""
    hidden = rows * length * config.hidden_size
    last_norm = FP32 * hidden * (1 if adapted else 2)
    layer = hidden * compute.itemsize if checkpoints else saved_by_layer(config, rows, length, compute, adapted)
    return config.num_hidden_layers * layer + last_norm


def backward(
    config: "Gemma2Config", rows: int, length: int, compute: Compute, checkpoints: bool, adapted: Adapted | None = None
) -> float:
    """What the backward pass needs beside that; with gradient checkpointing a layer is computed again first."""
    again = saved_by_layer(config, rows, length, compute, adapted) if checkpoints else 0
    return again + backward_working(config, rows, length, compute)


def forward(config: "Gemma2Config", rows: int, length: int, compute: Compute) -> float:
    """What a pass that keeps nothing needs: the widest place of a layer, and the hidden states around it."""
    tokens, itemsize = rows * length, compute.itemsize
    hidden, inner = tokens * config.hidden_size, tokens * config.intermediate_size
    heads = tokens * config.num_attention_heads * config.head_dim
    attention = 3 * heads * itemsize
    if compute.attention == "eager":  # the masked scores, their fp32 copy (of bf16), the softmax in fp32
        attention += _scores(config, rows, length) * (itemsize + FP32 + (FP32 if itemsize == BF16 else 0))
    around = hidden * (itemsize + 3 * FP32)  # the residual; a norm's input, square and product
    return around + max(attention, 3 * inner * itemsize) + masks(rows, length, compute)


def sampling(config: "Gemma2Config", rows: int, prompt: int, new: int, compute: Compute) -> Parts:
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


def _tile(config: "Gemma2Config", tokens: int, itemsize: int, on_cpu: bool) -> float:
    # On a CPU only what is written becomes resident; a GPU's allocator hands out all columns.
    columns = min(config.vocab_size, TILE_COLUMNS) if on_cpu else TILE_COLUMNS
    return min(tokens, TILE_TOKENS) * columns * itemsize


def fused_loss(config: "Gemma2Config", tokens: int, compute: Compute, trains_all: bool) -> float:
    """Log-probabilities of tokens, by tiles of logits; their gradient is summed up in fp32.

    Without Triton a tile is worked on in nine fp32 copies (`_backward_tile`).
    """
    copies = 9 * _tile(config, tokens, FP32, on_cpu=True) if compute.on_cpu else 0
    of_hidden = tokens * config.hidden_size * (FP32 + 2 * compute.itemsize)  # its gradient, itself and a copy
    return _tile(config, tokens, compute.itemsize, compute.on_cpu) + copies + of_hidden + _head(config, trains_all)


def divergence_loss(config: "Gemma2Config", tokens: int, compute: Compute, trains_all: bool) -> float:
    """Between student and teacher: two tiles, always in fp32; ten copies of one without Triton."""
    tile = _tile(config, tokens, FP32, compute.on_cpu)
    of_hidden = tokens * config.hidden_size * (FP32 + 2 * compute.itemsize)
    return (12 if compute.on_cpu else 2) * tile + of_hidden + _head(config, trains_all)


def _head(config: "Gemma2Config", trains_all: bool) -> float:
    """The head's gradient: summed up in fp32, beside the one of the embedding, which it is tied to."""
    return config.vocab_size * config.hidden_size * FP32 if trains_all else 0


def divergence(config: "Gemma2Config", rows: int, answer: int, itemsize: int) -> float:
    """Measuring how far two models are apart: both's logits of whole answers, one in two copies (soft-cap), and of
    some positions the probabilities in fp32, seven times."""
    logits = rows * (answer + 1) * config.vocab_size * itemsize
    return 3 * logits + 7 * min(DIVERGENCE_TOKENS, answer) * config.vocab_size * FP32
