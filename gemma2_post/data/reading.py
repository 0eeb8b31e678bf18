"""Reads and checks all rows of a source, tokenizes them, and writes them to Arrow files, on all cores.

The main process reads rows and hands them out in batches; the others check and tokenize a batch and write its
file. Only a few batches are in memory, however many rows there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
import xxhash
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.encoding import encode, types_of
from gemma2_post.data.forked import on_all_cores
from gemma2_post.data.keys import Source
from gemma2_post.data.rows import RowFormat
from gemma2_post.data.sources import num_rows_in, rows_of
from gemma2_post.data.turns import InvalidRow
from gemma2_post.stage.errors import UserError

DIGEST = "_digest"
"""Column of a hash of what is said in a row, which tells repeated rows."""
_SAID = ("messages", "prompt", "chosen", "rejected")
_MESSAGES = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
_TYPES = {
    **dict.fromkeys(_SAID, _MESSAGES),
    "trained": pyarrow.list_(pyarrow.bool_()), "later": pyarrow.list_(pyarrow.string()), "text": pyarrow.string(),
    "answers": pyarrow.list_(pyarrow.string()), "num_chosen": pyarrow.int32(),
    "subset": pyarrow.string(), "id": pyarrow.string(),
    "margin": pyarrow.float64(), "is_tie": pyarrow.bool_(), "num_turns": pyarrow.int32(), DIGEST: pyarrow.uint64(),
}  # fmt: skip
"""Types of all columns that rows are read as."""
_BATCH_ROWS = 2000
_ENCODED_ROWS = 100
"""Rows that are tokenized at a time: the tokenizer's result has 100 bytes a token."""


@dataclass(frozen=True)
class Task:
    """What is made of the rows of a source."""

    source: Source
    row_format: RowFormat
    columns: list[str]
    """Columns to keep beside those of the format, in rows that have them."""
    tokenizer: PreTrainedTokenizerBase | None
    """None: the rows are not tokenized."""
    folder: Path
    """Where the Arrow files are written."""


@dataclass
class Found:
    """What was found in the rows of a source, or in one batch of them."""

    num_rows: int = 0
    num_invalid: int = 0
    first_invalid: str = ""
    """The number of the first invalid row, and what is wrong with it."""
    num_system: int = 0
    """Rows with a system message."""
    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)
    """For each column that is kept beside the format's: the first row with a value, and its type."""
    schema: pyarrow.Schema | None = None
    """All columns; None without valid rows."""

    def add(self, other: "Found") -> None:
        """Adds what was found in the next batch."""
        self.num_rows += other.num_rows
        self.num_invalid += other.num_invalid
        self.first_invalid = self.first_invalid or other.first_invalid
        self.num_system += other.num_system
        self.kinds = other.kinds | self.kinds


def read(task: Task) -> Found:
    """Reads the source and writes `00000.arrow`, `00001.arrow`, ... with the same columns to the task's folder.

    Raises:
        UserError: The source cannot be read, or a column to keep has values of different types.
    """
    found, schemas = Found(), {}
    doing = f"{'reading and tokenizing' if task.tokenizer else 'reading'} {task.source.path}"
    with tqdm(desc=doing, unit=" rows", delay=1) as bar:
        for number, batch in enumerate(_results(task, doing)):
            if batch.schema:
                schemas[number] = batch.schema
                found.schema = _merged(task.source, found, batch)
            found.add(batch)
            if batch.num_rows == _BATCH_ROWS and bar.total is None:
                bar.total = num_rows_in(task.source)
            bar.update(batch.num_rows)
    for number, schema in schemas.items():
        if schema != found.schema:
            _convert(task.folder / f"{number:05d}.arrow", found.schema)
    return found


def _results(task: Task, doing: str) -> Iterator[Found]:
    """What was found in each batch, in order."""
    rows = rows_of(task.source, {*task.row_format.columns, *task.columns})
    batches = iter(lambda: list(islice(rows, _BATCH_ROWS)), [])
    first = next(batches, [])
    if len(first) < _BATCH_ROWS:
        yield _read_batch(task, (0, first))
    else:
        yield from on_all_cores(partial(_read_batch, task), enumerate(chain([first], batches)), doing)


# --- in the other processes ---


def _read_batch(task: Task, numbered: tuple[int, list[dict[str, Any]]]) -> Found:
    """Checks and tokenizes a batch, given with its number, and writes its file if any row is valid."""
    number, rows = numbered
    batch, numbers, valid = Found(num_rows=len(rows)), [], []
    for row_number, row in enumerate(rows, start=number * _BATCH_ROWS):
        try:
            read = task.row_format.read(row, task.columns)
        except InvalidRow as problem:
            batch.first_invalid = batch.first_invalid or f"row {row_number}: {problem}"
            batch.num_invalid += 1
            continue
        batch.num_system += read.pop("had_system")
        numbers.append(row_number)
        valid.append((row, read))
    if valid:
        table = _table(task, [read for _, read in valid])
        for column in [each for each in task.columns if each not in table.column_names]:
            if any(column in row for row, _ in valid):
                values = [row.get(column) for row, _ in valid]
                table = table.append_column(column, _array(task.source, column, numbers, values))
                batch.kinds |= _kinds(column, numbers, values)
        batch.schema = table.schema
        _write(task.folder / f"{number:05d}.arrow", table)
    return batch


def _table(task: Task, rows: list[dict[str, Any]]) -> pyarrow.Table:
    """What was read, a hash of what is said, and token ids."""
    names = task.row_format.result
    columns = {name: pyarrow.array([row[name] for row in rows], _TYPES[name]) for name in names}
    said = [name for name in _SAID if name in names]
    columns[DIGEST] = pyarrow.array([_digest([row[name] for name in said]) for row in rows], _TYPES[DIGEST])
    if task.tokenizer:
        parts = [
            encode(task.row_format, task.tokenizer, rows[start : start + _ENCODED_ROWS])
            for start in range(0, len(rows), _ENCODED_ROWS)
        ]
        for name, kind in types_of(task.row_format).items():
            columns[name] = pyarrow.concat_arrays([pyarrow.array(part[name], kind) for part in parts])
    return pyarrow.table(columns)


def _digest(parts: list[list[dict[str, str]]]) -> int:
    """Hash of messages in several parts; no text holds NUL."""
    said = "\0\0".join("\0".join(f"{turn['role']}\0{turn['content']}" for turn in part) for part in parts)
    return xxhash.xxh3_64_intdigest(said.encode())


def _array(source: Source, column: str, numbers: list[int], values: list[Any]) -> pyarrow.Array:
    """The values of a column, which must be of one type."""
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        pairs = zip(numbers, values, strict=True)
        kinds = [(number, type(each).__name__) for number, each in pairs if each is not None]
        other = next((each for each in kinds if each[1] != kinds[0][1]), kinds[0])
        raise _two_types(source, column, kinds[0], other) from error


def _kinds(column: str, numbers: list[int], values: list[Any]) -> dict[str, tuple[int, str]]:
    """The first row with a value, and its type."""
    pairs = zip(numbers, values, strict=True)
    return next(({column: (number, type(each).__name__)} for number, each in pairs if each is not None), {})


def _two_types(source: Source, column: str, first: tuple[int, str], other: tuple[int, str]) -> UserError:
    return UserError(
        f"{source.path}: column {column} is {first[1]} in row {first[0]} and {other[1]} in row {other[0]}; write "
        "values of one type"
    )


# --- files ---


def _merged(source: Source, found: Found, batch: Found) -> pyarrow.Schema:
    """The columns of earlier batches and of the next one, with types that hold both."""
    fields = {each.name: each for each in found.schema or ()}
    for added in batch.schema or ():
        try:
            both = [pyarrow.schema([each]) for each in (fields.get(added.name, added), added)]
            fields[added.name] = pyarrow.unify_schemas(both, promote_options="permissive").field(0)
        except pyarrow.ArrowException as error:
            raise _two_types(source, added.name, found.kinds[added.name], batch.kinds[added.name]) from error
    return pyarrow.schema(fields.values())


def _convert(file: Path, schema: pyarrow.Schema) -> None:
    """Gives a file the columns and types that all files of the source have."""
    with pyarrow.OSFile(str(file)) as stream:
        table = pyarrow.ipc.open_stream(stream).read_all()
    _write(file, pyarrow.concat_tables([schema.empty_table(), table], promote_options="permissive"))


def _write(file: Path, table: pyarrow.Table) -> None:
    with pyarrow.OSFile(str(file), "wb") as stream, pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
