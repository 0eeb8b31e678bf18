"""Reads one row of a data set, in any of the known formats, as a conversation, a prompt, questions or a document.

What belongs to a row's meaning is read or refused: a column of a known name whose text does not appear in what was
read would be lost. Columns of other names are metadata and stay unread.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemma2_post.data.turns import (
    InvalidRow,
    Turn,
    as_prompt,
    as_turns,
    check_messages,
    fold_system,
    is_chat,
    is_empty,
    without_weights,
)

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "instruction", "question", "query")
ADDITIONS = ("input", "context")
"""What follows a question: Alpaca's input, Dolly's context."""
ANSWERS = ("completion", "response", "output", "answer")
SYSTEM = ("system", "system_prompt", "system_message")
_AVOIDED = ("false", "0", "0.0")
"""Labels of answers that KTO learns to avoid, also as numbers and as texts of a CSV file."""
HISTORY = "history"
"""Earlier turns: a list of [question, answer], or messages."""
UNSUPPORTED = ("tools", "functions", "tool_calls", "documents", "image", "images", "audio", "video", "videos")

_OF_A_QUESTION = (*QUESTIONS, *ADDITIONS, *SYSTEM, HISTORY, *UNSUPPORTED, *CONVERSATIONS)
_KNOWN = frozenset((*_OF_A_QUESTION, *ANSWERS, "text", "turns", "label"))


class Row:
    """A row whose columns are taken one by one, so that what was not taken can be found at the end."""

    def __init__(self, columns: dict[str, Any], for_graders: Iterable[str] = ()):
        """Empty columns count as missing.

        Args:
            for_graders: Columns that the recipe keeps beside the conversation; they need not be taken.
        """
        self.left = {name: value for name, value in columns.items() if not is_empty(value)}
        self.names = list(columns)
        self.for_graders = set(for_graders)

    def take(self, *names: str) -> Any:
        """The value of the first of these columns that the row has, or None."""
        return next((self.left.pop(name) for name in names if name in self.left), None)

    def has(self, *names: str) -> bool:
        """Whether the row has one of these columns."""
        return any(name in self.left for name in names)

    def refuse_lost(self, names: Iterable[str], said: list[Turn]) -> None:
        """Refuses columns that were not taken and whose texts are not in these turns."""
        contents = [turn["content"] for turn in said if isinstance(turn["content"], str)]
        for name in names:
            if name in self.left and name not in self.for_graders:
                texts = list(_texts(self.left[name]))
                if not texts or not all(any(text.strip() in content for content in contents) for text in texts):
                    raise InvalidRow(
                        f"column {name} would be lost; make it a part of the conversation, remove it, or, if only "
                        "graders need it, name it in columns"
                    )


def _texts(value: object) -> Iterator[str]:
    """The texts in a value that may be nested, without the roles of turns."""
    if isinstance(value, str):
        yield from (turn["content"] for turn in as_prompt(value))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "from"):
                yield from _texts(item)


@dataclass(frozen=True)
class RowFormat:
    """What rows are read as."""

    parse: Callable[..., dict[str, Any]]
    """Takes a `Row` and the settings; returns the columns of the result, and `had_system`: whether it folded a system
    message."""
    result: tuple[str, ...]
    """The columns of the result."""
    expected: str
    """The columns that a row needs, for errors."""
    columns: frozenset[str] = _KNOWN
    """All columns that it may read."""
    settings: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Keys of the recipe that `parse` is called with, at their defaults."""

    def read(self, columns: dict[str, Any], for_graders: Iterable[str] = ()) -> dict[str, Any]:
        """The result for one row.

        Raises:
            InvalidRow: The row is of no known format, or is wrong.
        """
        return self.parse(Row(columns, for_graders), **self.settings)

    def with_settings(self, values: Mapping[str, Any]) -> "RowFormat":
        """The format with the settings that a recipe's keys give it."""
        return replace(self, settings={name: values.get(name, self.settings[name]) for name in self.settings})

    def no_format(self, row: Row) -> InvalidRow:
        """The error for a row without the columns that are needed."""
        empty = [name for name in row.names if name not in row.left and name in self.columns]
        if empty:
            return InvalidRow(f"column {empty[0]} is empty; expected {self.expected}")
        return InvalidRow(
            f"the columns {', '.join(row.names) or '(none)'} are of no known format; expected {self.expected}"
        )


# --- the parts of a row ---


def question_turns(row: Row) -> list[Turn]:
    """The turns of a question in one or several columns, with history and system text if there are any."""
    system, history = row.take(*SYSTEM), row.take(HISTORY)
    asked = row.take(*QUESTIONS, *ADDITIONS)
    turns = as_prompt(asked)
    if isinstance(asked, str) and len(turns) == 1:
        parts = [turns[0]["content"], *(row.take(name) for name in ADDITIONS if row.has(name))]
        if not all(isinstance(part, str) for part in parts):
            raise InvalidRow("the instruction or its input is not text")
        turns = [{"role": "user", "content": "\n\n".join(parts)}]
    return [*_system_turn(system), *_history(history), *turns]


def _system_turn(system: object) -> list[Turn]:
    return [] if system is None else [{"role": "system", "content": system}]


def _history(history: object) -> list[Turn]:
    if history is None:
        return []
    if isinstance(history, list) and all(isinstance(each, list) and len(each) == 2 for each in history):
        texts = [text for each in history for text in each]
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return as_turns(history, "user")


def _conversation(row: Row) -> list[Turn]:
    """The turns of a row with a whole conversation, with its system text if that is a column."""
    turns = as_turns(row.take(*CONVERSATIONS), "user")
    system = row.take(*SYSTEM)
    if system is not None and turns and turns[0]["role"] == "system":
        if turns[0]["content"] != system:
            raise InvalidRow("the system message of the conversation and the system column differ; keep one")
        system = None
    return [*_system_turn(system), *turns]


def _finished(turns: list[Turn], last: str) -> dict[str, Any]:
    """`turns` with the system text folded, and `had_system`; checked."""
    folded = fold_system(turns)
    check_messages(folded, last)
    return {"turns": folded, "had_system": folded is not turns}


# --- what a row is read as ---


def to_messages(row: Row) -> list[Turn]:
    """The conversation in a row, with its answer; a system message is not folded yet."""
    if row.has(*CONVERSATIONS):
        turns = _conversation(row)
    elif row.has(*QUESTIONS, *ADDITIONS) and row.has(*ANSWERS):
        label = str(row.take("label")).strip().lower()
        if label in _AVOIDED:
            raise InvalidRow(
                f"label is {label}, so the answer is one to avoid; leave such rows out, or rename the column if it "
                "means something else"
            )
        answer = as_turns(row.take(*ANSWERS), "assistant")
        turns = [*question_turns(row), *answer]
        row.refuse_lost(ANSWERS, turns)
    elif row.has("text"):
        text = row.take("text")
        if not isinstance(text, str) or not is_chat(text):
            raise InvalidRow(f"text is not ChatML (<|im_start|>role ... <|im_end|>), it begins {str(text)[:40]!r}")
        turns = [*_system_turn(row.take(*SYSTEM)), *as_turns(text, "user")]
    else:
        raise CONVERSATION.no_format(row)
    row.refuse_lost(_OF_A_QUESTION, turns)
    return turns


def read_conversation(row: Row) -> dict[str, Any]:
    """`messages`, `trained` (for each message, whether its tokens count in the loss) and `had_system`."""
    found = _finished(to_messages(row), last="assistant")
    turns = found.pop("turns")
    trained = [turn["role"] == "assistant" and turn.get("trained", True) for turn in turns]
    if not any(trained):
        raise InvalidRow("no turn of the model is to be trained on; leave such rows out")
    return found | {"messages": without_weights(turns), "trained": trained}


def read_prompt(row: Row) -> dict[str, Any]:
    """`prompt` (the row's, or its conversation without the model's last turn) and `had_system`."""
    if row.has(*CONVERSATIONS) or not row.has(*QUESTIONS, *ADDITIONS):
        if not row.has(*CONVERSATIONS, "text"):
            raise PROMPT.no_format(row)
        turns = to_messages(row)
        turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    else:
        turns = question_turns(row)
        row.refuse_lost(_OF_A_QUESTION, turns)
    found = _finished(turns, last="user")
    return {"prompt": without_weights(found.pop("turns"))} | found


def read_questions(row: Row) -> dict[str, Any]:
    """`prompt`, `later` (the user's later turns, each asked after the previous answer) and `had_system`.

    A list of texts as `turns` or `prompt` is a list of the user's turns, as in MT-Bench.
    """
    lists = [name for name in ("turns", "prompt") if isinstance(row.left.get(name), list)]
    if not lists or (lists == ["prompt"] and not isinstance(row.left["prompt"][0], str)):
        return read_prompt(row) | {"later": []}
    turns = row.take(lists[0])
    if not all(isinstance(turn, str) for turn in turns):
        raise InvalidRow(f"{lists[0]} is {str(turns)[:40]!r}, not a list of texts")
    users = [{"role": "user", "content": turn} for turn in turns]
    for user in users:
        check_messages([user], last="user")
    row.refuse_lost(_OF_A_QUESTION, users)
    return {"prompt": users[:1], "later": turns[1:], "had_system": False}


def read_document(row: Row) -> dict[str, Any]:
    """`text` of a raw text (else None), `messages` of a conversation (else none), and `had_system`."""
    text = row.left.get("text")
    if not row.has("text", *CONVERSATIONS, *ANSWERS):
        raise DOCUMENT.no_format(row)
    if text is None or row.has(*CONVERSATIONS) or (isinstance(text, str) and is_chat(text)):
        found = read_conversation(row)
        return {"text": None, "messages": found["messages"], "had_system": found["had_system"]}
    if not isinstance(text, str):
        raise InvalidRow(f"text is {str(text)[:40]!r}, not a text")
    return {"text": text, "messages": [], "had_system": False}


_EITHER = f"{' or '.join(QUESTIONS)} + {' or '.join(ANSWERS)}"
CONVERSATION = RowFormat(read_conversation, ("messages", "trained"), f"messages | conversations | {_EITHER} | text")
PROMPT = RowFormat(read_prompt, ("prompt",), f"{' | '.join(QUESTIONS)} | messages | conversations | text")
QUESTION = RowFormat(read_questions, ("prompt", "later"), f"turns | {PROMPT.expected}")
"""Also data sets like MT-Bench, whose later questions do not depend on the answers to earlier ones."""
DOCUMENT = RowFormat(read_document, ("text", "messages"), f"text | messages | conversations | {_EITHER}")
