"""Answers that exist already, in the layouts of AlpacaEval, FastChat, and Arena-Hard."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_post.data.files import read_file
from gemma2_post.data.rows import PROMPT
from gemma2_post.data.turns import InvalidRow, Message
from gemma2_post.stage.errors import UserError

_PROMPTS = PROMPT.columns - {"output", "response", "completion", "answer"}


@dataclass(frozen=True)
class Outputs:
    """What a model answered elsewhere."""

    name: str
    by_prompt: dict[str, str]
    """The answer to each prompt, by `key_of` the prompt."""
    by_id: dict[str, list[str]]
    """The answers to each question, one for each of the user's turns, by the question's id."""

    def answers_to(self, keys: list[str], ids: list[str] | None = None) -> list[list[str] | None]:
        """The answers to these prompts, by turn; None for a prompt without one.

        Args:
            keys: `key_of` each prompt.
            ids: The questions' ids, if they have any.
        """
        by_prompt = [[self.by_prompt[key]] if key in self.by_prompt else None for key in keys]
        by_id = [self.by_id.get(each) for each in ids] if ids else by_prompt
        return [one or other for one, other in zip(by_id, by_prompt, strict=True)]


def complete(answers: list[list[str] | None]) -> list[list[str]]:
    """The answers if there is one to each prompt, else none."""
    found = [each for each in answers if each is not None]
    return found if len(found) == len(answers) else []


def key_of(prompt: list[Message]) -> str:
    """The text of a prompt, by which its answer is found."""
    return "\n\n".join(turn["content"].strip() for turn in prompt)


def read_outputs(file: str) -> Outputs:
    """The answers in a file.

    Rows are AlpacaEval's (`instruction`, `output`, `generator`; or a prompt under another known name), FastChat's
    (`question_id`, `choices`, `model_id`), or Arena-Hard's (`uid`, `messages`, `model`).

    Raises:
        UserError: The file cannot be read, a row has another layout, or two rows answer one prompt.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"outputs names {file}, which is no file; give one such as model_outputs.json")
    name = ""
    by_prompt: dict[str, str] = {}
    by_id: dict[str, list[str]] = {}
    for number, row in enumerate(read_file(path, set())):
        place = f"{file}: row {number}"
        name = name or str(row.get("generator") or row.get("model_id") or row.get("model") or "")
        if "choices" in row or "messages" in row:
            key = str(row.get("question_id", row.get("uid")))
            if key in by_id:
                raise UserError(f"{place} answers question {key}, as an earlier row does; remove one of them")
            by_id[key] = _turns(row, place)
        elif isinstance(row.get("output"), str):
            key = key_of(_prompt(row, place))
            if by_prompt.setdefault(key, row["output"]) != row["output"]:
                raise UserError(
                    f"{place} answers a prompt that an earlier row answers differently; remove one of them"
                )
        else:
            raise UserError(
                f"{place} has the columns {', '.join(row)}; expected instruction and output (AlpacaEval), question_id "
                "and choices (FastChat), or uid and messages (Arena-Hard)"
            )
    return Outputs(name or path.stem, by_prompt, by_id)


def _prompt(row: dict[str, Any], place: str) -> list[Message]:
    try:
        return PROMPT.read({key: value for key, value in row.items() if key in _PROMPTS})["prompt"]
    except InvalidRow as problem:
        raise UserError(f"{place}: {problem}") from problem


def _turns(row: dict[str, Any], place: str) -> list[str]:
    """The model's turns of a row of FastChat's or Arena-Hard's layout."""
    if "choices" in row:
        choices = row["choices"]
        found = choices[0].get("turns") if isinstance(choices, list) and choices else None
    else:
        found = [turn.get("content") for turn in row["messages"] if turn.get("role") == "assistant"]
    turns = [text_of(turn) for turn in found or []]
    if not turns or None in turns:
        raise UserError(f"{place} has no answer; expected choices[0].turns, or messages of an assistant")
    return [turn for turn in turns if turn is not None]


def text_of(content: Any) -> str | None:
    """The text of a turn: itself, or what its `content` or `answer` is."""
    if isinstance(content, dict):
        return text_of(content.get("content", content.get("answer")))
    return content if isinstance(content, str) else None
