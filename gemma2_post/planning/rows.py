"""How many rows a stage reads and how long they are, as far as it can be known without downloading anything."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from gemma2_post.data.keys import Source
from gemma2_post.data.rows import RowFormat
from gemma2_post.data.sources import is_on_hub, rows_of
from gemma2_post.data.turns import InvalidRow, Message
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.planning.memory import Job
from gemma2_post.stage.recipe import values_of
from gemma2_post.stage.work import Lengths, Rows

FIRST_ROWS = 1000
"""Rows of each source whose lengths are counted."""
CHARACTERS = 4
"""Characters of a token, where no tokenizer is at hand."""
PER_TURN = 5
"""Tokens that the chat format adds to a turn."""

Count = Callable[[list[Message], bool], int]
"""Tokens of messages, and whether an answer is to follow."""


def counter(jobs: list[Job]) -> Count | None:
    """Counts tokens with the tokenizer of the first model of the jobs that is a folder; None if there is none."""
    named = [str(value) for job in jobs for key in job.checked.models for value in [job.values.get(key)]]
    folder = next((each for each in named if (Path(each) / "tokenizer.json").is_file()), None)
    if folder is None:
        return None
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
        answers: Lengths of answers in the data of earlier stages.
    """
    recipe, formats = values_of(job.checked.recipe), job.command.row_formats
    if "datasets" not in formats or not recipe.get("datasets"):
        return Rows(answers=answers)
    sources: list[Source] = recipe["datasets"]
    held_out: list[Source] | None = recipe.get("held_out_datasets")
    known = None if any(is_on_hub(each.path) for each in sources) else num_rows(sources)
    known_held_out = None
    if held_out and not any(is_on_hub(each.path) for each in held_out):
        known_held_out = num_rows(held_out)
    columns = recipe.get("columns") or []
    first = [row for each in sources if not is_on_hub(each.path) for row in first_rows(each, formats["datasets"], columns)]
    if not first:
        return Rows(known, known_held_out, answers=answers)
    whole = [messages for row in first for messages in conversations(row)]
    has_answers = "prompt" not in first[0] or "chosen" in first[0]
    prompts = [messages[:-1] if has_answers else messages for messages in whole]
    if has_answers:
        pairs = zip(whole, prompts, strict=True)
        answers = lengths(count(messages, False) - count(prompt, True) for messages, prompt in pairs)
    return Rows(
        known,
        known_held_out,
        lengths(count(messages, False) for messages in whole),
        lengths(count(messages, True) for messages in prompts),
        answers,
    )


def lengths(tokens: Iterable[int]) -> Lengths:
    """Lengths in order."""
    return Lengths(tuple(sorted(max(1, each) for each in tokens)))


def num_rows(sources: list[Source]) -> int:
    """Number of rows of a mixture, in the proportions of its weights; see `data.sources.load_mixture`."""
    sizes = [sum(1 for _ in rows_of(each, set())) for each in sources]
    weights = [each.weight for each in sources if each.weight is not None]
    if not weights:
        return sum(sizes)
    return round(min(size / weight for size, weight in zip(sizes, weights, strict=True)) * sum(weights))


def first_rows(source: Source, row_format: RowFormat, columns: list[str]) -> list[dict[str, Any]]:
    """The first valid rows of a source, as they are read."""
    found = []
    for row in islice(rows_of(source, {*row_format.columns, *columns}), FIRST_ROWS):
        try:
            found.append(row_format.read(row, columns))
        except InvalidRow:
            continue
    return found


def conversations(row: dict[str, Any]) -> list[list[Message]]:
    """What a row says: a conversation, a prompt, or both sides of a pair."""
    if "messages" in row:
        return [row["messages"]]
    return [[*row["prompt"], *row[side]] for side in ("chosen", "rejected") if side in row] or [row["prompt"]]
