"""`gemma2-post status`: what a run does now, read from its folder by a process that did not start it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
import yaml
from rich.console import Console

from gemma2_post import cli
from gemma2_post.pipeline import processes
from gemma2_post.pipeline.steps import Step
from gemma2_post.report import status
from gemma2_post.report.terminal import View
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from tests.conftest import TEACHER


def shown(run_dir: Path) -> dict[str, list[str]]:
    """The cells of each step's row by label, and under "" the line about the run."""
    headline, table = status.page(run_dir, status.read(run_dir)).renderables
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return {label: cells for label, *cells in zip(*columns, strict=True)} | {"": [str(headline)]}


def begin(run_dir: Path, *stages: str) -> View:
    """A run of these stages that has begun, shown on no terminal."""
    view = View(Console(file=io.StringIO()))
    steps = [Step(name, name.partition(" ")[0], name.partition(" ")[0], run_dir / name, None, {}) for name in stages]
    view.begin(run_dir, [(step, run_dir / "logs" / f"{step.label}.log") for step in steps])
    return view


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_shows_how_far_it_is_from_its_folder_alone_and_when_it_was_killed(
    recipe: dict[str, object], distill_recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe | {"model_name_or_path": TEACHER, "max_steps": 5000}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(distill_recipe))
    stages = {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml", "model": "sft"}}
    run_dir = tmp_path / "run"
    content = {"run_dir": str(run_dir), "launch": "accelerate_configs/cpu.yaml", "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, "-m", "gemma2_post.cli", "run", str(tmp_path / "pipeline.yaml")]
    chain = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        how_far = run_dir / "sft" / contract.HOW_FAR
        while not (how_far.is_file() and json.loads(how_far.read_text())["tokens_per_second"]):
            assert chain.poll() is None
            time.sleep(0.2)
        seen = shutil.copytree(run_dir, tmp_path / "another disk" / "run")
        state, took, progress, left, speed, memory, measured = shown(seen)["sft"]
        step, total = map(int, progress.split("/"))
        assert state == "running" and took and total == 5000 and 0 < step < 5000
        assert left.count(":") and float(speed.replace(",", "")) > 0 and 0.1 < float(memory) < 10
        assert measured.startswith("loss ") and " at step " not in measured
        assert shown(seen)["distill"][0] == "waiting" and f"process {chain.pid} on " in shown(seen)[""][0]
    finally:
        chain.send_signal(signal.SIGKILL)
        chain.wait()
        processes.end_all(run_dir)
    monkeypatch.setattr(status, "SILENT", 0.5)
    time.sleep(1)
    assert shown(run_dir)["sft"][0] == "lost" and "no sign of life for " in shown(run_dir)[""][0]
    cli.status(run_dir, follow=True)  # ends by itself, for there is nothing to wait for


def test_the_last_measurement_of_a_policy_is_what_its_watch_says(run_dir: Path) -> None:
    view = begin(run_dir, "sft", "rlhf policy 0")
    view.set("sft", "done", "gold 1.1 -> 1.3", 83.0)
    view.set("rlhf policy 0", "running", "log: somewhere")
    folder = run_dir / "rlhf policy 0"
    assert shown(run_dir)["sft"] == ["done", "1:23", "", "", "", "", "gold 1.1 -> 1.3"]
    assert shown(run_dir)["rlhf policy 0"][2:] == ["starting", "", "", "", ""]
    contract.begin(folder, {"recipe": {"graders": ["x:gold"]}, "inputs": {}, "code": {}, "versions": {}})
    how_far = {"time": time.time(), "step": 47, "max_steps": 80, "seconds_left": 3725.0, "tokens_per_second": 1234.5}
    how_far |= {"memory_gb": 61.25, "logged": {"loss": 0.5, "reward": 0.25}}
    contract.write_json(folder / contract.HOW_FAR, how_far)
    cells = ["47/80", "1:02:05", "1,234", "61.2"]
    assert shown(run_dir)["rlhf policy 0"][2:] == [*cells, "reward 0.25"]
    watched = [{"step": step, "reward": 0.1 * step, "gold": 1.25, "kl_to_start": 2, "other": 1} for step in (0, 40)]
    contract.write_text(folder / "watch.jsonl", "".join(json.dumps(each) + "\n" for each in watched))
    assert shown(run_dir)["rlhf policy 0"][2:] == [*cells, "reward 4, gold 1.25, kl_to_start 2 at step 40"]


def test_what_an_earlier_attempt_has_written_does_not_count(run_dir: Path) -> None:
    (run_dir / "sft").mkdir()
    how_far = {"time": time.time() - 1, "step": 47, "max_steps": 80, "seconds_left": 5, "memory_gb": 1, "logged": {}}
    contract.write_json(run_dir / "sft" / contract.HOW_FAR, how_far)
    begin(run_dir, "sft").set("sft", "running")
    assert shown(run_dir)["sft"][2:] == ["starting", "", "", "", ""]


def test_a_stage_that_trains_nothing_shows_its_bar_and_when_it_was_last_heard_of(run_dir: Path) -> None:
    begin(run_dir, "evaluate").set("evaluate", "running")
    log = run_dir / "logs" / "evaluate.log"
    log.write_text("\n--- now\nanswers:  25%|██▌       | 1/4 [00:02<00:06,  2.1s/model]")
    assert shown(run_dir)["evaluate"][2:] == ["answers 1/4", "00:06", "", "", ""]
    content = json.loads((run_dir / "status.json").read_text())
    content["steps"]["evaluate"]["began"] -= 1000
    (run_dir / "status.json").write_text(json.dumps(content))
    os.utime(log, (time.time() - 730,) * 2)
    assert shown(run_dir)["evaluate"][-1] == "no output for 12 min"


def test_following_ends_with_the_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_APART", 0.01)
    view, output = begin(run_dir, "sft", "distill"), io.StringIO()
    view.set("sft", "running")
    Timer(0.5, view.end, ["interrupted"]).start()
    status.show(run_dir, Console(file=output, width=140), follows=True)
    assert "run: interrupted after 0:0" in output.getvalue()
    assert shown(run_dir)["sft"][0] == "interrupted" and shown(run_dir)["distill"][0] == "waiting"


def test_ctrl_c_ends_following(run_dir: Path) -> None:
    begin(run_dir, "sft")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        began = time.monotonic()
        status.show(run_dir, Console(file=io.StringIO()), follows=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began > 0.4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no status.json, which a run writes; name the run_dir of a run"),
        (b"", "status.json: the file is damaged (it is empty); remove it"),
        (b"[]", "status.json: the file is damaged (it holds list, not an object); remove it"),
        (b"{}", "status.json: the file is damaged (state is missing); remove it"),
        ({"steps": {"sft": {}}}, "status.json: the file is damaged (in its steps); remove it"),
        ({"steps": {"x": {"stage": "x", "folder": "x", "log": "x"}}}, "status.json: x is no stage; remove it"),
    ],
)
def test_a_folder_without_a_run_or_with_a_damaged_one_is_one_sentence(
    content: dict[str, object] | bytes | None, message: str, run_dir: Path
) -> None:
    begin(run_dir, "sft")
    file = run_dir / "status.json"
    if content is None:
        file.unlink()
    else:
        whole = json.loads(file.read_text())
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(whole | content).encode())
    with pytest.raises(UserError) as error:
        cli.status(run_dir)
    assert message in str(error.value) and str(run_dir) in str(error.value)


def test_status_needs_no_torch() -> None:
    program = "import sys; from gemma2_post.report import status; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
