"""A chain that is killed at random moments ends with what an undisturbed one makes: `benchmarks/kills.py`, shorter."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.kills import disturb, made_by, run_command

pytestmark = pytest.mark.slow

Recipe = dict[str, object]


def test_a_chain_that_is_killed_three_times_makes_the_same(
    recipe: Recipe, distill_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages with a checkpoint after each step."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe | saving))
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(distill_recipe | saving))
    stages = {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml"}}
    content = {"run_dir": "unused", "launch": "accelerate_configs/cpu.yaml", "stages": stages}
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump(content, sort_keys=False))
    quiet, disturbed = tmp_path / "quiet", tmp_path / "kills"
    subprocess.run(run_command(pipeline, quiet, []), check=True, capture_output=True)
    disturb(run_command(pipeline, disturbed, []), disturbed, num_kills=3, longest=30.0, seed=1)
    assert made_by(disturbed) == made_by(quiet) and made_by(quiet).keys() == {"sft", "distill", "models"}
