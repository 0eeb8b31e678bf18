"""Reads the rows of a mixture into parts on disk: valid rows, what they are compared by, and the invalid ones."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import xxhash
from pyarrow import parquet

from gemma2_post.curation import rows
from gemma2_post.curation.keys import Kind, MixtureArguments
from gemma2_post.curation.kinds import FORMATS
from gemma2_post.curation.parts import work_on
from gemma2_post.curation.removed import Removed, Verdict, as_json, table, write_table
from gemma2_post.data.near_duplicates import Sketches, sketch
from gemma2_post.data.overlap import normalized
from gemma2_post.data.sources import no_rows, num_rows_in, rows_of
from gemma2_post.data.turns import InvalidRow
from gemma2_post.stage.errors import UserError

PART_ROWS = 2000
"""Rows of a part; its sketches and texts are in memory at once."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of sources, and where its parts are."""

    args: MixtureArguments
    kind: Kind
    names: list[str]
    """Of the sources."""
    columns: list[str]
    """Kept beside what is said, the reward included."""
    reward_column: str | None
    folder: Path

    def path(self, number: int, kind: str) -> Path:
        """A file of a part; `rows` is written last."""
        return self.folder / f"{number:05d}.{kind}"

    @property
    def num_parts(self) -> int:
        """The number of parts that have been read."""
        return len(list(self.folder.glob("*.rows")))

    def rows_of(self, number: int) -> list[dict[str, Any]]:
        """The valid rows of a part, with their source and number there."""
        found: list[dict[str, Any]] = parquet.read_table(self.path(number, "rows")).to_pylist()
        return [without_nulls(row) for row in found]


@dataclass(frozen=True)
class Part:
    """Rows of one source, as they were read."""

    number: int
    source: int
    first_row: int
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Compared:
    """What the rows of a part are compared by."""

    source: int
    """The number of their source."""
    exact: np.ndarray
    """uint64 [rows], a hash of what is said, normalized."""
    prompts: np.ndarray
    """uint64 [rows], a hash of the first prompt, normalized."""
    rewards: np.ndarray
    """float64 [rows], NaN without one."""
    whole: Sketches
    first: Sketches
    """Of the first prompts."""

    def save(self, path: Path) -> None:
        """Writes it to a file."""
        arrays: dict[str, Any] = {
            "source": np.array(self.source),
            "exact": self.exact,
            "prompts": self.prompts,
            "rewards": self.rewards,
        }
        for name, sketches in (("whole", self.whole), ("first", self.first)):
            arrays |= {f"{name}_{field}": value for field, value in vars(sketches).items()}
        with open(path, "wb") as stream:
            np.savez(stream, **arrays)

    @staticmethod
    def load(path: Path, *names: str) -> dict[str, np.ndarray]:
        """Some of its arrays, such as `exact` or `whole_bands`."""
        with np.load(path) as stored:
            return {name: stored[name] for name in names}

    @staticmethod
    def sketches(path: Path, which: str) -> Sketches:
        """Its sketches `whole` or `first`."""
        with np.load(path) as stored:
            return Sketches(*(stored[f"{which}_{field}"] for field in ("bands", "pairs", "ends", "num_words")))


def read(mixture: Mixture) -> None:
    """Reads all sources; parts that are there already are kept.

    Raises:
        UserError: A source cannot be read, or has too many invalid rows.
    """
    mixture.folder.mkdir(parents=True, exist_ok=True)
    sizes = [num_rows_in(source) for source in mixture.args.datasets]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    work_on(partial(_read_part, mixture), _parts(mixture), "reading rows", total)
    _check_invalid(mixture)


def _parts(mixture: Mixture) -> Iterator[Part]:
    number = 0
    wanted = {*FORMATS[mixture.kind].columns, *mixture.columns}
    for place, source in enumerate(mixture.args.datasets):
        found, first_row = rows_of(source, wanted), 0
        while batch := list(islice(found, PART_ROWS)):
            is_there = mixture.path(number, "rows").is_file()
            yield Part(number, place, first_row, [] if is_there else batch)
            number, first_row = number + 1, first_row + len(batch)
        if not first_row:
            raise no_rows(source)


def _read_part(mixture: Mixture, part: Part) -> int:
    """Checks the rows of a part, and writes what is found."""
    if not part.rows:
        return PART_ROWS
    name = mixture.names[part.source]
    valid, invalid = [], []
    for number, row in enumerate(part.rows, start=part.first_row):
        try:
            found = rows.read(mixture.kind, mixture.columns, row)
            valid.append(found | {rows.SOURCE: name, rows.NUMBER: number})
        except InvalidRow as problem:
            invalid.append(Removed(name, number, Verdict("invalid", str(problem)), as_json(row)))
    write_table(mixture.path(part.number, "invalid"), table(invalid))
    said = [rows.said(row) for row in valid]
    Compared(
        part.source,
        np.array([_hash(each.parts) for each in said], np.uint64),
        np.array([_hash(each.users[:1]) for each in said], np.uint64),
        np.array([rows.reward_of(row, mixture.reward_column) for row in valid], np.float64),
        sketch([each.parts for each in said]),
        sketch([each.users[:1] for each in said]),
    ).save(mixture.path(part.number, "compared"))
    try:
        content = rows.table(mixture.kind, valid)
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        raise UserError(
            f"{name}: a column has values of different types in rows {part.first_row} to "
            f"{part.first_row + len(part.rows) - 1} ({' '.join(str(error).split())[:200]}); write values of one type, "
            "or leave it out of columns"
        ) from error
    write_table(mixture.path(part.number, "rows"), content)
    return len(part.rows)


def _hash(parts: list[str]) -> int:
    return xxhash.xxh3_64_intdigest("\0".join(map(normalized, parts)).encode(errors="surrogatepass"))


def _check_invalid(mixture: Mixture) -> None:
    """Refuses a source of which all or too many rows are invalid."""
    num_valid, num_invalid = Counter[int](), Counter[int]()
    firsts: dict[int, str] = {}
    for number in range(mixture.num_parts):
        source = int(Compared.load(mixture.path(number, "compared"), "source")["source"])
        num_valid[source] += parquet.read_metadata(mixture.path(number, "rows")).num_rows
        invalid = parquet.read_table(mixture.path(number, "invalid"))
        num_invalid[source] += len(invalid)
        if len(invalid):
            first = invalid.slice(0, 1).to_pylist()[0]
            firsts.setdefault(source, f"row {first['source_row']}: {first['seen']}")
    for source, first in firsts.items():
        found, num_rows = num_invalid[source], num_valid[source] + num_invalid[source]
        if found == num_rows or found > mixture.args.max_invalid_share * num_rows:
            raise UserError(
                f"{mixture.names[source]}: {first} ({found} of {num_rows} rows are invalid); fix the data, or allow a "
                "larger share of such rows with max_invalid_share"
            )


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the columns, and its turns without the keys, that only other rows have."""
    return {
        name: [{key: each for key, each in turn.items() if each is not None} for turn in value]
        if name in rows.SAID
        else value
        for name, value in row.items()
        if value is not None
    }
