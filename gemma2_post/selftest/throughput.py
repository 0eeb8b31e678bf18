"""How fast a stack of real-shaped layers is on each device: forward, backward and sampling."""

from gemma2_post.models.cost import BF16, FP32
from gemma2_post.planning import machines
from gemma2_post.selftest.result import Result

LAYERS = 2
"""One with a sliding window, one without."""
TOKENS = 4096
"""The vocabulary is cut to these: 256,000 pieces would be another half of the model."""
ON_GPU, ON_CPU = (4, 1024), (1, 96)
"""Rows and their tokens; a processor takes a second for what a GPU computes in a millisecond."""


def check(device: str) -> Result:
    """The speed of two layers of Gemma 2 2B's shape; bf16 on a GPU, fp32 on a processor."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        hidden_size=2304,
        intermediate_size=9216,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        num_hidden_layers=LAYERS,
        vocab_size=TOKENS,
    )
    on_cpu = device == "cpu"
    (rows, length), itemsize = (ON_CPU, FP32) if on_cpu else (ON_GPU, BF16)
    timed = machines.time_passes(config, itemsize, device, rows, length)
    step = machines.step_of(config, itemsize, on_cpu, rows, length)
    numbers = vars(timed.speed(config, step)) | {
        "step_flops": step.flops / timed.train,
        "forward_tokens_per_second": rows * length / timed.forward,
        "training_tokens_per_second": rows * length / timed.train,
        "sampled_tokens_per_second": 1 / timed.sample,
    }
    found = (
        f"forward {rows * length / timed.forward:,.0f} tokens/s, with backward {rows * length / timed.train:,.0f}, "
        f"sampling {1 / timed.sample:,.0f}; products {timed.flops / 1e12:.3g} TFLOP/s"
    )
    return Result(f"{LAYERS} layers of 2b", "pass", found, numbers=numbers)
