"""Two real ZeRO-3 processes on the CPU, through `accelerate launch`, give what one process gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.conftest import losses

Run = Callable[[dict[str, object]], Path]


def test_two_zero3_processes_equal_one(run_sft: Run, recipe: dict[str, object], tmp_path: Path) -> None:
    """Same rows, same global batch; losses and weights agree within what bf16 resolves (three digits)."""
    values = recipe | {"bf16": True, "max_steps": 4}
    alone = run_sft(values)
    file = tmp_path / "zero3.yaml"
    file.write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "zero3"), "per_device_train_batch_size": 2}))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "accelerate_configs/deepspeed_zero3_cpu.yaml", "--main_process_port", "0"]
    command += ["-m", "gemma2_post.sft", "--config", str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr[-3000:]

    stage = json.loads((tmp_path / "zero3" / "stage.json").read_text())
    assert stage["num_processes"] == 2
    assert losses(tmp_path / "zero3") == pytest.approx(losses(alone), rel=0.01)
    assert losses(alone)[-1] < 0.95 * losses(alone)[0]
    assert stage["metrics"]["held_out_nll_before"] == pytest.approx(
        json.loads((alone / "metrics.json").read_text())["held_out_nll_before"], rel=0.01
    )
    sharded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "zero3", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    single, start = AutoModelForCausalLM.from_pretrained(alone), AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"])
    moved, apart = (
        torch.stack([(a.float() - b.float()).norm() for a, b in zip(first.parameters(), second.parameters(), strict=True)]).norm()
        for first, second in ((single, start), (single, sharded))
    )
    assert apart < 0.3 * moved
