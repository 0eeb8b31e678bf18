"""Two real processes on the CPU, under DeepSpeed and under DDP, give what one gives."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gemma2_post.models import reward_model
from tests import record_anchor
from tests.conftest import BASE, TEACHER, losses
from tests.test_rlhf import average, relative_error, saved_anchor

pytestmark = pytest.mark.slow

Run = Callable[[dict[str, object]], Path]

LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "dtype": "bfloat16", "learning_rate": 1e-2}
QLORA = LORA | {"load_in_4bit": True}
BUDGET = 0.15
"""Nats that three steps at this learning rate do not take, and four do."""
CASES = {"ZeRO-3, full": (3, {}), "ZeRO-3, LoRA": (3, LORA), "ZeRO-2, full": (2, {}), "DDP, QLoRA": (0, QLORA)}


def in_two_processes(module: str, zero_stage: int, values: dict[str, object], folder: Path) -> Path:
    """Runs a stage's module in two processes; returns its output directory."""
    config = yaml.safe_load(Path("accelerate_configs/deepspeed_zero3_cpu.yaml").read_text())
    if zero_stage == 2:
        config["deepspeed_config"] = {"zero_stage": 2, "gradient_accumulation_steps": "auto"}
    config["mixed_precision"] = "bf16" if values["bf16"] else "no"
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    output = folder / "sharded"
    (folder / "sharded.yaml").write_text(yaml.safe_dump(values | {"output_dir": str(output)}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(folder / "accelerate.yaml")]
    if zero_stage == 0:  # accelerate starts several CPU processes only through MPI
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", module, "--config", str(folder / "sharded.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert finished.returncode == 0, finished.stderr[-6000:]
    assert finished.stdout.count(", with 2 processes on cpu\n") == 1
    return output


@pytest.mark.parametrize(("zero_stage", "method"), CASES.values(), ids=CASES.keys())
def test_two_processes_equal_one(
    zero_stage: int, method: dict[str, object], run_sft: Run, recipe: dict[str, object], tmp_path: Path
) -> None:
    """Same rows, same global batch: losses agree to 1 %, which is what bf16 resolves, and weights accordingly."""
    values = recipe | {"bf16": True, "max_steps": 4, "num_samples": 3, "save_dtype": "bfloat16"} | method
    alone = run_sft(values)
    output = in_two_processes("gemma2_post.sft", zero_stage, values | {"per_device_train_batch_size": 2}, tmp_path)

    stage = json.loads((output / "stage.json").read_text())
    assert stage["num_processes"] == 2
    assert losses(output) == pytest.approx(losses(alone), rel=0.01)
    assert losses(alone)[-1] < 0.97 * losses(alone)[0]
    before = json.loads((alone / "metrics.json").read_text())["held_out_nll_before"]
    assert stage["metrics"]["held_out_nll_before"] == pytest.approx(before, rel=0.01)

    _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    start, one, two = (
        load_file(Path(directory) / "model.safetensors") for directory in (recipe["model_name_or_path"], alone, output)
    )
    assert start.keys() == one.keys() == two.keys()
    assert distance(one, two) < 0.3 * distance(start, one)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return sum((first[name].float() - second[name].float()).square().sum().item() for name in first) ** 0.5


def test_distillation_in_two_processes_with_answers_of_very_different_length_equals_one(
    run_sft: Run, run_distill: Run, recipe: dict[str, object], distill_recipe: dict[str, object], tmp_path: Path
) -> None:
    """One process has only prompts with an answer of four tokens, the other only ones whose answer is cut at 40.

    The student knows both by heart, so its answers are the same in bf16 (ZeRO-3) and in fp32. The first losses differ
    by one rounding of the weights, which bf16 does again after each update: 1.4 % at the fourth.
    """
    short, long = (
        {"prompt": f"Tell me {length}.", "completion": completion, "answer": "8"}
        for length, completion in (("a word", "Yes."), ("all", " ".join(map(str, range(60)))))
    )

    def source(name: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [{"path": str(tmp_path / name)}]

    rows = source("rows.jsonl", [short] * 4 + [long] * 4)
    # The space makes these rows others than the training rows, which would be dropped; the chat format trims it.
    held_out = source("few.jsonl", [row | {"prompt": f"{row['prompt']} "} for row in [long] * 3 + [short] * 2])
    knows_both = {
        "datasets": rows,
        "held_out_datasets": held_out,
        "columns": ["answer"],
        "max_steps": 60,
        "learning_rate": 3e-3,
    }
    student = run_sft(recipe | knows_both | {"output_dir": str(tmp_path / "student")})
    values = distill_recipe | {
        "model_name_or_path": str(student),
        "datasets": rows,
        "held_out_datasets": held_out,
        "columns": ["answer"],
        "graders": ["gemma2_post.tiny.gold:gold"],
        "generation_kwargs": {"do_sample": False},
        "shuffle_dataset": False,
        "max_completion_length": 40,
        "max_steps": 4,
        "beta": 0.0,
        "learning_rate": 5e-4,
        "save_dtype": "bfloat16",
    }
    alone = run_distill(values)
    output = in_two_processes(
        "gemma2_post.distill", 3, values | {"bf16": True, "per_device_train_batch_size": 2}, tmp_path
    )

    stage = json.loads((output / "stage.json").read_text())
    assert stage["num_processes"] == 2
    for directory in (alone, output):
        entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()][:4]
        lengths = [(entry["completions/min_length"], entry["completions/max_length"]) for entry in entries]
        assert lengths == [(4, 40)] * 4
    assert losses(output)[0] == pytest.approx(losses(alone)[0], rel=0.002)
    assert losses(output) == pytest.approx(losses(alone), rel=0.03)
    assert losses(alone)[-1] < 0.9 * losses(alone)[0]
    before = json.loads((alone / "metrics.json").read_text())
    for name in ("kl_student_teacher_before", "kl_teacher_student_before", "mean_tokens_before"):
        assert stage["metrics"][name] == pytest.approx(before[name], rel=0.03)

    _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    start, one, two = (load_file(directory / "model.safetensors") for directory in (student, alone, output))
    assert distance(one, two) < 0.3 * distance(start, one)


def test_two_teachers_take_the_same_turns_in_two_processes(
    run_distill: Run, distill_recipe: dict[str, object], tmp_path: Path
) -> None:
    """Each step is one micro-batch, so the teacher of a step is the same one; under ZeRO-3 both are sharded."""
    values = {key: value for key, value in distill_recipe.items() if key != "teacher_model_name_or_path"}
    student = str(shutil.copytree(TEACHER, tmp_path / "student"))
    values |= {"teachers": [student, BASE], "max_completion_length": 8, "save_dtype": "bfloat16"}
    values |= {"generation_kwargs": {"do_sample": False}, "num_samples": 3, "max_steps": 2}
    alone = run_distill(values)
    output = in_two_processes(
        "gemma2_post.distill", 3, values | {"bf16": True, "per_device_train_batch_size": 4}, tmp_path
    )
    assert losses(alone)[0] == pytest.approx(0, abs=1e-3) and losses(alone)[1] > 0.1
    assert losses(output) == pytest.approx(losses(alone), rel=0.03, abs=1e-3)
    for folder in (alone, output):
        found = json.loads((folder / "metrics.json").read_text())
        assert found["kl_student_teacher/student_before"] == pytest.approx(0, abs=1e-2)
        assert found["kl_student_teacher/base_before"] > 1


def without_chance(directory: Path) -> Path:
    """A language model that always says what is likeliest, however its prompts are batched: with huge logits."""
    shutil.copytree(BASE, directory)
    config = json.loads((directory / "config.json").read_text()) | {"final_logit_softcapping": None}
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = 1e5 * (1 + weights["model.norm.weight"].float())
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_reward_model_from_two_processes_equals_one(
    run_reward: Run, reward_recipe: dict[str, object], tmp_path: Path
) -> None:
    """Seven answers of a policy and twelve pairs, in batches of two: the shares are uneven, and no row is lost.

    Under ZeRO-3 the policy is whole on each process, the reward model is sharded, and its head is gathered in bf16.
    """
    values = reward_recipe | {"bf16": True, "max_steps": 4, "save_dtype": "bfloat16", "score_margin": 0.5}
    values |= {"policies": [str(without_chance(tmp_path / "policy"))], "num_samples": 7, "max_new_tokens": 12}
    values |= {"graders": ["gemma2_post.tiny.gold:gold"], "noise_ceiling": "gemma2_post.tiny.data:noise_ceiling"}
    untrained = run_reward(values | {"learning_rate": 1e-30, "max_steps": 1, "output_dir": str(tmp_path / "start")})
    alone = run_reward(values)
    small = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    output = in_two_processes("gemma2_post.reward", 3, values | small, tmp_path)

    stage = json.loads((output / "stage.json").read_text())
    assert stage["num_processes"] == 2
    assert losses(output) == pytest.approx(losses(alone), rel=0.02)
    assert losses(alone)[-1] < 0.8 * losses(alone)[0]
    one, two = (json.loads((directory / "metrics.json").read_text()) for directory in (alone, output))
    assert one.keys() == two.keys() and one["reward_mean"] != pytest.approx(one["reward_mean_before"], abs=0.1)
    measured = ["reward_mean", "reward_spread", "length_correlation", "noise_ceiling"]
    measured += [*(f"{name}_before" for name in measured), "answer_reward_mean", "answer_reward_spread"]
    assert {name: two[name] for name in measured} == pytest.approx({name: one[name] for name in measured}, abs=0.03)
    for name in ("accuracy", "accuracy_before", "gold_rank_correlation", "gold_rank_correlation_before"):
        assert two[name] == pytest.approx(one[name], abs=0.1), name  # one pair of twelve, two neighbours of seven

    weights = [load_file(directory / "model.safetensors") for directory in (untrained, alone, output)]
    heads = [{"score.weight": each["score.weight"]} for each in weights]
    for start, first, second in (weights, heads):
        assert start.keys() == first.keys() == second.keys()
        assert distance(first, second) < 0.3 * distance(start, first)
    assert heads[2]["score.weight"].dtype == torch.float32 and heads[2]["score.weight"].shape == (1, 64)
    _, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded = reward_model.load(str(output))
    assert (loaded.mean, loaded.spread) == (two["answer_reward_mean"], two["answer_reward_spread"])


@pytest.mark.parametrize("only_head", [True, False], ids=["the head alone", "a member"])
def test_a_score_head_is_trained_and_given_in_two_processes_as_in_one(
    only_head: bool, run_reward: Run, reward_recipe: dict[str, object], tmp_path: Path
) -> None:
    """Under ZeRO-3: the head alone, whose frozen features are sharded, and a member that begins with a head."""
    values = reward_recipe | {"bf16": True, "save_dtype": "bfloat16", "num_samples": 0}
    head = {"only_score_head": True, "learning_rate": 1e-2, "max_steps": 4}
    if not only_head:
        given = run_reward(values | head | {"output_dir": str(tmp_path / "head")})
        head = {"score_head": str(given), "max_steps": 4}
    untrained = run_reward(
        values | head | {"learning_rate": 1e-30, "max_steps": 1, "output_dir": str(tmp_path / "start")}
    )
    alone = run_reward(values | head)
    output = in_two_processes("gemma2_post.reward", 3, values | head | {"per_device_train_batch_size": 2}, tmp_path)
    assert losses(output) == pytest.approx(losses(alone), rel=0.02)
    start, one, two = (load_file(directory / "model.safetensors") for directory in (untrained, alone, output))
    trained = {name for name in start if not torch.equal(start[name], two[name])}
    assert (trained == {"score.weight"}) == only_head and "score.weight" in trained
    assert distance(one, two) < 0.3 * distance(start, one)


@pytest.mark.parametrize(
    ("zero_stage", "method"),
    [(3, {}), (2, {}), (3, LORA), (0, {})],
    ids=["ZeRO-3, full", "ZeRO-2, full", "ZeRO-3, LoRA", "DDP, full"],
)
def test_the_anchor_of_two_processes_is_the_closed_form_of_the_average(
    zero_stage: int, method: dict[str, object], rlhf_recipe: dict[str, object], tmp_path: Path
) -> None:
    """In fp32 from the fp32 masters; and the reference computes with its rounding, small parameters included."""
    values = rlhf_recipe | {"bf16": bool(zero_stage), "max_steps": 4, "anchor_mu": 0.2, "learning_rate": 3e-3} | method
    values |= {"per_device_train_batch_size": 4, "max_completion_length": 8, "missing_end_penalty": 3.0}
    output = in_two_processes("tests.record_anchor", zero_stage, values, tmp_path) / "policy-0"
    record = torch.load(tmp_path / "record.pt")
    expected = average(record["points"], 0.2)
    anchor = saved_anchor(output, method)
    assert anchor.keys() == expected.keys() and relative_error(anchor, expected) < 1e-6
    assert not all(torch.equal(each, each.bfloat16().float()) for each in anchor.values())
    if not method:
        ids = torch.tensor(record_anchor.IDS)
        start, anchored = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")(ids).logits
            for path in (rlhf_recipe["model_name_or_path"], output / "anchor")
        )
        assert (record["logits"] - anchored).abs().max() < 0.1 * (record["logits"] - start).abs().max()
    stage = json.loads((output / "stage.json").read_text())
    assert stage["num_processes"] == 2 and stage["metrics"]["kl_to_start"] > stage["metrics"]["kl_to_anchor"] > 0
    saved = load_file(output / "model.safetensors")
    if not method:  # the policy is saved in fp32, too, from the masters
        masters = record["points"][-1]
        assert saved.keys() == masters.keys() and all(torch.equal(saved[name], masters[name]) for name in saved)


def sharded_rlhf(recipe: dict[str, object], **values: object) -> dict[str, object]:
    small = {"bf16": True, "per_device_train_batch_size": 4, "max_completion_length": 8, "anchor_mu": 0.2}
    return recipe | small | values


@pytest.mark.parametrize("algorithm", ["rloo", "jbond"])
def test_an_interrupted_run_under_zero_3_goes_on_with_its_anchor(
    algorithm: str, rlhf_recipe: dict[str, object], tmp_path: Path
) -> None:
    values = sharded_rlhf(rlhf_recipe, max_steps=3, watch_steps=2, learning_rate=1e-3)
    if algorithm == "jbond":
        del values["num_generations"]
        values |= {"algorithm": algorithm, "global_batch_size": 12, "per_device_train_batch_size": 6}
    whole = in_two_processes("gemma2_post.rlhf", 3, values, tmp_path) / "policy-0"
    resumed = tmp_path / "again" / "sharded" / "policy-0"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    for file in ("before.json", "watch.jsonl"):
        shutil.copy(whole / file, resumed / file)
    begun = json.loads((whole / "stage.json").read_text())["fingerprint"]
    (resumed / "begun.json").write_text(json.dumps({"fingerprint": begun}))
    in_two_processes("gemma2_post.rlhf", 3, values, tmp_path / "again")
    for part in ("", "anchor"):
        first, second = (load_file(path / part / "model.safetensors") for path in (whole, resumed))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert [json.loads(line)["step"] for line in (resumed / "watch.jsonl").read_text().splitlines()] == [0, 2, 3]


def test_an_adapter_under_zero_3_goes_back_when_its_budget_is_passed(
    rlhf_recipe: dict[str, object], tmp_path: Path
) -> None:
    values = sharded_rlhf(rlhf_recipe, **LORA, max_steps=4, watch_steps=1, kl_budget=BUDGET)
    output = in_two_processes("gemma2_post.rlhf", 3, values, tmp_path) / "policy-0"
    curve = [json.loads(line) for line in (output / "watch.jsonl").read_text().splitlines()]
    metrics = json.loads((output / "metrics.json").read_text())
    kept = curve[-1]  # what was too far is not the policy's
    assert 1 <= metrics["kept_step"] == kept["step"] < 4 and metrics["kl_to_start"] == kept["kl_to_start"] < BUDGET
    checkpoint = load_file(output / f"checkpoint-{kept['step']}" / "adapter_model.safetensors")
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name].bfloat16(), checkpoint[name].bfloat16()) for name in saved)


@pytest.mark.parametrize("zero_stage", [0, 3], ids=["DDP", "ZeRO-3"])
@pytest.mark.parametrize("method", [{}, LORA | {"dtype": "float32"}], ids=["full", "LoRA"])
def test_jbond_in_two_processes_equals_one(
    zero_stage: int, method: dict[str, object], run_rlhf: Run, rlhf_recipe: dict[str, object], tmp_path: Path
) -> None:
    """In fp32 and without chance, from the second step on with answers of a policy that differs from its anchor.

    The baseline is that of the whole step, and each prompt's answers are on one process.
    """
    values = {key: value for key, value in rlhf_recipe.items() if key != "num_generations"}
    values |= {"algorithm": "jbond", "beta": 0.5, "global_batch_size": 12, "per_device_train_batch_size": 6}
    values |= {"generation_kwargs": {"do_sample": False}, "max_steps": 4, "learning_rate": 1e-3, "anchor_mu": 0.1}
    values |= method
    alone = run_rlhf(values)
    output = in_two_processes("gemma2_post.rlhf", zero_stage, values, tmp_path) / "policy-0"
    assert json.loads((output / "stage.json").read_text())["num_processes"] == 2
    logs = [
        [json.loads(line) for line in (each / "log.jsonl").read_text().splitlines()][:4] for each in (alone, output)
    ]
    for name in ("loss", "reward", "kl", "below_both", "grad_norm"):
        one, two = ([entry[name] for entry in log] for log in logs)
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5), name
    assert max(abs(entry["kl"]) for entry in logs[0]) > 1e-3
    start, one, two = (
        load_file(Path(each) / "model.safetensors") for each in (values["model_name_or_path"], alone, output)
    )
    assert distance(one, two) < 0.01 * distance(start, one)
    anchors = [saved_anchor(each, method) for each in (alone, output)]
    assert distance(*anchors) < 1e-3 * distance(anchors[0], dict.fromkeys(anchors[0], torch.zeros(())))
