"""Preference pairs of every usual form as one prompt with a chosen and a rejected answer, all checked."""

import logging
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from random import Random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.core import data
from gemma2_post.core.data import InvalidRow, Message, Source
from gemma2_post.core.errors import UserError

logger = logging.getLogger(__name__)

_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


FORMATS = [{"chosen", "rejected"}]
"""The columns that make a row a pair."""


@dataclass
class PreferenceArguments:
    score_margin: float = field(
        default=0.0,
        metadata={"help": "Margin in the loss for each point between score_chosen and score_rejected; 0 for none."},
    )
    multi_turn_share: float | None = field(
        default=None,
        metadata={"help": "Share of training pairs with more than one user turn; surplus pairs are left out."},
    )


# --- one row ---


def to_pair(row: dict[str, object], score_margin: float = 0.0) -> dict[str, object]:
    """`prompt`, `chosen`, `rejected` (messages), `margin`, `is_tie`, `had_system` of a row of a known form.

    An explicit prompt (`prompt`, or `conversations` as in ShareGPT) with two answers; or two conversations that share
    all but the model's last turn, as messages or as transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:".

    Args:
        score_margin: margin for each point between the scores.

    Raises:
        InvalidRow: what is wrong with the row.
    """
    unfolded = {side: _conversation(row, side) for side in ("chosen", "rejected")}
    pair = {side: data.fold_system(messages) for side, messages in unfolded.items()}
    for side, messages in pair.items():
        try:
            data.check_messages(messages)
        except InvalidRow as problem:
            raise InvalidRow(f"{side}: {problem}") from problem
    (*prompt, chosen), (*other_prompt, rejected) = pair["chosen"], pair["rejected"]
    if prompt != other_prompt:
        raise InvalidRow("chosen and rejected answer different prompts; only the model's last turn may differ")
    if chosen["content"].strip() == rejected["content"].strip():
        raise InvalidRow("chosen and rejected are the same answer")
    scores = [_number(row, f"score_{side}") for side in ("chosen", "rejected")]
    margin = _number(row, "margin") or 0.0
    is_tie = False
    if scores.count(None) == 1:
        raise InvalidRow("one of score_chosen and score_rejected is missing; give both or neither")
    if None not in scores:
        better, worse = scores
        if better < worse:
            raise InvalidRow(f"score_chosen {better:g} is below score_rejected {worse:g}")
        is_tie = better == worse
        margin += score_margin * (better - worse)
    if not math.isfinite(margin):
        raise InvalidRow(f"margin is {margin}, not a number")
    if margin < 0:
        raise InvalidRow(f"margin is {margin:g}; it must not be below 0")
    return {
        "prompt": prompt,
        "chosen": [chosen],
        "rejected": [rejected],
        "margin": float(margin),
        "is_tie": is_tie,
        "had_system": pair["chosen"] is not unfolded["chosen"],
    }


def _conversation(row: dict[str, object], side: str) -> list[Message]:
    """The whole conversation that ends with the chosen or the rejected answer."""
    answer = row[side]
    prompt_column = next((column for column in ("prompt", "conversations") if row.get(column)), None)
    if isinstance(answer, str) and prompt_column is None:
        return _transcript(answer, side)
    if isinstance(answer, list) and any(not isinstance(turn, dict) for turn in answer):
        raise InvalidRow(f"{side} holds {len(answer)} candidates; give one chosen and one rejected answer")
    turns = data.as_turns([answer] if isinstance(answer, dict) else answer, "assistant")
    if prompt_column is None or (turns and turns[0]["role"] != "assistant"):
        return turns
    return [*data.as_turns(row[prompt_column], "user"), *turns]


def _transcript(text: str, side: str) -> list[Message]:
    """Turns of a transcript in the format of Anthropic's HH data."""
    before, *parts = _TRANSCRIPT_TURN.split(text)
    if before.strip() or not parts:
        raise InvalidRow(f"{side} is text without a prompt and no transcript (\\n\\nHuman: ... \\n\\nAssistant: ...)")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _number(row: dict[str, object], column: str) -> float | None:
    value = row.get(column)
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise InvalidRow(f"{column} is {value!r}, not a number")
    return value


# --- whole data sets ---


def load_preferences(
    where: str,
    sources: list[Source],
    max_invalid_share: float,
    seed: int,
    columns: list[str] | None = None,
    score_margin: float = 0.0,
) -> Dataset:
    """The mixture as one data set of pairs: the columns of `to_pair`, `num_turns`, and those of `columns`.

    Ties, by equal scores, say nothing about which answer is better; they are dropped and counted.
    """
    read = partial(
        data.checked,
        parse=partial(to_pair, score_margin=score_margin),
        empty={"prompt": [], "chosen": [], "rejected": [], "margin": 0.0, "is_tie": False, "had_system": False},
    )
    pairs = data.load_mixture(where, sources, max_invalid_share, seed, columns or [], read, FORMATS)
    kept = pairs.filter(lambda is_tie: not is_tie, input_columns="is_tie")
    if len(kept) == 0:
        raise UserError(f"{where}: datasets: all {len(pairs)} pairs are ties (equal scores); give pairs that differ")
    if len(kept) < len(pairs):
        logger.warning("dropped %d of %d pairs as ties (equal scores)", len(pairs) - len(kept), len(pairs))
    kept = kept.remove_columns("is_tie")
    return kept.add_column("num_turns", [(len(prompt) + 1) // 2 for prompt in kept["prompt"]])


def balance_turns(where: str, pairs: Dataset, multi_turn_share: float, seed: int) -> Dataset:
    """As many pairs as possible with this share of multi-turn ones; no pair is used twice."""
    if not 0 < multi_turn_share < 1:
        raise UserError(f"{where}: multi_turn_share is {multi_turn_share:g}; write a share between 0 and 1")
    is_multi_turn = [num_turns > 1 for num_turns in pairs["num_turns"]]
    rows = {kind: [row for row, each in enumerate(is_multi_turn) if each == kind] for kind in (True, False)}
    if not rows[True] or not rows[False]:
        raise UserError(
            f"{where}: multi_turn_share needs single- and multi-turn pairs, found {len(rows[False])} and "
            f"{len(rows[True])}; remove it"
        )
    total = min(len(rows[True]) / multi_turn_share, len(rows[False]) / (1 - multi_turn_share))
    wanted = {True: round(total * multi_turn_share), False: round(total * (1 - multi_turn_share))}
    random = Random(seed)
    return pairs.select(sorted(row for kind in rows for row in random.sample(rows[kind], wanted[kind])))


def tokenize_pairs(
    where: str, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, max_too_long_share: float
) -> Dataset:
    """The pairs with `chosen_ids` and `rejected_ids`: whole conversations as a policy's prompt and answer are scored.

    `length` is that of the longer one, by which `train_sampling_strategy: group_by_length` makes batches.
    Pairs of which a side has more than `max_length` tokens are dropped and counted, by turns; never cut.
    """

    def render(row: dict[str, object]) -> dict[str, object]:
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
    found = (
        f"{len(rendered) - len(kept)} of {len(rendered)} pairs are longer than max_length {max_length} ({by_turns})"
    )
    if len(kept) == 0 or len(rendered) - len(kept) > max_too_long_share * len(rendered):
        raise UserError(f"{where}: {found}; raise max_length, or allow a larger share with max_too_long_share")
    logger.warning("dropped: %s", found)
    return kept
