"""Reads one row of preference data as a prompt with a chosen and a rejected answer, and checks it."""

import math
import re

from gemma2_post.data.rows import InvalidRow, Message, as_turns, check_messages, fold_system

_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")

PAIR_FORMATS = [{"chosen", "rejected"}]
"""The columns that a pair needs."""


def to_pair(row: dict[str, object], score_margin: float = 0.0) -> dict[str, object]:
    """`prompt`, `chosen`, `rejected` (messages), `margin`, `is_tie`, `had_system` of a row in a known form.

    Either an explicit prompt (`prompt`, or `conversations` as in ShareGPT) with two answers, or two conversations that
    differ only in the model's last turn, as messages or as transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:".

    Args:
        score_margin: Margin per point of difference between the scores.

    Raises:
        InvalidRow: The row is not a valid pair.
    """
    unfolded = {side: _conversation(row, side) for side in ("chosen", "rejected")}
    pair = {side: fold_system(messages) for side, messages in unfolded.items()}
    for side, messages in pair.items():
        try:
            check_messages(messages)
        except InvalidRow as problem:
            raise InvalidRow(f"{side}: {problem}") from problem
    (*prompt, chosen), (*other_prompt, rejected) = pair["chosen"], pair["rejected"]
    if prompt != other_prompt:
        raise InvalidRow("chosen and rejected answer different prompts; only the model's last turn may differ")
    if chosen["content"].strip() == rejected["content"].strip():
        raise InvalidRow("chosen and rejected are the same answer")
    better, worse = (_number(row, f"score_{side}") for side in ("chosen", "rejected"))
    margin = _number(row, "margin") or 0.0
    is_tie = False
    if (better is None) != (worse is None):
        raise InvalidRow("one of score_chosen and score_rejected is missing; give both or neither")
    if better is not None and worse is not None:
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
    turns = as_turns([answer] if isinstance(answer, dict) else answer, "assistant")
    if prompt_column is None or (turns and turns[0]["role"] != "assistant"):
        return turns
    return [*as_turns(row[prompt_column], "user"), *turns]


def _transcript(text: str, side: str) -> list[Message]:
    """The turns of a transcript in the format of Anthropic's HH data."""
    before, *parts = _TRANSCRIPT_TURN.split(text)
    if before.strip() or not parts:
        raise InvalidRow(f"{side} is text without a prompt and no transcript (\\n\\nHuman: ... \\n\\nAssistant: ...)")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[role], "content": content.strip()} for role, content in turns]


def _number(row: dict[str, object], column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRow(f"{column} is {value!r}, not a number")
    return value
