"""Conversations of every format become the same messages, and what is wrong with a row is said with its number."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import pack_dataset

from gemma2_post.data import prepared, rows
from gemma2_post.data.keys import DataArguments, Source
from gemma2_post.data.mixture import load_rows
from gemma2_post.data.preparation import drop_too_long, split_held_out
from gemma2_post.data.rows import CONVERSATION
from gemma2_post.models.tokenizer import render
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.recipe import build
from tests.conftest import load_conversations

USER, MODEL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CHAT = [USER, MODEL]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, max_invalid_share: float = 0.0, **source: object) -> Dataset:
    return load_conversations([Source(path, **source)], max_invalid_share, seed=0)


def numbered(start: int, end: int) -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"What is {i}?"}, MODEL]} for i in range(start, end)]


def refusal(path: str, max_invalid_share: float = 0.0) -> str:
    with pytest.raises(UserError) as refused, located("recipe"):
        load(path, max_invalid_share)
    return str(refused.value)


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
    row = {"instruction": "Translate.", "input": "Ja", "output": "Yes"}
    assert CONVERSATION.read(row)["messages"][0]["content"] == "Translate.\n\nJa"


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
        "the content of turn 1 is list, not text",
    ),
    "null content": ([USER, {"role": "assistant", "content": None}], "the content of turn 1 is NoneType, not text"),
    "blank content": ([USER, {"role": "assistant", "content": " \n"}], "the content of turn 1 is empty"),
    "control token": ([{"role": "user", "content": "<bos>Hi"}, MODEL], "turn 0 holds the control token <bos>"),
    "rendered text": (
        [USER, {"role": "assistant", "content": "x<end_of_turn>"}],
        "turn 1 holds the control token <end_of_turn>",
    ),
    "user last": ([USER, MODEL, USER], "the last turn is the user's"),
    "no turns": ([], "column messages is empty"),
    "no role": ([{"content": "x"}, MODEL], "a turn has no role and content"),
}


@pytest.mark.parametrize(("messages", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_row_is_refused_with_source_row_and_finding(messages: list, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    with pytest.raises(UserError) as refused, located("recipe"):
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
        ("broken.jsonl", '{"messages": [', r"line 1 is not JSON \(Expecting value"),
        ("table.csv", "a,b\n", "there are no rows"),
        ("table.xlsx", "a,b\n", r"expected \.json, \.jsonl, \.ndjson, \.csv"),
        (
            "columns.jsonl",
            '{"title": "a", "body": "b"}\n',
            "row 0: the columns title, body are of no known format; expected messages",
        ),
        ("none.json", "[]", "there are no rows"),
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
    with pytest.raises(UserError, match=r"nobody-at-all/chats-2\.5: cannot get this data set"):
        load("nobody-at-all/chats-2.5")


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
    sources = [Source("gemma2_post.tiny.data:demonstrations", "selection")]
    rows = load_conversations(sources, 0.0, seed=0, columns=["skill", "answer"])
    with pytest.raises(UserError, match="columns: no source has anser"):
        load_conversations(sources, 0.0, seed=0, columns=["anser"])
    assert set(rows.column_names) == {"skill", "answer", "messages", "trained"} and len(rows) == 480


def test_a_mixture_has_its_proportions_and_uses_no_row_twice(tmp_path: Path) -> None:
    """20 and 60 rows at 1 to 2: the 20 are all used, and 40 of the 60."""
    sources = []
    for name, num_rows, weight in (("a", 20, 1.0), ("b", 60, 2.0)):
        rows = [{"messages": [{"role": "user", "content": f"{name} {i}"}, MODEL]} for i in range(num_rows)]
        sources.append(Source(write(tmp_path / f"{name}.jsonl", rows), weight=weight))
    mixed = [messages[0]["content"] for messages in load_conversations(sources, 0.0, seed=0)["messages"]]
    assert len(mixed) == len(set(mixed)) == 60
    assert sum(text.startswith("a") for text in mixed) == 20
    sources[0].weight = None
    with pytest.raises(UserError, match="give a weight above 0 to every source or to none"):
        load_conversations(sources, 0.0, seed=0)
    sources[1].weight = None
    assert len(load_conversations(sources, 0.0, seed=0)) == 80


def test_held_out_rows_are_taken_out_of_the_training_rows_by_seed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}, MODEL]} for i in range(50)]
    arguments = DataArguments([Source(write(tmp_path / "rows.jsonl", rows))], held_out_share=0.1)

    def split(seed: int) -> tuple[set[str], set[str]]:
        parts = split_held_out(arguments, seed, CONVERSATION, tokenizer)
        return tuple({messages[0]["content"] for messages in part.dataset()["messages"]} for part in parts)

    train, held_out = split(seed=0)
    assert len(held_out) == 5 and len(train) == 45 and not train & held_out
    assert split(seed=0) == (train, held_out) != split(seed=1)


def test_long_rows_are_dropped_and_counted_and_never_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"role": "user", "content": "Hi " * 50}, MODEL]
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 19 + [{"messages": long}])
    rows = load_rows([Source(path)], 0.0, 0, row_format=CONVERSATION, tokenizer=tokenizer)
    (expected,) = (ids.tolist() for ids in render(tokenizer, [CHAT])["input_ids"])
    length = len(expected)
    kept = drop_too_long(rows, "max_length", length, max_too_long_share=0.05).dataset()
    assert len(kept) == 19 and all(ids == expected for ids in kept["input_ids"])
    assert f"dropped: 1 of 20 rows are longer than max_length {length} tokens" in caplog.text
    with pytest.raises(UserError, match=f"1 of 20 rows are longer than max_length {length} tokens; raise max_length"):
        drop_too_long(rows, "max_length", length, max_too_long_share=0.04)
    with pytest.raises(UserError, match="all 20 rows are longer than max_length"):
        drop_too_long(rows, "max_length", length - 1, max_too_long_share=1.0)


@pytest.mark.parametrize(
    "as_row",
    [
        lambda chat: {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in chat]},
        lambda chat: {"text": "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in chat)},
        lambda chat: {"prompt": chat[:-1], "completion": chat[-1]["content"]},
    ],
    ids=["ShareGPT", "ChatML", "prompt and completion"],
)
def test_turns_and_a_system_message_survive_in_every_format(
    as_row: Callable[[list[dict]], dict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat = [*CHAT, {"role": "user", "content": "And\nnow?"}, MODEL]
    with_system = as_row([{"role": "system", "content": "Be kind."}, *chat])
    path = write(tmp_path / "rows.jsonl", [with_system, as_row(chat), with_system])
    folded = [{"role": "user", "content": "Be kind.\n\nHi"}, *chat[1:]]
    assert load(path)["messages"] == [folded, chat, folded]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: a system message was put in front of the first user turn in 2 rows"
    ]


@pytest.mark.parametrize(
    ("valid", "invalid", "found"),
    [
        ({"messages": CHAT}, {"messages": [{"role": ["user"], "content": "x"}, MODEL]}, "role ['user'] is unknown"),
        (
            {"messages": CHAT},
            {"messages": [USER, {"role": "assistant", "content": ["x"]}]},
            "the content of turn 1 is",
        ),
        ({"messages": CHAT}, {"messages": None}, "column messages is empty"),
        ({"messages": CHAT}, {"messages": 5}, "the conversation is int, not a list"),
        ({"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": None}, "column completion is empty"),
        (
            {"instruction": "x", "output": "y"},
            {"instruction": [5], "output": "y"},
            "a turn has no role and content: 5",
        ),
        (
            {"instruction": "x", "output": "y"},
            {"instruction": "x", "input": 5, "output": "y"},
            "the instruction or its",
        ),
        ({"instruction": "x", "output": "y"}, {"instruction": "x", "output": None}, "column output is empty"),
        ({"conversations": []}, {"conversations": [{"from": "human"}]}, "a turn has no role and content"),
        ({"text": ""}, {"text": "<|im_start|>user\nx<|im_end|>"}, "the last turn is the user's"),
    ],
    ids=str,
)
def test_a_bad_value_is_found_whatever_the_format(valid: dict, invalid: dict, found: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [invalid, valid])
    assert refusal(path).startswith(f"recipe: {path}: row 0: {found}")


def test_an_invalid_row_far_down_is_found_and_can_be_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*numbered(0, 1000), {"messages": [USER]}])
    assert refusal(path).startswith(f"recipe: {path}: row 1000: the last turn is the user's")
    assert load(path, max_invalid_share=0.01)["messages"] == [row["messages"] for row in numbered(0, 1000)]


def test_a_source_without_one_valid_row_is_refused_whatever_the_share(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": [USER]}] * 3)
    assert "3 of 3 rows are invalid" in refusal(path, max_invalid_share=1.0)


def test_a_parquet_file_is_read_and_a_broken_one_refused(tmp_path: Path) -> None:
    Dataset.from_list(numbered(0, 3)).to_parquet(tmp_path / "rows.parquet")
    assert load(str(tmp_path / "rows.parquet"))["messages"] == [row["messages"] for row in numbered(0, 3)]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert "broken.parquet: not readable as parquet" in refusal(str(tmp_path / "broken.parquet"))


def test_a_split_that_a_function_of_the_project_does_not_have_is_refused_with_its_name() -> None:
    with pytest.raises(UserError, match="no split validation"):
        load_conversations([Source("gemma2_post.tiny.data:demonstrations", "validation")], 0.0, seed=0)


def test_a_function_without_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_rows.py").write_text("def rows(split):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal("no_rows:rows").startswith("recipe: no_rows:rows (train): there are no rows")


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_must_be_above_0(weight: float, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(0, 4))
    with pytest.raises(UserError, match=r"^datasets\[0\]: weight is -?\d; write a number above 0"):
        build(DataArguments, {"datasets": [{"path": path, "weight": weight}]})


def test_held_out_datasets_take_the_place_of_the_share_and_one_row_cannot_be_split(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", numbered(i, i + 1)) for i in range(2)]
    arguments = DataArguments([Source(paths[0])], [Source(paths[1])])
    train, held_out = (rows.dataset() for rows in split_held_out(arguments, 0, CONVERSATION, tokenizer))
    assert train["messages"] == [numbered(0, 1)[0]["messages"]]
    assert held_out["messages"] == [numbered(1, 2)[0]["messages"]]
    with pytest.raises(UserError, match=r"^recipe: 1 rows cannot be split"), located("recipe"):
        split_held_out(DataArguments([Source(paths[0])]), 0, CONVERSATION, tokenizer)


def test_packing_does_not_bring_back_what_an_earlier_code_made(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(0, 4))

    def packed() -> list[int]:
        # As SFTTrainer does with packing: true; it knows the rows by their fingerprint only.
        tokens = load_rows([Source(path)], 0.0, 0, row_format=CONVERSATION, tokenizer=tokenizer).dataset()
        return [
            i
            for ids in pack_dataset(tokens.select_columns(["input_ids", "labels"]), 128, "bfd")["input_ids"]
            for i in ids
        ]

    before = packed()
    monkeypatch.setattr(rows, "fold_system", lambda turns: [{**turn, "content": "new"} for turn in turns])
    monkeypatch.setattr(prepared, "_LIBRARIES", [])  # as other code would, it makes another key
    assert packed() != before


def test_what_would_be_lost_beside_the_conversation_is_refused(tmp_path: Path) -> None:
    row = {"instruction": "Hi", "output": "Hello!", "tools": [{"name": "search"}]}
    assert "row 0: column tools would be lost" in refusal(write(tmp_path / "rows.jsonl", [row]))


def test_sources_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    rows = [[{"messages": CHAT, "answer": answer}] for answer in (5, "five")]
    sources = [Source(write(tmp_path / f"{i}.jsonl", rows[i])) for i in range(2)]
    with pytest.raises(UserError, match="the sources do not fit together"):
        load_conversations(sources, 0.0, seed=0, columns=["answer"])
    assert len(load_conversations(sources, 0.0, seed=0)) == 2


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
        (
            "sft/llamafactory/glaive_toolcall_en_demo.json",
            r"row \d+: (role 'function_call' is unknown|column tools would be lost)",
        ),
        ("sft/self-instruct/seed_tasks.jsonl", "are of no known format"),
        ("sft/tulu-1/eval_instances_tulu_1.jsonl", "are of no known format"),
        ("text/wikitext-2/valid.txt", "row 0: text is not ChatML"),
    ],
)
def test_real_files_that_are_no_demonstrations_are_refused(file: str, message: str, real_data: Path) -> None:
    with pytest.raises(UserError, match=message):
        load(str(real_data / file))


def test_every_real_conversation_is_what_its_file_says(real_data: Path) -> None:
    expected = []
    for line in (real_data / "sft/tinker/conversations.jsonl").read_text().splitlines():
        first, *rest = json.loads(line)["messages"]
        if first["role"] == "system":
            first, rest = {"role": "user", "content": f"{first['content']}\n\n{rest[0]['content']}"}, rest[1:]
        expected.append([first, *rest])
    assert load(str(real_data / "sft/tinker/conversations.jsonl"))["messages"] == expected

    path = real_data / "sft/fastchat/dummy_conversation.json"
    names = {"user": "human", "assistant": "gpt"}
    assert [
        [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]
        for messages in load(str(path))["messages"]
    ] == [row["conversations"] for row in json.loads(path.read_text())]
