"""A run resumes from its newest whole checkpoint, whatever a crash has left of newer ones."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_post import evaluate, sft
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.paths import with_members
from gemma2_post.training.checkpoints import is_whole, newest_checkpoint
from tests.conftest import losses, run_stage

Recipe = dict[str, object]
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_samples": 0}


@pytest.fixture
def killed(recipe: Recipe, tmp_path: Path) -> Path:
    """What a run leaves that was killed after its third step of four."""
    output = run_stage(tmp_path / "recipe.yaml", sft.COMMAND, recipe | SAVING)
    contract.begin(output, json.loads((output / "stage.json").read_text())["fingerprint"])
    for file in ("stage.json", "metrics.json", "model.safetensors", "log.jsonl"):
        (output / file).unlink()
    return output


def cut(share: float) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return change


DAMAGES = {
    f"{file} cut to {share:.0%}": (file, cut(share))
    for file in (
        "trainer_state.json",
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "config.json",
    )
    for share in (0.0, 0.4, 0.99)
} | {
    "trainer_state.json missing": ("trainer_state.json", Path.unlink),
    "an index of lies": ("model.safetensors", lambda file: file.write_bytes((2**62).to_bytes(8, "little") + b"{}")),
    **{
        f"a header that is {header.decode()[:20]}": (
            "model.safetensors",
            lambda file, header=header: file.write_bytes(len(header).to_bytes(8, "little") + header),
        )
        for header in (b"[]", b"{", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b"[" * 9999)
    },
    "bytes that are no text": ("trainer_state.json", lambda file: file.write_bytes(b"\xff\xfe\x00")),
}


def test_damaged_checkpoints_are_passed_over_and_named(killed: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("checkpoint-", "checkpoint-best", "checkpoint-4.old", "checkpoint-9"):
        (killed / name).mkdir() if name != "checkpoint-9" else (killed / name).write_text("no folder")
    assert newest_checkpoint(killed) == killed / "checkpoint-3" and not caplog.records
    assert all(is_whole(file) for file in killed.rglob("*") if file.is_file())
    shutil.copytree(killed / "checkpoint-3", killed.parent / "kept")
    for name, (file, damage) in DAMAGES.items():
        damage(killed / "checkpoint-3" / file)
        caplog.clear()
        assert newest_checkpoint(killed) == killed / "checkpoint-2", name
        assert "checkpoint-3 is damaged" in caplog.text and file in caplog.text, name
        shutil.rmtree(killed / "checkpoint-3")
        shutil.copytree(killed.parent / "kept", killed / "checkpoint-3")
    cut(0.5)(killed / "checkpoint-3" / "optimizer.pt")
    assert newest_checkpoint(killed, "anchor.json") is None  # none has it
    (killed / "checkpoint-2" / "anchor.json").write_text("{}")
    (killed / "checkpoint-2" / "anchor-00000.safetensors").write_bytes(b"")
    assert newest_checkpoint(killed, "anchor.json") is None and "training begins from the start" in caplog.text


@pytest.mark.parametrize("num_damaged", [1, 3])
def test_a_run_resumes_from_an_older_checkpoint_or_begins_again(
    num_damaged: int, killed: Path, recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_stage(tmp_path / "recipe.yaml", sft.COMMAND, recipe | SAVING | {"output_dir": str(tmp_path / "whole")})
    for step in range(4 - num_damaged, 4):
        cut(0.5)(killed / f"checkpoint-{step}" / "optimizer.pt")
    with caplog.at_level(logging.WARNING):
        assert run_stage(tmp_path / "recipe.yaml", sft.COMMAND, recipe | SAVING) == killed
    assert losses(killed) == losses(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert "checkpoint-3 is damaged (optimizer.pt is cut)" in caplog.text
    assert ("begins from the start" if num_damaged == 3 else "resuming from") in caplog.text


@pytest.mark.parametrize("content", [None, b"", b'{"held_out_nll": 1.', b"[]", b"\xff"])
def test_what_was_measured_before_must_be_there_to_resume(
    content: bytes | None, killed: Path, recipe: Recipe, tmp_path: Path
) -> None:
    (killed / "before.json").unlink()
    if content is not None:
        (killed / "before.json").write_bytes(content)
    with pytest.raises(UserError, match=r"before\.json(: the file is damaged| is missing).*; move .*/out away"):
        run_stage(tmp_path / "recipe.yaml", sft.COMMAND, recipe | SAVING)
    assert len(contract.checkpoints(killed)) == 3


@pytest.mark.parametrize("name", ["checkpoint-", "checkpoint-best", "checkpoint--1", "checkpoint-1.5"])
def test_a_folder_that_is_no_checkpoint_is_no_progress(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert contract.checkpoints(tmp_path) == [] and not contract.has_progress(tmp_path)


def test_a_folder_that_is_no_policy_is_passed_over(tmp_path: Path) -> None:
    for name in ("policy-10", "policy-9", "policy-best", "policy-", "policy-0.previous"):
        (tmp_path / name).mkdir()
    found = with_members(evaluate.Recipe, {"models": [str(tmp_path)]})
    assert found["models"] == [str(tmp_path / "policy-9"), str(tmp_path / "policy-10")]
