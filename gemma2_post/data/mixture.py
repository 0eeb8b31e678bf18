"""Mixes the rows of several sources, and says which of them are used."""

import logging
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets, disable_caching
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.keys import Source
from gemma2_post.data.prepared import prepared
from gemma2_post.data.reading import Found
from gemma2_post.data.rows import DOCUMENT, RowFormat
from gemma2_post.data.sources import no_rows
from gemma2_post.data.turns import Message
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Rows that lie in Arrow files, and which of them are used, in what order."""

    all: Dataset
    numbers: np.ndarray
    """Of the rows in `all` that are used."""

    def __len__(self) -> int:
        return len(self.numbers)

    def column(self, name: str) -> np.ndarray:
        """The values of a column in the rows that are used."""
        return self.all.data.column(name).to_numpy()[self.numbers]

    def take(self, chosen: np.ndarray) -> "Rows":
        """Some of the rows that are used, by their places among them or by a mask."""
        return Rows(self.all, self.numbers[chosen])

    def dataset(self) -> Dataset:
        """The rows that are used, without the columns that only preparation needs."""
        return self.all.select_columns([name for name in self.all.column_names if name[0] != "_"]).select(self.numbers)


def load_rows(
    sources: list[Source],
    max_invalid_share: float,
    seed: int,
    columns: list[str] | None = None,
    *,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Rows:
    """The rows of all sources, read and checked, in the proportions of the sources' weights.

    Args:
        max_invalid_share: Largest share of invalid rows in a source; they are dropped.
        columns: Columns to keep; at least one source must have each of them.
        tokenizer: None: the rows are not tokenized; see `encoding.encode` for the columns of tokens.

    Raises:
        UserError: A source cannot be read, has no known format, is empty, or has too many invalid rows.
    """
    columns = columns or []
    disable_caching()  # what later steps make of the rows would be cached by their code's text alone
    loaded = []
    for source in sources:
        rows, found = prepared(source, row_format, columns, tokenizer)
        _check(source, found, max_invalid_share)
        loaded.append(rows)
    for column in columns:
        if not any(column in dataset.column_names for dataset in loaded):
            raise UserError(f"columns: no source has {column}; correct it or remove it")
    chosen = [np.arange(len(dataset)) for dataset in loaded]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        if len(weights) < len(sources):
            raise UserError("datasets: give a weight above 0 to every source or to none")
        # The largest mixture in these proportions that uses no row twice.
        total = min(len(dataset) / weight for dataset, weight in zip(loaded, weights, strict=True))
        chosen = [
            np.random.default_rng(seed).permutation(numbers)[: max(1, round(total * weight))]
            for numbers, weight in zip(chosen, weights, strict=True)
        ]
    try:
        together = concatenate_datasets(loaded)
    except ValueError as error:
        raise UserError(f"datasets: the sources do not fit together ({error}); make their columns alike") from error
    firsts = np.cumsum([0, *map(len, loaded[:-1])])
    return Rows(together, np.concatenate([numbers + first for numbers, first in zip(chosen, firsts, strict=True)]))


def load_documents(sources: list[Source], max_invalid_share: float, seed: int) -> list[str | list[Message]]:
    """Raw texts, and conversations where a source has them; see `load_rows`."""
    rows = load_rows(sources, max_invalid_share, seed, row_format=DOCUMENT).dataset()
    return [row["messages"] if row["text"] is None else row["text"] for row in rows]


def _check(source: Source, found: Found, max_invalid_share: float) -> None:
    """Refuses a source without rows or with too many invalid ones; says what was dropped and changed."""
    place = source.path
    if found.num_rows == 0:
        raise no_rows(source)
    if found.num_invalid:
        several = found.num_invalid > 1
        all_invalid = f" ({found.num_invalid} of {found.num_rows} rows are invalid)" if several else ""
        if found.num_invalid == found.num_rows or found.num_invalid > max_invalid_share * found.num_rows:
            raise UserError(
                f"{place}: {found.first_invalid}{all_invalid}; fix the data, or allow a share of such rows with "
                "max_invalid_share"
            )
        logger.warning("%s: dropped invalid rows; the first one is %s%s", place, found.first_invalid, all_invalid)
    if found.num_system:
        logger.warning(
            "%s: a system message was put in front of the first user turn in %d rows", place, found.num_system
        )
