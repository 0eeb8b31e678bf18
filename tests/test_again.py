"""A finished stage whose measurements have changed is measured again, before and after, and not trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma2_post.stage import contract
from tests.conftest import TEACHER
from tests.test_two_processes import LORA, in_two_processes

pytestmark = pytest.mark.slow

Recipe = dict[str, object]
Run = Callable[[Recipe], Path]

QLORA = LORA | {"load_in_4bit": True}
GRADED = {"graders": ["gemma2_post.tiny.gold:flattery"]}


def weights_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.safetensors")}


def metrics_of(output: Path) -> dict[str, float]:
    return json.loads((output / "stage.json").read_text())["metrics"]


def check_measured_again(run: Run, values: Recipe, output: Path) -> None:
    """Adds a grader to a finished stage."""
    run(values)
    weights, metrics = weights_of(output), metrics_of(output)
    assert weights and not any(name.startswith("flattery") for name in metrics)
    run(values | GRADED)
    assert weights_of(output) == weights
    again = metrics_of(output)
    new = {name for name in again if "flattery" in name}
    assert {"flattery", "flattery_before"} <= new
    for name, value in metrics.items():
        assert again[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert again.keys() - metrics.keys() >= new and not (output / contract.BEGUN).exists()


@pytest.mark.parametrize("method", [{}, QLORA], ids=["full", "QLoRA"])
def test_sft(method: Recipe, run_sft: Run, recipe: Recipe) -> None:
    values = recipe | {"max_steps": 2, "num_samples": 3, "save_dtype": "float32"} | method
    check_measured_again(run_sft, values, Path(values["output_dir"]))


def test_distill(run_distill: Run, distill_recipe: Recipe) -> None:
    values = distill_recipe | {"max_steps": 2, "save_dtype": "float32"}
    check_measured_again(run_distill, values, Path(values["output_dir"]))


def test_a_reward_model_is_sealed_again(run_reward: Run, reward_recipe: Recipe) -> None:
    output = run_reward(reward_recipe | QLORA | {"policies": [TEACHER], "num_samples": 3})
    weights, metrics = weights_of(output), metrics_of(output)
    sealed = (output / "reward_model.json").read_bytes()
    run_reward(reward_recipe | QLORA | {"policies": [TEACHER], "num_samples": 4})
    assert weights_of(output) == weights
    again = metrics_of(output)
    assert again["accuracy"] == metrics["accuracy"] and again["accuracy_before"] == metrics["accuracy_before"]
    assert again["answer_reward_mean"] != metrics["answer_reward_mean"]
    assert (output / "reward_model.json").read_bytes() != sealed


def test_a_policy_keeps_the_curve_that_was_watched(run_rlhf: Run, rlhf_recipe: Recipe) -> None:
    values = rlhf_recipe | {"max_steps": 3, "watch_steps": 1, "save_dtype": "float32"}
    output = Path(values["output_dir"]) / "policy-0"
    check_measured_again(run_rlhf, values, output)
    curve = contract.read_lines(output / "watch.jsonl")
    assert [entry["step"] for entry in curve] == [0, 1, 2, 3]
    assert ["flattery" in entry for entry in curve] == [True, False, False, True]
    assert all("kl_to_anchor" in entry for entry in curve)


def test_under_zero_3(rlhf_recipe: Recipe, tmp_path: Path) -> None:
    values = rlhf_recipe | LORA | {"bf16": True, "max_steps": 2, "per_device_train_batch_size": 4}

    def run(values: Recipe) -> Path:
        return in_two_processes("gemma2_post.rlhf", 3, values, tmp_path)

    check_measured_again(run, values, tmp_path / "sharded" / "policy-0")


def test_a_run_that_resumes_with_another_grader_is_measured_again_at_its_end(run_sft: Run, recipe: Recipe) -> None:
    """What was measured before the first step was measured without that grader."""
    values = recipe | {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    output = run_sft(values)
    weights = weights_of(output)
    begun = json.loads((output / "stage.json").read_text())["fingerprint"]
    (output / "stage.json").unlink()
    contract.begin(output, begun)
    run_sft(values | GRADED)
    assert "flattery_before" not in metrics_of(output)
    run_sft(values | GRADED)
    assert "flattery_before" in metrics_of(output)
    assert {name: weights_of(output)[name] for name in weights} == weights
