"""What is recorded of the rows that are removed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet


@dataclass(frozen=True)
class Verdict:
    """Why a row is removed."""

    rule: str
    seen: str
    """What the rule saw."""
    other: str = ""
    """The text that it matched, where that is no row of the mixture."""
    other_source: str | None = None
    """Where what it matched is, with `other_row`: a source of the mixture, or an evaluation set."""
    other_row: int | None = None


@dataclass(frozen=True)
class Removed:
    """A row that is removed, and why."""

    source: str
    source_row: int
    verdict: Verdict
    row: str
    """The row as JSON."""


_SCHEMA = pyarrow.schema(
    {
        "source": pyarrow.string(), "source_row": pyarrow.int64(), "rule": pyarrow.string(),
        "seen": pyarrow.string(), "other": pyarrow.string(), "other_source": pyarrow.string(),
        "other_row": pyarrow.int64(), "row": pyarrow.string(),
    }
)  # fmt: skip


def as_json(row: dict[str, Any]) -> str:
    """A row as JSON; what JSON does not know, as Python shows it. Half characters become question marks."""
    return json.dumps(row, ensure_ascii=False, default=repr).encode(errors="replace").decode()


def table(rows: list[Removed]) -> pyarrow.Table:
    """The rows as a table."""
    found = [
        {"source": each.source, "source_row": each.source_row, **asdict(each.verdict), "row": each.row}
        for each in rows
    ]
    return pyarrow.Table.from_pylist(found, _SCHEMA)


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
