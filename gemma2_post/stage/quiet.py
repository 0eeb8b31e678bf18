"""Warnings of libraries that nobody who writes a recipe can act on; they are silenced one by one."""

import logging
import warnings

_SILENCED = {
    # A faster kernel for CPUs, which the package `kernels` would download; the results are the same without it.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # DeepSpeed found no GPU; a stage's first line says what it runs on.
    "DeepSpeed": "Setting accelerator to CPU",
}
"""How the messages of these loggers begin."""


def silence_libraries() -> None:
    """Silences these warnings in this process; to be called before the libraries are imported."""
    # TRL uses the old name of activation_checkpointing itself, and sets it by default.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    for name in _SILENCED:
        logging.getLogger(name).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_SILENCED[record.name])
