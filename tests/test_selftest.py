"""The selftest passes on this machine, and fails with a remedy where something is wrong."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gemma2_post.selftest import environment, numerics, stages
from gemma2_post.selftest.run import tried
from gemma2_post.stage import launcher
from gemma2_post.stage.errors import UserError

CPU, ZERO_3 = Path("accelerate_configs/cpu.yaml"), Path("accelerate_configs/deepspeed_zero3_cpu.yaml")
REFERENCES = json.loads(stages.REFERENCE.read_text())


# --- environment ---


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    lines = Path("constraints.txt").read_text().split()
    constraints = dict(line.split("==") for line in lines)
    assert {name: constraints[name] for name in environment.TESTED} == environment.TESTED


def test_versions() -> None:
    found = environment.installed()
    assert environment.versions(found, environment.required()).state == "pass"
    missing = environment.versions({name: found[name] for name in found if name != "trl"}, [])
    assert missing.state == "fail" and missing.found.startswith("trl is missing")
    assert "constraints.txt" in missing.remedy
    other = environment.versions(found | {"trl": "1.16.9"}, [])
    assert other.state == "pass" and "trl 1.16.9 (tested: 1.16.0)" in other.found
    refused = environment.versions(found, ["trl>=99"])
    assert refused.state == "fail" and "trl>=99" in refused.found


@pytest.mark.parametrize(
    ("result", "remedy"),
    [
        (environment.open_files(256), "ulimit -n"),
        (environment.host_memory(1e9), "free some"),
        (environment.shared_memory(Path("nowhere"), 2), "--shm-size"),
    ],
    ids=["files", "memory", "shared memory"],
)
def test_too_little_of_anything_fails(result: environment.Result, remedy: str) -> None:
    assert result.state == "fail" and remedy in result.remedy


def test_this_machine_has_enough(tmp_path: Path) -> None:
    found = [environment.open_files(4096), environment.host_memory(8e9), environment.disk(tmp_path)]
    found.append(environment.shared_memory(Path("nowhere"), 1))
    assert [each.state for each in found] == ["pass"] * 4 and not any(each.remedy for each in found)
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_compilation_is_named(tmp_path: Path) -> None:
    assert environment.compiled_extensions(tmp_path / "nowhere").state == "pass"
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert environment.compiled_extensions(tmp_path).state == "pass", "it may compile now"
    os.utime(lock, (0, 0))
    found = environment.compiled_extensions(tmp_path)
    assert found.state == "fail" and found.remedy.endswith(f"rm {lock}")


def test_the_hub_is_no_failure_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = environment.hub()
    assert found.state == "skipped" and "HF_HUB_OFFLINE" in found.found


def test_a_check_that_raises_fails() -> None:
    found = tried(partial(numerics.product, "no device"))
    assert found.state == "fail" and found.name == "product no device" and found.found and found.remedy


# --- numerics ---


@pytest.mark.parametrize("head_size", numerics.HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_attention_passes(head_size: int, dtype: torch.dtype) -> None:
    assert numerics.knobs(head_size).state == "pass"
    found = numerics.attention("cpu", head_size, "eager", dtype)
    assert found.state == "pass" and found.numbers["logits"] > 0 and found.numbers["gradients"] > 0


@pytest.mark.parametrize("head_size", numerics.HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", numerics.KNOBS)
def test_an_attention_that_ignores_a_fact_about_gemma_2_fails_and_says_which(
    ignored: str, dtype: torch.dtype, head_size: int
) -> None:
    found = numerics.attention("cpu", head_size, "eager", dtype, **numerics.KNOBS[ignored])
    assert found.state == "fail" and f"it seems to ignore the {ignored}" in found.remedy


def test_an_attention_that_does_not_work_here_fails() -> None:
    found = numerics.attention("cpu", 128, "no_attention", torch.float32)
    assert found.state == "fail" and found.remedy.startswith("write attn_implementation: eager")


def test_products_quantized_weights_and_the_anchor_pass() -> None:
    found = [numerics.product("cpu"), numerics.quantized("cpu", 4), numerics.quantized("cpu", 8)]
    found.append(numerics.anchor("cpu"))
    assert [each.state for each in found] == ["pass"] * 4, found


def test_an_anchor_in_bf16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2_post.weights.anchor._local_fp32", lambda parameter: parameter.data.bfloat16())
    found = numerics.anchor("cpu")
    assert found.state == "fail" and "stand still" in found.remedy


# --- stages ---


def test_there_is_a_reference_for_everything_that_is_compared() -> None:
    assert {name.removesuffix("-4bit") for name in REFERENCES} == set(stages.STAGES)
    for name, reference in REFERENCES.items():
        assert reference.keys() == stages.TOLERANCES[name.removesuffix("-4bit")].keys()


@pytest.mark.parametrize("name", REFERENCES)
def test_a_value_beyond_its_tolerance_fails(name: str) -> None:
    stage, reference = name.removesuffix("-4bit"), REFERENCES[name]
    assert stages.compared(stage, reference, reference, 1.0).state == "pass"
    for key, (relative, absolute) in stages.TOLERANCES[stage].items():
        for sign in (-1, 1):
            last = reference[key][-1]
            beyond = last + sign * (1.1 * max(relative * abs(last), absolute) + 1)
            found = stages.compared(stage, reference | {key: [*reference[key][:-1], beyond]}, reference, 1.0)
            assert found.state == "fail" and found.found.startswith(key) and found.remedy
    assert stages.compared(stage, reference | {key: []}, reference, 1.0).state == "fail"


def process(**changes: object) -> dict[str, Any]:
    return {"device": "cuda:0", "name": "GPU", "num_processes": 2, "sum": 3.0, "gb_per_second": 1.0} | changes


@pytest.mark.parametrize(
    ("seen", "num_gpus", "found", "remedy"),
    [
        ([process()], 2, "they should be 2", "num_processes"),
        ([process(num_processes=1), process(num_processes=1)], 2, "they should be 2", "distributed_type"),
        ([process(), process(device="cuda:1", sum=2.0)], 2, "what they add up is wrong", "nccl-tests"),
        ([process(), process()], 2, "1 of 2 visible GPUs are used", "num_processes"),
        ([process(), process(device="cuda:1")], 4, "2 of 4 visible GPUs are used", "CUDA_VISIBLE_DEVICES"),
    ],
    ids=["one is missing", "each is alone", "a wrong sum", "the same GPU", "idle GPUs"],
)
def test_processes_that_are_not_what_the_config_says_fail(
    seen: list[dict[str, Any]], num_gpus: int, found: str, remedy: str
) -> None:
    result = stages.compared_processes(seen, 2, num_gpus, 1.0)
    assert result.state == "fail" and found in result.found and remedy in result.remedy
    whole = [process(), process(device="cuda:1")]
    assert stages.compared_processes(whole, 2, 2, 1.0).state == "pass"


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"num_processes": 3}, "starts 3 processes; .* a divisor of 32"), ({"num_machines": 2}, "is for 2 machines")],
)
def test_configs_that_cannot_be_tested_are_refused(changes: dict[str, object], error: str, tmp_path: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(CPU.read_text()) | changes))
    with pytest.raises(UserError, match=error):
        stages.checked_launcher(config)


def test_it_runs_in_the_projects_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CPU.resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run from the project's folder"):
        stages.checked_launcher(config)


@pytest.mark.slow
def test_a_process_that_fails_gives_its_error(tmp_path: Path) -> None:
    _, log, status = stages.launch(CPU, tmp_path / "sft.log", "gemma2_post.sft", "--learning_rte=1")
    found = stages.failed("sft", log, "do this")
    assert status and found.state == "fail" and "error: " in found.found and found.log and found.remedy == "do this"


@pytest.mark.slow
def test_zero_3_on_two_processes_gives_the_reference_and_what_it_saves_is_what_it_trained(tmp_path: Path) -> None:
    found = launcher.read(ZERO_3)
    stages.write_rows(tmp_path)
    results = [
        stages.check_processes(ZERO_3, found, tmp_path),
        stages.check_stage("sft", ZERO_3, found, tmp_path, REFERENCES),
        stages.check_reload(ZERO_3, found, tmp_path),
    ]
    assert [each for each in results if each.state != "pass"] == []
    assert results[0].found.startswith("2 on CPU")


# --- all of it ---


@pytest.mark.slow
def test_the_selftest_passes_here(tmp_path: Path) -> None:
    file = tmp_path / "selftest.json"
    command = [sys.executable, "-m", "gemma2_post.cli", "selftest", "--launch", str(CPU), "--json", str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    content = json.loads(file.read_text())
    assert content["passes"] and content["launch"] == CPU.read_text()
    passed = {each["name"] for each in content["results"] if each["state"] == "pass"}
    assert {
        "versions",
        "disk",
        "flex_attention float32 head 256",
        "anchor in fp32",
        "processes",
        *stages.STAGES,
        "2 layers of 2b",
    } <= passed
    (speed,) = [each["numbers"] for each in content["results"] if each["name"] == "2 layers of 2b"]
    assert speed["forward_tokens_per_second"] > speed["training_tokens_per_second"] > 0
    assert "0 fail" in finished.stdout and "pass     rlhf" in finished.stdout
