"""Reads one row of a data set as a conversation: converts every known format to `messages` and checks them."""

import re
from collections.abc import Callable
from typing import Any

from gemma2_post.models.tokens import SPECIAL_TOKENS

Message = dict[str, str]

_CONTROL_TOKENS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_PARTS_OF_A_CONVERSATION = ("system", "history", "tools")
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip


class InvalidRow(Exception):
    """What is wrong with one row, in words that follow "row 3: "."""


def to_messages(row: dict[str, Any]) -> list[Message]:
    """The conversation in a row of one of the known formats (`FORMATS`); raises `InvalidRow`."""
    if "messages" in row:
        return _renamed(row["messages"], "role", "content")
    if "conversations" in row:
        return _renamed(row["conversations"], "from", "value")
    if "prompt" in row and "completion" in row:
        return [*as_turns(row["prompt"], "user"), *as_turns(row["completion"], "assistant")]
    if "instruction" in row and "output" in row:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            raise InvalidRow("the instruction or its input is not text")
        return [{"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": row["output"]}]
    text = row["text"]
    if (
        not isinstance(text, str)
        or _CHATML_TURN.sub("", text).strip()
        or "<|im_start|>" in "".join(content for _, content in _CHATML_TURN.findall(text))
    ):
        raise InvalidRow(f"text is not ChatML (<|im_start|>role ... <|im_end|>), it begins {str(text)[:40]!r}")
    return [{"role": _role(role), "content": content} for role, content in _CHATML_TURN.findall(text)]


FORMATS = [{"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"}, {"text"}]
"""The columns that a conversation needs, one set for each format."""
PROMPT_FORMATS = [{"prompt"}, *FORMATS]
QUESTION_FORMATS = [{"turns"}, *PROMPT_FORMATS]
"""Also data sets like MT-Bench, whose later questions do not depend on the answers to earlier ones."""


def as_turns(value: object, role: str) -> list[Message]:
    """A text as one turn of `role`, or a list of turns with `role` and `content` (ShareGPT: `from` and `value`)."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    is_sharegpt = isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]
    return _renamed(value, *(("from", "value") if is_sharegpt else ("role", "content")))


def _renamed(turns: object, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise InvalidRow(f"the conversation is {type(turns).__name__}, not a list")
    for turn in turns:
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            raise InvalidRow(f"a turn has no {role_key} and {content_key}: {str(turn)[:60]}")
    return [{"role": _role(turn[role_key]), "content": turn[content_key]} for turn in turns]


def _role(role: object) -> str:
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRow(f"role {role!r} is unknown (known are {', '.join(_ROLES)})")
    return _ROLES[role]


def fold_system(messages: list[Message]) -> list[Message]:
    """The messages with the system text moved to the front of the first user turn: Gemma 2 has no system role."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        raise InvalidRow("no user turn follows the system message")
    if not isinstance(system["content"], str) or not isinstance(rest[0]["content"], str):
        raise InvalidRow("the content of the system message or of the first user turn is not text")
    return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def check_messages(messages: list[Message], last: str = "assistant") -> None:
    """Raises `InvalidRow` unless user and model alternate, user first and `last` last, and every turn is plain text.

    Args:
        last: Role of the last turn: "assistant" for a conversation, "user" for a prompt.
    """
    if not messages:
        raise InvalidRow("the conversation is empty" if last == "assistant" else "there is no user turn to answer")
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        content = message["content"]
        if message["role"] != expected:
            found = message["role"]
            raise InvalidRow(f"turn {i} is by {found}, expected {expected} (they must alternate, user first)")
        if not isinstance(content, str):
            raise InvalidRow(f"the content of turn {i} is {type(content).__name__}, not text")
        if not content.strip():
            raise InvalidRow(f"the content of turn {i} is empty")
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise InvalidRow(f"turn {i} holds half a character (a lone surrogate)")
        if token := _CONTROL_TOKENS.search(content):
            found = token.group()
            raise InvalidRow(f"turn {i} holds the control token {found}; give the text without the chat format")
    if messages[-1]["role"] != last:
        found, wanted = ("user", "model") if last == "assistant" else ("model", "user")
        raise InvalidRow(f"the last turn is the {found}'s; it must be the {wanted}'s")


def is_valid(messages: list[Message]) -> bool:
    """Whether a conversation passes `check_messages`."""
    try:
        check_messages(messages)
    except InvalidRow:
        return False
    return True


def read_conversation(row: dict[str, object]) -> dict[str, object]:
    """`messages` and `had_system` of a row."""
    messages = to_messages(row)
    folded = fold_system(messages)
    check_messages(folded)
    return {"messages": folded, "had_system": folded is not messages}


def read_prompt(row: dict[str, object]) -> dict[str, object]:
    """`prompt` (the row's, or its conversation without the model's last turn) and `had_system` of a row."""
    if "prompt" in row and not row.keys() & {"messages", "conversations"}:  # with them, it is only the first turn
        messages = as_turns(row["prompt"], "user")
    else:
        messages = to_messages(row)
        messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    folded = fold_system(messages)
    check_messages(folded, last="user")
    return {"prompt": folded, "had_system": folded is not messages}


def read_questions(row: dict[str, object]) -> dict[str, object]:
    """`prompt`, `later` (the user's later turns, each asked after the previous answer) and `had_system` of a row."""
    if "turns" not in row:
        return read_prompt(row) | {"later": []}
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise InvalidRow(f"turns is {str(turns)[:40]!r}, not a list of texts")
    for turn in turns:
        check_messages([{"role": "user", "content": turn}], last="user")
    return {"prompt": [{"role": "user", "content": turns[0]}], "later": turns[1:], "had_system": False}


def checked(
    row: dict[str, object], parse: Callable[[dict[str, object]], dict[str, object]], empty: dict[str, object]
) -> dict[str, object]:
    """The result of `parse` with an empty `problem`, or `empty` with what is wrong with the row as its `problem`."""
    try:
        parsed = parse(row)
        for column in _PARTS_OF_A_CONVERSATION:
            if row.get(column):
                raise InvalidRow(f"column {column} would be lost; make it a part of the conversation")
    except InvalidRow as problem:
        return empty | {"problem": str(problem)}
    return parsed | {"problem": ""}
