"""Loads and mixes data sets from the Hub, local files and Python functions.

Every row of every source is checked before a model is loaded. Errors name the source, the row and what was found.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasets import Dataset, IterableDataset, concatenate_datasets, disable_caching, load_dataset

from gemma2_post.data import rows
from gemma2_post.data.functions import is_function, load_function
from gemma2_post.data.keys import Source
from gemma2_post.data.pairs import PAIR_FORMATS, to_pair
from gemma2_post.stage.errors import UserError

logger = logging.getLogger(__name__)

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_mixture(
    sources: list[Source],
    max_invalid_share: float,
    seed: int,
    columns: list[str] | None = None,
    *,
    parse: Callable[[dict[str, object]], dict[str, object]],
    empty: dict[str, object],
    formats: list[set[str]],
) -> Dataset:
    """The rows of all sources, parsed and checked, as one data set in the proportions of the sources' weights.

    Args:
        max_invalid_share: Largest share of invalid rows in a source; they are dropped.
        columns: Columns to keep; at least one source must have each of them.
        parse: Parses one row, and `empty` replaces an invalid one; see `checked`.
        formats: The columns that a row needs, one set for each known format.

    Raises:
        UserError: A source cannot be read, has no known format, is empty, or has too many invalid rows.
    """
    columns, read = columns or [], partial(rows.checked, parse=parse, empty=empty)
    # datasets keys its cache by the function passed to it, not by what that function calls: after a change of the
    # checks or the chat format it would return stale rows.
    disable_caching()
    loaded = [_load_source(source, max_invalid_share, columns, read, formats) for source in sources]
    for column in columns:
        if not any(column in dataset.column_names for dataset in loaded):
            raise UserError(f"columns: no source has {column}; correct it or remove it")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        if len(weights) < len(sources) or not all(weight > 0 for weight in weights):
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
        raise UserError(f"datasets: the sources do not fit together ({error})") from error


load_conversations = partial(
    load_mixture, parse=rows.read_conversation, empty={"messages": [], "had_system": False}, formats=rows.FORMATS
)
"""`load_mixture` with a column `messages`."""
load_prompts = partial(
    load_mixture, parse=rows.read_prompt, empty={"prompt": [], "had_system": False}, formats=rows.PROMPT_FORMATS
)
"""`load_mixture` with a column `prompt`: the messages up to the user's last turn, without the model's answer to it."""
load_questions = partial(
    load_mixture,
    parse=rows.read_questions,
    empty={"prompt": [], "later": [], "had_system": False},
    formats=rows.QUESTION_FORMATS,
)
"""`load_mixture` with columns `prompt` and `later`: the user's later turns (MT-Bench's `turns`)."""


def _load_source(
    source: Source,
    max_invalid_share: float,
    columns: list[str],
    read: Callable[[dict[str, object]], dict[str, object]],
    formats: list[set[str]],
) -> Dataset:
    """The valid rows of one source, parsed, with those of `columns` that it has."""
    place, dataset = source.path, _read(source)
    if len(dataset) == 0:
        raise UserError(f"{place} ({source.split}): there are no rows; check the split, or the file")
    _check_format(place, dataset.column_names, formats)
    dataset = dataset.map(read, remove_columns=[c for c in dataset.column_names if c not in columns])
    problems = [(row, problem) for row, problem in enumerate(dataset["problem"]) if problem]
    if problems:
        found = "row {}: {}".format(*problems[0])
        if problems[1:]:
            found += f" ({len(problems)} of {len(dataset)} rows are invalid)"
        if len(problems) > max_invalid_share * len(dataset) or len(problems) == len(dataset):
            raise UserError(f"{place}: {found}; fix the data, or allow a share of such rows with max_invalid_share")
        logger.warning("%s: dropped invalid rows; the first one is %s", place, found)
        dataset = dataset.filter(lambda problem: not problem, input_columns="problem")
    if num_system := sum(dataset["had_system"]):
        logger.warning("%s: a system message was put in front of the first user turn in %d rows", place, num_system)
    return dataset.remove_columns(["problem", "had_system"])


def _check_format(place: str, columns: list[str], formats: list[set[str]]) -> None:
    if not any(needed <= set(columns) for needed in formats):
        known = " | ".join(" + ".join(sorted(needed)) for needed in formats)
        raise UserError(f"{place}: the columns {', '.join(columns)} are of no known format; expected {known}")


def check_sources(sources: list[Source], columns: list[str], formats: list[set[str]]) -> None:
    """Refuses missing functions and files, and files whose first row has other columns than expected.

    Checks no other rows, and nothing on the Hub.
    """
    for source in sources:
        if is_function(source.path):
            load_function(source.path)
        elif Path(source.path).exists() or Path(source.path).suffix in _FILE_FORMATS:
            found = list(next(iter(_read(source, streaming=True))))
            _check_format(source.path, found, formats)
            if len(sources) == 1 and (missing := [column for column in columns if column not in found]):
                raise UserError(f"columns: no source has {missing[0]}; correct it or remove it")


def _read(source: Source, streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of one source as they are; only a local file can be streamed."""
    if is_function(source.path):
        return Dataset.from_list(load_function(source.path)(source.split))
    suffix = Path(source.path).suffix
    if suffix in _FILE_FORMATS:
        if not Path(source.path).is_file():
            raise UserError(f"{source.path}: there is no such file; paths start where the command is run")
        if Path(source.path).stat().st_size == 0:
            raise UserError(f"{source.path}: the file is empty")
        try:
            return load_dataset(_FILE_FORMATS[suffix], data_files=source.path, split=source.split, streaming=streaming)
        except Exception as error:  # datasets wraps all errors of its readers, even Arrow's own
            raise UserError(
                f"{source.path}: not readable as {suffix[1:]} with the same columns in each row and split "
                f"{source.split} ({' '.join(str(error.__cause__ or error).split())[:200]}); fix the file or the split"
            ) from error
    if Path(source.path).exists():
        raise UserError(f"{source.path}: expected .json, .jsonl or .parquet, module:function, or a Hub data set")
    try:
        return load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source.path}: cannot get this data set ({' '.join(str(error).split())[:200]}); check its name "
            "and split, your login (`hf auth login`) and the network, or give a local file"
        ) from error


def load_documents(sources: list[Source], max_invalid_share: float, seed: int) -> list[str | list[rows.Message]]:
    """Raw texts from sources with a column `text` that is not ChatML; conversations from all other sources.

    Raises:
        UserError: See `load_mixture`; or a row has no text.
    """
    documents: list[str | list[rows.Message]] = []
    for source in sources:
        dataset = _read(source)
        texts = dataset["text"] if "text" in dataset.column_names else []
        if not len(texts) or any("<|im_start|>" in (text or "") for text in texts):
            documents += load_conversations([source], max_invalid_share, seed)["messages"]
            continue
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{source.path}: row {row}: text is {text!r}, not a text; fix the data")
        documents += texts
    return documents


def load_preferences(
    sources: list[Source],
    max_invalid_share: float,
    seed: int,
    columns: list[str] | None = None,
    score_margin: float = 0.0,
) -> Dataset:
    """`load_mixture` with the columns of `to_pair` and `num_turns` (of the user).

    Drops and counts ties (equal scores), which do not say which answer is better.

    Raises:
        UserError: See `load_mixture`; or all pairs are ties.
    """
    pairs = load_mixture(
        sources,
        max_invalid_share,
        seed,
        columns,
        parse=partial(to_pair, score_margin=score_margin),
        empty={"prompt": [], "chosen": [], "rejected": [], "margin": 0.0, "is_tie": False, "had_system": False},
        formats=PAIR_FORMATS,
    )
    kept = pairs.filter(lambda is_tie: not is_tie, input_columns="is_tie")
    if len(kept) == 0:
        raise UserError(f"datasets: all {len(pairs)} pairs are ties (equal scores); give pairs that differ")
    if len(kept) < len(pairs):
        logger.warning("dropped %d of %d pairs as ties (equal scores)", len(pairs) - len(kept), len(pairs))
    kept = kept.remove_columns("is_tie")
    return kept.add_column("num_turns", [(len(prompt) + 1) // 2 for prompt in kept["prompt"]])
