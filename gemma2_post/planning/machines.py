"""How fast machines compute: a table of GPUs, and this machine's processor, measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from gemma2_post.models import work
from gemma2_post.models.cost import BF16, Compute
from gemma2_post.models.work import Model
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.work import Lengths, Pass

if TYPE_CHECKING:
    from transformers import Gemma2Config


@dataclass(frozen=True)
class Speed:
    """What a machine reaches with a model."""

    flops: float
    """FLOP/s."""
    bandwidth: float
    """Bytes/s from memory."""
    layer: float
    """Seconds that a layer takes to start, whatever it computes."""

    def times(self, factor: float) -> "Speed":
        """A machine that is this many times as fast."""
        return Speed(self.flops * factor, self.bandwidth * factor, self.layer / factor)

    def seconds(self, each: Pass) -> float:
        """How long these passes take, as if computing, reading memory and starting layers did not overlap."""
        return each.count * (each.flops / self.flops + each.num_bytes / self.bandwidth + each.layers * self.layer)


# --- GPUs ---

GPUS = {
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100": (312e12, 2.04e12),
    "L4": (121e12, 0.30e12),
    "RTX 4090": (165e12, 1.01e12),
}
"""Peak of dense products in bf16 with sums in fp32, FLOP/s, and bandwidth of the memory, bytes/s, by NVIDIA's data
sheets: H100 and H200 SXM, A100 SXM 80 GB, L4, GeForce RTX 4090 (Ada architecture whitepaper, appendix A)."""
FLOPS_SHARES, BANDWIDTH_SHARES = (0.5, 0.2), (0.8, 0.4)
"""Shares of the peaks that are reached, at best and at worst. They are assumptions: nothing here was measured on a
GPU. Half of the peak is what libraries for training at scale report; eager attention and small batches reach less."""
LAYER_SECONDS = 0.5e-3, 1.5e-3
"""Time to start the kernels of a layer from Python, at best and at worst; assumed as well. It limits how fast
`generate` of transformers samples: 26 layers of 1 ms are 38 steps per second, whatever the batch."""
START_SECONDS = 30, 120
"""Time to start a stage: processes, imports, data, and weights that are read."""


def check_gpu(gpu: str) -> None:
    """Raises a `UserError` for a GPU that is not in the table."""
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: its speed is not known; name one of {', '.join(GPUS)}")


def speeds_of(gpu: str) -> tuple[Speed, Speed]:
    """A GPU at its best and at its worst."""
    flops, bandwidth = GPUS[gpu]
    best, worst = (
        Speed(flops * share, bandwidth * of_bandwidth, layer)
        for share, of_bandwidth, layer in zip(FLOPS_SHARES, BANDWIDTH_SHARES, LAYER_SECONDS, strict=True)
    )
    return best, worst


# --- this machine's processor ---

SPREAD = 1.3
"""By how much a processor may be faster or slower than when it was measured."""
CPU_START_SECONDS = 11, 20
"""Time to start a stage; in the tiny chain, 9 s for processes and imports, the rest for data and the output."""
ROWS, LENGTH, NEW = 32, 96, 16
"""Rows, their tokens, and the sampled tokens of the measurement."""
MOST_LAYERS, MOST_TOKENS = 4, 4096
"""Layers and vocabulary of the measured model, at most; a pass is in proportion to both."""


def speeds_of_processor(each: Pass) -> tuple[Speed, Speed]:
    """This machine's processor with the model of a pass, at its best and at its worst; measured in a second or two."""
    measured = _measured(_Widths.of(each.config), each.itemsize)
    best, worst = (measured.times(factor) for factor in (SPREAD, 1 / SPREAD))
    return best, worst


class _Widths(NamedTuple):
    """What a model's speed depends on."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_hidden_layers: int
    vocab_size: int

    @classmethod
    def of(cls, config: "Gemma2Config") -> "_Widths":
        found = cls(*(getattr(config, name) for name in cls._fields))
        return found._replace(
            num_hidden_layers=min(found.num_hidden_layers, MOST_LAYERS), vocab_size=min(found.vocab_size, MOST_TOKENS)
        )


@cache
def _measured(widths: _Widths, itemsize: int) -> Speed:
    """The speed with a random model of these widths: of a product of matrices, of a step of training beside its
    products, and of sampling a token."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**widths._asdict(), query_pre_attn_scalar=widths.head_dim)
    dtype = torch.bfloat16 if itemsize == BF16 else torch.float32
    with torch.random.fork_rng():
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=dtype)
        rows = torch.randint(4, config.vocab_size, (ROWS, LENGTH))
        hidden = torch.randn(ROWS * LENGTH, config.hidden_size, dtype=dtype)

    def multiply() -> None:
        torch.nn.functional.linear(hidden, model.model.layers[0].mlp.up_proj.weight)

    def train() -> None:
        model.model(input_ids=rows, use_cache=False).last_hidden_state.backward(hidden.view(ROWS, LENGTH, -1))

    def sample() -> None:
        prompt = rows[:1, :1]
        model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    flops = 2 * hidden.numel() * config.intermediate_size / _seconds(multiply)
    layer = _seconds(sample) / NEW / config.num_hidden_layers
    described = Model(config, Compute(itemsize, on_cpu=True))
    step = work.training(described, ROWS, Lengths((LENGTH,)), work.Loss(), checkpoints=False)
    seconds = _seconds(train)
    others = seconds - step.flops / flops - step.layers * layer
    return Speed(flops, step.num_bytes / max(others, seconds / 4), layer)


def _seconds(call: Callable[[], None]) -> float:
    """The median of three calls, after one to warm up."""
    call()
    found = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return median(found)
