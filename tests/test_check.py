"""`gemma2-post check`: what can be known to be wrong before anything starts is said in one sentence."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from gemma2_post.pipeline.check import check, report
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.stage.errors import UserError
from tests.test_pipeline import gemma2_post

Recipe = dict[str, object]
PIPELINES = sorted(Path("recipes").glob("*/pipeline.yaml"))


EVERY = ("sft", "distill")
"""Labels of the steps of `pipeline`."""


@pytest.mark.parametrize("path", PIPELINES, ids=str)
def test_a_shipped_pipeline_can_start(path: Path) -> None:
    """Without a GPU, and without the network, in seconds (of this process: the machine may be busy)."""
    began = time.process_time()
    checked = check(load_pipeline(path))
    assert time.process_time() - began < 5
    assert report(checked).startswith("can start: ") and ", distill, " in report(checked)
    unknown = {key for each in checked for key, config in each.checked.models.items() if config is None}
    assert unknown <= {"policies", "runs", "models"}


@pytest.mark.slow
def test_check_is_a_command_that_takes_several_pipelines() -> None:
    """For less than it costs to import the packages twice more: in seconds, a slow machine would fail this."""
    began = children_seconds()
    subprocess.run([sys.executable, "-c", "import gemma2_post.pipeline.check"], check=True)
    imported = children_seconds()
    finished = gemma2_post("check", *map(str, PIPELINES))
    assert children_seconds() - imported < 3 * (imported - began)
    assert finished.returncode == 0, finished.stderr
    assert [line.partition(":")[0] for line in finished.stdout.splitlines()] == [*map(str, PIPELINES)]


def children_seconds() -> float:
    """Processor time of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.fixture
def pipeline(recipe: Recipe, distill_recipe: Recipe, tmp_path: Path) -> Path:
    """Two stages that could run."""
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(distill_recipe))
    stages = {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml", "model": "sft"}}
    path = tmp_path / "pipeline.yaml"
    content = {"run_dir": str(tmp_path / "run"), "launch": "accelerate_configs/cpu.yaml", "stages": stages}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def with_entry(path: Path, **changes: object) -> None:
    content = yaml.safe_load(path.read_text())
    content["stages"]["distill"] |= changes
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def no_turns(folder: Path) -> Recipe:
    (folder / "rows.jsonl").write_text(json.dumps({"title": "?", "reply": "!"}) + "\n")
    return {"datasets": [{"path": str(folder / "rows.jsonl")}]}


WRONG: dict[str, tuple[Callable[[Path], Recipe], str]] = {
    "misspelt": (lambda _: {"lerning_rate": 1}, "unknown key lerning_rate (value 1); did you mean learning_rate?"),
    "type": (lambda _: {"learning_rate": "fast"}, "learning_rate is 'fast' (str); write a number"),
    "batch": (
        lambda _: {"global_batch_size": 9},
        "global_batch_size 9 does not divide by per_device_train_batch_size",
    ),
    "no file": (lambda _: {"datasets": [{"path": "no.jsonl"}]}, "no.jsonl: there is no such file"),
    "columns": (no_turns, "the columns title, reply are of no known format; expected prompt | instruction"),
    "kept column": (lambda _: {"columns": ["mood"], "graders": None}, "columns: no source has mood"),
    "function": (lambda _: {"graders": ["gemma2_post.tiny.gold:silver"]}, "gemma2_post.tiny.gold:silver: there is no"),
    "folder": (
        lambda _: {"teacher_model_name_or_path": "models/large/teacher"},
        "teacher_model_name_or_path is models/large/teacher, which no earlier stage makes, and there is no such",
    ),
    "length": (lambda _: {"max_completion_length": 300}, "max_completion_length 300 leaves 0 of the model's 256"),
    "quantised": (
        lambda _: {"teacher_load_in_4bit": True, "teacher_load_in_8bit": True},
        "teacher_load_in_4bit and teacher_load_in_8bit are both true",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_later_stage_is_known_before_the_first_one_starts(
    change: Callable[[Path], Recipe], message: str, pipeline: Path, tmp_path: Path
) -> None:
    check(load_pipeline(pipeline))
    with pytest.raises(UserError) as error:
        check(load_pipeline(pipeline, overrides={"distill": change(tmp_path)}))
    assert message in str(error.value) and str(error.value).startswith(f"{tmp_path}/distill.yaml: ")


@pytest.mark.slow
def test_a_run_is_checked_before_it_begins(pipeline: Path, tmp_path: Path) -> None:
    finished = gemma2_post("run", str(pipeline), "--set", "distill.learning_rate=fast")
    assert finished.returncode == 2 and "distill.yaml: learning_rate is 'fast'" in finished.stderr
    assert not (tmp_path / "run" / "sft").exists()


def test_a_gate_on_what_is_not_measured_says_what_is(pipeline: Path, tmp_path: Path) -> None:
    with_entry(pipeline, gates={"kl_teacher_student": "<= 50", "stop_rate/names": ">= 0.9"})
    check(load_pipeline(pipeline))
    with_entry(pipeline, gates={"acuracy": ">= 0.9"})
    with pytest.raises(
        UserError, match=r"the gate is on acuracy, which it does not measure; it measures kl_stu.*, stu"
    ):
        check(load_pipeline(pipeline))


def test_more_processes_than_devices_are_refused_where_it_is_to_run(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpus.yaml").write_text("num_machines: 1\nnum_processes: 2\nmixed_precision: bf16\n")
    with_entry(pipeline, launch=str(tmp_path / "gpus.yaml"))
    overrides = {"distill": {"bf16": True, "dtype": "float32", "per_device_train_batch_size": 4}}
    with pytest.raises(UserError, match="TRL computes the distillation loss past accelerate's autocast"):
        check(load_pipeline(pipeline, overrides=overrides))
    overrides["distill"] |= {"use_peft": True, "dtype": "bfloat16"}
    check(load_pipeline(pipeline, overrides=overrides))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"gpus\.yaml: starts 2 processes on this machine, which shows 1 GPUs"):
        check(load_pipeline(pipeline, overrides=overrides), to_run=EVERY)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(load_pipeline(pipeline, overrides=overrides), to_run=EVERY)


def test_the_number_of_processes_is_that_of_the_launcher(pipeline: Path, tmp_path: Path) -> None:
    """The global batch stays; what each process accumulates follows."""
    for num_processes in (1, 2, 4):
        (tmp_path / "cpus.yaml").write_text(f"use_cpu: true\nnum_processes: {num_processes}\n")
        with_entry(pipeline, launch=str(tmp_path / "cpus.yaml"))
        _, distill = check(load_pipeline(pipeline, overrides={"distill": {"per_device_train_batch_size": 2}}))
        assert distill.checked.recipe.training.gradient_accumulation_steps * 2 * num_processes == 8
    (tmp_path / "cpus.yaml").write_text("use_cpu: true\nnum_processes: 3\n")
    with pytest.raises(UserError, match="8 does not divide by per_device_train_batch_size 2 x 3 processes"):
        check(load_pipeline(pipeline, overrides={"distill": {"per_device_train_batch_size": 2}}))


def test_several_machines_need_slurm(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "machines.yaml").write_text("use_cpu: true\nnum_machines: 2\nnum_processes: 2\n")
    with_entry(pipeline, launch=str(tmp_path / "machines.yaml"))
    overrides = {"distill": {"per_device_train_batch_size": 4}}
    check(load_pipeline(pipeline, overrides=overrides))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="for 2 machines, and this is not a Slurm job; submit it with sbatch"):
        check(load_pipeline(pipeline, overrides=overrides), to_run=EVERY)


def test_an_evaluation_on_prompts_that_were_trained_on_is_refused(
    pipeline: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """The same rows in another file and another form; those that a stage selects by count, too."""
    evaluated = {
        "init": "sft", "models": ["sft"], "baseline": "sft", "reward_functions": ["gemma2_post.tiny.gold:accuracy"],
        "columns": ["answer"],
    }  # fmt: skip
    content = yaml.safe_load(pipeline.read_text())
    content["stages"]["evaluate"] = {"recipe": "evaluate.yaml", "init": "sft", "models": ["sft"], "baseline": "sft"}
    pipeline.write_text(yaml.safe_dump(content, sort_keys=False))
    for key, does in (("datasets", "trains on"), ("held_out_datasets", "selects by")):
        lines = Path(recipe[key][0]["path"]).read_text().splitlines()
        prompt = json.loads(lines[2])["messages"][:-1]
        rows = [{"prompt": "Is this new?", "answer": "8"}, {"prompt": prompt, "answer": "8"}]
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = evaluated | {"datasets": [{"path": str(tmp_path / "test.jsonl")}]}
        (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(values | {"output_dir": "x"}))
        with pytest.raises(
            UserError, match=rf"evaluate.yaml: datasets: row 1 of .*, which sft {does}; 1 of 2 prompts overlap"
        ):
            check(load_pipeline(pipeline))
        (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0] | {"answer": "9"}))
        check(load_pipeline(pipeline))


def test_a_stage_reads_a_file_that_an_earlier_stage_makes(
    recipe: Recipe, reward_recipe: Recipe, tmp_path: Path
) -> None:
    """Such as the pairs that a synthesis writes beside its conversations."""
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(reward_recipe | {"columns": None}))
    stages = {
        "synthesize": {"recipe": str(Path("recipes/tiny/synthesize.yaml").absolute())},
        "sft": {"recipe": "sft.yaml", "datasets": "synthesize/data.jsonl"},
        "reward": {"recipe": "reward.yaml", "datasets": "synthesize/pairs"},
    }
    content = {"run_dir": str(tmp_path / "run"), "launch": "accelerate_configs/cpu.yaml", "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    pipeline = load_pipeline(tmp_path / "pipeline.yaml")
    assert len(check(pipeline)) == 3
    sources = pipeline.references_of("reward")["datasets"]
    assert sources == [{"path": str(tmp_path / "run" / "synthesize" / "pairs")}]


def test_a_front_with_another_reward_than_the_training_is_refused() -> None:
    pipeline = load_pipeline(Path("recipes/tiny/pipeline.yaml"), overrides={"rlhf": {"length_penalty": 0.1}})
    check(pipeline)
    pipeline = load_pipeline(
        Path("recipes/tiny/pipeline.yaml"),
        overrides={"rlhf": {"length_penalty": 0.1}, "warp": {"length_penalty": 0.2}},
    )
    with pytest.raises(
        UserError, match=r"length_penalty is 0.2, but rlhf.* policy \d was trained with 0.1; remove it"
    ):
        check(pipeline)
