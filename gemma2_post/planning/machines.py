"""How fast machines compute: a table of GPUs, and this machine's processor, measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from gemma2_post.models import work
from gemma2_post.models.cost import BF16, Compute
from gemma2_post.models.work import Model
from gemma2_post.stage import contract
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
SPREAD = 1.3
"""By how much a device may be faster or slower than when it was measured."""
START_SECONDS = 30, 120
"""Time to start a stage: processes, imports, data, and weights that are read."""


@cache
def speed_of_selftest(file: str) -> Speed:
    """The slowest GPU in the JSON file of a selftest.

    Raises:
        UserError: The file has no speed of a GPU.
    """
    results = contract.read_json(Path(file), {"results": list}, "run gemma2-post selftest again")["results"]
    names = [each.name for each in fields(Speed)]
    parts = [each.get("numbers", {}) for each in results if str(each.get("part")).startswith("speed of cuda")]
    found = [Speed(**{name: each[name] for name in names}) for each in parts if all(name in each for name in names)]
    if not found:
        raise UserError(f"--gpu {file}: it has no speed of a GPU; run gemma2-post selftest on a machine with one")
    return min(found, key=lambda speed: speed.flops)


def check_gpu(gpu: str) -> None:
    """Raises a `UserError` for a GPU that is neither in the table nor in the file of a selftest."""
    if Path(gpu).is_file():
        speed_of_selftest(gpu)
    elif gpu not in GPUS:
        raise UserError(
            f"--gpu {gpu}: its speed is not known; name one of {', '.join(GPUS)}, or the selftest.json of a machine"
        )


def speeds_of(gpu: str) -> tuple[Speed, Speed]:
    """A GPU at its best and at its worst; by name, or as a selftest has measured it."""
    if gpu not in GPUS:
        return speed_of_selftest(gpu).times(SPREAD), speed_of_selftest(gpu).times(1 / SPREAD)
    flops, bandwidth = GPUS[gpu]
    best, worst = (
        Speed(flops * share, bandwidth * of_bandwidth, layer)
        for share, of_bandwidth, layer in zip(FLOPS_SHARES, BANDWIDTH_SHARES, LAYER_SECONDS, strict=True)
    )
    return best, worst


# --- this machine's processor ---

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

    def config(self) -> "Gemma2Config":
        from transformers import Gemma2Config

        return Gemma2Config(**self._asdict(), query_pre_attn_scalar=self.head_dim)


@cache
def _measured(widths: _Widths, itemsize: int) -> Speed:
    """The speed with a random model of these widths: of a product of matrices, of a step of training beside its
    products, and of sampling a token."""
    config = widths.config()
    timed = time_passes(config, itemsize, "cpu", ROWS, LENGTH)
    return timed.speed(config, step_of(config, itemsize, on_cpu=True, rows=ROWS, length=LENGTH))


# --- measuring ---


@dataclass(frozen=True)
class Timed:
    """What a random model reaches on a device."""

    flops: float
    """FLOP/s of its largest product of matrices."""
    forward: float
    """Seconds of a forward pass up to the last hidden state."""
    train: float
    """Seconds of a forward and a backward pass."""
    sample: float
    """Seconds for each token that is sampled, of one row."""

    def speed(self, config: "Gemma2Config", step: Pass) -> Speed:
        """What explains these times: what a step takes beside its products and its layers' starts is memory.

        Args:
            step: What a step of training computes.
        """
        layer = self.sample / config.num_hidden_layers
        others = self.train - step.flops / self.flops - step.layers * layer
        return Speed(self.flops, step.num_bytes / max(others, self.train / 4), layer)


def time_passes(config: "Gemma2Config", itemsize: int, device: str, rows: int, length: int) -> Timed:
    """Measures a random model of this shape.

    Args:
        itemsize: Bytes per value: 2 for bf16, 4 for fp32.
        rows, length: Rows of a pass and the tokens of each.
    """
    import torch
    from transformers import Gemma2ForCausalLM

    dtype = torch.bfloat16 if itemsize == BF16 else torch.float32
    with torch.random.fork_rng():
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=dtype).to(device)
        tokens = torch.randint(4, config.vocab_size, (rows, length), device=device)
        hidden = torch.randn(rows * length, config.hidden_size, dtype=dtype, device=device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def multiply() -> None:
        torch.nn.functional.linear(hidden, model.model.layers[0].mlp.up_proj.weight)

    @torch.no_grad()
    def forward() -> None:
        model.model(input_ids=tokens, use_cache=False)

    def train() -> None:
        model.model(input_ids=tokens, use_cache=False).last_hidden_state.backward(hidden.view(rows, length, -1))

    def sample() -> None:
        prompt = tokens[:1, :1]
        model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    flops = 2 * hidden.numel() * config.intermediate_size / _seconds(multiply, wait)
    return Timed(flops, _seconds(forward, wait), _seconds(train, wait), _seconds(sample, wait) / NEW)


def step_of(config: "Gemma2Config", itemsize: int, on_cpu: bool, rows: int, length: int) -> Pass:
    """What a forward and a backward pass of `time_passes` computes."""
    described = Model(config, Compute(itemsize, on_cpu=on_cpu))
    return work.training(described, rows, Lengths((length,)), work.Loss(), checkpoints=False)


def _seconds(call: Callable[[], None], wait: Callable[[], None] = lambda: None) -> float:
    """The median of three calls, after one to warm up.

    Args:
        wait: Waits until a device has computed what was asked of it.
    """
    call()
    wait()
    found = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        wait()
        found.append(time.perf_counter() - began)
    return median(found)
