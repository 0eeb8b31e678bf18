"""Finds test prompts that earlier stages of a chain have read: exact matches after normalization, by content.

A prompt is the user's turns. One that a conversation contains as its beginning has been read, too: every turn of the
model is trained on, not only the last one.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gemma2_post.data.keys import Source
from gemma2_post.data.rows import RowFormat
from gemma2_post.data.sources import absolute_slices, is_on_hub, rows_of
from gemma2_post.data.turns import InvalidRow
from gemma2_post.stage.errors import UserError

Prompt = tuple[str, ...]
"""The user's turns, normalized."""
_MANY = 1_000_000
"""Rows that a split on the Hub is taken to have where two slices of it are compared."""


@dataclass
class Row:
    """A row of a data set."""

    source: Source
    number: int

    def __str__(self) -> str:
        return f"row {self.number} of {self.source.path} ({self.source.split})"


def normalized(text: str) -> str:
    """The text in NFKC, without differences in case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_unseen(
    test: list[Source], row_format: RowFormat, read: Iterable[tuple[list[Source], RowFormat, str]]
) -> None:
    """Refuses test prompts that another stage has read.

    Data sets on the Hub are compared by their names, splits and slices, because a check uses no network.

    Args:
        read: The sources of the earlier stages, with the formats of their rows and what the stage does with them, in
            words: "sft trains on".

    Raises:
        UserError: Some prompts overlap; names the first rows.
    """
    tested = {prompts[-1]: row for row, prompts in _prompts(test, row_format)}
    for sources, read_format, purpose in read:
        for source in sources:
            if is_on_hub(source.path):
                _check_slices(source, test, purpose)
        seen: dict[Prompt, Row] = {}
        for row, prompts in _prompts(sources, read_format):
            for prompt in prompts:
                if prompt in tested:
                    seen.setdefault(prompt, row)
        if seen:
            prompt, row = next(iter(seen.items()))
            first = [str(tested[each].number) for each in list(seen)[:3]]
            raise UserError(
                f"datasets: {tested[prompt]} asks what {row} asks, which {purpose}; {len(seen)} of {len(tested)} "
                f"prompts overlap (rows {', '.join(first)}{', ...' if len(seen) > 3 else ''}); test on prompts that "
                "no stage has read"
            )


def _prompts(sources: list[Source], row_format: RowFormat) -> Iterator[tuple[Row, list[Prompt]]]:
    """The valid rows of sources that are not on the Hub, with all prompts that are in them, the longest last."""
    for source in sources:
        if is_on_hub(source.path):
            continue
        for number, columns in enumerate(rows_of(source, set(row_format.columns))):
            try:
                found = row_format.read(columns, columns)
            except InvalidRow:
                continue
            users = [normalized(text) for text in _user_turns(found)]
            if users:
                yield Row(source, number), [tuple(users[:end]) for end in range(1, len(users) + 1)]


def _user_turns(row: dict[str, Any]) -> list[str]:
    turns = row.get("messages") or row.get("prompt") or []
    return [turn["content"] for turn in turns if turn["role"] == "user"] + row.get("later", [])


def _check_slices(source: Source, test: list[Source], purpose: str) -> None:
    """Refuses a test source that may share rows with a source on the Hub: the same split, in slices that meet."""
    for each in test:
        is_same = (each.path, each.name, each.revision) == (source.path, source.name, source.revision)
        if is_same and any(
            name == other and first < other_last and other_first < last
            for name, first, last in _ranges(each)
            for other, other_first, other_last in _ranges(source)
        ):
            raise UserError(
                f"datasets: {each.path} ({each.split}) shares rows with {source.split}, which {purpose}; test on "
                "another split, or on another slice of it, such as test[50%:]"
            )


def _ranges(source: Source) -> list[tuple[str, int, int]]:
    """The splits that a source names, with their first row and the row after their last one."""
    names = re.findall(r"(?:^|\+)\s*([^\[+\s]+)", source.split)
    slices = absolute_slices(source, dict.fromkeys(names, _MANY))
    return [(each.splitname, each.from_, each.to) for each in slices]
