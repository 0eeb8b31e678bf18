"""J-BOND: the paper's reward, its gradient in TRL's trainer, and everything else as in RLOO."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from gemma2_post import rlhf
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.training import jbond
from gemma2_post.training import run as training
from gemma2_post.training.jbond import advantages, backward_rewards, leave_one_out
from tests.test_distill import metrics_of, same_weights
from tests.test_rlhf import LORA, METHODS, average, relative_error, saved_anchor, trajectories  # noqa: F401

Run = Callable[[dict[str, object]], Path]
Recipe = dict[str, object]


@pytest.fixture
def jbond_recipe(rlhf_recipe: Recipe) -> Recipe:
    """Four prompts a step."""
    kept = {key: value for key, value in rlhf_recipe.items() if key != "num_generations"}
    batch = {"global_batch_size": 12, "per_device_train_batch_size": 12}
    return kept | batch | {"algorithm": "jbond", "beta": 0.0}


# --- the algorithm ---


def some_rewards(num_prompts: int) -> torch.Tensor:
    """Rewards with ties, as judges give them."""
    return torch.randint(0, 4, (num_prompts, 3), generator=torch.manual_seed(0)).double()


def test_the_reward_is_strict_and_calibrated_over_two_answers_of_the_anchor() -> None:
    """Exactly, over all pairs of answers of an anchor with ties: -log 16 (1 - p)^2 (appendix A.4)."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    anchor = torch.tensor([0.1, 0.25, 0.15, 0.2, 0.3], dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    probabilities = anchor[pairs].prod(1)
    for reward in rewards:
        groups = torch.cat([reward.expand(25, 1), rewards[pairs]], dim=1)
        expected = -math.log(16) * (1 - anchor[rewards <= reward].sum()) ** 2
        assert (probabilities * backward_rewards(groups)).sum().item() == pytest.approx(expected.item(), abs=1e-12)
    assert -math.log(16) * 0.5**2 == pytest.approx(math.log(0.5))  # where it equals the reward of best-of-n
    assert backward_rewards(torch.tensor([[1.0, 1.0, 2.0], [0.9, 1.0, 2.0], [1.5, 1.0, 2.0]])).tolist() == [
        0.0,
        pytest.approx(-math.log(16)),
        0.0,
    ]


def test_advantages_are_those_of_the_paper() -> None:
    rewards, log_ratios = (
        torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 0.5, 2.0]]),
        torch.tensor([0.1, -0.2, 0]),
    )
    returns = [-math.log(16) - 0.1, 0.2, -math.log(16)]
    assert leave_one_out(torch.tensor(returns)).tolist() == pytest.approx(
        [(returns[1] + returns[2]) / 2, (returns[0] + returns[2]) / 2, (returns[0] + returns[1]) / 2]
    )
    found = advantages(rewards, log_ratios, backward_weight=0.3, beta=2.0)
    for i, (own, better, empty) in enumerate(found.tolist()):
        baseline = (sum(returns) - returns[i]) / 2
        assert own == pytest.approx(0.3 * (returns[i] - baseline) - 2.0 * log_ratios[i].item(), abs=1e-6)
        assert better == pytest.approx(0.7) and own + better + empty == pytest.approx(0, abs=1e-6)


def test_only_the_order_of_rewards_counts() -> None:
    rewards, log_ratios = some_rewards(50), torch.randn(50, dtype=torch.float64)
    found = advantages(rewards, log_ratios, 0.5, 1.0)
    assert torch.equal(found, advantages(rewards.exp() - 7, log_ratios, 0.5, 1.0))
    assert not torch.equal(found, advantages(-rewards, log_ratios, 0.5, 1.0))
    assert torch.equal(rewards[:, 1:].argmax(1), (rewards.exp() - 7)[:, 1:].argmax(1))


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_the_expected_gradient_is_that_of_the_objective(beta: float) -> None:
    """Of a table of answers, in float64, over all groups: half of both KLs' parts, plus beta KL(policy || anchor)."""
    rewards = torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    logits = torch.tensor([0.3, -0.4, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    policy = logits.log_softmax(0)
    log_ratios = policy.detach() - anchor.log()
    groups = torch.cartesian_prod(*[torch.arange(4)] * 3)  # the policy's answer, and two of the anchor
    weights = policy.detach().exp()[groups[:, 0]] * anchor[groups[:, 1:]].prod(1)
    returns = backward_rewards(rewards[groups]) - log_ratios[groups[:, 0]]
    # A baseline that does not depend on the answer changes no expectation: that of one other prompt, always the same.
    found = torch.zeros_like(logits)
    for group, weight, own_return in zip(groups, weights, returns, strict=True):
        other = torch.tensor([1, 0, 2])
        pair = torch.stack([group, other])
        own, better, _ = advantages(rewards[pair], log_ratios[pair[:, 0]], 0.5, beta)[0]
        assert own == pytest.approx(
            0.5 * (own_return - (0 - log_ratios[1])).item() - beta * log_ratios[group[0]].item(), abs=1e-12
        )
        best = group[1 + int(rewards[group[1:]].argmax())]
        (gradient,) = torch.autograd.grad(own * policy[group[0]] + better * policy[best], logits, retain_graph=True)
        found += weight * gradient

    best_of_two = torch.zeros(4, dtype=torch.float64)
    for first, second in torch.cartesian_prod(torch.arange(4), torch.arange(4)):
        best = first if rewards[first] >= rewards[second] else second
        best_of_two[best] += anchor[first] * anchor[second]
    p = torch.stack([anchor[rewards <= reward].sum() for reward in rewards])
    kl = (policy.exp() * (policy - anchor.log())).sum()
    forward, backward = -(best_of_two * policy).sum(), kl - (policy.exp() * -math.log(16) * (1 - p) ** 2).sum()
    (expected,) = torch.autograd.grad(-(0.5 * forward + 0.5 * backward + beta * kl), logits)
    assert torch.allclose(found, expected, atol=1e-12)


# --- in TRL's trainer ---


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float64, with its own forward function; TRL has put another one, bound to the model, in its place."""
    copied = copy.deepcopy(model).double()
    for module in copied.modules():
        module.__dict__.pop("forward", None)
    return copied


class Gradients(TrainerCallback):
    """J-BOND's gradient by hand, in float64, beside TRL's, at each step."""

    def __init__(self, trainer: GRPOTrainer, monkeypatch: pytest.MonkeyPatch, beta: float):
        self.trainer, self.beta = trainer, beta
        self.steps: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        self.log_ratios: list[float] = []
        sample, weighted = jbond.sample, jbond.weighted

        def remember_answers(trainer: GRPOTrainer, prompt_ids: list[list[int]], of_anchor: bool) -> list[list[int]]:
            found = sample(trainer, prompt_ids, of_anchor)
            if of_anchor:
                self.anchors = [found[i : i + 2] for i in range(0, len(found), 2)]
            else:
                self.prompts, self.own = prompt_ids, found
            return found

        def remember_rewards(*arguments: object) -> list[float]:
            found = weighted(*arguments)
            self.rewards = [found[i : i + 3] for i in range(0, len(found), 3)]
            return found

        monkeypatch.setattr(jbond, "sample", remember_answers)
        monkeypatch.setattr(jbond, "weighted", remember_rewards)

    def log_probability(self, model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.9
        return logits.log_softmax(-1)[range(len(answer)), answer].sum()

    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        trainer, policy = self.trainer, in_float64(self.trainer.model)
        reference = in_float64(trainer.ref_model) if trainer.ref_model is not None else None
        own, ratios, returns = [], [], []
        for prompt, answer, (mine, *others) in zip(self.prompts, self.own, self.rewards, strict=True):
            own.append(self.log_probability(policy, prompt, answer))
            with torch.no_grad():
                if reference is not None:
                    anchored = self.log_probability(reference, prompt, answer)
                else:
                    with use_adapter(policy, "ref"):
                        anchored = self.log_probability(policy, prompt, answer)
            ratios.append((own[-1] - anchored).item())
            returns.append((-math.log(16) if mine < min(others) else 0.0) - ratios[-1])
        loss, n = torch.zeros((), dtype=torch.float64), len(own)
        for i, (prompt, pair, (_, first, second)) in enumerate(
            zip(self.prompts, self.anchors, self.rewards, strict=True)
        ):
            best = self.log_probability(policy, prompt, pair[second > first])
            baseline = (sum(returns) - returns[i]) / (n - 1)
            loss = loss - 0.5 * best - 0.5 * own[i] * (returns[i] - baseline) + self.beta * own[i] * ratios[i]
        trained = {name: each for name, each in policy.named_parameters() if each.requires_grad}
        by_hand = torch.autograd.grad(loss / n, list(trained.values()))
        self.log_ratios += ratios
        found = {name: each.grad.clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
        self.steps.append((found, dict(zip(trained, by_hand, strict=True))))


def far_apart(completions: list[str], **_: object) -> list[float]:
    """As a function may reward what cannot be parsed; in float32, a billion takes all that is added to it away."""
    return [-1e9 - len(completion) for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rows"),
    [({}, 12), ({}, 4), (LORA, 12), ({"reward_functions": ["tests.test_jbond:far_apart"]}, 12)],
    ids=["full", "full, accumulated", "LoRA", "rewards far apart"],
)
def test_the_gradient_is_the_one_written_by_hand(
    method: Recipe, rows: int, run_rlhf: Run, jbond_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once policy and anchor differ, with answers of different lengths, and a temperature."""
    seen, run = [], training.run

    def remember_and_run(*arguments: object, **further: object) -> None:
        seen.append(Gradients(arguments[2], monkeypatch, beta=0.7))
        arguments[2].add_callback(seen[-1])
        run(*arguments, **further)

    monkeypatch.setattr(training, "run", remember_and_run)
    rate = 3e-2 if method else 1e-3
    changes = {"max_steps": 3, "learning_rate": rate, "max_grad_norm": 0.0, "temperature": 0.9, "beta": 0.7}
    run_rlhf(jbond_recipe | method | changes | {"per_device_train_batch_size": rows, "seed": 3})
    (gradients,) = seen
    assert len(gradients.steps) == 3 and max(map(abs, gradients.log_ratios)) > 0.01
    for found, by_hand in gradients.steps:
        assert by_hand.keys() == found.keys() and relative_error(found, by_hand) < 1e-5


@pytest.mark.slow
def test_a_large_beta_keeps_the_policy_at_its_anchor(run_rlhf: Run, jbond_recipe: Recipe, tmp_path: Path) -> None:
    """And without one the anchor's best answers draw the policy away from it."""
    values = jbond_recipe | {"anchor": "start", "max_steps": 12, "learning_rate": 5e-4}
    free, held = (
        metrics_of(run_rlhf(values | {"beta": beta, "output_dir": str(tmp_path / f"beta-{beta:g}")}))["kl_to_start"]
        for beta in (0.0, 30.0)
    )
    assert held < 0.5 * free and free > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_anchor_is_the_closed_form_of_the_average(
    method: Recipe,
    run_rlhf: Run,
    jbond_recipe: Recipe,
    trajectories: list,  # noqa: F811
) -> None:
    output = run_rlhf(jbond_recipe | method | {"max_steps": 4, "anchor_mu": 0.1})
    (trajectory,) = trajectories
    assert relative_error(saved_anchor(output, method), average(trajectory.points, 0.1)) < 1e-6
    first = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert not same_weights(output, Path(jbond_recipe["model_name_or_path"]))


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, METHODS["QLoRA"]], ids=["full", "QLoRA"])
def test_resumed_equals_uninterrupted(
    method: Recipe,
    run_rlhf: Run,
    jbond_recipe: Recipe,
    tmp_path: Path,
    trajectories: list,  # noqa: F811
) -> None:
    values = jbond_recipe | method | {"max_steps": 4, "watch_steps": 2}
    whole = run_rlhf(values | {"output_dir": str(tmp_path / "whole")})
    resumed = tmp_path / "resumed" / "policy-0"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    begun = json.loads((whole / "stage.json").read_text())["fingerprint"]
    (resumed / "begun.json").write_text(json.dumps({"fingerprint": begun}))
    for file in ("before.json", "watch.jsonl"):
        shutil.copy(whole / file, resumed / file)
    assert run_rlhf(values | {"output_dir": str(tmp_path / "resumed")}) == resumed
    assert len(trajectories[1].points) == 3 and same_weights(whole, resumed)
    first, second = saved_anchor(whole, method), saved_anchor(resumed, method)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_what_is_watched_is_the_reward_of_the_policy_and_a_budget_ends_the_run(
    run_rlhf: Run, jbond_recipe: Recipe, tmp_path: Path
) -> None:
    values = jbond_recipe | {"watch_steps": 1, "max_steps": 5, "learning_rate": 1e-3, "anchor_mu": 0.5}
    values |= {"reward_functions": ["gemma2_post.tiny.gold:gold"], "reward_weights": [1.0, 2.0, 1.0]}
    free = run_rlhf(values | {"output_dir": str(tmp_path / "free")})
    curve = [json.loads(line) for line in (free / "watch.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in (free / "log.jsonl").read_text().splitlines()][:5]
    assert [entry["step"] for entry in curve] == [0, 1, 2, 3, 4, 5]
    for entry in curve:
        parts = entry["reward_model"], entry["gold"], entry["missing_end_penalty"]
        assert entry["reward"] == pytest.approx(parts[0] + 2 * parts[1] + parts[2])
    for entry in log:
        parts = (entry[f"rewards/{name}/mean"] for name in ("reward_model", "gold", "missing_end_penalty"))
        assert entry["reward"] == pytest.approx(
            sum(w * each for w, each in zip([1, 2, 1], parts, strict=True)), abs=1e-5
        )
    kls = [entry["kl_to_start"] for entry in curve]
    passed = max(range(2, 6), key=lambda step: kls[step] - max(kls[:step]))
    budget = (max(kls[:passed]) + kls[passed]) / 2
    held = metrics_of(run_rlhf(values | {"output_dir": str(tmp_path / "held"), "kl_budget": budget}))
    assert held["kept_step"] == passed - 1 and held["kl_to_start"] == pytest.approx(kls[passed - 1], rel=1e-3)


# --- mistakes ---

BAD = {
    "no anchor": ({"anchor": "none"}, "anchor is none, but J-BOND learns from the anchor's answers; write ema or sta"),
    "group size": ({"num_generations": 4}, "num_generations is 4, but J-BOND samples 3 answers a prompt; remove it"),
    "batch": ({"global_batch_size": 8}, "global_batch_size 8 does not divide by num_generations 3"),
    "one prompt": (
        {"global_batch_size": 3, "per_device_train_batch_size": 3},
        "global_batch_size is 3; write 6 or more, because J-BOND's baseline is the return of other prompts",
    ),
    "RLOO's keys": ({"normalize_advantages": True}, "normalize_advantages and reward_clip_range do nothing in J-BOND"),
    "weight": ({"backward_weight": 1.5}, "backward_weight is 1.5; write 0 or more, at most 1"),
    "weight without J-BOND": (
        {"algorithm": "rloo", "backward_weight": 0.3, "num_generations": 2, "beta": 0.1},
        "backward_weight does nothing without algorithm: jbond; remove it",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_refused_before_anything_is_loaded(changes: Recipe, message: str, jbond_recipe: Recipe) -> None:
    with pytest.raises(UserError, match=message):
        rlhf.COMMAND.build(jbond_recipe | changes)


def test_each_process_needs_whole_groups(jbond_recipe: Recipe) -> None:
    values = jbond_recipe | {"global_batch_size": 18, "per_device_train_batch_size": 3}
    rlhf.COMMAND.build(values, Launcher(num_processes=2))
    rlhf.COMMAND.build(values, Launcher(num_processes=3))
    values["global_batch_size"] = 12
    with pytest.raises(UserError, match="12 does not divide by J-BOND's 3 answers a prompt x 3 processes"):
        rlhf.COMMAND.build(values | {"per_device_train_batch_size": 2}, Launcher(num_processes=3))


def test_other_recipes_outputs_stay_up_to_date(rlhf_recipe: Recipe) -> None:
    same = rlhf_recipe | {"algorithm": "rloo", "backward_weight": 0.5}
    assert rlhf.COMMAND.fingerprint(same) == rlhf.COMMAND.fingerprint(rlhf_recipe)
