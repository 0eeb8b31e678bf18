"""The benchmark for one GPU, with small models on a CPU: it must not fail where minutes are dear."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_stage_and_a_bare_trainer_learn_the_same_and_a_second_run_goes_on(tmp_path: Path) -> None:
    """All parts but those of the seed's command are there already, as after an earlier run."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("2b", "9b", "2b-eager", "2b-flex_attention", "2b-flash_attention_2"):
        (folder / f"{name}.json").write_text("{}")
    (folder / "selftest.json").write_text('{"results": [{"state": "pass"}, {"state": "pass"}]}')
    command = [sys.executable, "benchmarks/gpu.py", str(folder), "--small", "--work", str(tmp_path / "work")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    stage, bare = (json.loads((folder / f"{name}.json").read_text())["sft"] for name in ("27b", "27b-bare"))
    assert len(bare["losses"]) == 6 and bare["losses"] == pytest.approx(stage["losses"], rel=2e-3)
    assert stage["planned_gb"]["total"] > 0 and set(stage["host_peak_gb"]) >= {"training", "saving"}
    summary = (folder / "summary.md").read_text()
    assert "Selftest: 2 pass." in summary and f"| 27b | sft | {stage['tokens_per_second']} |" in summary
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stdout == "" and times == {file: file.stat().st_mtime_ns for file in folder.glob("*.json")}
