"""Reads one row of pairs that people have labeled: two answers to a prompt, and which one is better.

The layouts are those of LLMBar, Auto-J, JudgeBench, AlpacaFarm, and MT-Bench's human judgments; or preference pairs.
"""

from collections.abc import Mapping
from typing import Any

from gemma2_post.data.pairs import PAIR, has_answers, read_pair
from gemma2_post.data.rows import Row, RowFormat, question_turns
from gemma2_post.data.turns import InvalidRow, check_messages, fold_system, without_weights

_LABELS: Mapping[tuple[str, str, str], Mapping[Any, float]] = {
    ("output_1", "output_2", "label"): {1: 1.0, 2: 0.0},
    ("output_1", "output_2", "preference"): {1: 1.0, 2: 0.0, 0: 0.5, 1.5: 0.5},
    ("response 1", "response 2", "label"): {0: 1.0, 1: 0.0, 2: 0.5},
    ("response_A", "response_B", "label"): {"A>B": 1.0, "B>A": 0.0, "A=B": 0.5},
    ("response_a", "response_b", "winner"): {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5},
    ("conversation_a", "conversation_b", "winner"): {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5},
}
"""First answer, second answer, and the column that says which is better: 1 if the first is, 0 if the second, 0.5 for a
tie. In this order: LLMBar, AlpacaFarm and AlpacaEval's human annotations, Auto-J, JudgeBench, and Chatbot Arena."""
_GROUPS = ("subset", "scenario", "category", "source", "dataset")
"""Columns that say what kind of pair it is; the first that a row has counts."""


def read_labeled_pair(row: Row) -> dict[str, Any]:
    """`prompt` (messages), `first` and `second` (answers), `label` (1 if the first is better), and `group` of a row.

    In a conversation of several turns, an answer holds all that a model said, with the user's later turns quoted with
    `>`. In a preference pair, the chosen answer is the first.

    Raises:
        InvalidRow: The row has none of the known layouts.
    """
    group = next((str(row.left[name]) for name in _GROUPS if name in row.left), "all")
    for (first, second, column), labels in _LABELS.items():
        if first in row.names and second in row.names and column in row.names:
            label = row.take(column)
            if not isinstance(label, int | float | str) or label not in labels:
                raise InvalidRow(f"{column} is {label!r}; expected one of {', '.join(map(repr, labels))}")
            answers = [row.take(name) for name in (first, second)]
            read = _of_conversations(*answers) if first == "conversation_a" else _of_texts(row, *answers)
            return read | {"label": labels[label], "group": group}
    if not has_answers(row):
        raise LABELED_PAIR.no_format(row)
    pair = read_pair(row)
    answers = [pair[side][0]["content"] for side in ("chosen", "rejected")]
    return {"prompt": pair["prompt"], "first": answers[0], "second": answers[1], "label": 1.0, "group": group}


def _of_texts(row: Row, first: Any, second: Any) -> dict[str, Any]:
    prompt = fold_system(question_turns(row))
    check_messages(prompt, last="user")
    for answer in (first, second):
        if answer is not None and not isinstance(answer, str):
            raise InvalidRow(f"an answer is {type(answer).__name__}, not a text")
    return {"prompt": without_weights(prompt), "first": first or "", "second": second or ""}


def _of_conversations(first: Any, second: Any) -> dict[str, Any]:
    both = []
    for turns in (first, second):
        if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
            raise InvalidRow("a conversation is no list of turns with role and content")
        texts = [str(turn.get("content")) for turn in turns]
        both.append((texts[::2], texts[1::2]))
    (users, answers), (other_users, others) = both
    if users != other_users or len(answers) != len(users) or len(others) != len(users):
        raise InvalidRow("the two conversations have different turns of the user")
    prompt = [{"role": "user", "content": users[0]}]
    return {"prompt": prompt, "first": quoting(users, answers), "second": quoting(users, others)}


def quoting(users: list[str], answers: list[str]) -> str:
    """All that a model answered, with the user's later turns quoted with `>`."""
    parts = [answers[0]]
    for user, answer in zip(users[1:], answers[1:], strict=True):
        parts += [f"> {user}", answer]
    return "\n\n".join(parts)


LABELED_PAIR = RowFormat(
    read_labeled_pair,
    ("prompt", "first", "second", "label", "group"),
    "output_1 + output_2 + label | response 1 + response 2 + label | response_A + response_B + label | "
    "conversation_a + conversation_b + winner | chosen + rejected",
    PAIR.columns | {name for names in _LABELS for name in names} | {*_GROUPS},
)
