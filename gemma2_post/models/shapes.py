"""The shapes of Gemma 2 models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Gemma2Config

SCORE_HEAD = "score.weight"
"""The parameter that a reward model has and a language model does not."""
_KEYS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "query_pre_attn_scalar"
).split()
SHAPES = {
    "google/gemma-2-2b": dict(zip(_KEYS, (2304, 9216, 26, 8, 4, 256, 256), strict=True)),
    "google/gemma-2-9b": dict(zip(_KEYS, (3584, 14336, 42, 16, 8, 256, 256), strict=True)),
    "google/gemma-2-27b": dict(zip(_KEYS, (4608, 36864, 46, 32, 16, 128, 144), strict=True)),
}
"""Config values by Hub name without `-it`, for planning before any download (arXiv 2408.00118, table 1)."""


def known_config(name: str) -> "Gemma2Config | None":
    """The config of a Gemma 2 model on the Hub, from its name alone; None for any other name."""
    from transformers import Gemma2Config

    shape = SHAPES.get(name.removesuffix("-it"))
    return None if shape is None else Gemma2Config(**shape)


def num_parameters(config: "Gemma2Config") -> int:
    """Number of parameters of the causal language model; the tied head and embedding count once."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 4 * config.hidden_size
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * layer + config.hidden_size


def linear_shapes(config: "Gemma2Config") -> dict[str, tuple[int, int]]:
    """Input and output widths of a layer's matrices, by name; these are what is quantized or adapted."""
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
