"""NaN and infinity stop every training stage, and no stage file is written over them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from gemma2_post import distill, reward, rlhf, sft
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.training import run as training
from gemma2_post.training import watch
from gemma2_post.training.finite import are_finite
from tests.conftest import run_stage

Recipe = dict[str, object]
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
STAGES = {
    "sft": (sft.COMMAND, "recipe", {}),
    "sft with an adapter": (sft.COMMAND, "recipe", LORA),
    "distill": (distill.COMMAND, "distill_recipe", {}),
    "reward": (reward.COMMAND, "reward_recipe", {}),
    "rlhf": (rlhf.COMMAND, "rlhf_recipe", {}),
}


EXPLODES = [("reward", 1e5), *((stage, rate) for stage in STAGES for rate in (1e20, 1e38))]


@pytest.mark.parametrize(("stage", "rate"), EXPLODES)
def test_a_learning_rate_that_explodes_stops_the_stage(
    stage: str, rate: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    command, recipe_name, changes = STAGES[stage]
    values = request.getfixturevalue(recipe_name) | changes | {"learning_rate": rate, "max_steps": 4}
    with pytest.raises(UserError, match=r"(NaN|nan|inf).* at step [1-4]; there is no checkpoint yet in .*; lower"):
        run_stage(tmp_path / "recipe.yaml", command, values)
    assert not list(tmp_path.rglob("stage.json"))


def with_run(monkeypatch: pytest.MonkeyPatch, change: Callable[..., dict[str, object]]) -> None:
    """Changes what a stage hands to `training.run.run`: the arguments by name."""
    run = training.run

    def changed(stage, recipe, trainer, measure, complete=lambda before, after: {}, **more) -> None:
        given = {"trainer": trainer, "measure": measure, "complete": complete}
        run(stage, recipe, **given | change(**given), **more)

    monkeypatch.setattr(training, "run", changed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", ["before the first step", "at step 2; there", "at step 2; there is no checkpoint"])
def test_what_is_measured_must_be_finite(
    value: float, when: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after training, and what follows from both."""

    def change(trainer, measure, complete) -> dict[str, object]:
        def spoiled() -> dict[str, float]:
            is_spoiled = trainer.state.global_step == (0 if "before" in when else 2)
            return measure() | ({"score": value} if is_spoiled and not when.endswith("checkpoint") else {})

        spoils_last = when.endswith("checkpoint")
        return {"measure": spoiled, "complete": lambda before, after: {"score": value} if spoils_last else {}}

    with_run(monkeypatch, change)
    with pytest.raises(UserError, match=f"score is {value} {when}"):
        run_stage(tmp_path / "recipe.yaml", sft.COMMAND, recipe)
    assert not list(tmp_path.rglob("stage.json"))


class Explode(TrainerCallback):
    """Raises the learning rate of one step beyond what fp32 can hold."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, optimizer=None, **_) -> None:
        if state.global_step == self.step - 1:
            optimizer.param_groups[0]["lr"] = 3e38


def test_the_last_good_checkpoint_is_kept_and_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(trainer, **_) -> dict[str, object]:
        trainer.add_callback(Explode(3))
        return {}

    with_run(monkeypatch, change)
    saving = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(
        UserError, match=r"infinite at step 3; the last good checkpoint is checkpoint-2 in .*/out; lower"
    ):
        run_stage(tmp_path / "recipe.yaml", sft.COMMAND, recipe | saving)
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()


@pytest.mark.parametrize("stage", ["distill", "rlhf"])
def test_probabilities_that_are_nan_stop_a_stage_that_samples(
    stage: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are finite, but so large that what the model computes with them is not."""

    def change(trainer, measure, **_) -> dict[str, object]:
        def spoil() -> dict[str, float]:
            found = measure()
            with torch.no_grad():
                trainer.model.model.norm.weight.fill_(3e38)
                trainer.model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
            return found

        return {"measure": spoil}

    with_run(monkeypatch, change)
    command, recipe_name, _ = STAGES[stage]
    with pytest.raises(UserError, match="probabilities are NaN or infinite before the first step"):
        run_stage(tmp_path / "recipe.yaml", command, request.getfixturevalue(recipe_name))
    assert not list(tmp_path.rglob("stage.json"))


def test_what_is_measured_while_a_policy_trains_must_be_finite(
    rlhf_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([{"distinct_answers": 1.0}, {"distinct_answers": math.nan}])
    monkeypatch.setattr(watch, "distinctness", lambda answers: next(measured))
    with pytest.raises(UserError, match="distinct_answers is nan at step 1; there is no checkpoint yet"):
        run_stage(tmp_path / "recipe.yaml", rlhf.COMMAND, rlhf_recipe | {"watch_steps": 1})
    curve = (tmp_path / "out" / "policy-0" / "watch.jsonl").read_text()
    assert len(curve.splitlines()) == 1 and "NaN" not in curve


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_stage_is_done_with_a_metric_that_is_not_finite(value: float, tmp_path: Path) -> None:
    wanted = {"recipe": {}, "inputs": {}, "code": {}, "versions": {}}
    contract.begin(tmp_path, wanted)
    with pytest.raises(UserError, match=f"win_rate is {value}, so nothing is released"):
        contract.finish(tmp_path, "evaluate", wanted, 1.0, {}, {"num": 1, "win_rate": value})
    assert not (tmp_path / "stage.json").exists() and not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_among_many_is_found(value: float) -> None:
    tensors = [torch.ones(3), torch.ones(2, 5, dtype=torch.bfloat16), torch.empty(0)]
    assert are_finite(tensors) and are_finite([torch.full((9,), 3e38)]) and are_finite([])
    tensors[1][1, 2] = value
    assert not are_finite(tensors)
