"""Rows that were read, checked and tokenized once, for all processes, stages and runs that use the same source.

They lie beside the data sets of the Hub (`HF_DATASETS_CACHE`), in `gemma2_post/KEY`, where the key is a hash of
everything that they depend on: the content of the source, its keys, the tokenizer, the chat format, this code and the
libraries. A function counts by the rows that it makes, which it does each time.
"""

import fcntl
import inspect
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import datasets
import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.encoding import types_of
from gemma2_post.data.functions import is_function
from gemma2_post.data.keys import Source
from gemma2_post.data.reading import Found, Task, read
from gemma2_post.data.rows import RowFormat
from gemma2_post.data.sources import is_on_hub, rows_of
from gemma2_post.stage import contract, digests

logger = logging.getLogger(__name__)

FILE = "rows.json"
"""In a folder of prepared rows: where they were read first, and what was found."""
_LIBRARIES = ["datasets", "tokenizers", "transformers"]
_SECONDS_APART = 0.5


def prepared(
    source: Source, row_format: RowFormat, columns: list[str], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Dataset, Found]:
    """The valid rows of a source, mapped from Arrow files, and what was found in all of them.

    The first process of a machine prepares the rows if they are not there; all others wait for it.

    Raises:
        UserError: See `reading.read`.
    """
    tokenizer = tokenizer if types_of(row_format) else None
    state = PartialState()
    keys = [_key(source, row_format, columns, tokenizer) if state.is_main_process else ""]
    if state.num_processes > 1:
        broadcast_object_list(keys)
    folder = root() / keys[0]
    if state.is_local_main_process:
        with _alone(folder, source):
            if not folder.is_dir():
                _prepare(folder, source, row_format, columns, tokenizer)
    while not folder.is_dir():  # no barrier: its time limit would be one for the preparation
        time.sleep(_SECONDS_APART)
    found = Found(**json.loads((folder / FILE).read_text())["found"])
    files = [Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))]
    return concatenate_datasets(files) if files else Dataset.from_dict({}), found


def root() -> Path:
    """The folder of all prepared rows."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "gemma2_post"


def _prepare(
    folder: Path, source: Source, row_format: RowFormat, columns: list[str], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    found = read(Task(source, row_format, columns, tokenizer, unfinished))
    found.schema = None  # the files have it
    contract.write_json(unfinished / FILE, {"source": source.path, "found": asdict(found)})
    unfinished.rename(folder)


@contextmanager
def _alone(folder: Path, source: Source) -> Iterator[None]:
    """Waits for other launches that prepare the same rows."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: waiting for another process that prepares the same rows", source.path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(source: Source, row_format: RowFormat, columns: list[str], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash of all that the rows depend on."""
    content: object = None
    if is_on_hub(source.path):
        content = digests.of_hub(source.path, source.revision, is_dataset=True)
    elif not is_function(source.path):
        content = digests.of_input(source.path)
    parts = [
        [source.split, source.name],
        content or _digest_of_rows(source, row_format, columns),
        [*row_format.result, dict(row_format.settings), columns],
        tokenizer and digests.of_text(tokenizer.backend_tokenizer.to_str() + tokenizer.chat_template),
        digests.of_code(Path(inspect.getfile(_key))),
        [metadata.version(library) for library in _LIBRARIES],
    ]
    return digests.of_text(json.dumps(parts))


def _digest_of_rows(source: Source, row_format: RowFormat, columns: list[str]) -> str:
    digest = xxhash.xxh3_128()
    for row in rows_of(source, {*row_format.columns, *columns}):
        digest.update(json.dumps(row, default=repr).encode())
    return digest.hexdigest()
