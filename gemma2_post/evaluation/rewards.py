"""The rewards of RLHF as functions that TRL calls: the reward model and what is added to its score."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from gemma2_post.data.functions import load_grader
from gemma2_post.data.turns import Message
from gemma2_post.evaluation.keys import RewardFunctionArguments
from gemma2_post.models import reward_model
from gemma2_post.models.tokens import STOP_TOKEN_IDS
from gemma2_post.stage.errors import OneProcessError, UserError

RewardFunction = Callable[..., list[float]]
"""TRL calls it with `prompts` and `completions` (messages), `completion_ids`, and the columns of the rows."""
_GIVEN_BY_TRL = ["prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"]


def load_reward_functions(
    args: RewardFunctionArguments,
    columns: list[str],
    score: "ModelReward | None" = None,
    weights: list[float] | None = None,
) -> list[RewardFunction]:
    """The reward model, if there is one, the recipe's functions, and its penalties.

    Args:
        columns: Names of the rows' columns.
        weights: Weights of the rewards; if given, one for each.
    """
    given = [*_GIVEN_BY_TRL, *(column for column in columns if column != "prompt")]
    functions: list[RewardFunction] = [score] if score else []
    functions += [load_grader(path, given) for path in args.reward_functions or []]
    if args.missing_end_penalty:
        functions.append(missing_end(args.missing_end_penalty))
    if args.length_penalty:
        functions.append(length(args.length_penalty))
    if weights and len(weights) != len(functions):
        names = ", ".join(function.__name__ for function in functions)
        raise UserError(
            f"reward_weights has {len(weights)} values for {len(functions)} rewards ({names}); give one for each"
        )
    return functions


def values_of(
    functions: list[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    answers: list[list[int]],
    columns: dict[str, list],
    trainer_state: TrainerState | None = None,
) -> dict[str, list[float]]:
    """The rewards that training would give to answers, by function, computed outside of training.

    Args:
        answers: Token ids, with the stop token if the answer ended.
        columns: The rows' columns, by name.
    """
    texts = [tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in answers]  # as TRL does
    return {
        function.__name__: function(
            prompts=prompts,
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=answers,
            trainer_state=trainer_state,
            log_extra=lambda *_: None,
            log_metric=lambda *_: None,
            **columns,
        )
        for function in functions
    }


class ModelReward:
    """The reward model's score of each conversation, computed in right-padded batches.

    Checks the reward model when it is created; loads the weights later, when a trainer can shard them like the policy.
    """

    __name__ = "reward_model"

    def __init__(self, args: RewardFunctionArguments, tokenizer: PreTrainedTokenizerBase):
        assert args.reward_model is not None, "created only for recipes that name a reward model"
        self.path, self.args, self.tokenizer = args.reward_model, args, tokenizer
        sealed: dict[str, Any] = reward_model.check(self.path, tokenizer)
        if args.normalize_rewards and not sealed["spread"] > 0:
            raise UserError(
                f"{self.path} recorded a spread of {sealed['spread']:g}, by which nothing can be "
                "normalized; write normalize_rewards: false, or train it again with more num_samples"
            )
        self.max_length: int = sealed["max_length"]
        """Length limit of its training conversations, in tokens."""

    def load(self, device: torch.device, prepare: Callable[[PreTrainedModel], torch.nn.Module]) -> None:
        """Loads the weights, quantized ones onto this device; `prepare` moves or shards any others."""
        quantization = self.args.reward_model_load_in
        self.loaded = reward_model.load(self.path, self.tokenizer, prepare, quantization, device)

    def __call__(self, prompts: list[list[Message]], completions: list[list[Message]], **_: object) -> list[float]:
        scores = self.raw([[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)])
        if self.args.normalize_rewards:
            scores = [(score - self.loaded.mean) / self.loaded.spread for score in scores]
        return scores

    def raw(self, conversations: list[list[Message]]) -> list[float]:
        """The scores of conversations as the reward model gives them."""
        scores = reward_model.score(self.loaded.model, self.tokenizer, conversations, self.args.reward_batch_size)
        if not all(map(math.isfinite, scores)):
            raise OneProcessError(f"reward_model {self.path} gives scores that are NaN or infinite")
        return scores


def weighted(by_function: dict[str, list[float]], weights: list[float] | None = None) -> list[float]:
    """The reward of each answer: the sum of its rewards by function, with these weights (None: 1 each)."""
    weights = weights or [1.0] * len(by_function)
    return [sum(map(operator.mul, weights, each)) for each in zip(*by_function.values(), strict=True)]


def as_trained(
    args: RewardFunctionArguments, trained: Mapping[str, Any], policy: str
) -> tuple[RewardFunctionArguments, list[float] | None]:
    """How a policy's answers were rewarded in training, with the weights of the rewards.

    Args:
        args: What the recipe of a front says; the reward model and its batch size are kept.
        trained: The keys that the policy was trained with.
        policy: Name of the policy, for errors.

    Raises:
        UserError: The recipe sets another value than the policy was trained with.
    """
    taken: dict[str, Any] = {}
    for each in fields(args):
        if each.name not in ("reward_model", "reward_batch_size"):
            said, was = getattr(args, each.name), trained.get(each.name, each.default)
            if said not in (each.default, was):
                raise UserError(
                    f"{each.name} is {said}, but {policy} was trained with {was}; remove it, because a front is "
                    "rewarded as its policies were"
                )
            taken[each.name] = was
    return replace(args, **taken), trained.get("reward_weights")


def missing_end(penalty: float) -> RewardFunction:
    """A penalty for answers without a stop token, which TRL renders as if they had ended."""

    def missing_end_penalty(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [0.0 if ids and ids[-1] in STOP_TOKEN_IDS else -penalty for ids in completion_ids]

    return missing_end_penalty


def length(penalty: float) -> RewardFunction:
    """A penalty for each token of an answer."""

    def length_penalty(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [-penalty * len(ids) for ids in completion_ids]

    return length_penalty
