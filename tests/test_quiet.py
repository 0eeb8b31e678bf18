"""Only the named warnings of libraries are silenced; others are shown."""

import logging
import warnings

import pytest

from gemma2_post.stage.quiet import silence_libraries

REPORT = """Gemma2ForSequenceClassification LOAD REPORT from: a/b
Key          | Status  |
-------------+---------+-
score.weight | MISSING |

Notes:
- MISSING:	those params were newly initialized because missing from the checkpoint.
"""
MISMATCH = "Gradient accumulation steps mismatch: GradientAccumulationPlugin has {}, DeepSpeed config has 2."
CASES = {
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community", "Failed"),
    "accelerate.accelerator": (f"[RANK 0] {MISMATCH.format(1)}", f"[RANK 0] {MISMATCH.format(4)}"),
    "transformers.modeling_utils": (REPORT, REPORT.replace("\n\n", "\nmodel.norm.weight | MISSING |\n\n")),
}


@pytest.mark.parametrize(("name", "messages"), CASES.items(), ids=CASES.keys())
def test_a_logger_keeps_its_other_warnings(
    name: str, messages: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    silence_libraries()
    silence_libraries()
    silenced, shown = messages
    logging.getLogger(name).warning(silenced)
    logging.getLogger(name).warning(shown)
    assert [record.getMessage() for record in caplog.records] == [shown]


def test_other_names_that_go_are_still_told() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_libraries()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=2)
        warnings.warn(
            "You are using 'rollout_func', which is an experimental feature. This", UserWarning, stacklevel=2
        )
        warnings.warn("`another_key` is deprecated and will be removed in v6.", FutureWarning, stacklevel=2)
    assert [str(each.message) for each in shown] == ["`another_key` is deprecated and will be removed in v6."]
