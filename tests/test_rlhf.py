"""RLHF: an anchor that is the exact average, a reward that says what it means, runs that stop where they should."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import RLOOTrainer

from gemma2_post import rlhf
from gemma2_post.evaluation import rewards
from gemma2_post.evaluation.answering.samples import Answer, distinctness
from gemma2_post.models.loading import load_for_training
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.training import policy as policies
from gemma2_post.training import run as training
from gemma2_post.weights.anchor import EmaAnchor
from tests.conftest import TEACHER, write_prompts
from tests.test_bad_input import with_model, with_values
from tests.test_distill import metrics_of, same_weights, swap_two_tokens

Run = Callable[[dict[str, object]], Path]
Recipe = dict[str, object]
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 1e-3}
METHODS = {
    "full": {},
    "LoRA": LORA,
    "LoRA in bf16": LORA | {"dtype": "bfloat16"},
    "QLoRA": LORA | {"load_in_4bit": True, "dtype": "bfloat16"},
}


class Trajectory(TrainerCallback):
    """The trained weights in float64, before the first step and after each."""

    def __init__(self, trainer: RLOOTrainer):
        self.trainer, self.points = trainer, []

    def on_train_begin(self, args, state, control, **_) -> None:
        trained = {name: each for name, each in self.trainer.model.named_parameters() if each.requires_grad}
        self.points.append({name: each.detach().double() for name, each in trained.items()})

    on_step_end = on_train_begin


def average(points: list[dict[str, torch.Tensor]], mu: float) -> dict[str, torch.Tensor]:
    """The closed form in float64: (1 - mu)^T theta_0 + sum over t of mu (1 - mu)^(T - t) theta_t."""
    last = len(points) - 1
    weights = [(1 - mu) ** last] + [mu * (1 - mu) ** (last - t) for t in range(1, last + 1)]
    return {
        name: sum(weight * point[name].double() for weight, point in zip(weights, points, strict=True))
        for name in points[0]
    }


@pytest.fixture
def trajectories(monkeypatch: pytest.MonkeyPatch) -> list[Trajectory]:
    """Of the runs that follow."""
    seen, run = [], training.run

    def remember_and_run(*arguments: object, **further: object) -> None:
        trainer = arguments[2]
        seen.append(Trajectory(trainer))
        trainer.add_callback(seen[-1])
        run(*arguments, **further)

    monkeypatch.setattr(training, "run", remember_and_run)
    return seen


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    error = sum((found[name].double() - expected[name]).square().sum() for name in expected)
    return float((error / sum(each.square().sum() for each in expected.values())).sqrt())


def saved_anchor(output: Path, method: Recipe) -> dict[str, torch.Tensor]:
    if not method:
        return load_file(output / "anchor" / "model.safetensors")
    adapter = load_file(output / "anchor" / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter.items()}


# --- the anchor ---


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_anchor_is_the_closed_form_of_the_average_and_so_is_the_reference(
    method: Recipe, run_rlhf: Run, rlhf_recipe: Recipe, trajectories: list[Trajectory]
) -> None:
    output = run_rlhf(rlhf_recipe | method | {"max_steps": 4, "anchor_mu": 0.01})
    (trajectory,) = trajectories
    expected = average(trajectory.points, 0.01)
    anchor = saved_anchor(output, method)
    assert anchor.keys() == expected.keys() and {each.dtype for each in anchor.values()} == {torch.float32}
    assert relative_error(anchor, expected) < 1e-6
    moved = {name: each - trajectory.points[0][name] for name, each in expected.items()}
    saved_moved = {name: anchor[name].double() - trajectory.points[0][name] for name in expected}
    assert relative_error(saved_moved, moved) < 0.01  # also of what little has moved at mu = 0.01
    trainer = trajectory.trainer
    if not method:
        reference = dict(trainer.ref_model.named_parameters())
    else:
        parameters = dict(trainer.model.named_parameters())
        reference = {name: parameters[name.replace(".default.", ".ref.")] for name in expected}
    assert relative_error({name: each.detach() for name, each in reference.items()}, expected) < 1e-6


@pytest.mark.slow
def test_the_anchor_begins_at_the_start_and_the_policy_leaves_both(run_rlhf: Run, rlhf_recipe: Recipe) -> None:
    output = run_rlhf(rlhf_recipe | {"max_steps": 3, "learning_rate": 1e-3, "anchor_mu": 0.5})
    metrics = metrics_of(output)
    before = [metrics[f"kl_to_{name}_before"] for name in ("start", "anchor")]
    assert before == pytest.approx([0.0, 0.0], abs=1e-6)  # some processors' kernels round by the batch
    assert metrics["kl_to_start"] > metrics["kl_to_anchor"] > 1e-4
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert log[0]["step"] == 1 and log[0]["kl"] == pytest.approx(0.0, abs=1e-6) and log[2]["kl"] != 0
    assert AutoModelForCausalLM.from_pretrained(output / "anchor", dtype="auto").dtype == torch.float32


@pytest.mark.slow
def test_a_fixed_anchor_is_the_start_and_nothing_else_is_loaded_or_saved(run_rlhf: Run, rlhf_recipe: Recipe) -> None:
    output = run_rlhf(rlhf_recipe | {"anchor": "start"})
    assert "kl_to_anchor" not in metrics_of(output) and not (output / "anchor").exists()


@pytest.mark.slow
def test_without_an_anchor_nothing_holds_the_policy_and_its_distance_is_still_measured(
    run_rlhf: Run, rlhf_recipe: Recipe
) -> None:
    output = run_rlhf(rlhf_recipe | {"anchor": "none", "beta": 0.0})
    assert metrics_of(output)["kl_to_start"] > 0 and "kl_to_anchor" not in metrics_of(output)


def test_a_policy_that_is_not_its_reference_is_stopped_at_the_first_step(
    run_rlhf: Run, rlhf_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed_policy(*arguments: object) -> torch.nn.Module:
        policy = load_for_training(*arguments)
        with torch.no_grad():
            policy.model.norm.weight += 0.5
        return policy

    monkeypatch.setattr(policies, "load_policy", changed_policy)
    with pytest.raises(
        UserError, match=r"before the first update the policy is .* nats a token away from its reference"
    ):
        run_rlhf(rlhf_recipe | {"anchor": "start"})


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, METHODS["QLoRA"]], ids=["full", "QLoRA"])
def test_resumed_equals_uninterrupted_anchor_included(
    method: Recipe, run_rlhf: Run, rlhf_recipe: Recipe, tmp_path: Path, trajectories: list[Trajectory]
) -> None:
    values = rlhf_recipe | method | {"max_steps": 4, "watch_steps": 2}
    whole = run_rlhf(values | {"output_dir": str(tmp_path / "whole")})
    resumed = tmp_path / "resumed" / "policy-0"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-3")
    (resumed / "checkpoint-3" / "anchor.json").unlink()  # as if killed while its anchor was written
    begun = json.loads((whole / "stage.json").read_text())["fingerprint"]
    (resumed / "begun.json").write_text(json.dumps({"fingerprint": begun}))
    shutil.copy(whole / "before.json", resumed / "before.json")
    shutil.copy(whole / "watch.jsonl", resumed / "watch.jsonl")
    assert run_rlhf(values | {"output_dir": str(tmp_path / "resumed")}) == resumed
    assert same_weights(whole, resumed)
    first, second = saved_anchor(whole, method), saved_anchor(resumed, method)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(trajectories[1].points) == 3  # it did go on from step 2
    tokens = [entry["num_tokens"] for entry in contract.read_lines(resumed / "log.jsonl") if "num_tokens" in entry]
    assert training.throughput(trajectories[1].trainer, 1.0, tokens[1])["tokens_per_second"] == tokens[-1] - tokens[1]
    assert relative_error(second, average(trajectories[0].points, 0.3)) < 1e-6


@pytest.mark.slow
def test_in_bf16_the_start_is_computed_as_the_policy_is(
    run_rlhf: Run, rlhf_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else rounding alone would be a distance, and count against the budget."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert metrics_of(run_rlhf(rlhf_recipe | {"bf16": True}))["kl_to_start_before"] == pytest.approx(0.0, abs=1e-6)


# --- policies ---


@pytest.mark.slow
def test_policies_differ_by_seed_and_order_of_prompts_and_write_their_own_folders(
    run_rlhf: Run, rlhf_recipe: Recipe
) -> None:
    first, second = (run_rlhf(rlhf_recipe | {"policy": policy}) for policy in (0, 1))
    assert (first.name, second.name) == ("policy-0", "policy-1") and first.parent == second.parent
    assert not same_weights(first, second)
    recipes = [json.loads((output / "stage.json").read_text())["fingerprint"]["recipe"] for output in (first, second)]
    assert recipes[0] | {"policy": 1} == recipes[1]
    for policy in ({}, {"policy": 0}):  # policy 0 is what a recipe without one makes
        assert rlhf.COMMAND.fingerprint(rlhf_recipe | policy) == rlhf.COMMAND.fingerprint(rlhf_recipe)


@pytest.mark.slow
def test_a_policy_with_adapters_is_its_base_plus_the_exact_adapter_in_fp32(run_rlhf: Run, rlhf_recipe: Recipe) -> None:
    output = run_rlhf(rlhf_recipe | METHODS["QLoRA"])
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {each.dtype for each in adapter.values()} == {torch.float32} and not any("ref" in name for name in adapter)
    base, merged = load_file(Path(TEACHER) / "model.safetensors"), load_file(output / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    lora = [adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "BA"]
    expected = base[f"{name}.weight"].double() + 2.0 * lora[0] @ lora[1]
    assert torch.allclose(merged[f"{name}.weight"].double(), expected, atol=1e-6)


# --- rewards ---


def test_an_answer_that_was_cut_is_penalised_and_one_that_ended_is_not() -> None:
    ended, cut = [5, 6, 107], [5, 6, 7]
    assert rewards.missing_end(1.5)(completion_ids=[ended, cut, [5, 1]]) == [0.0, -1.5, 0.0]
    assert rewards.length(0.01)(completion_ids=[ended, []]) == pytest.approx([-0.03, 0.0])


@pytest.mark.parametrize("normalize", [True, False])
def test_the_models_reward_is_the_score_of_the_conversation_in_any_chunks(
    normalize: bool, reward_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    from gemma2_post.models import reward_model

    prompts = [[{"role": "user", "content": f"What is {i} plus 1?" + " Please." * i}] for i in range(5)]
    completions = [[{"role": "assistant", "content": f"It is {i + 1}."}] for i in range(5)]
    found = {}
    for batch_size in (1, 2, 32):
        args = rewards.RewardFunctionArguments(
            reward_model=str(reward_model_dir), normalize_rewards=normalize, reward_batch_size=batch_size
        )
        reward = rewards.ModelReward(args, tokenizer)
        reward.load(torch.device("cpu"), lambda model: model)
        found[batch_size] = reward(prompts=prompts, completions=completions, completion_ids=None)
    loaded = reward_model.load(str(reward_model_dir))
    scores = reward_model.score(loaded.model, tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])
    expected = [(score - 0.5) / 2.0 for score in scores] if normalize else scores
    assert found[1] == pytest.approx(expected, abs=1e-4) and found[2] == pytest.approx(expected, abs=1e-4)
    assert found[32] == pytest.approx(expected, abs=1e-4) and len({round(score, 3) for score in scores}) == 5


@pytest.mark.slow
def test_a_python_function_rewards_as_in_trl(run_rlhf: Run, rlhf_recipe: Recipe) -> None:
    values = {key: value for key, value in rlhf_recipe.items() if key != "reward_model"}
    output = run_rlhf(values | {"reward_functions": ["gemma2_post.tiny.gold:gold"], "missing_end_penalty": 0.0})
    metrics = metrics_of(output)
    assert metrics["gold"] == metrics["reward"] and -0.25 <= metrics["gold"] <= 1.5


@pytest.mark.slow
def test_a_quantized_reward_model_rewards_nearly_alike(run_rlhf: Run, rlhf_recipe: Recipe, tmp_path: Path) -> None:
    values = rlhf_recipe | {"max_steps": 1}
    exact = json.loads((run_rlhf(values) / "before.json").read_text())
    quantized = values | {"reward_model_load_in": "4bit", "output_dir": str(tmp_path / "quantized")}
    found = json.loads((run_rlhf(quantized) / "before.json").read_text())
    assert found["mean_tokens"] == exact["mean_tokens"], "the same answers"
    assert 1e-6 < abs(found["reward_model"] - exact["reward_model"]) < 0.5
    with pytest.raises(UserError, match="a quantized reward model cannot be sharded by ZeRO-3; remove reward_model_l"):
        rlhf.COMMAND.build(quantized, Launcher(zero_stage=3, saves_16bit_model=True))


# --- watching ---


@pytest.mark.slow
def test_what_is_watched_is_written_with_answers_to_read(run_rlhf: Run, rlhf_recipe: Recipe) -> None:
    output = run_rlhf(rlhf_recipe | {"watch_steps": 1, "graders": ["gemma2_post.tiny.gold:gold"], "max_steps": 2})
    curve = [json.loads(line) for line in (output / "watch.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in curve] == [0, 1, 2]
    for name in ("reward", "reward_model", "missing_end_penalty", "kl_to_start", "kl_to_anchor", "stop_rate", "gold"):
        assert all(name in entry for entry in curve)
    assert curve[-1]["reward"] == pytest.approx(curve[-1]["reward_model"] + curve[-1]["missing_end_penalty"])
    samples = [json.loads(line) for line in (output / "samples" / "step-2.jsonl").read_text().splitlines()]
    assert len(samples) == 5 and samples[0].keys() == {"prompt", "answer", "ended", "reward"}
    assert curve[-1]["reward"] == pytest.approx(sum(sample["reward"] for sample in samples) / 5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, METHODS["LoRA"]], ids=["full", "LoRA"])
def test_a_run_that_passes_its_budget_ends_at_the_last_checkpoint_under_it(
    method: Recipe, run_rlhf: Run, rlhf_recipe: Recipe, tmp_path: Path, trajectories: list[Trajectory]
) -> None:
    values = rlhf_recipe | method | {"watch_steps": 1, "max_steps": 6, "learning_rate": 1e-3, "anchor_mu": 0.5}
    free = run_rlhf(values | {"output_dir": str(tmp_path / "free")})
    curve = [json.loads(line)["kl_to_start"] for line in (free / "watch.jsonl").read_text().splitlines()]
    passed = max(range(2, 7), key=lambda step: curve[step] - max(curve[:step]))
    budget = (max(curve[:passed]) + curve[passed]) / 2
    assert curve[passed] > budget
    output = run_rlhf(values | {"output_dir": str(tmp_path / "held"), "kl_budget": budget})
    metrics = metrics_of(output)
    assert metrics["kept_step"] == passed - 1 and metrics["kl_to_start"] == pytest.approx(curve[passed - 1], rel=1e-3)
    kept = trajectories[0].points[passed - 1]
    now = {name: each for name, each in trajectories[1].trainer.model.named_parameters() if name in kept}
    assert relative_error({name: each.detach() for name, each in now.items()}, kept) < 1e-6
    assert relative_error(saved_anchor(output, method), average(trajectories[0].points[:passed], 0.5)) < 1e-6


@pytest.mark.slow
def test_a_budget_that_is_passed_at_once_says_so(run_rlhf: Run, rlhf_recipe: Recipe) -> None:
    with pytest.raises(UserError, match="kl_budget 1e-09 is passed at the first measurement"):
        run_rlhf(rlhf_recipe | {"kl_budget": 1e-9, "watch_steps": 1})


def test_a_policy_that_never_ends_is_stopped_before_the_first_step(
    run_rlhf: Run, rlhf_recipe: Recipe, model_dir: Path
) -> None:
    with pytest.raises(UserError, match="the policy has collapsed at step 0: none of its answers ends"):
        run_rlhf(rlhf_recipe | {"model_name_or_path": str(model_dir), "max_completion_length": 3})


@pytest.mark.slow
def test_weights_that_explode_stop_the_run_and_the_last_good_checkpoint_is_named(
    run_rlhf: Run, rlhf_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on; the first was good."""

    class Explode(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_) -> None:
            if state.global_step == 1:
                optimizer.param_groups[0]["lr"] = 3e38

    run = training.run

    def explode_and_run(*arguments: object, **further: object) -> None:
        arguments[2].add_callback(Explode())
        run(*arguments, **further)

    monkeypatch.setattr(training, "run", explode_and_run)
    with pytest.raises(UserError, match=r"weights are NaN or infinite at step 2; the last good .* is checkpoint-1 in"):
        run_rlhf(rlhf_recipe | {"watch_steps": 1, "max_steps": 4})


def test_distinctness_counts_answers_and_pairs_of_tokens() -> None:
    answers = [Answer("a b", [], [1, 2, 3]), Answer("a b", [], [1, 2, 3]), Answer("c", [], [4])]
    assert distinctness(answers) == {"distinct_answers": 2 / 3, "distinct_bigrams": 2 / 4}


# --- mistakes ---


def unfinished(recipe: Recipe, folder: Path) -> Recipe:
    copied = shutil.copytree(recipe["reward_model"], folder / "unfinished")
    (copied / "begun.json").write_text("{}")
    return recipe | {"reward_model": str(copied)}


def adapter_only(recipe: Recipe, folder: Path) -> Recipe:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return recipe | {"reward_model": str(folder / "adapter")}


def policy_adapter(recipe: Recipe, folder: Path) -> Recipe:
    return adapter_only(recipe, folder) | {
        "model_name_or_path": str(folder / "adapter"),
        "reward_model": recipe["reward_model"],
    }


def no_prompts(recipe: Recipe, folder: Path) -> Recipe:
    return recipe | {"datasets": [{"path": str(write_prompts(folder / "none.jsonl", "train", 0))}]}


def no_spread(recipe: Recipe, folder: Path) -> Recipe:
    copied = shutil.copytree(recipe["reward_model"], folder / "constant")
    sealed = json.loads((copied / "reward_model.json").read_text())
    (copied / "reward_model.json").write_text(json.dumps(sealed | {"spread": 0.0}))
    return recipe | {"reward_model": str(copied)}


def other_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    return with_model(swap_two_tokens)(recipe, folder)


BAD = {
    "beta 0 with an anchor": (with_values(beta=0.0), "beta is 0, so the anchor ema holds nothing"),
    "beta without an anchor": (with_values(anchor="none"), "anchor is none with beta 0.1; write beta: 0"),
    "negative beta": (with_values(beta=-0.1), "beta is -0.1; write 0 or more"),
    "mu of 0": (with_values(anchor_mu=0.0), "anchor_mu is 0; write a number above 0, at most 1"),
    "mu above 1": (with_values(anchor_mu=1.5), "anchor_mu is 1.5; write a number above 0, at most 1"),
    "group size": (with_values(num_generations=3), "global_batch_size 8 does not divide by num_generations 3"),
    "group of one": (with_values(num_generations=1), "num_generations is 1; write 2 or more"),
    "TRL's own anchor": (
        with_values(sync_ref_model=True),
        "sync_ref_model must not be set: TRL's average stands still",
    ),
    "unfinished reward model": (unfinished, "unfinished is not finished"),
    "reward adapter": (adapter_only, "adapter is an adapter, not a model"),
    "reward of another tokenizer": (other_tokenizer, "was trained with another tokenizer than the policy's"),
    "a policy as reward model": (with_values(reward_model=TEACHER), "is a language model, not a reward model"),
    "policy adapter": (policy_adapter, "adapter is an adapter, not a model"),
    "no rewards": (with_values(reward_model=None), "nothing rewards the answers"),
    "bonus for cut answers": (with_values(missing_end_penalty=-1.0), "missing_end_penalty is -1; write 0 or more"),
    "no prompts": (no_prompts, "none.jsonl: the file is empty"),
    "answers that the reward model has not seen": (
        with_values(max_completion_length=300),
        "leaves 0 of the reward model's 192 positions",
    ),
    "prompts that do not fit": (
        with_values(max_completion_length=600, reward_model=None, reward_functions=["gemma2_post.tiny.gold:gold"]),
        "leaves 0 of the model's 512 positions",
    ),
    "few prompts": (
        with_values(num_generations=2, global_batch_size=64, per_device_train_batch_size=64),
        "24 prompts are",
    ),
    "a function that needs a column": (
        with_values(reward_functions=["gemma2_post.tiny.gold:gold"], columns=["skill"]),
        "gemma2_post.tiny.gold:gold cannot be called with completions and the columns",
    ),
    "no steps between": (with_values(watch_steps=0), "watch_steps is 0; write 1 or more"),
    "no budget": (with_values(kl_budget=0.0), "kl_budget is 0; write a number above 0"),
    "one checkpoint": (with_values(save_total_limit=1), "save_total_limit is 1, but the last checkpoint is needed"),
    "own checkpoints": (with_values(save_steps=10), "save_steps must not be set: a checkpoint is written at each"),
    "weights of rewards": (
        with_values(reward_weights=[1.0]),
        "1 values for 2 rewards (reward_model, missing_end_penalty)",
    ),
    "no spread": (no_spread, "recorded a spread of 0, by which nothing can be normalized"),
    "no watching": (with_values(num_samples=0), "num_samples is 0, so nobody would watch the policy"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence_with_status_2_before_the_policy_is_loaded(
    change: Callable,
    message: str,
    rlhf_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(policies, "load_policy", lambda *_: pytest.fail("the policy was loaded"))
    file = tmp_path / "bad.yaml"
    values = {key: value for key, value in change(rlhf_recipe, tmp_path).items() if value is not None}
    file.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["rlhf", "--config", str(file)])
    with pytest.raises(SystemExit) as exit:
        rlhf.COMMAND.launch()
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_restored_anchor_lives_where_the_fp32_policy_does(tmp_path: Path) -> None:
    """ZeRO-2 may offload it; here it is on the device `meta`, and the trainer on the CPU."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0)
    anchor = EmaAnchor(SimpleNamespace(accelerator=accelerator, is_deepspeed_enabled=False), mu=0.5)
    policy, reference = (torch.nn.Parameter(torch.zeros(3, device="meta")) for _ in range(2))
    anchor.tracked = {"weight": (policy, reference)}
    save_file({"weight": torch.ones(3)}, tmp_path / "anchor-00000.safetensors")
    anchor.restore(tmp_path)
    assert anchor.shadows["weight"].device == policy.device
    anchor.on_step_end(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl())
