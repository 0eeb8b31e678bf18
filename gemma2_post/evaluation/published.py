"""What Google reports for Gemma 2 on the benchmarks of the preset, to stand beside what is measured here.

Base models: the model card of `google/gemma-2-2b`; the technical report (arXiv 2408.00118, table 17) has 52.2 for the
2b model on MMLU. Instruction models: the same table, which has only MMLU of these. With as many examples as in
`benchmarks.PRESET`, and Google's own prompts, so that a model may differ by some points.
"""

from transformers import Gemma2Config

from gemma2_post.models.shapes import size_of

_TASKS = ("mmlu", "gsm8k", "arc_challenge", "hellaswag", "winogrande")
_BASE = {
    "google/gemma-2-2b": (0.513, 0.239, 0.554, 0.730, 0.709),
    "google/gemma-2-9b": (0.713, 0.686, 0.684, 0.819, 0.806),
    "google/gemma-2-27b": (0.752, 0.740, 0.714, 0.864, 0.837),
}
_INSTRUCTION = {
    "google/gemma-2-2b": {"mmlu": 0.561},
    "google/gemma-2-9b": {"mmlu": 0.723},
    "google/gemma-2-27b": {"mmlu": 0.762},
}


def published(config: Gemma2Config, is_base: bool) -> dict[str, float]:
    """The reported scores by task, as shares; none for a model of another size.

    Args:
        is_base: Whether those of the base model, or of the instruction model.
    """
    size = size_of(config)
    if size is None:
        return {}
    return dict(zip(_TASKS, _BASE[size], strict=True)) if is_base else _INSTRUCTION[size]
