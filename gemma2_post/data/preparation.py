"""From the rows of a mixture to what trainers read: splits, drops and counts what is too long, balances turns.

Nothing here reads a row's texts or tokens: lengths and hashes were written beside them.
"""

import logging
from collections import Counter
from functools import partial
from random import Random

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.encoding import LENGTH
from gemma2_post.data.keys import DataArguments
from gemma2_post.data.mixture import Rows, load_rows
from gemma2_post.data.reading import DIGEST
from gemma2_post.data.rows import RowFormat
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)


def split_held_out(
    data_args: DataArguments, seed: int, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, Rows]:
    """Training rows and held-out rows, tokenized; without pairs that are ties.

    Training rows that are held out, too, are dropped and counted.
    """
    settings = data_args.max_invalid_share, seed, data_args.columns
    load = partial(load_rows, row_format=row_format, tokenizer=tokenizer)
    train = drop_ties(load(data_args.datasets, *settings))
    if data_args.held_out_datasets:
        held_out = drop_ties(load(data_args.held_out_datasets, *settings))
        return _without(train, held_out), held_out
    num_held_out = max(1, round(data_args.held_out_share * len(train)))
    if num_held_out >= len(train):
        raise UserError(
            f"{len(train)} rows cannot be split at held_out_share {data_args.held_out_share}; lower it, or "
            "give more rows"
        )
    drawn = np.random.default_rng(seed).permutation(len(train))  # as `Dataset.train_test_split` draws
    held_out = train.take(drawn[:num_held_out])
    return _without(train.take(drawn[num_held_out:]), held_out), held_out


def drop_ties(rows: Rows, key: str = "datasets") -> Rows:
    """The pairs without ties (equal scores), which do not say which answer is better; other rows as they are.

    Args:
        key: The key of the recipe that names the rows, for the error.

    Raises:
        UserError: All pairs are ties.
    """
    if "is_tie" not in rows.all.column_names:
        return rows
    kept = Rows(rows.all.remove_columns("is_tie"), rows.numbers[~rows.column("is_tie")])
    if len(kept) == 0:
        raise UserError(f"{key}: all {len(rows)} pairs are ties (equal scores); give pairs that differ")
    if len(kept) < len(rows):
        logger.warning("dropped %d of %d pairs as ties (equal scores)", len(rows) - len(kept), len(rows))
    return kept


def _without(train: Rows, held_out: Rows) -> Rows:
    """The training rows whose conversations (prompts, pairs) are not held out."""
    kept = train.take(~np.isin(train.column(DIGEST), held_out.column(DIGEST)))
    if len(kept) == 0:
        raise UserError(
            "held_out_datasets: every training row is held out, too; hold out rows that are not trained on"
        )
    if num_dropped := len(train) - len(kept):
        logger.warning("dropped %d of %d training rows, because they are held out, too", num_dropped, len(train))
    return kept


def drop_too_long(rows: Rows, key: str, max_length: int, max_too_long_share: float) -> Rows:
    """The rows of at most `max_length` tokens; drops and counts the others, never cuts them.

    A cut conversation would lack its `<end_of_turn>`, and the model would learn not to stop. Pairs count by their
    longer side, and are counted by number of turns.

    Args:
        key: The key of the recipe that says `max_length`.

    Raises:
        UserError: None are left, or a larger share than `max_too_long_share` is too long.
    """
    kept = rows.take(rows.column(LENGTH) <= max_length)
    if len(kept) == len(rows):
        return kept
    names = rows.all.column_names
    what = (
        "pairs"
        if "chosen" in names
        else "rows of answers"
        if "answers" in names
        else "prompts"
        if "prompt" in names
        else "rows"
    )
    by_turns = f" ({_by_turns(rows, kept)})" if what == "pairs" else ""
    num_dropped = len(rows) - len(kept)
    found = f"{num_dropped} of {len(rows)} {what} are longer than {key} {max_length} tokens{by_turns}"
    if len(kept) == 0:
        raise UserError(f"all {len(rows)} {what} are longer than {key} {max_length} tokens; raise {key}")
    if num_dropped > max_too_long_share * len(rows):
        raise UserError(f"{found}; raise {key}, or allow a larger share with max_too_long_share")
    logger.warning("dropped: %s", found)
    return kept


def _by_turns(rows: Rows, kept: Rows) -> str:
    before, after = (Counter(each.column("num_turns").tolist()) for each in (rows, kept))
    return ", ".join(
        f"{before[turns] - after[turns]} of {before[turns]} with {turns} user turns" for turns in sorted(before)
    )


def balance_turns(pairs: Rows, multi_turn_share: float, seed: int) -> Rows:
    """As many of the pairs as possible such that this share is multi-turn."""
    is_multi_turn = pairs.column("num_turns") > 1
    places = {kind: np.flatnonzero(is_multi_turn == kind).tolist() for kind in (True, False)}
    if not places[True] or not places[False]:
        raise UserError(
            f"multi_turn_share needs single- and multi-turn pairs, found {len(places[False])} and "
            f"{len(places[True])}; remove it"
        )
    total = min(len(places[True]) / multi_turn_share, len(places[False]) / (1 - multi_turn_share))
    wanted = {True: round(total * multi_turn_share), False: round(total * (1 - multi_turn_share))}
    random = Random(seed)
    drawn = [place for kind in places for place in random.sample(places[kind], wanted[kind])]
    return pairs.take(np.sort(drawn))


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
