"""Reads one row of a benchmark of reward models: a prompt with answers, of which the first ones are the best.

The layouts are RewardBench's (one chosen and one rejected answer), RewardBench 2's (lists of them), and preference
pairs.
"""

from typing import Any

from gemma2_post.data.pairs import PAIR, has_answers, read_pair
from gemma2_post.data.rows import QUESTIONS, Row, RowFormat, question_turns
from gemma2_post.data.turns import InvalidRow, check_messages, fold_system, without_weights


def read_ranked(row: Row) -> dict[str, Any]:
    """`prompt`, `answers` (texts, the chosen ones first), `num_chosen`, `subset`, `id`, and `had_system` of a row.

    Raises:
        InvalidRow: The row has none of the known layouts, or an answer is no text.
    """
    subset, key = str(row.take("subset") or "all"), str(row.take("id") or "")
    chosen, rejected = (_texts(row.left.get(side)) for side in ("chosen", "rejected"))
    if row.has(*QUESTIONS) and chosen and rejected:
        turns = question_turns(row)
        folded = fold_system(turns)
        check_messages(folded, last="user")
        prompt, had_system = without_weights(folded), folded is not turns
    elif has_answers(row):
        pair = read_pair(row)
        prompt, had_system = pair["prompt"], pair["had_system"]
        chosen, rejected = ([pair[side][0]["content"]] for side in ("chosen", "rejected"))
    else:
        raise RANKED.no_format(row)
    if not all(text.strip() for text in (*chosen, *rejected)):
        raise InvalidRow("an answer is empty")
    found = {"prompt": prompt, "answers": [*chosen, *rejected], "num_chosen": len(chosen)}
    return found | {"subset": subset, "id": key, "had_system": had_system}


def _texts(value: object) -> list[str] | None:
    """The texts of a text or a list of texts; None of anything else."""
    texts = [value] if isinstance(value, str) else value
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


RANKED = RowFormat(
    read_ranked,
    ("prompt", "answers", "num_chosen", "subset", "id"),
    "prompt + chosen + rejected, both a text or lists of texts; subset and id | a preference pair",
    PAIR.columns | {"subset", "id"},
)
