"""Warnings of libraries that nobody who writes a recipe can act on; they are silenced one by one."""

import logging
import re
import warnings

_MESSAGES = {
    # A faster kernel for CPUs, which the package `kernels` would download; the results are the same without it.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward",
    # LLM.int8 multiplies in float16 whatever the model computes in, and says so at each matrix.
    "bitsandbytes.autograd._functions": r"MatMul8bitLt: inputs will be cast",
    # It found no GPU; a stage's first line says what it runs on.
    "DeepSpeed": r"Setting accelerator to CPU",
    # The Trainer always gives accelerate 1, because it accumulates itself; DeepSpeed's value is the recipe's.
    "accelerate.accelerator": r"(\[RANK \d+\] )?Gradient accumulation steps mismatch: \w+Plugin has 1\b",
    # A reward model begins with a new head; the report is shown if it names anything else.
    "transformers.modeling_utils": r".* LOAD REPORT.*\nKey .*\n-.*\nscore\.weight .* MISSING .*\n\n",
}
"""By logger, how the message begins."""
_RENAMED = [
    # TRL uses the old name of activation_checkpointing itself, and sets it by default.
    ".*gradient_checkpointing.* is deprecated",
    # DeepSpeed gathers and scatters under the old names.
    "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
]
"""How warnings about old names begin that a library uses itself."""
_EXPERIMENTAL = "You are using 'rollout_func', which is an experimental feature"
"""TRL's, about what J-BOND needs; the tested version is pinned."""


def silence_libraries() -> None:
    """Silences these warnings in this process; to be called before the libraries are imported."""
    for message in _RENAMED:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    warnings.filterwarnings("ignore", message=_EXPERIMENTAL, category=UserWarning)
    for name in _MESSAGES:
        logging.getLogger(name).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not re.match(_MESSAGES[record.name], record.getMessage())
