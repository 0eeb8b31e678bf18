"""How many rows a stage reads and how long they are, as far as it can be known without downloading anything."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma2_post.data.keys import Source
from gemma2_post.data.rows import RowFormat
from gemma2_post.data.sources import is_here, rows_of
from gemma2_post.data.turns import InvalidRow, Message
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.planning.memory import Job
from gemma2_post.stage.recipe import values_of
from gemma2_post.stage.work import Lengths, Rows

FIRST_ROWS = 500
"""Rows of each source whose lengths are counted."""
CHARACTERS = 4
"""Characters of a token, where no tokenizer is at hand."""
PER_TURN = 5
"""Tokens that the chat format adds to a turn."""

Count = Callable[[list[Message], bool], int]
"""Tokens of messages, and whether an answer is to follow."""


def counter(jobs: list[Job]) -> Count:
    """Counts tokens with the tokenizer of the first model of the jobs that is a folder; estimates them if none is."""
    named = [str(job.values.get(key)) for job in jobs for key in job.checked.models]
    folder = next((each for each in named if (Path(each) / "tokenizer.json").is_file()), None)
    if folder is None:
        return estimated
    tokenizer = load_tokenizer(folder, load_config(folder))
    return lambda messages, follows: len(
        tokenizer.apply_chat_template(messages, add_generation_prompt=follows, return_dict=True)["input_ids"]
    )


def estimated(messages: list[Message], follows: bool) -> int:
    """Tokens by the number of characters."""
    return sum(len(each["content"]) // CHARACTERS + PER_TURN for each in messages) + follows * PER_TURN


def rows_of_job(job: Job, count: Count, answers: Lengths | None) -> Rows:
    """What is known about a stage's rows.

    Args:
        answers: Lengths of answers in the data of earlier stages, for rows that have none.
    """
    recipe, formats = values_of(job.checked.recipe), job.command.row_formats
    if not recipe.get("datasets"):
        return Rows(answers=answers)
    columns, row_format = recipe.get("columns") or [], formats["datasets"]
    known, first = read(recipe["datasets"], row_format, columns)
    known_held_out, _ = read(recipe.get("held_out_datasets") or [], row_format, columns)
    if not first:
        return Rows(known, known_held_out, answers=answers)
    whole = [messages for row in first for messages in conversations(row)]
    prompts = whole
    if whole[0][-1]["role"] == "assistant":
        prompts = [messages[:-1] for messages in whole]
        pairs = zip(whole, prompts, strict=True)
        answers = lengths(count(messages, False) - count(prompt, True) for messages, prompt in pairs)
    of_whole = lengths(count(messages, False) for messages in whole)
    return Rows(known, known_held_out, of_whole, lengths(count(messages, True) for messages in prompts), answers)


def lengths(tokens: Iterable[int]) -> Lengths:
    """Lengths in order."""
    return Lengths(tuple(sorted(max(1, each) for each in tokens)))


def read(sources: list[Source], row_format: RowFormat, columns: list[str]) -> tuple[int | None, list[dict[str, Any]]]:
    """The number of rows of a mixture (see `data.sources.load_mixture`) and its first valid rows, as they are read.

    The number is None if there are no sources, or some are on the Hub or still to be made; these are not looked at.
    """
    sizes, first = [], []
    local = [each for each in sources if is_here(each.path)]
    for source in local:
        rows = rows_of(source, {*row_format.columns, *columns})
        size = 0
        for size, row in enumerate(rows, start=1):
            if size <= FIRST_ROWS:
                with suppress(InvalidRow):
                    first.append(row_format.read(row, columns))
        sizes.append(size)
    if not sources or len(local) < len(sources):
        return None, first
    weights = [each.weight for each in sources if each.weight is not None]
    if not weights:
        return sum(sizes), first
    return round(min(size / weight for size, weight in zip(sizes, weights, strict=True)) * sum(weights)), first


def conversations(row: dict[str, Any]) -> list[list[Message]]:
    """What a row says: a conversation, a prompt, or both sides of a pair."""
    if "messages" in row:
        return [row["messages"]]
    return [[*row["prompt"], *row[side]] for side in ("chosen", "rejected") if side in row] or [row["prompt"]]
