"""Conversations from the Hub, from local files and from Python functions, all as `messages`, all checked.

Every row of every source is checked before a model is loaded. An error names the source, the row and what was found.
"""

import importlib
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset, IterableDataset, concatenate_datasets, disable_caching, load_dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.core import gemma
from gemma2_post.core.errors import UserError
from gemma2_post.core.tokens import SPECIAL_TOKENS

logger = logging.getLogger(__name__)

Message = dict[str, str]

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_CONTROL_TOKENS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_PARTS_OF_A_CONVERSATION = ("system", "history", "tools")
_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip


@dataclass
class Source:
    """One data set of a mixture."""

    path: str
    """A Hub data set, a .json/.jsonl/.parquet file, or `module:function`, which is given the split."""
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    weight: float | None = None
    """Share of the mixture, relative to the others; no row is used twice. None for all: every row of every source."""


@dataclass
class DataArguments:
    datasets: list[Source] = field(metadata={"help": "Sources to train on: path, split, name, revision, weight."})
    held_out_datasets: list[Source] | None = field(
        default=None, metadata={"help": "Sources to evaluate on; without it, held_out_share of the training rows."}
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns that are kept beside the conversation, for graders and group_by."}
    )
    held_out_share: float = field(default=0.02, metadata={"help": "Share of the rows kept for evaluation, at random."})
    max_too_long_share: float = field(
        default=0.05, metadata={"help": "More rows than this share over max_length are an error; they are dropped."}
    )
    max_invalid_share: float = field(
        default=0.0,
        metadata={"help": "More rows than this share that are no valid chat are an error; they are dropped."},
    )


class InvalidRow(Exception):
    """What is wrong with one row, in words that follow "row 3: "."""


# --- one row ---


def to_messages(row: dict[str, object]) -> list[Message]:
    """The conversation in a row of one of the known formats; raises `InvalidRow`."""
    if "messages" in row:
        return _renamed(row["messages"], "role", "content")
    if "conversations" in row:
        return _renamed(row["conversations"], "from", "value")
    if "prompt" in row and "completion" in row:
        return [*as_turns(row["prompt"], "user"), *as_turns(row["completion"], "assistant")]
    if "instruction" in row and "output" in row:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            raise InvalidRow("the instruction or its input is not text")
        return [{"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": row["output"]}]
    text = row["text"]
    if (
        not isinstance(text, str)
        or _CHATML_TURN.sub("", text).strip()
        or "<|im_start|>" in "".join(content for _, content in _CHATML_TURN.findall(text))
    ):
        raise InvalidRow(f"text is not ChatML (<|im_start|>role ... <|im_end|>), it begins {str(text)[:40]!r}")
    return [{"role": _role(role), "content": content} for role, content in _CHATML_TURN.findall(text)]


FORMATS = [{"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"}, {"text"}]
"""The columns that make a row a conversation."""
PROMPT_FORMATS = [{"prompt"}, *FORMATS]
QUESTION_FORMATS = [{"turns"}, *PROMPT_FORMATS]
"""With those of sets like MT-Bench, whose later questions follow whatever was answered to the earlier ones."""


def as_turns(value: object, role: str) -> list[Message]:
    """A text as one turn of `role`, or a list of turns by role and content (or, as in ShareGPT, from and value)."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    is_sharegpt = isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]
    return _renamed(value, *(("from", "value") if is_sharegpt else ("role", "content")))


def _renamed(turns: object, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise InvalidRow(f"the conversation is {type(turns).__name__}, not a list")
    for turn in turns:
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            raise InvalidRow(f"a turn has no {role_key} and {content_key}: {str(turn)[:60]}")
    return [{"role": _role(turn[role_key]), "content": turn[content_key]} for turn in turns]


def _role(role: object) -> str:
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRow(f"role {role!r} is unknown (known are {', '.join(_ROLES)})")
    return _ROLES[role]


def fold_system(messages: list[Message]) -> list[Message]:
    """Gemma 2 has no system role: its text goes in front of the first user turn."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        raise InvalidRow("no user turn follows the system message")
    if not isinstance(system["content"], str) or not isinstance(rest[0]["content"], str):
        raise InvalidRow("the content of the system message or of the first user turn is not text")
    return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def to_prompt(row: dict[str, object]) -> list[Message]:
    """What a model is to answer: the row's prompt, or its conversation without the model's last turn."""
    if "prompt" in row and not row.keys() & {"messages", "conversations"}:  # beside them it is the first turn only
        return as_turns(row["prompt"], "user")
    messages = to_messages(row)
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def check_messages(messages: list[Message], last: str = "assistant") -> None:
    """Raises `InvalidRow` unless user and model take turns, user first and `last` last, and all of it is plain text.

    Args:
        last: whose turn ends it: "assistant" for a conversation, "user" for a prompt.
    """
    if not messages:
        raise InvalidRow("the conversation is empty" if last == "assistant" else "there is no user turn to answer")
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        content = message["content"]
        if message["role"] != expected:
            raise InvalidRow(
                f"turn {i} is by {message['role']}, expected {expected} (they must alternate, user first)"
            )
        if not isinstance(content, str):
            raise InvalidRow(f"the content of turn {i} is {type(content).__name__}, not text")
        if not content.strip():
            raise InvalidRow(f"the content of turn {i} is empty")
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise InvalidRow(f"turn {i} holds half a character (a lone surrogate)")
        if token := _CONTROL_TOKENS.search(content):
            raise InvalidRow(
                f"turn {i} holds the control token {token.group()}; give the text without the chat format"
            )
    if messages[-1]["role"] != last:
        found, wanted = ("user", "model") if last == "assistant" else ("model", "user")
        raise InvalidRow(f"the last turn is the {found}'s; it must be the {wanted}'s")


def is_valid(messages: list[Message]) -> bool:
    """Whether a conversation may be trained on as it is."""
    try:
        check_messages(messages)
    except InvalidRow:
        return False
    return True


def _conversation(row: dict[str, object]) -> dict[str, object]:
    messages = to_messages(row)
    folded = fold_system(messages)
    check_messages(folded)
    return {"messages": folded, "had_system": folded is not messages}


def _prompt(row: dict[str, object]) -> dict[str, object]:
    messages = to_prompt(row)
    folded = fold_system(messages)
    check_messages(folded, last="user")
    return {"prompt": folded, "had_system": folded is not messages}


def _questions(row: dict[str, object]) -> dict[str, object]:
    """A prompt, and in `later` what the user will say when it, and then the next, has been answered."""
    if "turns" not in row:
        return _prompt(row) | {"later": []}
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise InvalidRow(f"turns is {str(turns)[:40]!r}, not a list of texts")
    for turn in turns:
        check_messages([{"role": "user", "content": turn}], last="user")
    return {"prompt": [{"role": "user", "content": turns[0]}], "later": turns[1:], "had_system": False}


def checked(
    row: dict[str, object], parse: Callable[[dict[str, object]], dict[str, object]], empty: dict[str, object]
) -> dict[str, object]:
    """What one row becomes: what `parse` makes of it and no `problem`, or `empty` and what is wrong with it."""
    try:
        parsed = parse(row)
        for column in _PARTS_OF_A_CONVERSATION:
            if row.get(column):
                raise InvalidRow(f"column {column} would be lost; make it a part of the conversation")
    except InvalidRow as problem:
        return empty | {"problem": str(problem)}
    return parsed | {"problem": ""}


# --- whole data sets ---


def load_conversations(
    where: str, sources: list[Source], max_invalid_share: float, seed: int, columns: list[str] | None = None
) -> Dataset:
    """The mixture as one data set: `messages`, and those of `columns` that the sources have.

    Raises:
        UserError: a source that cannot be read, with columns of no known format, empty, or with invalid rows.
    """
    read = partial(checked, parse=_conversation, empty={"messages": [], "had_system": False})
    return load_mixture(where, sources, max_invalid_share, seed, columns or [], read, FORMATS)


def load_prompts(
    where: str, sources: list[Source], max_invalid_share: float, seed: int, columns: list[str] | None = None
) -> Dataset:
    """As `load_conversations`, but `prompt` in place of `messages`: the model's last turn, where there is one, is
    dropped, and the user's turn before it is the last."""
    read = partial(checked, parse=_prompt, empty={"prompt": [], "had_system": False})
    return load_mixture(where, sources, max_invalid_share, seed, columns or [], read, PROMPT_FORMATS)


def load_questions(
    where: str, sources: list[Source], max_invalid_share: float, seed: int, columns: list[str] | None = None
) -> Dataset:
    """As `load_prompts`, with `later`: what the user goes on to say, turn by turn (MT-Bench's `turns`)."""
    read = partial(checked, parse=_questions, empty={"prompt": [], "later": [], "had_system": False})
    return load_mixture(where, sources, max_invalid_share, seed, columns or [], read, QUESTION_FORMATS)


def load_mixture(
    where: str,
    sources: list[Source],
    max_invalid_share: float,
    seed: int,
    columns: list[str],
    read: Callable[[dict[str, object]], dict[str, object]],
    formats: list[set[str]],
) -> Dataset:
    # datasets keys its cache by the function it is given, not by what that calls: after a change of the checks or of
    # the chat format it would hand out what the old ones made.
    disable_caching()
    loaded = [_load_source(where, source, max_invalid_share, columns, read, formats) for source in sources]
    for column in columns:
        if not any(column in dataset.column_names for dataset in loaded):
            raise UserError(f"{where}: columns: no source has {column}; correct it or remove it")
    weights = [source.weight for source in sources]
    if any(weight is not None for weight in weights):
        if not all(weight is not None and weight > 0 for weight in weights):
            raise UserError(f"{where}: datasets: give a weight above 0 to every source or to none")
        # The largest mixture in these proportions in which no row is used twice.
        total = min(len(dataset) / weight for dataset, weight in zip(loaded, weights, strict=True))
        loaded = [
            dataset.shuffle(seed=seed).select(range(max(1, round(total * weight))))
            for dataset, weight in zip(loaded, weights, strict=True)
        ]
    try:
        return concatenate_datasets(loaded)
    except ValueError as error:
        raise UserError(f"{where}: datasets: the sources do not fit together ({error})") from error


def _load_source(
    where: str,
    source: Source,
    max_invalid_share: float,
    columns: list[str],
    read: Callable[[dict[str, object]], dict[str, object]],
    formats: list[set[str]],
) -> Dataset:
    place = f"{where}: {source.path}"
    dataset = _read(where, source)
    if len(dataset) == 0:
        raise UserError(f"{place} ({source.split}): there are no rows; check the split, or the file")
    _check_format(place, dataset.column_names, formats)
    dataset = dataset.map(read, remove_columns=[c for c in dataset.column_names if c not in columns])
    problems = [(row, problem) for row, problem in enumerate(dataset["problem"]) if problem]
    if problems:
        row, problem = problems[0]
        found = f"row {row}: {problem}" + (
            f" ({len(problems)} of {len(dataset)} rows are invalid)" if problems[1:] else ""
        )
        if len(problems) > max_invalid_share * len(dataset) or len(problems) == len(dataset):
            raise UserError(f"{place}: {found}; mend the data, or allow a share of such rows with max_invalid_share")
        logger.warning("%s: dropped invalid rows; the first one is %s", place, found)
        dataset = dataset.filter(lambda problem: not problem, input_columns="problem")
    num_system = sum(dataset["had_system"])
    if num_system:
        logger.warning("%s: a system message was put in front of the first user turn in %d rows", place, num_system)
    return dataset.remove_columns(["problem", "had_system"])


def _check_format(place: str, columns: list[str], formats: list[set[str]]) -> None:
    if not any(needed <= set(columns) for needed in formats):
        known = " | ".join(" + ".join(sorted(needed)) for needed in formats)
        raise UserError(f"{place}: the columns {', '.join(columns)} are of no known format; expected {known}")


def _is_function(path: str) -> bool:
    module, colon, _ = path.partition(":")
    return bool(colon) and all(part.isidentifier() for part in module.split("."))


def check_sources(where: str, sources: list[Source], columns: list[str], formats: list[set[str]]) -> None:
    """Refuses functions and files that are not there, and files whose first row is not what is expected.

    What is on the Hub is left alone, and so are the other rows.
    """
    for source in sources:
        if _is_function(source.path):
            load_function(where, source.path)
        elif Path(source.path).exists() or Path(source.path).suffix in _FILE_FORMATS:
            found = list(next(iter(_read(where, source, streaming=True))))
            _check_format(f"{where}: {source.path}", found, formats)
            missing = [column for column in columns if column not in found]
            if missing and len(sources) == 1:
                raise UserError(f"{where}: columns: no source has {missing[0]}; correct it or remove it")


def _read(where: str, source: Source, streaming: bool = False) -> Dataset | IterableDataset:
    if _is_function(source.path):
        return Dataset.from_list(load_function(where, source.path)(source.split))
    suffix = Path(source.path).suffix
    if suffix in _FILE_FORMATS:
        if not Path(source.path).is_file():
            raise UserError(f"{where}: {source.path}: there is no such file; paths start where the command is run")
        if Path(source.path).stat().st_size == 0:
            raise UserError(f"{where}: {source.path}: the file is empty")
        try:
            return load_dataset(_FILE_FORMATS[suffix], data_files=source.path, split=source.split, streaming=streaming)
        except Exception as error:  # datasets wraps whatever its readers raise, down to Arrow's own errors
            raise UserError(
                f"{where}: {source.path}: not readable as {suffix[1:]} with the same columns in each row and split "
                f"{source.split} ({' '.join(str(error.__cause__ or error).split())[:200]}); mend the file or the split"
            ) from error
    if Path(source.path).exists():
        raise UserError(
            f"{where}: {source.path}: expected .json, .jsonl or .parquet, module:function, or a Hub data set"
        )
    try:
        return load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: {source.path}: cannot get this data set ({' '.join(str(error).split())[:200]}); check its name "
            "and split, your login (`hf auth login`) and the network, or give a local file"
        ) from error


def load_function(where: str, path: str) -> Callable:
    """The function that a recipe names as `module:function`."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}: {path}: there is no such function ({error}); write module:function") from error
    if not inspect.isfunction(function):
        raise UserError(f"{where}: {path}: is {type(function).__name__}, not a function; write module:function")
    return function


def load_grader(where: str, path: str, columns: list[str]) -> Callable[..., list[float]]:
    """A function that grades answers, called as TRL calls a reward function: `completions` and these columns."""
    function = load_function(where, path)
    try:
        inspect.signature(function).bind(completions=[], **{column: [] for column in columns})
    except TypeError as error:
        raise UserError(
            f"{where}: {path} cannot be called with completions and the columns {', '.join(columns) or '(none)'} "
            f"({error}); name what it needs in columns"
        ) from error
    return function


def load_documents(
    where: str, sources: list[Source], max_invalid_share: float, seed: int
) -> list[str | list[Message]]:
    """Texts as they are, from a column `text` that is no ChatML; conversations, from all else.

    Raises:
        UserError: see `load_conversations`; a row without a text.
    """
    documents: list[str | list[Message]] = []
    for source in sources:
        dataset = _read(where, source)
        texts = dataset["text"] if "text" in dataset.column_names else []
        if not len(texts) or any("<|im_start|>" in (text or "") for text in texts):
            documents += load_conversations(where, [source], max_invalid_share, seed)["messages"]
            continue
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{where}: {source.path}: row {row}: text is {text!r}, not a text; mend the data")
        documents += texts
    return documents


def split_held_out(
    where: str, data_args: DataArguments, seed: int, load: Callable[..., Dataset] = load_conversations
) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows, as `load` makes them."""

    def load_sources(sources: list[Source]) -> Dataset:
        return load(where, sources, data_args.max_invalid_share, seed, data_args.columns)

    train = load_sources(data_args.datasets)
    if data_args.held_out_datasets:
        return train, load_sources(data_args.held_out_datasets)
    num_held_out = max(1, round(data_args.held_out_share * len(train)))
    if num_held_out >= len(train):
        raise UserError(
            f"{where}: {len(train)} rows cannot be split at held_out_share {data_args.held_out_share}; lower it, or "
            "give more rows"
        )
    parts = train.train_test_split(test_size=num_held_out, seed=seed)
    return parts["train"], parts["test"]


def tokenize(
    where: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, max_too_long_share: float
) -> Dataset:
    """The rows with their `input_ids` and `labels`; those over `max_length` tokens are dropped and counted, never cut.

    A cut row would have lost its `<end_of_turn>`, and the model would learn not to stop.
    """
    rendered = dataset.map(lambda messages: gemma.render(tokenizer, messages), input_columns="messages")
    return _drop_too_long(where, rendered, "rows", "max_length", max_length, max_too_long_share)


def drop_long_prompts(
    where: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, max_too_long_share: float
) -> Dataset:
    """The rows whose `prompt`, in the chat format, has at most `max_prompt_length` tokens."""
    rendered = dataset.map(
        lambda prompt: dict(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)),
        input_columns="prompt",
    )
    kept = _drop_too_long(where, rendered, "prompts", "max_prompt_length", max_prompt_length, max_too_long_share)
    return kept.select_columns(dataset.column_names)


def _drop_too_long(
    where: str, rendered: Dataset, what: str, key: str, max_length: int, max_too_long_share: float
) -> Dataset:
    kept = rendered.filter(lambda input_ids: len(input_ids) <= max_length, input_columns="input_ids")
    num_dropped = len(rendered) - len(kept)
    if len(kept) == 0:
        raise UserError(f"{where}: all {len(rendered)} {what} are longer than {key} {max_length} tokens; raise {key}")
    if num_dropped > max_too_long_share * len(rendered):
        raise UserError(
            f"{where}: {num_dropped} of {len(rendered)} {what} are longer than {key} {max_length} tokens; raise "
            f"{key}, or allow a larger share with max_too_long_share"
        )
    if num_dropped:
        logger.warning("dropped %d of %d %s longer than %d tokens", num_dropped, len(rendered), what, max_length)
    return kept
