"""J-BOND (arXiv 2407.14622, algorithm 2): distills the best of two answers of a moving anchor into the policy.

TRL's GRPOTrainer trains it as it is, through `rollout_func`. TRL sees a group of three rows for each prompt: the
policy's answer, the better one of two answers of the anchor, and an empty row. GRPO's advantage is a row's reward
minus the mean of its group; the empty row, which has no gradient, makes the advantages of a group add up to 0, so that
each row keeps the one that J-BOND gives it.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, RLOOConfig
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer.utils import pad, use_adapter

from gemma2_post.data.turns import Message
from gemma2_post.evaluation.rewards import RewardFunction, values_of, weighted
from gemma2_post.models.tokens import BOS, EOS, PAD, STOP_TOKEN_IDS
from gemma2_post.weights.anchor import REFERENCE_ADAPTER

ROWS = 3
"""Rows of a prompt: the policy's answer, the better answer of the anchor, and the empty row."""
MOST_LOGGED = 1e3
"""Rewards beyond this, in size, are logged as this."""
BELOW_BOTH = -math.log(16)
"""The reward of an answer below both of the anchor's (equation 17).

Its expectation, -log 16 (1 - p)^2 for an answer that is at least as good as a share p of the anchor's, is log p at
p = 1/2."""


# --- the algorithm ---


def backward_rewards(rewards: torch.Tensor) -> torch.Tensor:
    """-log 16 for an answer that is rewarded less than both of the anchor's, else 0 (equation 17); a tie gives 0.

    Args:
        rewards: (prompts, 3): of the policy's answer, and of the two of the anchor.

    Returns:
        (prompts,), of the same dtype.
    """
    below = rewards[:, 0] < rewards[:, 1:].min(1).values
    return below * torch.full_like(rewards[:, 0], BELOW_BOTH)


def leave_one_out(returns: torch.Tensor) -> torch.Tensor:
    """The baseline of each of at least two answers (answers,): the mean of the others' returns."""
    return (returns.sum() - returns) / (len(returns) - 1)


def advantages(rewards: torch.Tensor, log_ratios: torch.Tensor, backward_weight: float, beta: float) -> torch.Tensor:
    """What the gradient of each row's log-probability is multiplied with, for ascent (algorithm 2).

    With b the weight of the backward KL, R the return r_J-BOND - log(policy / anchor), and B its baseline:
    b (R - B) - beta log(policy / anchor) for the policy's answer, 1 - b for the better one of the anchor, and what
    makes the sum 0 for the empty row. The term with beta is minus the gradient of beta KL(policy || anchor)
    (equation 19); algorithm 2 prints it with the opposite sign, which would push the policy away from the anchor.

    Args:
        rewards: (prompts, 3): of the policy's answer, and of the two of the anchor; all prompts of the step.
        log_ratios: log(policy / anchor) of the policy's whole answers, (prompts,), in nats.
        backward_weight: b, in [0, 1]; the paper's beta.
        beta: Weight of the KL to the anchor; the paper's gamma.

    Returns:
        (prompts, 3), of the same dtype.
    """
    returns = backward_rewards(rewards) - log_ratios
    own = backward_weight * (returns - leave_one_out(returns)) - beta * log_ratios
    better = torch.full_like(own, 1 - backward_weight)
    return torch.stack([own, better, -own - better], dim=1)


# --- in TRL's trainer ---


def jbond_trainer(
    policy: PreTrainedModel | PeftModel,
    args: RLOOConfig,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    functions: list[RewardFunction],
    backward_weight: float,
) -> GRPOTrainer:
    """TRL's trainer with J-BOND's answers and advantages; its gradient is J-BOND's, a mean over the step's prompts.

    Args:
        args: Those of RLOO with the same batch: `num_generations` is `ROWS`.
        functions: The reward functions, with the weights in `args`.
    """
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[jbond],
        args=_grpo_config(args),
        train_dataset=rows.with_transform(carry_columns),
        processing_class=tokenizer,
        rollout_func=Rollout(functions, args.reward_weights, backward_weight, args.beta),
    )
    trainer.beta = 0.0  # its reference is the anchor, but GRPO's own KL, which is another estimator, stays out
    return trainer


def _grpo_config(args: RLOOConfig) -> GRPOConfig:
    shared = {field.name for field in fields(GRPOConfig) if field.init}
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name in shared}
    values["steps_per_generation"] = None  # follows from generation_batch_size
    values["reward_weights"] = None  # `Rollout` has them
    values["beta"] = args.beta or 1.0  # 0 would make no reference
    # The log-probability of a row is summed over its tokens, and the loss averaged over rows.
    loss = {"loss_type": "luspo", "importance_sampling_level": "sequence", "scale_rewards": "none"}
    return GRPOConfig(**values | loss)


def carry_columns(batch: dict[str, list]) -> dict[str, list]:
    """Puts each row's columns into its prompt's last message, because TRL's rollout functions see only prompts."""
    others = [name for name in batch if name != "prompt"]
    prompts = [
        [*prompt[:-1], prompt[-1] | {"columns": {name: batch[name][i] for name in others}}]
        for i, prompt in enumerate(batch["prompt"])
    ]
    return batch | {"prompt": prompts}


def jbond(
    advantage: list[float], measured: list[dict[str, float]], log_metric: Callable[[str, float], None], **_: object
) -> list[float]:
    """TRL's reward function: returns what `Rollout` has computed, and logs what it has measured."""
    for name, value in measured[0].items():
        log_metric(name, value)
    return advantage


class Rollout:
    """TRL's `rollout_func`: samples the answers of a step, rewards them, and computes the advantages of their rows."""

    def __init__(
        self, functions: list[RewardFunction], weights: list[float] | None, backward_weight: float, beta: float
    ):
        self.functions, self.weights = functions, weights
        self.backward_weight, self.beta = backward_weight, beta

    def __call__(self, prompts: list[list[dict[str, Any]]], trainer: GRPOTrainer) -> dict[str, object]:
        """The rows of this process's prompts, each of which comes `ROWS` times, one after the other."""
        prompts = prompts[::ROWS]
        columns = [prompt[-1].pop("columns") for prompt in prompts]
        tokenized = trainer.processing_class.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)
        prompt_ids = tokenized["input_ids"]
        own = sample(trainer, prompt_ids, of_anchor=False)
        others = sample(trainer, [ids for ids in prompt_ids for _ in range(2)], of_anchor=True)
        values = self._values(trainer, prompts, columns, own, others)
        log_ratios = log_probabilities(trainer, prompt_ids, own, of_anchor=False)
        log_ratios -= log_probabilities(trainer, prompt_ids, own, of_anchor=True)
        rewards = torch.tensor(weighted(values, self.weights), dtype=torch.float64).view(-1, ROWS)
        better = [others[2 * i + j] for i, j in enumerate(rewards[:, 1:].argmax(1).tolist())]

        # The baseline is that of the whole step, over all processes.
        device, first = trainer.accelerator.device, trainer.accelerator.process_index * len(prompts)
        lengths = torch.tensor([len(answer) for answer in own], dtype=torch.float64, device=device)
        local = torch.cat([rewards.to(device), log_ratios[:, None], lengths[:, None]], dim=1)
        everywhere = trainer.accelerator.gather(local).cpu()
        all_rewards, (log_ratios, lengths) = everywhere[:, :ROWS], everywhere[:, ROWS:].T
        found = advantages(all_rewards, log_ratios, self.backward_weight, self.beta)
        # TRL averages over the rows and takes away the mean of each group: the policy's reward, which it so logs. It
        # does so in float32, in which the advantages beside a reward of a million would be rounded away.
        logged = rewards[:, :1].clamp(-MOST_LOGGED, MOST_LOGGED)
        found = ROWS * found[first : first + len(prompts)] + logged
        rows = [row for pair in zip(own, better, strict=True) for row in (*pair, None)]
        return {
            "prompt_ids": [ids for prompt in prompt_ids for ids in (prompt, prompt, [BOS])],
            "completion_ids": [[EOS] if row is None else row for row in rows],
            "env_mask": [[0] if row is None else [1] * len(row) for row in rows],
            "logprobs": None,
            "advantage": found.flatten().tolist(),
            "measured": {
                "kl": float(log_ratios.sum() / lengths.sum()),
                "below_both": float((backward_rewards(all_rewards) < 0).double().mean()),
                **{f"rewards/{name}/mean": mean(each[::ROWS]) for name, each in values.items()},
            },
        }

    def _values(
        self,
        trainer: GRPOTrainer,
        prompts: list[list[Message]],
        columns: list[dict[str, object]],
        own: list[list[int]],
        others: list[list[int]],
    ) -> dict[str, list[float]]:
        """The rewards of all answers by function, `ROWS` to a prompt: the policy's, then the anchor's."""
        return values_of(
            self.functions,
            trainer.processing_class,
            [prompt for prompt in prompts for _ in range(ROWS)],
            [answer for group in zip(own, others[::2], others[1::2], strict=True) for answer in group],
            {name: [each[name] for each in columns for _ in range(ROWS)] for name in columns[0]},
            trainer.state,
        )


def sample(trainer: GRPOTrainer, prompt_ids: list[list[int]], of_anchor: bool) -> list[list[int]]:
    """An answer to each prompt, sampled by the policy or by its anchor as the trainer's arguments say.

    Returns:
        Token ids, with the stop token if the answer ended.
    """
    args, wrapped = trainer.args, trainer.model_wrapped
    if of_anchor and trainer.ref_model is not None:
        wrapped = trainer.ref_model
    ids, mask = _padded(prompt_ids, "left", trainer.accelerator.device)
    with (
        unwrap_model_for_generation(
            wrapped,
            trainer.accelerator,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as model,
        _adapter(model, of_anchor),
        torch.no_grad(),
    ):
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=trainer.generation_config)
    answers = found[:, ids.shape[1] :].tolist()
    ends = [next((i + 1 for i, each in enumerate(answer) if each in STOP_TOKEN_IDS), None) for answer in answers]
    return [answer[:end] for answer, end in zip(answers, ends, strict=True)]


def log_probabilities(
    trainer: GRPOTrainer, prompt_ids: list[list[int]], answers: list[list[int]], of_anchor: bool
) -> torch.Tensor:
    """log p(answer | prompt) under the policy or its anchor, summed over the answer's tokens: (answers,), float64."""
    device = trainer.accelerator.device
    prompts, prompt_mask = _padded(prompt_ids, "left", device)
    completions, mask = _padded(answers, "right", device)
    model = trainer.model
    if of_anchor and trainer.ref_model is not None:
        model = trainer.ref_model
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        _adapter(trainer.accelerator.unwrap_model(model), of_anchor),
    ):
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            model,
            torch.cat([prompts, completions], dim=1),
            torch.cat([prompt_mask, mask], dim=1),
            completions.shape[1],
            batch_size=trainer.args.per_device_train_batch_size,
        )
    return torch.where(mask.bool(), found, 0.0).double().sum(1)


def _adapter(model: torch.nn.Module, of_anchor: bool) -> AbstractContextManager:
    is_adapter = of_anchor and isinstance(model, PeftModel)
    return use_adapter(model, REFERENCE_ADAPTER) if is_adapter else nullcontext()


def _padded(rows: list[list[int]], side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest)."""
    ids = [torch.tensor(row) for row in rows]
    mask = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side=side)
    return pad(ids, padding_value=PAD, padding_side=side).to(device), mask.to(device)
