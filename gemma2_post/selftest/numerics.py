"""Whether a device computes Gemma 2 correctly, held against the same computation in fp64 on the processor."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma2_post.selftest.result import Result, judged

HEAD_SIZES = (256, 128)
"""Of Gemma 2 2b and 9b, and of 27b."""
WINDOW, LENGTH, ROWS = 32, 160, 2
"""The window of every second layer is much shorter than the rows, so it bites."""
SCALE = 4
"""Queries, keys and embeddings are made this much larger: scores come near 50, logits near 30, and both caps bite."""
FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 0.03
"""Relative error of logits: on a CPU eager attention has 4e-7 in fp32 and 0.012 in bf16. Ignoring the attention
soft-cap makes 0.06, the window 0.14, and the logit soft-cap 0.9."""
FP32_GRADIENTS, BF16_GRADIENTS = 1e-3, 0.2
"""Relative error of the gradients of all query, key and value matrices; on a CPU 8e-6 and 0.11."""
KNOBS: dict[str, dict[str, object]] = {
    "attention soft-cap": {"attn_logit_softcapping": None},
    "logit soft-cap": {"final_logit_softcapping": None},
    "sliding window": {"sliding_window": 8192},
}
"""What each of the facts about Gemma 2 looks like if it is ignored."""


def attention(device: str, head_size: int, implementation: str, dtype: torch.dtype, **ignored: object) -> Result:
    """Logits and gradients of two layers with this attention against fp64.

    Args:
        ignored: Keys of the tested model's config that differ from the reference's.
    """
    type_name = str(dtype).removeprefix("torch.")
    name = f"{implementation} {type_name} head {head_size}"
    forward_limit, backward_limit = (
        (FP32_TOLERANCE, FP32_GRADIENTS) if dtype == torch.float32 else (BF16_TOLERANCE, BF16_GRADIENTS)
    )
    has_backward = not (device == "cpu" and implementation == "flex_attention")
    logits, gradients = _computed(head_size, "eager", torch.float64, "cpu", has_backward)
    try:
        found_logits, found_gradients = _computed(head_size, implementation, dtype, device, has_backward, **ignored)
    except Exception as raised:  # kernels raise what they like where a device is not what they were written for
        reason = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
        return judged(name, False, reason, _attention_remedy(implementation, ""))
    forward = error(found_logits, logits)
    text = f"error {forward:.1e} of {forward_limit:g} in logits"
    numbers = {"logits": forward}
    passes = forward <= forward_limit
    if gradients is not None and found_gradients is not None:
        backward = numbers["gradients"] = error(found_gradients, gradients)
        text += f", {backward:.1e} of {backward_limit:g} in gradients"
        passes = passes and backward <= backward_limit
    else:
        text += "; its backward pass does not exist on a CPU"
    seems = "" if passes else _seems_to_ignore(head_size, found_logits)
    return judged(name, passes, text, _attention_remedy(implementation, seems), **numbers)


def _seems_to_ignore(head_size: int, found: torch.Tensor) -> str:
    """Which of the facts about Gemma 2 these logits come without, if one."""
    for knob, keys in KNOBS.items():
        if error(found, _computed(head_size, "eager", torch.float64, "cpu", False, **keys)[0]) < BF16_TOLERANCE:
            return f"it seems to ignore the {knob}: "
    return ""


def _attention_remedy(implementation: str, seems: str) -> str:
    if implementation == "eager":
        return f"{seems}install the versions of constraints.txt; if they are, report this with the JSON file"
    return f"{seems}write attn_implementation: eager, or install the versions of constraints.txt"


def knobs(head_size: int) -> Result:
    """Whether the reference itself depends on both soft-caps and on the window by more than any tolerance."""
    logits, _ = _computed(head_size, "eager", torch.float64, "cpu", False)
    changes = {
        knob: error(_computed(head_size, "eager", torch.float64, "cpu", False, **keys)[0], logits)
        for knob, keys in KNOBS.items()
    }
    text = ", ".join(f"{knob} {change:.2g}" for knob, change in changes.items())
    passes = min(changes.values()) > 1.5 * BF16_TOLERANCE
    remedy = "transformers does not apply it: install the versions of constraints.txt"
    return judged(f"soft-caps and window head {head_size}", passes, f"change logits by: {text}", remedy)


def _computed(
    head_size: int, implementation: str, dtype: torch.dtype, device: str, has_backward: bool, **changes: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits and gradients, in fp64 on the CPU, of a random model, the same for every call with this head size."""
    values: dict[str, object] = {
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head_size,
        "query_pre_attn_scalar": head_size,
        "sliding_window": WINDOW,
        "initializer_range": 0.1,
    }
    config = Gemma2Config(**values | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM._from_config(config, attn_implementation=implementation, dtype=torch.float32)
        rows = torch.randint(4, config.vocab_size, (ROWS, LENGTH))
        weights = torch.randn(ROWS, LENGTH, config.vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "embed_tokens")):
                parameter.mul_(SCALE)
    model = model.to(device=device, dtype=dtype)
    with torch.set_grad_enabled(has_backward):
        logits = model(input_ids=rows.to(device), use_cache=False).logits
    found = logits.detach().double().cpu()
    if not has_backward:
        return found, None
    (logits.double() * weights.to(device).double()).sum().backward()
    gradients = [
        parameter.grad.double().cpu().flatten()
        for name, parameter in model.named_parameters()
        if any(part in name for part in ("q_proj", "k_proj", "v_proj"))
    ]
    return found, torch.cat(gradients)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error: the norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


# --- products, quantized weights, the anchor ---


def product(device: str) -> Result:
    """Products of matrices of Gemma 2 2B's width: bf16, and fp32 that must not be rounded to TF32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, two = torch.randn(256, 2304), torch.randn(2304, 256)
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = one.to(dtype), two.to(dtype)
        found = (left.to(device) @ right.to(device)).double().cpu()
        errors[dtype] = error(found, left.double() @ right.double())
    bf16, fp32 = errors[torch.bfloat16], errors[torch.float32]
    text = f"error {bf16:.1e} of 0.004 in bf16, {fp32:.1e} of 1e-05 in fp32"
    remedy = (
        "the device rounds more than its type asks for: unset NVIDIA_TF32_OVERRIDE, allow no TF32, no sums in bf16; "
        "if that is so already, the device or its driver is faulty"
    )
    return judged("matrix product", bf16 <= 0.004 and fp32 <= 1e-5, text, remedy, bf16=bf16, fp32=fp32)


def quantized(device: str, bits: int) -> Result:
    """A weight that is quantized and read again, and the product of the quantized layer."""
    import bitsandbytes as bnb
    from bitsandbytes import functional

    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight, inputs = 0.02 * torch.randn(512, 512), torch.randn(16, 512)
    on_device, inputs = weight.to(device), inputs.to(device, torch.bfloat16)
    if bits == 4:
        packed, state = functional.quantize_4bit(on_device, quant_type="nf4")
        read = functional.dequantize_4bit(packed, state)
        layer: Any = bnb.nn.Linear4bit(512, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        packed, state, _ = functional.int8_vectorwise_quant(on_device.half())
        read = functional.int8_vectorwise_dequant(packed, state)
        layer = bnb.nn.Linear8bitLt(512, 512, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.half(), has_fp16_weights=False, requires_grad=False)
    least, most, product_limit = (0.08, 0.105, 0.01) if bits == 4 else (0.004, 0.012, 0.03)
    round_trip = error(read.double(), on_device.double())
    with torch.no_grad():
        found = layer.to(device)(inputs)  # quantizes on the way
    multiplied = error(found.double(), inputs.double() @ read.double().T)
    text = f"round trip {round_trip:.2g} of {least:g} to {most:g}, product {multiplied:.1e} of {product_limit:g}"
    remedy = f"bitsandbytes does not work here: train without load_in_{bits}bit, or install its tested version"
    return judged(
        f"{bits}-bit weights",
        least <= round_trip <= most and multiplied <= product_limit,
        text,
        remedy,
        round_trip=round_trip,
        product=multiplied,
    )


def anchor(device: str) -> Result:
    """The moving average of a policy that stands still, after 50 updates, against its closed form.

    In bf16 the average would not move at all: each update is smaller than half a step of bf16.
    """
    from gemma2_post.weights.anchor import EmaAnchor

    share, steps, moved = 0.01, 50, 1e-3
    policy, reference = (torch.nn.Linear(64, 64, bias=False, device=device) for _ in range(2))
    reference.bfloat16()
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer: Any = SimpleNamespace(model=policy, ref_model=reference, accelerator=accelerator)
    average = EmaAnchor(trainer, share)
    state: Any = SimpleNamespace(global_step=0)
    with torch.no_grad():
        policy.weight.fill_(1.0)
        average.on_train_begin(None, state, None)
        policy.weight.fill_(1.0 + moved)
        for _ in range(steps):
            average.on_step_end(None, state, None)
    expected = moved * (1 - (1 - share) ** steps)
    difference = abs((average.shadows["weight"].double() - 1).mean().item() / expected - 1)
    text = f"error {difference:.1e} of 0.01 after {steps} updates of {share}"
    remedy = "the anchor of rlhf would stand still: install the versions of constraints.txt, and report this"
    return judged("anchor in fp32", difference <= 0.01, text, remedy, error=difference)


def check(device: str) -> Iterator[partial[Result]]:
    """The checks of a device, to be called one after another."""
    from transformers.utils import is_flash_attn_2_available

    on_gpu = device != "cpu"
    has_flash = on_gpu and is_flash_attn_2_available()
    # In fp32, flex attention's kernels for heads of 256 do not fit on a GPU's shared memory.
    tests = [("eager", torch.float32), ("eager", torch.bfloat16)]
    tests.append(("flex_attention", torch.bfloat16 if on_gpu else torch.float32))
    tests += [("flash_attention_2", torch.bfloat16)] if has_flash else []
    for head_size in HEAD_SIZES:
        yield partial(knobs, head_size)
        for implementation, dtype in tests:
            yield partial(attention, device, head_size, implementation, dtype)
    if not has_flash:
        yield partial(Result, "flash_attention_2", "skipped", "not installed" if on_gpu else "needs a GPU")
    yield partial(product, device)
    yield partial(quantized, device, 4)
    yield partial(quantized, device, 8)
    yield partial(anchor, device)
