"""Reads one row of a benchmark of reward models: a prompt with answers, of which the first ones are the best.

The layouts are RewardBench's (one chosen and one rejected answer), RewardBench 2's (lists of them), and preference
pairs.
"""

import re
from typing import Any

from gemma2_post.data.pairs import PAIR, QUESTION_COLUMNS, has_answers, read_margin, read_pair
from gemma2_post.data.rows import QUESTIONS, Row, RowFormat, question_turns
from gemma2_post.data.turns import InvalidRow, check_messages, fold_system, without_weights

_TIES_ID = re.compile("(ref|tied):.+")


def read_ranked(row: Row) -> dict[str, Any]:
    """`prompt`, `answers` (texts, chosen ones first), `num_chosen`, `subset`, `id`, `is_tie`, `had_system` of a row.

    Raises:
        InvalidRow: The row has none of the known layouts, an answer is no text, a column would be lost, scores
            contradict the answers, or a row of RewardBench 2's Ties has no id that says its kind.
    """
    subset, key = str(row.take("subset") or "all"), str(row.take("id") or "")
    chosen, rejected = (_texts(row.left.get(side)) for side in ("chosen", "rejected"))
    if row.has(*QUESTIONS) and chosen and rejected:
        is_pair = len(chosen) == len(rejected) == 1
        is_tie = is_pair and read_margin(row, score_margin=0.0)[1]
        turns = question_turns(row)
        row.refuse_lost(QUESTION_COLUMNS, turns)
        folded = fold_system(turns)
        check_messages(folded, last="user")
        prompt, had_system = without_weights(folded), folded is not turns
    elif has_answers(row):
        pair = read_pair(row)
        prompt, is_tie, had_system = pair["prompt"], pair["is_tie"], pair["had_system"]
        chosen, rejected = ([pair[side][0]["content"]] for side in ("chosen", "rejected"))
    else:
        raise RANKED.no_format(row)
    if not all(text.strip() for text in (*chosen, *rejected)):
        raise InvalidRow("an answer is empty")
    answers = [*chosen, *rejected]
    if subset.lower() == "ties" and len(answers) > 2 and not _TIES_ID.fullmatch(key):
        raise InvalidRow(f"id is {key!r}; rows of the subset {subset} need ref:N or tied:N, by which they are scored")
    found = {"prompt": prompt, "answers": answers, "num_chosen": len(chosen), "subset": subset, "id": key}
    return found | {"is_tie": is_tie, "had_system": had_system}


def _texts(value: object) -> list[str] | None:
    """The texts of a text or a list of texts; None of anything else."""
    texts = [value] if isinstance(value, str) else value
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


RANKED = RowFormat(
    read_ranked,
    ("prompt", "answers", "num_chosen", "subset", "id", "is_tie"),
    "prompt + chosen + rejected, both a text or lists of texts; subset and id | a preference pair",
    PAIR.columns | {"subset", "id"},
)
