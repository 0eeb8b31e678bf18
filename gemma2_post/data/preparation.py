"""Turns rows into what trainers read: splits, balanced turns, token ids; drops and counts what is too long."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.keys import DataArguments
from gemma2_post.data.sources import load_conversations
from gemma2_post.models.tokenizer import render
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)


def split_held_out(
    data_args: DataArguments, seed: int, load: Callable[..., Dataset] = load_conversations
) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows; `load` loads sources, as `load_conversations` does.

    Training rows that are held out, too, are dropped and counted.
    """
    settings = data_args.max_invalid_share, seed, data_args.columns
    train = load(data_args.datasets, *settings)
    if data_args.held_out_datasets:
        held_out = load(data_args.held_out_datasets, *settings)
        return _without(train, held_out), held_out
    num_held_out = max(1, round(data_args.held_out_share * len(train)))
    if num_held_out >= len(train):
        raise UserError(
            f"{len(train)} rows cannot be split at held_out_share {data_args.held_out_share}; lower it, or "
            "give more rows"
        )
    parts = train.train_test_split(test_size=num_held_out, seed=seed)
    return _without(parts["train"], parts["test"]), parts["test"]


def _without(train: Dataset, held_out: Dataset) -> Dataset:
    """The training rows whose conversations (prompts, pairs) are not held out."""
    columns = [name for name in ("messages", "prompt", "chosen", "rejected") if name in train.column_names]

    def texts(rows: Dataset) -> list[str]:
        return [json.dumps(row) for row in rows.select_columns(columns)]

    seen, held = texts(train), set(texts(held_out))
    kept = [number for number, text in enumerate(seen) if text not in held]
    if not kept:
        raise UserError(
            "held_out_datasets: every training row is held out, too; hold out rows that are not trained on"
        )
    if num_dropped := len(train) - len(kept):
        logger.warning("dropped %d of %d training rows, because they are held out, too", num_dropped, len(train))
        return train.select(kept)
    return train


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, max_too_long_share: float
) -> Dataset:
    """The rows with their `input_ids` and `labels`; drops and counts rows over `max_length` tokens, never cuts them.

    Rows whose loss no token counts in cannot be here: `read_conversation` refuses them.

    A cut row would lack its `<end_of_turn>`, and the model would learn not to stop.
    """
    columns = ["messages", "trained"]
    rendered = dataset.map(lambda messages, trained: render(tokenizer, messages, trained), input_columns=columns)
    return _drop_too_long(rendered, "rows", "max_length", max_length, max_too_long_share)


def drop_long_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, max_too_long_share: float
) -> Dataset:
    """The rows whose `prompt` has at most `max_prompt_length` tokens in the chat format."""
    rendered = dataset.map(
        lambda prompt: dict(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)),
        input_columns="prompt",
    )
    kept = _drop_too_long(rendered, "prompts", "max_prompt_length", max_prompt_length, max_too_long_share)
    return kept.select_columns(dataset.column_names)


def _drop_too_long(rendered: Dataset, what: str, key: str, max_length: int, max_too_long_share: float) -> Dataset:
    kept = rendered.filter(lambda input_ids: len(input_ids) <= max_length, input_columns="input_ids")
    num_dropped = len(rendered) - len(kept)
    if len(kept) == 0:
        raise UserError(f"all {len(rendered)} {what} are longer than {key} {max_length} tokens; raise {key}")
    if num_dropped > max_too_long_share * len(rendered):
        raise UserError(
            f"{num_dropped} of {len(rendered)} {what} are longer than {key} {max_length} tokens; raise "
            f"{key}, or allow a larger share with max_too_long_share"
        )
    if num_dropped:
        logger.warning("dropped %d of %d %s longer than %d tokens", num_dropped, len(rendered), what, max_length)
    return kept


def balance_turns(pairs: Dataset, multi_turn_share: float, seed: int) -> Dataset:
    """As many of the pairs as possible such that this share is multi-turn."""
    is_multi_turn = [num_turns > 1 for num_turns in pairs["num_turns"]]
    rows = {kind: [row for row, each in enumerate(is_multi_turn) if each == kind] for kind in (True, False)}
    if not rows[True] or not rows[False]:
        raise UserError(
            f"multi_turn_share needs single- and multi-turn pairs, found {len(rows[False])} and "
            f"{len(rows[True])}; remove it"
        )
    total = min(len(rows[True]) / multi_turn_share, len(rows[False]) / (1 - multi_turn_share))
    wanted = {True: round(total * multi_turn_share), False: round(total * (1 - multi_turn_share))}
    random = Random(seed)
    return pairs.select(sorted(row for kind in rows for row in random.sample(rows[kind], wanted[kind])))


def tokenize_pairs(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, max_too_long_share: float
) -> Dataset:
    """The pairs with `chosen_ids` and `rejected_ids`: whole conversations, rendered like the answers of a policy.

    `length` is the length of the longer one, for `train_sampling_strategy: group_by_length`. Drops pairs with a side
    over `max_length` tokens and counts them by number of turns; never cuts them.
    """

    def render(row: dict[str, Any]) -> dict[str, object]:
        ids = {
            f"{side}_ids": tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=True)["input_ids"]
            for side in ("chosen", "rejected")
        }
        return ids | {"length": max(map(len, ids.values()))}

    rendered = pairs.map(render)
    kept = rendered.filter(lambda length: length <= max_length, input_columns="length")
    if len(kept) == len(rendered):
        return kept
    all_turns, kept_turns = Counter(rendered["num_turns"]), Counter(kept["num_turns"])
    by_turns = ", ".join(
        f"{all_turns[turns] - kept_turns[turns]} of {all_turns[turns]} with {turns} user turns"
        for turns in sorted(all_turns)
    )
    num_dropped = len(rendered) - len(kept)
    found = f"{num_dropped} of {len(rendered)} pairs are longer than max_length {max_length} ({by_turns})"
    if len(kept) == 0 or num_dropped > max_too_long_share * len(rendered):
        raise UserError(f"{found}; raise max_length, or allow a larger share with max_too_long_share")
    logger.warning("dropped: %s", found)
    return kept


def check_enough(rows: Dataset, num_needed: int, needed: str, what: str = "prompts") -> None:
    """Refuses fewer rows than one step needs.

    Args:
        needed: `num_needed` in words, for the error.
        what: What the rows are, for the error.
    """
    if len(rows) < num_needed:
        raise UserError(
            f"{len(rows)} {what} are fewer than {needed}, which one step needs; lower it, or give more {what}"
        )
