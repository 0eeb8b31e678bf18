"""A stage over two machines of a Slurm job, with stand-ins for srun and scontrol: both machines are this one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gemma2_post.pipeline import slurm
from gemma2_post.stage.errors import EXIT_STATUS_FILE, UserError
from tests.conftest import losses

SRUN = f"""#!{sys.executable}
import os, subprocess, sys, time
first = next(i for i, each in enumerate(sys.argv) if i and not each.startswith("--"))
options, command = dict(each[2:].split("=") for each in sys.argv[1:first]), sys.argv[first:]
assert options["nodes"] == options["ntasks"] and options["ntasks-per-node"] == "1" and options["export"] == "ALL"
step = {{"SLURM_STEP_ID": "7", "SLURM_STEP_NODELIST": "node[2-3]", "SLURM_LOCALID": "0"}}
numbers = [str(i) for i in range(int(options["nodes"]))]
tasks = [subprocess.Popen(command, env=os.environ | step | {{"SLURM_NODEID": i, "SLURM_PROCID": i}}) for i in numbers]
while any(task.poll() is None for task in tasks):
    if options["kill-on-bad-exit"] == "1" and any(task.returncode for task in tasks):
        for task in tasks:
            task.terminate()
    time.sleep(0.1)
sys.exit(max(128 - each if each < 0 else each for each in (task.returncode for task in tasks)))
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[2-3]" ] && printf "localhost\\nnode3\\n"
"""


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of three nodes; a step of two is put on the second and the third."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[1-3]"}
    for name, value in (job | {"OMP_NUM_THREADS": "1", "PATH": f"{programs}:{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)


def on_two_machines(values: dict[str, object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Starts the SFT stage with the shipped config for two machines, but with one process on the CPU of each."""
    config = yaml.safe_load(Path("accelerate_configs/deepspeed_zero3_multi_node.yaml").read_text())
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True}))
    (folder / "two.yaml").write_text(yaml.safe_dump(values))
    command = [*slurm.srun(config["num_machines"]), "--quiet", "--config_file", str(folder / "accelerate.yaml")]
    command += ["-m", "gemma2_post.sft", "--config", str(folder / "two.yaml")]
    environment = os.environ | {EXIT_STATUS_FILE: str(folder / "status")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.usefixtures("allocation")
def test_two_machines_equal_one(
    run_sft: Callable[[dict[str, object]], Path], recipe: dict[str, object], tmp_path: Path
) -> None:
    """Same rows, same global batch: losses agree to 1 %, which is what bf16 resolves."""
    values = recipe | {"bf16": True, "save_dtype": "bfloat16"}
    alone, output = run_sft(values), tmp_path / "two"
    finished = on_two_machines(values | {"per_device_train_batch_size": 4, "output_dir": str(output)}, tmp_path)
    assert finished.returncode == 0, finished.stderr[-6000:]
    assert json.loads((output / "stage.json").read_text())["num_processes"] == 2
    assert losses(output) == pytest.approx(losses(alone), rel=0.01)
    weights = load_file(output / "model.safetensors")
    assert weights.keys() == load_file(alone / "model.safetensors").keys()
    assert all(torch.isfinite(each).all() for each in weights.values())


@pytest.mark.slow
@pytest.mark.usefixtures("allocation")
def test_a_mistake_in_the_recipe_ends_both_machines_with_its_sentence_and_status(
    recipe: dict[str, object], tmp_path: Path
) -> None:
    finished = on_two_machines(recipe | {"learning_rat": 1e-3}, tmp_path)
    assert finished.returncode
    assert (tmp_path / "status").read_text() == str(UserError.status)
    assert "learning_rat" in next(line for line in finished.stderr.splitlines() if line.startswith("error: "))


@pytest.mark.usefixtures("allocation")
def test_each_step_of_each_job_has_a_port_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(sys, "argv", ["slurm", "-m", "gemma2_post.sft", "--config", "sft.yaml"])
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[2-3]")
    jobs = [("4711", "0"), ("4711", "1"), ("4712", "0"), ("4712", "1")]
    for node in ("0", "1"):
        for job, step in jobs:
            for name, value in (("SLURM_NODEID", node), ("SLURM_JOB_ID", job), ("SLURM_STEP_ID", step)):
                monkeypatch.setenv(name, value)
            slurm.main()
    ports = [command[command.index("--main_process_port") + 1] for command in started]
    assert ports[:4] == ports[4:] and len(set(ports)) == 4
    assert all(1024 < int(each) < 32768 for each in ports)
    assert [command[command.index("--machine_rank") + 1] for command in started] == ["0"] * 4 + ["1"] * 4
    assert all(command[command.index("--main_process_ip") + 1] == "localhost" for command in started)
    assert all(command[-4:] == sys.argv[1:] for command in started)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({}, "for 2 machines, and this is not a Slurm job; submit it with sbatch --nodes 2 "),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}, "for 2 machines, and the Slurm job has 1; submit it with"),
    ],
)
def test_without_enough_machines_it_says_how_to_get_them(
    job: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        slurm.srun(2)


@pytest.mark.parametrize(("requeue", "requeued"), [("", ""), ("1", "requeue 12\n")])
def test_a_submitted_run_that_is_out_of_time_is_asked_to_end_and_queued_again_if_wanted(
    requeue: str, requeued: str, tmp_path: Path
) -> None:
    end = "trap 'sleep 0.5; touch ended; exit 130' TERM"
    programs = {
        ".venv/bin/gemma2-post": f'#!/bin/sh\n{end}\nsleep 1\necho "$@" > arguments\nwhile sleep 0.1; do :; done\n',
        "scontrol": '#!/bin/sh\necho "$@" > requeued\n',
    }
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "REQUEUE": requeue}
    script = ["bash", str(Path("recipes/submit.sh").resolve()), "pipeline.yaml", "--seed", "3"]
    arguments = tmp_path / "arguments"
    with subprocess.Popen(script, cwd=tmp_path, env=environment) as job:
        while not arguments.is_file() or not arguments.read_text():
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        try:
            assert job.wait(timeout=60) == 130 and (tmp_path / "ended").is_file()
        finally:
            job.kill()
    assert arguments.read_text() == "run pipeline.yaml --seed 3\n"
    assert ((tmp_path / "requeued").read_text() if requeued else "") == requeued
