"""The shapes of Gemma 2 models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Gemma2Config

SCORE_HEAD = "score.weight"
"""The parameter that makes a reward model of a language model."""
SHAPES = {
    f"google/gemma-2-{size}": {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
    }
    for size, hidden, intermediate, layers, heads, kv_heads, head_dim, scalar in [
        ("2b", 2304, 9216, 26, 8, 4, 256, 256),
        ("9b", 3584, 14336, 42, 16, 8, 256, 256),
        ("27b", 4608, 36864, 46, 32, 16, 128, 144),
    ]
}
"""By Hub name without `-it`, for what is planned before anything is downloaded (arXiv 2408.00118, table 1)."""


def known_config(name: str) -> "Gemma2Config | None":
    """The config of a model on the Hub, from its name alone."""
    from transformers import Gemma2Config

    shape = SHAPES.get(name.removesuffix("-it"))
    return None if shape is None else Gemma2Config(**shape)


def num_parameters(config: "Gemma2Config") -> int:
    """Parameters of the causal language model, the tied head counted once."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 4 * config.hidden_size
    return config.vocab_size * config.hidden_size + config.num_hidden_layers * layer + config.hidden_size


def linear_shapes(config: "Gemma2Config") -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's matrices, which are what is quantized and adapted."""
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
