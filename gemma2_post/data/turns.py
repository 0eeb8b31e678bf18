"""The turns of a conversation: read from messages, texts, transcripts and ChatML, and checked.

Nothing is dropped silently: what a turn holds beside its role, its text and its weight is refused by name.
"""

import re
from typing import Any

from gemma2_post.models.tokens import SPECIAL_TOKENS

Message = dict[str, str]
"""`role` (user or assistant; system at first) and `content`."""
Turn = dict[str, Any]
"""A message, and `trained` (bool) where the data says whether its tokens count in the loss."""

_CONTROL_TOKENS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
_OPEN_CHATML_TURN = re.compile(r"<\|im_start\|>assistant\s*$")
"""The start of the model's answer, at the end of a prompt."""
_BEGINS_AS_TRANSCRIPT = re.compile(r"\s*(?:#{3} ?)?(Human|User|Assistant|AI):")
_BEGINS_AS_ONE_TURN = re.compile(r"\s*(?:#{3} ?)?(?:Human|Assistant):|\s*\n\n(?:User|AI):")
"""A mark that is no content even if the text has no other: many texts begin with "AI:" or "User:"."""
_HASHES = r"(?<!#)#{3} ?"
_TURN_STARTS = [r"(?:^|\n\n)", r"(?:^|\n)\s*", r"(?:^|\s+|(?=#{3}))"]
"""Where a turn of a transcript begins: after an empty line, as in Anthropic's HH data, or else a line, or anywhere."""
_INNER_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
_FOREIGN_FORMAT = re.compile(r"\s*(<s>|\[INST\]|<\|\w+\|>|#{3} ?(?:Instruction|System|Response|Input):)")
_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "ai": "assistant", "system": "system",
}  # fmt: skip
_ROLE_KEYS, _CONTENT_KEYS, _WEIGHT_KEYS = ("role", "from"), ("content", "value"), ("weight", "train", "loss_weight")


class InvalidRow(Exception):
    """What is wrong with one row, in words that follow "row 3: "."""


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def as_turns(value: object, role: str) -> list[Turn]:
    """The turns of a message, a list of messages, or a text.

    A text is one turn of `role`, a transcript ("Human: ... Assistant: ..."), or ChatML. "User:" or "AI:" begins a
    transcript only if both speak, or after an empty line. In a message, `weight: 0` or `train: false` keeps its tokens
    out of the loss.

    Raises:
        InvalidRow: Something in it is not understood.
    """
    if isinstance(value, str):
        return _turns_of_text(value, role)
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], str):
        return _turns_of_text(turns[0], role)
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        raise InvalidRow(f"a list of {len(turns)} texts does not say who speaks; give turns with role and content")
    if not isinstance(turns, list):
        raise InvalidRow(f"the conversation is {type(turns).__name__}, not a list")
    return [_turn(i, turn) for i, turn in enumerate(turns)]


def _turn(number: int, turn: object) -> Turn:
    if not isinstance(turn, dict):
        raise InvalidRow(f"a turn has no role and content: {str(turn)[:60]}")
    role_key, content_key = (
        next((key for key in keys if key in turn), keys[0]) for keys in (_ROLE_KEYS, _CONTENT_KEYS)
    )
    if role_key not in turn or content_key not in turn:
        raise InvalidRow(f"a turn has no role and content: {str(turn)[:60]}")
    weights = [key for key in _WEIGHT_KEYS if not is_empty(turn.get(key))]
    for key, value in turn.items():
        if key not in (role_key, content_key, *weights) and not is_empty(value):
            raise InvalidRow(f"turn {number} has {key} {str(value)[:40]!r}, which would be lost; remove the key")
    found: Turn = {"role": _role(turn[role_key]), "content": _text(number, turn[content_key])}
    for key in weights:
        found["trained"] = found.get("trained", True) and _is_trained(number, key, turn[key], found["role"])
    return found


def _role(role: object) -> str:
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise InvalidRow(f"role {role!r} is unknown (known are {', '.join(_ROLES)})")
    return _ROLES[role.lower()]


def _text(number: int, content: object) -> object:
    """The text of a content that is given in parts; any other content as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        keys = {key for key, value in part.items() if not is_empty(value)} if isinstance(part, dict) else set()
        named = keys & {"text", "value"}
        if keys - named != {"type"} or len(named) != 1 or part["type"] != "text":
            raise InvalidRow(f"the content of turn {number} is list, not text, and holds {str(part)[:60]}")
        texts.append(part[named.pop()])
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _is_trained(number: int, key: str, value: object, role: str) -> bool:
    if value not in (0, 1) or isinstance(value, str):
        raise InvalidRow(f"turn {number} has {key} {value!r}; write 0 or 1, or true or false")
    if value and role != "assistant":
        raise InvalidRow(
            f"turn {number} is the {role}'s and has {key} {value!r}; only the model's turns are trained on"
        )
    return bool(value)


# --- texts ---


def _turns_of_text(text: str, role: str) -> list[Turn]:
    unified = text.replace("\r\n", "\n")
    if "<|im_start|>" in unified:
        return _chatml(unified)
    turns = _transcript(unified)
    if _has_both_speakers(turns) or _BEGINS_AS_ONE_TURN.match(unified):
        _refuse_unsplit(turns, unified)
        return turns
    if _INNER_TRANSCRIPT.search(unified):
        raise InvalidRow(f"a transcript follows other text, {text[:40]!r}; give its turns as messages")
    if found := _FOREIGN_FORMAT.match(unified):
        raise InvalidRow(f"a text begins with {found.group(1)}, another chat format; give its turns as messages")
    return [{"role": role, "content": text}]


def is_chat(text: str) -> bool:
    """Whether a text is written as a conversation: ChatML, or a transcript with both speakers."""
    return "<|im_start|>" in text or _has_both_speakers(_transcript(text.replace("\r\n", "\n")))


def _chatml(text: str) -> list[Turn]:
    text = _OPEN_CHATML_TURN.sub("", text)
    turns = _CHATML_TURN.findall(text)
    if _CHATML_TURN.sub("", text).strip() or "<|im_start|>" in "".join(content for _, content in turns):
        raise InvalidRow(f"text is not ChatML (<|im_start|>role ... <|im_end|>), it begins {text[:40]!r}")
    return [{"role": _role(role), "content": content} for role, content in turns]


def _speakers(text: str) -> tuple[str, str] | None:
    """What a transcript calls user and model, by who speaks first; None for a text that does not begin as one."""
    found = _BEGINS_AS_TRANSCRIPT.match(text)
    if found is None:
        return None
    first = found.group(1)
    user = first if first in ("Human", "User") else "Human"
    return user, first if first in ("Assistant", "AI") else "Assistant" if "Assistant:" in text else "AI"


def _transcript(text: str) -> list[Turn]:
    """The turns of a transcript; none of a text that does not begin as one.

    If the first mark has hashes, those with hashes begin turns wherever they stand.
    """
    speakers = _speakers(text)
    if speakers is None:
        return []
    text, mark = text.strip(), f"({'|'.join(speakers)}):"
    begins_with_hashes = [_HASHES + mark] if text.startswith("###") else []
    parts: list[str] = []
    for pattern in (*begins_with_hashes, *(f"{start}(?:#{{3}} ?)?{mark}" for start in _TURN_STARTS)):
        parts = re.split(pattern, text)
        if len(parts) > 3:
            break
    return [
        {"role": "user" if speaker == speakers[0] else "assistant", "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _has_both_speakers(turns: list[Turn]) -> bool:
    return len({turn["role"] for turn in turns}) == 2


def _refuse_unsplit(turns: list[Turn], text: str) -> None:
    """Refuses a transcript in which a turn holds a mark, after which the other one may speak.

    One at the beginning of a turn follows another mark, as in some rows of HH, and begins nothing.
    """
    mark = f"(?:{'|'.join(_speakers(text) or ())}):"
    unsplit = re.compile(rf"\n {{0,3}}{mark}|.{_HASHES}{mark}", re.DOTALL)
    for number, turn in enumerate(turns):
        if found := unsplit.search(turn["content"]):
            raise InvalidRow(
                f"turn {number} of a transcript holds {found.group()[1:].strip()!r}, which may begin a turn of its "
                "own; give the turns as messages"
            )


def as_prompt(value: object) -> list[Turn]:
    """`as_turns` of a prompt, without the start of an answer at its end ("Assistant:" and nothing more)."""
    turns = as_turns(value, "user")
    is_open = len(turns) > 1 and turns[-1]["role"] == "assistant" and turns[-1]["content"] == ""
    return turns[:-1] if is_open and isinstance(value, str) else turns


# --- checks ---


def fold_system(messages: list[Turn]) -> list[Turn]:
    """The messages with the system text moved to the front of the first user turn: Gemma 2 has no system role."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        raise InvalidRow("no user turn follows the system message")
    if not isinstance(system["content"], str) or not isinstance(rest[0]["content"], str):
        raise InvalidRow("the content of the system message or of the first user turn is not text")
    return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def check_messages(messages: list[Turn], last: str = "assistant") -> None:
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
        if "\0" in content:
            raise InvalidRow(f"turn {i} holds a NUL character; remove it")
        if not _is_whole(content):
            raise InvalidRow(f"turn {i} holds half a character (a lone surrogate)")
        if token := _CONTROL_TOKENS.search(content):
            found = token.group()
            raise InvalidRow(f"turn {i} holds the control token {found}; give the text without the chat format")
    if messages[-1]["role"] != last:
        found, wanted = ("user", "model") if last == "assistant" else ("model", "user")
        raise InvalidRow(f"the last turn is the {found}'s; it must be the {wanted}'s")


def _is_whole(text: str) -> bool:
    """Whether a text can be encoded: it holds no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_valid(messages: list[Turn]) -> bool:
    """Whether a conversation passes `check_messages`."""
    try:
        check_messages(messages)
    except InvalidRow:
        return False
    return True


def without_weights(turns: list[Turn]) -> list[Message]:
    """The messages alone."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
