"""The rows of a mixture in the form in which they are written, whatever the form in which they were read."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow

from gemma2_post.curation.keys import Kind
from gemma2_post.curation.kinds import ANY, FORMATS, kind_of
from gemma2_post.data.keys import Source
from gemma2_post.data.pairs import scores_of
from gemma2_post.data.rows import Row
from gemma2_post.data.sources import no_rows, rows_of
from gemma2_post.data.turns import InvalidRow, Message
from gemma2_post.stage.errors import UserError

SOURCE, NUMBER = "source", "source_row"
"""Columns of the name of a row's source, and of its number there."""
_SAID_IN = {"conversations": ("messages",), "pairs": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}
SAID = {"messages", "prompt", "chosen", "rejected"}
"""Columns of turns."""
_TURN = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})
_WEIGHTED = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string(), "weight": pyarrow.int8()})
_FIRST_ROWS = 100


def find_kind(sources: list[Source], columns: list[str], wanted: Kind | None) -> Kind:
    """What the rows of a mixture are: what the recipe says, or what the first rows of every source are.

    Args:
        columns: Columns that are kept beside what is said, and so are no answers.

    Raises:
        UserError: The sources differ, or one is empty.
    """
    if wanted:
        return wanted
    kinds: dict[Kind, Source] = {}
    for source in sources:
        first = list(islice(rows_of(source, set(ANY.columns)), _FIRST_ROWS))
        if not first:
            raise no_rows(source)
        for row in first:
            kinds.setdefault(kind_of(Row(row, columns)), source)
    if len(kinds) > 1:
        (one, place), (other, other_place) = list(kinds.items())[:2]
        raise UserError(
            f"datasets: {place.path} has {one}, and {other_place.path} has {other}; curate them apart, "
            "or say with rows what all of them are read as"
        )
    return next(iter(kinds))


def names_of(sources: list[Source]) -> list[str]:
    """A name for each source, as in reports: its path, with the split if that is not `train`."""
    names = [each.path if each.split == "train" else f"{each.path} ({each.split})" for each in sources]
    return [name if names.count(name) == 1 else f"{name} #{place}" for place, name in enumerate(names, start=1)]


def read(kind: Kind, columns: list[str], row: dict[str, Any]) -> dict[str, Any]:
    """A row in the form in which it is written: `messages`, or `prompt` (with `chosen`, `rejected` and their scores).

    Raises:
        InvalidRow: The stages refuse it, or it is a pair without a better answer.
    """
    found = FORMATS[kind].read(row, columns)
    said = {name: found[name] for name in _SAID_IN[kind]}
    if kind == "pairs":
        if found["is_tie"]:
            raise InvalidRow("neither answer is better")
        said |= {"margin": found["margin"], **scores_of(Row(row))}
    elif kind == "conversations" and not all(
        trained for trained, turn in zip(found["trained"], found["messages"], strict=True) if turn["role"] != "user"
    ):
        pairs = zip(found["messages"], found["trained"], strict=True)
        said["messages"] = [turn | {"weight": int(trained)} for turn, trained in pairs]
    return said | {name: row[name] for name in columns if name in row}


def table(kind: Kind, rows: list[dict[str, Any]]) -> pyarrow.Table:
    """Rows as columns; a column that only some rows have is null in the others.

    Raises:
        pyarrow.ArrowException: A column has values of different types.
    """
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        is_weighted = name == "messages" and any("weight" in turn for row in rows for turn in row[name])
        turn = _WEIGHTED if is_weighted else _TURN
        columns[name] = pyarrow.array(values, pyarrow.list_(turn) if name in _SAID_IN[kind] else None)
    return pyarrow.table(columns)


# --- what is said in a row ---


@dataclass(frozen=True)
class Said:
    """The turns of a row, by who says them and what they are for."""

    turns: list[Message]
    """All of them: of a pair the prompt, the chosen and the rejected answer."""
    wanted: list[Message]
    """Without the rejected answer of a pair."""
    parts: list[str]
    """Its text for comparing: what the user says, what the assistant answers, and the rejected answer of a pair."""

    @property
    def users(self) -> list[str]:
        """What the user says."""
        return [turn["content"] for turn in self.turns if turn["role"] == "user"]

    @property
    def all_answers(self) -> list[str]:
        """What the assistant says, in rejected answers, too."""
        return [turn["content"] for turn in self.turns if turn["role"] == "assistant"]

    @property
    def answers(self) -> list[str]:
        """What the assistant says, without rejected answers."""
        return [turn["content"] for turn in self.wanted if turn["role"] == "assistant"]


def said(row: dict[str, Any]) -> Said:
    """What is said in a row that `read` has returned."""
    if "messages" in row:
        return Said(row["messages"], row["messages"], _by_role(row["messages"]))
    if "chosen" in row:
        wanted = [*row["prompt"], *row["chosen"]]
        return Said([*wanted, *row["rejected"]], wanted, [*_by_role(wanted), *_by_role(row["rejected"])[1:]])
    return Said(row["prompt"], row["prompt"], _by_role(row["prompt"]))


def _by_role(turns: list[Message]) -> list[str]:
    """What the user says, and what the assistant says."""
    return ["\n".join(turn["content"] for turn in turns if turn["role"] == role) for role in ("user", "assistant")]


def rewritten(row: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The row with another text in each turn."""
    return {
        name: [turn | {"content": change(turn["content"])} for turn in value] if name in SAID else value
        for name, value in row.items()
    }


def texts_of(row: dict[str, Any]) -> Iterator[str]:
    """The text of each turn."""
    yield from (turn["content"] for turn in said(row).turns)


def reward_of(row: dict[str, Any], column: str | None) -> float:
    """The number in the reward column; NaN if there is none."""
    value = row.get(column) if column else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
