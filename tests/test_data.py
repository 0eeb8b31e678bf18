"""Conversations of every format become the same messages, and what is wrong with a row is said with its number."""

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.core import data, gemma
from gemma2_post.core.data import DataArguments, Source
from gemma2_post.core.errors import UserError

USER, MODEL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CHAT = [USER, MODEL]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, max_invalid_share: float = 0.0, **source: object) -> Dataset:
    return data.load_conversations("recipe", [Source(path, **source)], max_invalid_share, seed=0)


FORMATS = {
    "messages": {"messages": CHAT},
    "messages, role model": {"messages": [USER, {"role": "model", "content": "Hello!"}]},
    "prompt and completion as text": {"prompt": "Hi", "completion": "Hello!"},
    "prompt and completion as messages": {"prompt": [USER], "completion": [MODEL]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Hello!"},
    "Alpaca without input": {"instruction": "Hi", "output": "Hello!"},
    "ChatML": {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"},
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_becomes_the_same_messages(row: dict, tmp_path: Path) -> None:
    assert list(load(write(tmp_path / "rows.jsonl", [row]))["messages"]) == [CHAT]


def test_the_input_of_alpaca_follows_its_instruction() -> None:
    assert (
        data.to_messages({"instruction": "Translate.", "input": "Ja", "output": "Yes"})[0]["content"]
        == "Translate.\n\nJa"
    )


def test_a_system_message_is_folded_into_the_first_user_turn_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    system = {"role": "system", "content": "Be kind."}
    path = write(tmp_path / "rows.jsonl", [{"messages": [system, *CHAT, USER, MODEL]}, {"messages": CHAT}])
    with caplog.at_level(logging.WARNING):
        rows = load(path)
    assert rows["messages"][0] == [{"role": "user", "content": "Be kind.\n\nHi"}, MODEL, USER, MODEL]
    assert "a system message was put in front of the first user turn in 1 rows" in caplog.text


INVALID = {
    "assistant first": ([MODEL, USER], "turn 0 is by assistant, expected user"),
    "two user turns": ([USER, USER, MODEL], "turn 1 is by user, expected assistant"),
    "late system": ([USER, MODEL, {"role": "system", "content": "x"}, MODEL], "turn 2 is by system, expected user"),
    "only a system message": ([{"role": "system", "content": "x"}], "no user turn follows the system message"),
    "unknown role": ([USER, {"role": "tool", "content": "x"}], "role 'tool' is unknown"),
    "list content": (
        [USER, {"role": "assistant", "content": [{"text": "x"}]}],
        "the content of turn 1 is list, not text",
    ),
    "list content under a system message": (
        [{"role": "system", "content": "x"}, {"role": "user", "content": [{"text": "x"}]}, MODEL],
        "the content of the system message or of the first user turn is not text",
    ),
    "null content": ([USER, {"role": "assistant", "content": None}], "the content of turn 1 is NoneType, not text"),
    "blank content": ([USER, {"role": "assistant", "content": " \n"}], "the content of turn 1 is empty"),
    "control token": ([{"role": "user", "content": "<bos>Hi"}, MODEL], "turn 0 holds the control token <bos>"),
    "rendered text": (
        [USER, {"role": "assistant", "content": "x<end_of_turn>"}],
        "turn 1 holds the control token <end_of_turn>",
    ),
    "user last": ([USER, MODEL, USER], "the last turn is the user's"),
    "no turns": ([], "the conversation is empty"),
    "no role": ([{"content": "x"}, MODEL], "a turn has no role and content"),
}


@pytest.mark.parametrize(("messages", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_row_is_refused_with_source_row_and_finding(messages: list, message: str, tmp_path: Path) -> None:
    # One row alone, since Arrow itself may refuse to read rows of different types from one file.
    path = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(UserError) as refused:
        load(path)
    assert str(refused.value).startswith(f"recipe: {path}: row 0: ") and message in str(refused.value)


def test_the_number_is_that_of_the_first_bad_row_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": FORMATS["ChatML"]["text"]}, {"text": "Hi"}, {"text": "Ho"}])
    with pytest.raises(UserError, match=r"row 1: text is not ChatML .* begins 'Hi' \(2 of 3 rows are invalid\)"):
        load(path)


def test_a_share_of_invalid_rows_can_be_allowed_and_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 3 + [{"messages": [USER]}])
    with pytest.raises(UserError, match="row 3: the last turn is the user's"):
        load(path, max_invalid_share=0.2)
    assert len(load(path, max_invalid_share=0.25)) == 3
    assert "dropped invalid rows; the first one is row 3" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no such file"),
        ("empty.jsonl", "", "the file is empty"),
        ("broken.jsonl", '{"messages": [', "not readable as jsonl"),
        ("table.csv", "a,b\n", r"expected \.json, \.jsonl or \.parquet"),
        (
            "columns.jsonl",
            '{"question": "a", "answer": "b"}\n',
            "the columns question, answer are of no known format; expected",
        ),
        ("none.json", "[]", "there are no rows|not readable"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / name))


def test_a_split_that_a_file_does_not_have_is_not_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 4)
    assert len(load(path, split="train[:2]")) == 2
    with pytest.raises(UserError, match="split test"):
        load(path, split="test")


def test_a_hub_name_with_a_dot_is_a_hub_name() -> None:
    with pytest.raises(UserError, match=r"teknium/OpenHermes-2\.5: cannot get this data set"):
        load("teknium/OpenHermes-2.5")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gemma2_post.tiny.data:nothing", "there is no such function"),
        ("gemma2_post.nowhere:rows", "there is no such function"),
        ("gemma2_post.tiny.data:NUM_ROWS", "is dict, not a function"),
    ],
)
def test_a_source_that_is_no_function_is_refused(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(path)


def test_what_grades_answers_survives() -> None:
    rows = load("gemma2_post.tiny.data:demonstrations", split="held_out")
    assert set(rows.column_names) == {"skill", "answer", "messages"} and len(rows) == 480


def test_a_mixture_has_its_proportions_and_uses_no_row_twice(tmp_path: Path) -> None:
    """20 and 60 rows at 1 to 2: the 20 are all used, and 40 of the 60."""
    sources = []
    for name, num_rows, weight in (("a", 20, 1.0), ("b", 60, 2.0)):
        rows = [{"messages": [{"role": "user", "content": f"{name} {i}"}, MODEL]} for i in range(num_rows)]
        sources.append(Source(write(tmp_path / f"{name}.jsonl", rows), weight=weight))
    mixed = [
        messages[0]["content"] for messages in data.load_conversations("recipe", sources, 0.0, seed=0)["messages"]
    ]
    assert len(mixed) == len(set(mixed)) == 60
    assert sum(text.startswith("a") for text in mixed) == 20
    sources[0].weight = None
    with pytest.raises(UserError, match="give a weight above 0 to every source or to none"):
        data.load_conversations("recipe", sources, 0.0, seed=0)
    sources[1].weight = None
    assert len(data.load_conversations("recipe", sources, 0.0, seed=0)) == 80


def test_held_out_rows_are_taken_out_of_the_training_rows_by_seed(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}, MODEL]} for i in range(50)]
    arguments = DataArguments([Source(write(tmp_path / "rows.jsonl", rows))], held_out_share=0.1)

    def split(seed: int) -> tuple[set[str], set[str]]:
        parts = data.split_held_out("recipe", arguments, seed)
        return tuple({messages[0]["content"] for messages in part["messages"]} for part in parts)

    train, held_out = split(seed=0)
    assert len(held_out) == 5 and len(train) == 45 and not train & held_out
    assert split(seed=0) == (train, held_out) != split(seed=1)


def test_long_rows_are_dropped_and_counted_and_never_cut(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"role": "user", "content": "Hi " * 50}, MODEL]
    rows = Dataset.from_list([{"messages": CHAT}] * 19 + [{"messages": long}])
    length = len(gemma.render(tokenizer, CHAT)["input_ids"])
    kept = data.tokenize("recipe", rows, tokenizer, max_length=length, max_too_long_share=0.05)
    assert len(kept) == 19 and all(ids == gemma.render(tokenizer, CHAT)["input_ids"] for ids in kept["input_ids"])
    assert f"dropped 1 of 20 rows longer than {length} tokens" in caplog.text
    with pytest.raises(UserError, match=f"1 of 20 rows are longer than max_length {length} tokens"):
        data.tokenize("recipe", rows, tokenizer, max_length=length, max_too_long_share=0.04)
    with pytest.raises(UserError, match="all 20 rows are longer than max_length"):
        data.tokenize("recipe", rows, tokenizer, max_length=length - 1, max_too_long_share=1.0)


# --- real files ---


@pytest.mark.parametrize(
    ("file", "num_rows", "num_folded"),
    [("tinker/conversations.jsonl", 128, 25), ("fastchat/dummy_conversation.json", 500, 0)],
)
def test_real_conversations_are_read(
    file: str, num_rows: int, num_folded: int, real_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = load(str(real_data / "sft" / file))
    assert len(rows) == num_rows
    assert (f"in {num_folded} rows" in caplog.text) == bool(num_folded)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("sft/llamafactory/glaive_toolcall_en_demo.json", r"row \d+: role 'function_call' is unknown"),
        ("sft/self-instruct/seed_tasks.jsonl", "are of no known format"),
        ("sft/tulu-1/eval_instances_tulu_1.jsonl", "are of no known format"),
        ("benchmarks/gsm8k/train.first2000.jsonl", "the columns question, answer are of no known format"),
    ],
)
def test_real_files_that_are_no_demonstrations_are_refused(file: str, message: str, real_data: Path) -> None:
    with pytest.raises(UserError, match=message):
        load(str(real_data / file))
