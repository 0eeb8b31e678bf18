"""Reads one row of preference data as a prompt with a chosen and a rejected answer, and checks it.

A pair is given by answers called chosen and rejected, or by two answers and a column that says which one is better:
the layouts of HelpSteer, SHP and PKU-SafeRLHF.
"""

import math
from typing import Any

from gemma2_post.data.rows import ADDITIONS, HISTORY, QUESTIONS, SYSTEM, UNSUPPORTED, Row, RowFormat, question_turns
from gemma2_post.data.turns import InvalidRow, Turn, as_prompt, as_turns, check_messages, fold_system, without_weights

_CHOSEN = {
    "chosen": "rejected", "chosen_messages": "rejected_messages", "chosen_response": "rejected_response",
    "response_chosen": "response_rejected",
}  # fmt: skip
_SCORES = {
    "score_chosen": "score_rejected", "chosen_score": "rejected_score", "chosen-rating": "rejected-rating",
    "chosen_rating": "rejected_rating", "rating_chosen": "rating_rejected",
}  # fmt: skip
_PREFERENCES = {
    ("response_1", "response_2", "preference_strength"): (range(-3, 4), lambda strength: -strength),
    ("response1", "response2", "overall_preference"): (range(-3, 4), lambda preference: -preference),
    ("human_ref_A", "human_ref_B", "labels"): (range(2), lambda label: 2 * label - 1),
    ("response_0", "response_1", "better_response_id"): (range(2), lambda better: 1 - 2 * better),
}
"""First answer, second answer, and what says which is better, with its values and a function that is above 0 if it is
the first; as the cards of HelpSteer2, HelpSteer3, SHP and PKU-SafeRLHF define these columns."""
QUESTION_COLUMNS = (*QUESTIONS, *ADDITIONS, *SYSTEM, HISTORY, "conversations", *UNSUPPORTED)
"""What belongs to the prompt of a pair."""

_READ = frozenset((*_CHOSEN, *_CHOSEN.values(), *_SCORES, *_SCORES.values(), *QUESTION_COLUMNS, "margin")) | frozenset(
    name for names in _PREFERENCES for name in names
)


def read_pair(row: Row, score_margin: float = 0.0) -> dict[str, Any]:
    """`prompt`, `chosen`, `rejected` (messages), `margin`, `is_tie`, `num_turns` (the user's), `had_system` of a row.

    The row has either a prompt with two answers, or two conversations that differ only in the model's last turn; as
    messages, texts, or transcripts with "Human:" and "Assistant:".

    Args:
        score_margin: Margin per point of difference between the scores.

    Raises:
        InvalidRow: The row is not a valid pair.
    """
    answers, is_tie = _answers(row)
    prompt = _prompt(row)
    unfolded = {side: _conversation(side, answer, prompt) for side, answer in answers.items()}
    row.refuse_lost(QUESTION_COLUMNS, unfolded["chosen"])
    pair = {side: fold_system(turns) for side, turns in unfolded.items()}
    for side, turns in pair.items():
        try:
            check_messages(turns)
        except InvalidRow as problem:
            raise InvalidRow(f"{side}: {problem}") from problem
        if not turns[-1].get("trained", True):
            raise InvalidRow(f"{side}: the answer has a weight of 0; leave such pairs out")
    messages = {side: without_weights(turns) for side, turns in pair.items()}
    (*shared, chosen), (*other_prompt, rejected) = messages["chosen"], messages["rejected"]
    if shared != other_prompt:
        raise InvalidRow("chosen and rejected answer different prompts; only the model's last turn may differ")
    if chosen["content"].strip() == rejected["content"].strip():
        raise InvalidRow("chosen and rejected are the same answer")
    margin, has_equal_scores = read_margin(row, score_margin)
    return {
        "prompt": shared,
        "chosen": [chosen],
        "rejected": [rejected],
        "margin": margin,
        "is_tie": is_tie or has_equal_scores,
        "num_turns": (len(shared) + 1) // 2,
        "had_system": pair["chosen"] is not unfolded["chosen"],
    }


def has_answers(row: Row) -> bool:
    """Whether a row has two answers and says which is better, in a known layout."""
    named = any(row.has(name) and row.has(other) for name, other in _CHOSEN.items())
    return named or any(all(row.has(name) for name in names) for names in _PREFERENCES)


def _answers(row: Row) -> tuple[dict[str, Any], bool]:
    """The chosen and the rejected answer, as they are in the row, and whether neither is better."""
    for name, other in _CHOSEN.items():
        if row.has(name) and row.has(other):
            return {"chosen": row.take(name), "rejected": row.take(other)}, False
    for (first, second, which), (values, preference) in _PREFERENCES.items():
        if row.has(first) and row.has(second) and row.has(which):
            value = _number(row, which)
            if value not in values:
                raise InvalidRow(f"{which} is {value:g}; it must be one of {', '.join(map(str, values))}")
            better = preference(value)
            answers = [row.take(first), row.take(second)]
            chosen, rejected = answers if better >= 0 else reversed(answers)
            return {"chosen": chosen, "rejected": rejected}, better == 0
    raise PAIR.no_format(row)


def _prompt(row: Row) -> list[Turn]:
    """The turns of the prompt, none if the answers hold the whole conversations."""
    if row.has("conversations"):
        system = row.take(*SYSTEM)
        return [*([{"role": "system", "content": system}] if system else []), *as_turns(row.take("conversations"), "")]
    if row.has(*QUESTIONS) or not row.has("context", HISTORY):
        return question_turns(row) if row.has(*QUESTIONS) else []
    return as_prompt(row.take("context", HISTORY))  # HelpSteer3's messages, SHP's post


def _conversation(side: str, answer: object, prompt: list[Turn]) -> list[Turn]:
    """The whole conversation that ends with the chosen or the rejected answer."""
    if isinstance(answer, list) and any(not isinstance(turn, dict) for turn in answer):
        raise InvalidRow(f"{side} holds {len(answer)} candidates; give one chosen and one rejected answer")
    turns = as_turns(answer, "assistant")
    if turns and turns[0]["role"] != "assistant":  # the prompt is in it
        contents = [str(turn["content"]).strip() for turn in turns]
        if any(str(turn["content"]).strip() not in contents for turn in prompt):
            raise InvalidRow(f"the prompt is no part of the conversation in {side}; give one of them")
        return turns
    if not prompt and isinstance(answer, str):
        raise InvalidRow(f"{side} is text without a prompt and no transcript (\\n\\nHuman: ... \\n\\nAssistant: ...)")
    return [*prompt, *turns]


def read_margin(row: Row, score_margin: float) -> tuple[float, bool]:
    """The margin of a pair, and whether its scores are equal.

    Raises:
        InvalidRow: A score is no number or lacks the other, the chosen answer has the lower one, or a margin is < 0.
    """
    margin, is_tie = _number(row, "margin") or 0.0, False
    for name, other in _SCORES.items():
        better, worse = _number(row, name), _number(row, other)
        if (better is None) != (worse is None):
            raise InvalidRow(f"one of {name} and {other} is missing; give both or neither")
        if better is not None and worse is not None:
            if better < worse:
                raise InvalidRow(f"{name} {better:g} is below {other} {worse:g}")
            is_tie = better == worse
            margin += score_margin * (better - worse)
            break
    if not math.isfinite(margin):
        raise InvalidRow(f"margin is {margin}, not a number")
    if margin < 0:
        raise InvalidRow(f"margin is {margin:g}; it must not be below 0")
    return float(margin), is_tie


def scores_of(row: Row) -> dict[str, float]:
    """The scores of both answers, as `score_chosen` and `score_rejected`; none if the row has none."""
    for name, other in _SCORES.items():
        better, worse = _number(row, name), _number(row, other)
        if better is not None and worse is not None:
            return {"score_chosen": better, "score_rejected": worse}
    return {}


def _number(row: Row, column: str) -> float | None:
    """The number in a column, which in a CSV file is a text."""
    value = row.take(column)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRow(f"{column} is {value!r}, not a number")
    return number


PAIR = RowFormat(
    read_pair,
    ("prompt", "chosen", "rejected", "margin", "is_tie", "num_turns"),
    "chosen + rejected | chosen_messages + rejected_messages | response_1 + response_2 + preference_strength | "
    "human_ref_A + human_ref_B + labels | response_0 + response_1 + better_response_id",
    _READ,
    {"score_margin": 0.0},
)
