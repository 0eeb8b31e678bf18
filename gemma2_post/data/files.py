"""Reads rows from local files: JSON, JSON lines, CSV, Parquet and plain text, compressed or not; folders and globs.

Each row is read by itself, so rows may have different columns, and an error names the line or the row. Nothing is
cached: what is read is what the file holds now.
"""

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from gemma2_post.stage import contract
from gemma2_post.stage.digests import DATA_SUFFIXES
from gemma2_post.stage.errors import UserError

Columns = dict[str, Any]

_COMPRESSED = {".gz", ".zst"}
_LINES = {".jsonl", ".ndjson"}
_SPLITS = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval|held_out)(?=[-_.])")
"""A split in the name of a file, as in `train-00000-of-00002.parquet`."""
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json"}
"""What the Hub and LLaMA-Factory keep beside the data."""
_STARTS = {
    b"version https://git-lfs.github.com": "is a Git LFS pointer, not the data; run `git lfs pull`",
    b"<": "begins like a web page (HTML); download the file itself",
    b"\x1f\x8b": "is compressed with gzip; rename it to end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; rename it to end in .zst",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is a Parquet file; rename it to end in .parquet",
    b"\xff\xfe": "is encoded as UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
    b"\xfe\xff": "is encoded as UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW",
}


def is_glob(path: str) -> bool:
    """Whether a path is a pattern of paths, such as `data/*.parquet`, and no file or folder."""
    return any(character in path for character in "*?[") and not Path(path).exists()


def is_data(path: str) -> bool:
    """Whether a name ends like a data file."""
    return _suffix(Path(path)) in DATA_SUFFIXES


def files_of(path: str, split: str) -> list[Path]:
    """The data files that a path stands for: itself, those in a folder (not in its subfolders), or those of a glob.

    The records of a stage, in the folder that it has made, are no data.

    If the files of a folder or a glob are named by splits, only those of `split`.

    Raises:
        UserError: There are none, or only some are named by splits.
    """
    if is_glob(path):
        found = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
    elif Path(path).is_dir():
        found = sorted(Path(path).iterdir())
    else:
        _refuse_other_split(path, split, ["train"])
        return [Path(path)]
    files = [file for file in found if file.is_file() and is_data(file.name) and not _is_about_data(file)]
    if not files:
        raise UserError(f"{path}: there are no data files ({', '.join(DATA_SUFFIXES)}) here; name their folder")
    splits = {file: match.group(1) for file in files if (match := _SPLITS.search(file.name))}
    if not splits:
        _refuse_other_split(path, split, ["train"])
        return files
    if unnamed := next((file for file in files if file not in splits), None):
        named = next(iter(splits))
        raise UserError(
            f"{path}: {named.name} is named by the split {splits[named]}, and {unnamed.name} by none; name the files "
            "one by one in datasets, or rename them so that all or none have a split in their names"
        )
    _refuse_other_split(path, split, sorted(set(splits.values())))
    return [file for file in files if splits[file] == _name_of(split)]


def _is_about_data(file: Path) -> bool:
    """Whether a file describes the data beside it, or is a stage's record."""
    return file.name in _DESCRIPTIONS or (file.name in contract.RECORDS and (file.parent / contract.DONE).is_file())


def _refuse_other_split(path: str, split: str, existing: list[str]) -> None:
    if _name_of(split) not in existing:
        raise UserError(f"{path}: there is no split {split}, only {', '.join(existing)}; correct the split")


def _name_of(split: str) -> str:
    """The split without a slice: `train` of `train[:100]`."""
    return split.partition("[")[0]


def read_file(file: Path, columns: set[str]) -> Iterator[Columns]:
    """The rows of a file, without those columns of a Parquet file that are not in `columns`.

    Raises:
        UserError: The file cannot be read, or a line or a row is none.
    """
    try:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty; write it again, or remove it")
        if file.suffix == ".parquet":
            yield from _parquet(file, columns)
            return
        with _open(file) as stream:
            _refuse_other_content(file, stream)
            text = io.TextIOWrapper(cast("BinaryIO", stream), encoding="utf-8-sig", newline="")
            suffix = _suffix(file).removesuffix(file.suffix if file.suffix in _COMPRESSED else "")
            if suffix == ".csv":
                yield from _csv(file, text)
            elif suffix == ".txt":
                yield {"text": text.read()}
            else:
                yield from _json(file, text, suffix in _LINES)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 (byte 0x{error.object[error.start]:02x}); if it is Latin-1, convert it: "
            "iconv -f LATIN1 -t UTF-8 FILE > NEW"
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # also what a decompressor says about half a file
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}); write it again") from error


def count_rows(file: Path) -> int | None:
    """Rows of a Parquet file, lines of a file with a row in each; None of other files."""
    if file.suffix == ".parquet":
        from pyarrow.parquet import read_metadata  # a slow import

        return int(read_metadata(file).num_rows)
    if file.suffix in _LINES:
        with open(file, "rb") as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    return None


def _suffix(file: Path) -> str:
    """The last suffix, or the last two of a compressed file: `.jsonl.gz`."""
    return "".join(file.suffixes[-2:]) if file.suffix in _COMPRESSED else file.suffix


def _open(file: Path) -> io.BufferedIOBase:
    if file.suffix not in _COMPRESSED:
        return open(file, "rb")
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # pyarrow takes half a file for a whole one
    import pyarrow  # a slow import

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


def _refuse_other_content(file: Path, stream: io.BufferedIOBase) -> None:
    start = stream.peek(64).lstrip()  # type: ignore[attr-defined]  # both kinds of streams are buffered
    for magic, what in _STARTS.items():
        if start.startswith(magic):
            raise UserError(f"{file}: {what.replace('FILE', str(file))}")
    if b"\0" in start[:4]:
        raise UserError(f"{file}: is no text (UTF-16 without a mark, or binary); save it as UTF-8")


# --- formats ---


def _json(file: Path, text: io.TextIOBase, is_lines: bool) -> Iterator[Columns]:
    """The rows of a list of objects, or of lines with an object each, whatever the suffix."""
    lines = (line for line in enumerate(text, start=1) if line[1].strip())
    number, first = next(lines, (0, ""))
    if not number:
        return
    if not first.lstrip().startswith("[") and (is_lines or _is_object(first)):
        yield _row(file, f"line {number}", _parsed(file, number, first))
        for number, line in lines:
            yield _row(file, f"line {number}", _parsed(file, number, line))
        return
    content = _parsed(file, number, first + text.read())
    if not isinstance(content, list):
        raise UserError(f"{file}: is {_kind(content)}; write a list of objects, or one object per line (.jsonl)")
    for number, row in enumerate(content):
        yield _row(file, f"row {number}", row)


def _is_object(line: str) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(file: Path, number: int, text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        raise UserError(
            f"{file}: line {number + error.lineno - 1} is not JSON ({error.msg}, near {near!r}); fix it, or cut it "
            "off if it is incomplete"
        ) from error
    except (ValueError, RecursionError) as error:  # twice the same key, a number of 5,000 digits, 1,000 brackets
        raise UserError(f"{file}: line {number} cannot be read ({str(error)[:100]}); fix or remove it") from error


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return found


def _row(file: Path, place: str, row: object) -> Columns:
    if not isinstance(row, dict):
        raise UserError(f"{file}: {place} is {_kind(row)}, not an object with columns; fix or remove it")
    return row


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _csv(file: Path, text: io.TextIOBase) -> Iterator[Columns]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{file}: {max(header, key=header.count)!r} heads two columns; rename one")
        for row in reader:
            if len(row) != len(header) and row:
                raise UserError(
                    f"{file}: line {reader.line_num} has {len(row)} fields, and the header {len(header)}; quote "
                    "fields that hold commas or line breaks"
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}: line {reader.line_num} is not CSV ({error}); fix it") from error


def _parquet(file: Path, columns: set[str]) -> Iterator[Columns]:
    import pyarrow
    from pyarrow.parquet import ParquetFile  # a slow import

    try:
        with ParquetFile(file) as opened:
            names = [name for name in opened.schema_arrow.names if name in columns]
            others = [name for name in opened.schema_arrow.names if name not in columns]
            for batch in opened.iter_batches(batch_size=1000, columns=names):
                # Others without their values, so that an error can name them.
                yield from ({**dict.fromkeys(others), **row} for row in batch.to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not readable as parquet ({reason}); write it again, or download it again") from error
