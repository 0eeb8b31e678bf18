"""The rows of data sets from the Hub, local files and Python functions, one by one, as they are there."""

import inspect
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import ReadInstruction, load_dataset
from datasets.exceptions import DatasetGenerationCastError, DatasetGenerationError, DatasetsError

from gemma2_post.data.files import count_rows, files_of, is_data, is_glob, read_file
from gemma2_post.data.functions import is_function, load_function, raised
from gemma2_post.data.keys import Source
from gemma2_post.data.rows import RowFormat
from gemma2_post.data.turns import InvalidRow
from gemma2_post.stage.errors import UserError

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FIRST_ROWS = 100
"""Rows that a check of a recipe may read."""


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
                raise no_rows(source)
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


def no_rows(source: Source) -> UserError:
    return UserError(f"{source.path} ({source.split}): there are no rows; check the split, or the file")


def _is_local(path: str) -> bool:
    """Whether a path is meant to be a file, a folder or a glob; the rest are functions and names on the Hub."""
    return Path(path).exists() or is_data(path) or is_glob(path) or not _HUB_NAME.fullmatch(path)


def is_on_hub(path: str) -> bool:
    """Whether a path is the name of a data set on the Hub."""
    return not is_function(path) and not _is_local(path)


def is_here(path: str) -> bool:
    """Whether a path is a function, or files that exist: neither on the Hub, nor still to be made by a stage."""
    return is_function(path) or is_glob(path) or Path(path).exists()


def rows_of(source: Source, columns: set[str]) -> Iterator[dict[str, Any]]:
    """The rows of a source as they are; of tables, only these columns.

    Raises:
        UserError: The source cannot be read.
    """
    path = source.path
    if is_function(path):
        yield from _rows_of_function(source)
    elif _is_local(path):
        yield from _sliced(lambda: _rows_of_files(source, columns), source)
    else:
        try:
            dataset = load_dataset(path, source.name, split=source.split, revision=source.revision)
        except DatasetGenerationError as error:
            cause = error if isinstance(error, DatasetGenerationCastError) else error.__cause__ or error
            reason = " ".join(str(cause).split())[:200]
            raise UserError(
                f"{path}: its files cannot be read as one table ({reason}); download them and give their "
                "folder, whose files may have different columns"
            ) from error
        except (DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot get this data set ({' '.join(str(error).split())[:200]}); check its name "
                "and split, your login (`hf auth login`) and the network, or give a local file"
            ) from error
        read = [name for name in dataset.column_names if name in columns]
        others: dict[str, Any] = dict.fromkeys(name for name in dataset.column_names if name not in columns)
        some = read or dataset.column_names[:1]  # without any column, there would be no rows
        for batch in dataset.select_columns(some).with_format("arrow").iter(1000):
            yield from (row | others for row in batch.to_pylist())  # an error can name all columns


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


def _sliced(read: Callable[[], Iterator[dict[str, Any]]], source: Source) -> Iterator[dict[str, Any]]:
    """The rows that a split with a slice names, such as `train[:100]` or `train[10%:]`; all without a slice."""
    name, bracket, _ = source.split.partition("[")
    if not bracket:
        yield from read()
        return
    num_rows = sum(1 for _ in read())
    for part in absolute_slices(source, {name: num_rows}):
        yield from islice(read(), part.from_, part.to)


def num_rows_in(source: Source) -> int | None:
    """The number of rows in readable local files, counted quickly; None for other sources and kinds of files."""
    if is_function(source.path) or not _is_local(source.path) or "[" in source.split:
        return None
    counts = [count_rows(file) for file in files_of(source.path, source.split)]
    return None if None in counts else sum(count for count in counts if count)


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
