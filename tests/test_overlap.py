"""Test prompts that an earlier stage has read are found by content, and refused with their rows."""

import json
from pathlib import Path

import pytest

from gemma2_post.data.keys import Source
from gemma2_post.data.overlap import check_unseen, normalized
from gemma2_post.data.pairs import PAIR
from gemma2_post.data.rows import CONVERSATION, PROMPT, QUESTION, RowFormat
from gemma2_post.stage.errors import UserError


def write(path: Path, rows: list[dict]) -> list[Source]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [Source(str(path))]


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


TEST = [{"prompt": "What is red?"}, {"prompt": talk("Hello!", "Hi.", "Who am  I?")}, {"turns": ["One?", "Two?"]}]


@pytest.mark.parametrize(
    ("row_format", "row", "number"),
    [
        (PROMPT, {"prompt": "what is\u00a0RED?"}, 0),
        (PROMPT, {"prompt": talk("Hello!", "Another answer.", "Who am I?")}, 1),
        (CONVERSATION, {"messages": talk("What is red?", "A color.")}, 0),
        (CONVERSATION, {"messages": talk("What is red?", "A color.", "Sure?", "Yes.")}, 0),
        (CONVERSATION, {"instruction": "What is red?", "output": "A color."}, 0),
        (CONVERSATION, {"messages": talk("One?", "1.", "Two?", "2.")}, 2),
        (PAIR, {"prompt": "What is red?", "chosen": "A color.", "rejected": "No."}, 0),
        (PAIR, {"chosen": talk("What is red?", "A color."), "rejected": talk("What is red?", "No.")}, 0),
    ],
)
def test_a_prompt_that_was_read_is_refused_with_both_rows(
    row_format: RowFormat, row: dict, number: int, tmp_path: Path
) -> None:
    test = write(tmp_path / "test.jsonl", TEST)
    other = {PROMPT: {"prompt": "New?"}, CONVERSATION: {"messages": talk("New?", "Yes.")}}
    other[PAIR] = {"prompt": "New?", "chosen": "Yes.", "rejected": "No."}
    read = write(tmp_path / "train.jsonl", [other[row_format], row])
    with pytest.raises(UserError) as raised:
        check_unseen(test, QUESTION, [(read, row_format, "sft trains on")])
    message = str(raised.value)
    assert f"row {number} of {test[0].path} (train) asks what row 1 of {read[0].path} (train) asks" in message
    assert "which sft trains on; 1 of 3 prompts overlap" in message
    check_unseen(test, QUESTION, [(write(tmp_path / "new.jsonl", [other[row_format]]), row_format, "sft trains on")])


@pytest.mark.parametrize("text", ["Hello!", "One?", "Who am I?", "What is red", "What is red? Sure?"])
def test_other_prompts_are_not(text: str, tmp_path: Path) -> None:
    """A conversation's first turn alone is another prompt, as is its last turn alone."""
    test, read = write(tmp_path / "test.jsonl", TEST), write(tmp_path / "train.jsonl", [{"prompt": text}])
    check_unseen(test, QUESTION, [(read, PROMPT, "rlhf trains on")])


def test_invalid_rows_are_left_to_the_stage_that_reads_them(tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", TEST)
    read = write(tmp_path / "train.jsonl", [{"messages": []}, {"messages": talk("What is red?", "A color.")}])
    with pytest.raises(UserError, match=r"row 1 of .*train\.jsonl"):
        check_unseen(test, QUESTION, [(read, CONVERSATION, "sft trains on")])


@pytest.mark.parametrize(
    ("split", "is_refused"),
    [("test", True), ("test[:50%]", False), ("test[:51%]", True), ("train", False), ("train+test", True)],
)
def test_on_the_hub_names_and_slices_are_compared(split: str, is_refused: bool) -> None:
    test, read = [Source("owner/data", "test[50%:]")], [Source("owner/data", split)]
    if is_refused:
        with pytest.raises(UserError, match=r"owner/data \(test\[50%:\]\) shares rows with .*, which sft trains on"):
            check_unseen(test, QUESTION, [(read, PROMPT, "sft trains on")])
    else:
        check_unseen(test, QUESTION, [(read, PROMPT, "sft trains on")])


def test_another_configuration_on_the_hub_is_another_data_set() -> None:
    test, read = [Source("owner/data", "test", name="one")], [Source("owner/data", "test", name="two")]
    check_unseen(test, QUESTION, [(read, PROMPT, "sft trains on")])


def test_texts_are_normalized_for_comparing() -> None:
    assert normalized("  What\u00a0IS\n\n\ufb01ve? ") == "what is five?"
