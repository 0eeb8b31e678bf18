"""The questions of a protocol, and the files that several protocols share."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_post.data.files import read_file
from gemma2_post.data.turns import Message
from gemma2_post.evaluation.protocols.outputs import Outputs, read_outputs
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError


@dataclass(frozen=True)
class Questions:
    """What a protocol asks each model."""

    protocol: str
    ids: list[str]
    turns: list[list[str]]
    """The user's turns of each question; later ones are asked after the model's answer."""
    categories: list[str]
    temperatures: list[float]
    """Temperature at which each question is answered."""

    @property
    def prompts(self) -> list[list[Message]]:
        """The first turn of each question."""
        return [[{"role": "user", "content": turns[0]}] for turns in self.turns]

    @property
    def later(self) -> list[list[str]]:
        """The user's later turns of each question."""
        return [turns[1:] for turns in self.turns]

    @property
    def keys(self) -> list[str]:
        """What answers of files are found by."""
        return [turns[0].strip() for turns in self.turns]

    def answers_of(self, outputs: Outputs) -> list[list[str] | None]:
        """The answers in a file, by turn; None for a question without an answer to each turn."""
        answers = outputs.answers_to(self.keys, self.ids)
        return [
            given if given and len(given) >= len(turns) else None
            for given, turns in zip(answers, self.turns, strict=True)
        ]


def read_questions(folder: str, protocol: str) -> list[dict[str, Any]]:
    """The rows of `question.jsonl` in a folder.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    file = Path(folder) / "question.jsonl"
    if not file.is_file():
        raise UserError(f"{protocol}: {folder} has no question.jsonl; name the folder of that project's data")
    rows = list(read_file(file, set()))
    if not rows:
        raise UserError(f"{file}: there are no questions here; download it again")
    return rows


def read_answers(folder: Path, wanted: str | None, key: str) -> Outputs | None:
    """The answers in a folder of files such as `model_answer/gpt-4-0314.jsonl`; None if it has none.

    Args:
        wanted: The file's name without its suffix; None: the only one there.
        key: The key of the recipe that names it, for errors.

    Raises:
        UserError: There is no such file, or there are several and none is named.
    """
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    names = [file.stem for file in files]
    if wanted is None and len(files) <= 1:
        return read_outputs(str(files[0])) if files else None
    if wanted not in names:
        raise UserError(f"{key} is {wanted}, and {folder} has {', '.join(names) or 'no file'}; name one of these")
    return read_outputs(str(folder / f"{wanted}.jsonl"))


def file_name(model: str) -> str:
    """A model's name as the name of a file: `rlhf/policy-0` is `rlhf--policy-0`."""
    return model.replace("/", "--")


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object to a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    contract.write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
