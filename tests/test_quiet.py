"""Only the named warnings of libraries are silenced; others are shown."""

import logging
import warnings

import pytest

from gemma2_post.stage.quiet import silence_libraries


def test_a_logger_keeps_its_other_warnings(caplog: pytest.LogCaptureFixture) -> None:
    silence_libraries()
    silence_libraries()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_other_names_that_go_are_still_told() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_libraries()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=2)
        warnings.warn("`another_key` is deprecated and will be removed in v6.", FutureWarning, stacklevel=2)
    assert [str(each.message) for each in shown] == ["`another_key` is deprecated and will be removed in v6."]
