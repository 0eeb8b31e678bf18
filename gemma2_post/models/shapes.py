"""The shapes of Gemma 2 models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemma2_post.stage.errors import UserError

if TYPE_CHECKING:
    from transformers import Gemma2Config

LM_HEAD = "lm_head.weight"
"""The head of a language model, which is tied to the embeddings and usually not saved."""
SCORE_HEAD = "score.weight"
"""The parameter that a reward model has and a language model does not."""
_DEFAULTS = {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
"""Values that a Gemma 2 config may leave out, as in transformers."""
_MOST_LAYERS = 1000
_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")
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


def size_of(config: "Gemma2Config") -> str | None:
    """The Hub name without `-it` of the Gemma 2 model with these shapes; None for other shapes."""
    return next(
        (name for name, shape in SHAPES.items() if all(getattr(config, key) == shape[key] for key in shape)), None
    )


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


def tensor_shapes(config: Mapping[str, Any], path: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by name, without heads; each matrix is (outputs, inputs).

    Args:
        config: Values of its config; the rest are Gemma 2's defaults.
        path: The model, for errors.

    Raises:
        UserError: A value cannot be.
    """
    sizes = {}
    for key, default in _DEFAULTS.items():
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: its config.json says {key} {value!r}; it must be a whole number, 1 or more")
        if key == "num_hidden_layers" and value > _MOST_LAYERS:
            raise UserError(f"{path}: its config.json says {key} {value}; no Gemma 2 has more than {_MOST_LAYERS}")
        sizes[key] = value
    hidden, inner, head = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    of_layer: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}_proj.weight": (keys, hidden) for name in "kv"},
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        **{f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj.weight": (hidden, inner),
        **{f"{name}_layernorm.weight": (hidden,) for name in _NORMS},
    }
    layers = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(sizes["num_hidden_layers"])
        for name, shape in of_layer.items()
    }
    return {"model.embed_tokens.weight": (sizes["vocab_size"], hidden), **layers, "model.norm.weight": (hidden,)}
