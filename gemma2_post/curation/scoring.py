"""The models that a curation asks: a reward model, and a tokenizer for lengths."""

from collections.abc import Callable
from functools import cache

import torch

from gemma2_post.curation.keys import Kind, QualityArguments
from gemma2_post.data.turns import Message
from gemma2_post.models import reward_model
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.stage.errors import UserError

Score = Callable[[list[list[Message]]], list[float]]


def load_score(args: QualityArguments, kind: Kind) -> Score | None:
    """Scores conversations with the reward model; None without one. Its weights are loaded when it is first called.

    Raises:
        UserError: It is no finished reward model, or the rows are no conversations.
    """
    if args.min_reward is not None and kind != "conversations":
        raise UserError(f"min_reward is for conversations, and datasets has {kind}; remove it")
    if not args.reward_model:
        return None
    path = args.reward_model
    reward_model.check(path)

    @cache
    def loaded() -> reward_model.RewardModel:
        found = reward_model.load(path)
        found.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return found

    return lambda conversations: reward_model.score(
        loaded().model, loaded().tokenizer, conversations, args.reward_batch_size
    )


def load_tokens(tokenizer: str | None) -> Callable[[str], int] | None:
    """Counts the tokens of a text, without those of the chat format; None without a tokenizer."""
    if not tokenizer:
        return None
    loaded = load_tokenizer(tokenizer, load_config(tokenizer))
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])
