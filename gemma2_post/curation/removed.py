"""What is recorded of the rows that are removed, and of the rules that remove them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

RULES = (
    "invalid",
    "exact_duplicate",
    "near_duplicate",
    "too_many_answers",
    "contaminated",
    "sensitive_information",
    "personal_information",
    "pattern",
    "self_identification",
    "unsafe",
    "low_reward",
    "refusal",
    "hedging",
    "weight",
)
"""The rules, in the order in which they are applied; a row is removed by the first one that it breaks."""


@dataclass(frozen=True)
class Removed:
    """A row that is removed, and why."""

    source: str
    source_row: int
    rule: str
    seen: str
    """What the rule saw."""
    other: str
    """What it matched, to be read beside it; empty if nothing is."""
    row: str
    """The row as JSON."""


_SCHEMA = pyarrow.schema(
    [
        (name, pyarrow.int64() if name == "source_row" else pyarrow.string())
        for name in ("source", "source_row", "rule", "seen", "other", "row")
    ]
)


def as_json(row: dict[str, Any]) -> str:
    """A row as JSON; what JSON does not know, as Python shows it. Half characters become question marks."""
    return json.dumps(row, ensure_ascii=False, default=repr).encode(errors="replace").decode()


def table(rows: list[Removed]) -> pyarrow.Table:
    """The rows as a table."""
    return pyarrow.Table.from_pylist([asdict(row) for row in rows], _SCHEMA)


def write_table(path: Path, content: pyarrow.Table) -> None:
    """Writes a Parquet file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    parquet.write_table(content, temporary, compression="zstd")
    temporary.replace(path)


class Writer:
    """A Parquet file that is written table by table; it has its name only when it is whole."""

    def __init__(self, path: Path, schema: pyarrow.Schema):
        self.path, self.schema = path, schema
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._writer = parquet.ParquetWriter(self._temporary, schema, compression="zstd")

    def add(self, content: pyarrow.Table) -> None:
        """Writes rows; columns that they lack are null."""
        if len(content):
            both = [self.schema.empty_table(), content]
            self._writer.write_table(pyarrow.concat_tables(both, promote_options="permissive"))

    def close(self) -> None:
        """Gives the file its name."""
        self._writer.close()
        self._temporary.replace(self.path)


def removed_writer(path: Path) -> Writer:
    """A file of removed rows."""
    return Writer(path, _SCHEMA)

