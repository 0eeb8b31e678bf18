"""Loads and mixes data sets from the Hub, local files and Python functions.

Every row of every source is read and checked before a model is loaded. Errors name the source, the row and what was
found. The rows are kept in temporary Arrow files, so that no cache can return rows of an earlier file or code.
"""

import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
from datasets import (
    Dataset,
    Features,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    disable_caching,
    load_dataset,
)
from datasets.arrow_writer import ArrowWriter

from gemma2_post.data.files import files_of, is_data, is_glob, read_file
from gemma2_post.data.functions import is_function, load_function, raised
from gemma2_post.data.keys import Source
from gemma2_post.data.pairs import pairs_with_margin
from gemma2_post.data.rows import CONVERSATION, DOCUMENT, PROMPT, QUESTION, RowFormat
from gemma2_post.data.turns import InvalidRow, Message
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_FEATURES = {
    **dict.fromkeys(["messages", "prompt", "chosen", "rejected"], _MESSAGES),
    "trained": List(Value("bool")), "later": List(Value("string")), "text": Value("string"),
    "margin": Value("float64"), "is_tie": Value("bool"),
}  # fmt: skip
"""Types of all columns that rows are read as."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FIRST_ROWS = 100
"""Rows that a check of a recipe may read."""


def load_mixture(
    sources: list[Source],
    max_invalid_share: float,
    seed: int,
    columns: list[str] | None = None,
    *,
    row_format: RowFormat,
) -> Dataset:
    """The rows of all sources, read and checked, as one data set in the proportions of the sources' weights.

    Args:
        max_invalid_share: Largest share of invalid rows in a source; they are dropped.
        columns: Columns to keep; at least one source must have each of them.

    Raises:
        UserError: A source cannot be read, has no known format, is empty, or has too many invalid rows.
    """
    columns = columns or []
    disable_caching()  # what later steps make of the rows would be cached by their code's text alone
    loaded = [_load_source(source, max_invalid_share, columns, row_format) for source in sources]
    for column in columns:
        if not any(column in dataset.column_names for dataset in loaded):
            raise UserError(f"columns: no source has {column}; correct it or remove it")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        if len(weights) < len(sources):
            raise UserError("datasets: give a weight above 0 to every source or to none")
        # The largest mixture in these proportions that uses no row twice.
        total = min(len(dataset) / weight for dataset, weight in zip(loaded, weights, strict=True))
        loaded = [
            dataset.shuffle(seed=seed).select(range(max(1, round(total * weight))))
            for dataset, weight in zip(loaded, weights, strict=True)
        ]
    try:
        return concatenate_datasets(loaded)
    except ValueError as error:
        raise UserError(f"datasets: the sources do not fit together ({error}); make their columns alike") from error


load_conversations = partial(load_mixture, row_format=CONVERSATION)
"""`load_mixture` with columns `messages` and `trained`: for each message, whether its tokens count in the loss."""
load_prompts = partial(load_mixture, row_format=PROMPT)
"""`load_mixture` with a column `prompt`: the messages up to the user's last turn, without the model's answer to it."""
load_questions = partial(load_mixture, row_format=QUESTION)
"""`load_mixture` with columns `prompt` and `later`: the user's later turns (MT-Bench's `turns`)."""


def load_documents(sources: list[Source], max_invalid_share: float, seed: int) -> list[str | list[Message]]:
    """Raw texts, and conversations where a source has them; see `load_mixture`."""
    loaded = load_mixture(sources, max_invalid_share, seed, row_format=DOCUMENT)
    return [row["messages"] if row["text"] is None else row["text"] for row in loaded]


def load_preferences(
    sources: list[Source],
    max_invalid_share: float,
    seed: int,
    columns: list[str] | None = None,
    score_margin: float = 0.0,
) -> Dataset:
    """`load_mixture` with the columns of `read_pair` and `num_turns` (of the user).

    Drops and counts ties (equal scores), which do not say which answer is better.

    Raises:
        UserError: See `load_mixture`; or all pairs are ties.
    """
    pairs = load_mixture(sources, max_invalid_share, seed, columns, row_format=pairs_with_margin(score_margin))
    kept = pairs.filter(lambda is_tie: not is_tie, input_columns="is_tie")
    if len(kept) == 0:
        raise UserError(f"datasets: all {len(pairs)} pairs are ties (equal scores); give pairs that differ")
    if len(kept) < len(pairs):
        logger.warning("dropped %d of %d pairs as ties (equal scores)", len(pairs) - len(kept), len(pairs))
    kept = kept.remove_columns("is_tie")
    return kept.add_column("num_turns", [(len(prompt) + 1) // 2 for prompt in kept["prompt"]])


def check_sources(sources: list[Source], columns: list[str], row_format: RowFormat, max_invalid_share: float) -> None:
    """Refuses missing functions and files, and files whose first rows are not as expected.

    It checks no later rows, calls no functions, and looks at nothing on the Hub.
    """
    for source in sources:
        if is_function(source.path):
            load_function(source.path)
        elif _is_local(source.path):
            first = list(islice(rows_of(source, {*row_format.columns, *columns}), _FIRST_ROWS))
            if not first:
                raise _no_rows(source)
            for number, row in enumerate(first):
                try:
                    row_format.read(row, columns)
                    break
                except InvalidRow as problem:
                    if not max_invalid_share:
                        raise UserError(f"{source.path}: row {number}: {problem}; fix the data") from problem
            missing = [column for column in columns if not any(column in row for row in first)]
            if len(sources) == 1 and len(first) < _FIRST_ROWS and missing:
                raise UserError(f"columns: no source has {missing[0]}; correct it or remove it")


# --- one source ---


@dataclass
class _Invalid:
    """The invalid rows of a source."""

    first: str = ""
    """The number of the first one, and what is wrong with it."""
    num: int = 0

    def add(self, number: int, problem: InvalidRow) -> None:
        self.first = self.first or f"row {number}: {problem}"
        self.num += 1


def _load_source(source: Source, max_invalid_share: float, columns: list[str], row_format: RowFormat) -> Dataset:
    """The valid rows of one source, with those of `columns` that it has."""
    place, invalid, num_rows, num_system = source.path, _Invalid(), 0, 0
    kept: dict[str, list[Any]] = {column: [] for column in columns}
    having: set[str] = set()
    file = _new_file()
    features = Features({name: _FEATURES[name] for name in row_format.result})
    with ArrowWriter(path=str(file), features=features) as writer:
        for row in rows_of(source, {*row_format.columns, *columns}):
            num_rows += 1
            try:
                found = row_format.read(row, columns)
            except InvalidRow as problem:
                invalid.add(num_rows - 1, problem)
                continue
            num_system += found.pop("had_system")
            for column in columns:
                kept[column].append(row.get(column))
            having |= row.keys()
            writer.write(found)
        writer.finalize()
    if num_rows == 0:
        raise _no_rows(source)
    if invalid.num:
        all_invalid = f" ({invalid.num} of {num_rows} rows are invalid)" if invalid.num > 1 else ""
        if invalid.num == num_rows or invalid.num > max_invalid_share * num_rows:
            raise UserError(
                f"{place}: {invalid.first}{all_invalid}; fix the data, or allow a share of such rows with "
                "max_invalid_share"
            )
        logger.warning("%s: dropped invalid rows; the first one is %s%s", place, invalid.first, all_invalid)
    if num_system:
        logger.warning("%s: a system message was put in front of the first user turn in %d rows", place, num_system)
    dataset = Dataset.from_file(str(file))
    for column in columns:
        if column in having and column not in dataset.column_names:
            dataset = dataset.add_column(column, _array(place, column, kept[column]))
    return dataset


def _array(place: str, column: str, values: list[Any]) -> pyarrow.Array:
    """The values of a column, which must be of one type."""
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        kinds = [(number, type(value).__name__) for number, value in enumerate(values) if value is not None]
        other = next((each for each in kinds if each[1] != kinds[0][1]), kinds[0])
        raise UserError(
            f"{place}: column {column} is {kinds[0][1]} in row {kinds[0][0]} and {other[1]} in row {other[0]}; write "
            "values of one type"
        ) from error


@cache
def _folder() -> TemporaryDirectory:
    """The folder of this process's Arrow files, removed when it ends."""
    return TemporaryDirectory(prefix="gemma2_post-")


_numbers = count()


def _new_file() -> Path:
    return Path(_folder().name) / f"{next(_numbers)}.arrow"


def _no_rows(source: Source) -> UserError:
    return UserError(f"{source.path} ({source.split}): there are no rows; check the split, or the file")


def _is_local(path: str) -> bool:
    """Whether a path is meant to be a file, a folder or a glob; the rest are functions and names on the Hub."""
    return Path(path).exists() or is_data(path) or is_glob(path) or not _HUB_NAME.fullmatch(path)


def is_on_hub(path: str) -> bool:
    """Whether a path is the name of a data set on the Hub."""
    return not is_function(path) and not _is_local(path)


def rows_of(source: Source, columns: set[str]) -> Iterator[dict[str, Any]]:
    """The rows of a source as they are; of tables, only these columns.

    Raises:
        UserError: The source cannot be read.
    """
    path = source.path
    if is_function(path):
        yield from _rows_of_function(source)
    elif _is_local(path):
        yield from _sliced(_rows_of_files(source, columns), source)
    else:
        try:
            dataset = load_dataset(path, source.name, split=source.split, revision=source.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot get this data set ({' '.join(str(error).split())[:200]}); check its name "
                "and split, your login (`hf auth login`) and the network, or give a local file"
            ) from error
        read = [name for name in dataset.column_names if name in columns]
        others: dict[str, Any] = dict.fromkeys(name for name in dataset.column_names if name not in columns)
        yield from (others | row for row in dataset.select_columns(read))  # an error can name all columns


def _rows_of_files(source: Source, columns: set[str]) -> Iterator[dict[str, Any]]:
    path = source.path
    if not path.strip():
        raise UserError("a path of datasets is empty; name a file, a function or a data set on the Hub")
    if "://" in path:
        raise UserError(
            f"{path}: is a URL; download the file and give its path, or give the data set's name on the Hub"
        )
    if not Path(path).exists() and not is_glob(path):
        raise UserError(f"{path}: there is no such file; paths start where the command is run")
    if Path(path).is_file() and not is_data(path):
        raise UserError(
            f"{path}: expected .json, .jsonl, .ndjson, .csv, .parquet or .txt, also as .gz or .zst, module:function, "
            "or a Hub data set"
        )
    for file in files_of(path, source.split):
        yield from read_file(file, columns)


def _sliced(rows: Iterator[dict[str, Any]], source: Source) -> Iterator[dict[str, Any]]:
    """The rows that a split with a slice names, such as `train[:100]` or `train[10%:]`."""
    name, bracket, _ = source.split.partition("[")
    if not bracket:
        yield from rows
        return
    every = list(rows)
    for part in absolute_slices(source, {name: len(every)}):
        yield from every[part.from_ : part.to]


def absolute_slices(source: Source, num_rows: dict[str, int]) -> list[Any]:
    """The slices that a split names, each with `splitname`, `from_` and `to`, given the sizes of the splits."""
    try:
        return ReadInstruction.from_spec(source.split).to_absolute(num_rows)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{source.path}: split {source.split} is not readable ({error}); write train[:100]") from error


def _rows_of_function(source: Source) -> Iterator[dict[str, Any]]:
    """What a user's function returns or generates."""
    function = load_function(source.path)
    advice = "return a list of rows, each a dictionary"
    try:
        inspect.signature(function).bind(source.split)
        rows = function(source.split)
        if not hasattr(rows, "__iter__") or isinstance(rows, str | dict):
            raise UserError(f"{source.path}: returned {type(rows).__name__}; {advice}")
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(f"{source.path}: row {number} is {type(row).__name__}; {advice}")
            yield row
    except UserError:
        raise
    except Exception as error:  # a user's code can raise anything
        raise UserError(raised(source.path, "making rows", error)) from error
