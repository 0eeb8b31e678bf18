"""Evaluation: models beside each other on the same prompts, and against one of them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gemma2_post import evaluate
from gemma2_post.core import gemma
from gemma2_post.core.errors import UserError
from gemma2_post.evaluate import win_rate
from tests.conftest import BASE, TEACHER, run_stage, write_prompts

Recipe = dict[str, object]


@pytest.fixture
def evaluate_recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """The teacher, and twice what noise has made of it."""
    folders = []
    for name, noise in (("sft", 0.05), ("rlhf/policy-0", 0.0), ("rlhf/policy-1", 0.01)):
        model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        folder = tmp_path / "runs" / name
        gemma.save_model(model, model.state_dict(), folder, torch.float32)
        gemma.save_tokenizer(tokenizer, folder)
        folders.append(str(folder))
    return {
        "init": TEACHER,
        "base": BASE,
        "models": folders,
        "baseline": folders[0],
        "reward_functions": ["gemma2_post.tiny.gold:gold"],
        "datasets": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", "held_out", 12))}],
        "columns": ["skill", "answer"],
        "graders": ["gemma2_post.tiny.gold:gold"],
        "max_completion_length": 16,
        "num_samples": 12,
        "batch_size": 5,
        "output_dir": str(tmp_path / "runs" / "evaluate"),
    }


def test_models_are_measured_beside_each_other(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe)
    models = json.loads((output / "models.json").read_text())
    assert list(models) == ["base", "sft", "rlhf/policy-0", "rlhf/policy-1"]
    assert models["rlhf/policy-0"]["kl_to_init"] == pytest.approx(0, abs=1e-6)
    assert models["base"]["kl_to_init"] > models["sft"]["kl_to_init"] > models["rlhf/policy-1"]["kl_to_init"] > 1e-3
    assert models["rlhf/policy-0"]["gold"] > models["sft"]["gold"] + 0.1
    assert models["sft"]["win_rate_vs_sft"] == 0.5 and models["rlhf/policy-0"]["win_rate_vs_sft"] > 0.5
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["gold"] == models["rlhf/policy-1"]["gold"]
    assert metrics["win_rate"] == models["rlhf/policy-1"]["win_rate_vs_sft"]
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(list(row["answers"]) == list(models) for row in rows)


def test_a_tie_is_half_a_win() -> None:
    assert win_rate([1.0, 2.0, 3.0, 0.0], [1.0, 1.0, 4.0, 0.0]) == 0.5
    assert win_rate([1.0, 1.0], [0.0, 1.0]) == 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "models is empty; name one or more folders"),
        ({"baseline": BASE}, f"baseline is {BASE}, which is none of the models; add it"),
        ({"models": ["nowhere"], "baseline": "nowhere"}, "models names nowhere, which holds no model"),
        ({"num_samples": 1}, "num_samples must be 2 or more"),
        ({"init": "nowhere/at/all"}, "cannot get nowhere/at/all"),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(
    change: Recipe, message: str, evaluate_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe | change)
    assert not (tmp_path / "runs" / "evaluate").exists()
