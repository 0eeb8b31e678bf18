"""Rows as users have them: what belongs to a row's meaning is read, and what is not understood is refused by name."""

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.keys import Source
from gemma2_post.data.pairs import PAIR
from gemma2_post.data.rows import CONVERSATION, DOCUMENT, PROMPT, QUESTION
from gemma2_post.data.turns import InvalidRow
from gemma2_post.models.tokenizer import render
from tests.conftest import load_conversations, load_preferences

Row = dict[str, object]

USER, MODEL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
AGAIN, BYE = {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Bye!"}
CHAT = [USER, MODEL, AGAIN, BYE]


def conversation(row: Row) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in CONVERSATION.read(row)["messages"]]


# --- keys of a turn ---


@pytest.mark.parametrize("zero", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss_weight": 0}])
@pytest.mark.parametrize("one", [{}, {"weight": 1}, {"train": True}, {"weight": None}])
def test_a_turn_with_a_weight_of_0_has_no_loss(
    zero: Row, one: Row, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    row = {"messages": [USER, MODEL | zero, AGAIN | {"weight": 0}, BYE | one]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = load_conversations([Source(str(tmp_path / "rows.jsonl"))], 0.0, 0, tokenizer=tokenizer)
    everything = {name: values[0].tolist() for name, values in render(tokenizer, [CHAT]).items()}
    assert found["input_ids"] == everything["input_ids"]
    spoken = [token for token in found["labels"] if token != -100]
    assert tokenizer.decode(spoken) == "Bye!<end_of_turn><eos>"
    assert tokenizer.decode([t for t in everything["labels"] if t != -100]) == (
        "Hello!<end_of_turn>Bye!<end_of_turn><eos>"
    )


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"weight": 0.5}, "turn 1 has weight 0.5; write 0 or 1"),
        ({"weight": "0"}, "turn 1 has weight '0'; write 0 or 1"),
        ({"train": "false"}, "turn 1 has train 'false'"),
        ({"weight": [1]}, r"turn 1 has weight \[1\]"),
        ({"tool_calls": [{"id": "1"}]}, "turn 1 has tool_calls .* which would be lost; remove the key"),
        ({"name": "Bob"}, "turn 1 has name 'Bob', which would be lost"),
        ({"reasoning_content": "Hm."}, "turn 1 has reasoning_content 'Hm.'"),
        ({"prefix": False}, "turn 1 has prefix 'False'"),
        ({"value": "Ho!"}, "turn 1 has value 'Ho!'"),
    ],
)
def test_a_key_of_a_turn_that_is_not_understood_is_refused_by_name(turn: Row, message: str) -> None:
    for row in ({"messages": [USER, MODEL | turn]}, {"prompt": "Hi", "completion": [MODEL | turn]}):
        with pytest.raises(InvalidRow, match=message.replace("turn 1", r"turn [01]")):
            CONVERSATION.read(row)


def test_empty_keys_and_a_content_in_parts_are_fine() -> None:
    empty = {"tool_calls": None, "name": "", "images": [], "extra": {}}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]}
    assert conversation({"messages": [USER | empty, parts]}) == [("user", "Hi"), ("assistant", "Hello!")]
    with pytest.raises(InvalidRow, match=r"the content of turn 1 is list, not text, and holds .*image"):
        CONVERSATION.read({"messages": [USER, MODEL | {"content": [{"type": "image", "text": "x"}]}]})


def test_weights_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidRow, match="turn 0 is the user's and has train True; only the model's turns"):
        CONVERSATION.read({"messages": [USER | {"train": True}, MODEL]})
    with pytest.raises(InvalidRow, match="no turn of the model is to be trained on"):
        CONVERSATION.read({"messages": [USER, MODEL | {"weight": 0}]})
    prompt = PROMPT.read({"messages": [USER, MODEL | {"weight": 0}, AGAIN, BYE | {"weight": 0}]})["prompt"]
    assert prompt == [USER, MODEL, AGAIN]


# --- columns ---

COLUMNS = {
    "Dolly": ({"instruction": "Why?", "context": "It rains.", "response": "So."}, "Why?\n\nIt rains."),
    "Dolly without context": ({"instruction": "Why?", "context": "", "response": "So.", "category": "qa"}, "Why?"),
    "question and answer": ({"question": "Why?", "answer": "So."}, "Why?"),
    "query and response": ({"query": "Why?", "response": "So."}, "Why?"),
    "input and output": ({"input": "Why?", "output": "So."}, "Why?"),
    "Alpaca and a context": ({"instruction": "Why?", "input": "a", "context": "b", "output": "So."}, "Why?\n\na\n\nb"),
    "OpenOrca": (
        {"id": "7", "system_prompt": "Be brief.", "question": "Why?", "response": "So."},
        "Be brief.\n\nWhy?",
    ),
    "UltraChat": (
        {
            "prompt": "Why?",
            "prompt_id": "x",
            "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
        },
        "Why?",
    ),
}


@pytest.mark.parametrize(("row", "asked"), COLUMNS.values(), ids=COLUMNS.keys())
def test_the_columns_that_belong_to_a_row_are_read(row: Row, asked: str) -> None:
    assert conversation(row) == [("user", asked), ("assistant", "So.")]
    assert PROMPT.read(row)["prompt"] == [{"role": "user", "content": asked}]


def test_history_comes_first() -> None:
    row = {"instruction": "And now?", "output": "Bye!", "history": [["Hi", "Hello!"]], "system": "Be kind."}
    expected = [("user", "Be kind.\n\nHi"), ("assistant", "Hello!"), ("user", "And now?"), ("assistant", "Bye!")]
    assert conversation(row) == expected


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": CHAT, "context": "It rains."}, "context"),
        ({"messages": CHAT, "prompt": "Something else?"}, "prompt"),
        ({"messages": CHAT, "tools": "[]x"}, "tools"),
        ({"prompt": "Hi", "question": "Ho", "completion": "x"}, "question"),
        ({"prompt": "Hi", "completion": "x", "response": "y"}, "response"),
        ({"prompt": [USER], "completion": "x", "input": "more"}, "input"),
        ({"instruction": "Hi", "output": "x", "images": ["a.png"]}, "images"),
        ({"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nx<|im_end|>", "context": "c"}, "context"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_column_that_would_be_lost_is_refused_unless_graders_need_it(row: Row, column: str) -> None:
    with pytest.raises(InvalidRow, match=f"column {column} would be lost"):
        CONVERSATION.read(row)
    assert CONVERSATION.read(row, [column])["messages"]


def test_an_answer_that_is_marked_as_bad_is_not_trained_on() -> None:
    for label in (False, 0, 0.0, "False", "false", "0"):
        with pytest.raises(InvalidRow, match=rf"label is {str(label).lower()}, so the answer is one to avoid"):
            CONVERSATION.read({"prompt": "Hi", "completion": "x", "label": label})
    for label in (True, 1, 1.0, "True", "1", None, "", "science"):
        assert CONVERSATION.read({"prompt": "Hi", "completion": "x", "label": label})["trained"] == [False, True]


def test_a_prompt_may_have_any_name_and_needs_no_answer() -> None:
    for name in ("prompt", "instruction", "question", "query", "input"):
        assert PROMPT.read({name: "Hi"})["prompt"] == [USER]
        assert PROMPT.read({name: "Hi", "answer": "5", "chosen": "x"})["prompt"] == [USER]


def test_a_list_of_texts_is_the_users_turns_where_they_are_asked_one_by_one() -> None:
    for name in ("turns", "prompt"):
        found = QUESTION.read({name: ["Hi", "And now?"], "category": "x"})
        assert found["prompt"] == [USER] and found["later"] == ["And now?"]
    assert PROMPT.read({"prompt": ["Hi"]})["prompt"] == [USER]
    with pytest.raises(InvalidRow, match="a list of 2 texts does not say who speaks"):
        PROMPT.read({"prompt": ["Hi", "And now?"]})


# --- transcripts ---

HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: And now?\n\nAssistant:"
TRANSCRIPTS = {
    "HH": HH,
    "without leading newlines": HH.strip(),
    "with spaces before": f"  {HH}",
    "without the last marker": HH.removesuffix("\n\nAssistant:"),
    "with CRLF": HH.replace("\n", "\r\n"),
    "with single newlines": HH.replace("\n\n", "\n"),
    "in one line": HH.replace("\n\n", " "),
    "with User": HH.replace("Human:", "User:"),
    "with AI": HH.replace("Assistant:", "AI:"),
    "Guanaco": "### Human: Hi### Assistant: Hello!### Human: And now?### Assistant:",
    "ChatML": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    "ChatML with CRLF": "<|im_start|>user\r\nHi<|im_end|>\r\n<|im_start|>assistant\r\nHello!<|im_end|>\r\n"
    "<|im_start|>user\r\nAnd now?<|im_end|>\r\n",
}


@pytest.mark.parametrize("text", TRANSCRIPTS.values(), ids=TRANSCRIPTS.keys())
def test_a_transcript_is_the_conversation_that_it_is(text: str) -> None:
    assert PROMPT.read({"prompt": text})["prompt"] == [USER, MODEL, AGAIN]
    row = CONVERSATION.read({"prompt": text, "completion": "Bye!"})
    assert row["messages"] == CHAT
    pair = PAIR.read({"prompt": text, "chosen": "Bye!", "rejected": "Go!"})
    assert pair["prompt"] == [USER, MODEL, AGAIN] and pair["chosen"] == [BYE]


@pytest.mark.parametrize(
    "text",
    [
        "### Human: Hi\n### Assistant: Hello!### Human: And now?### Assistant: Bye!",
        "### Human: Hi\n\n### Assistant: Hello!### Human: And now?\n### Assistant: Bye!",
        "###Human: Hi ### Assistant: Hello!\n\n### Human: And now?### Assistant: Bye!",
    ],
)
def test_marks_with_hashes_begin_turns_wherever_they_stand(text: str) -> None:
    assert CONVERSATION.read({"text": text})["messages"] == CHAT


@pytest.mark.parametrize(
    ("text", "turn", "mark"),
    [
        ("Human: a\n\nAssistant: b\nHuman: c\nAssistant: d", 1, "Human:"),
        ("Human: a\n\nAssistant: b\n  Human: c", 1, "Human:"),
        ("User: a\n\nAI: b\n\nUser: c\nAI: d", 2, "AI:"),
        ("Human: a\n\nAssistant: b ### Human: c ### Assistant: d", 1, "### Human:"),
        ("### Human: a### Assistant: b\nHuman: c\nAssistant: d", 1, "Human:"),
    ],
)
def test_a_transcript_that_may_be_split_in_two_ways_is_refused(text: str, turn: int, mark: str) -> None:
    for row in ({"text": text}, {"prompt": text, "completion": "e"}):
        with pytest.raises(
            InvalidRow, match=f"turn {turn} of a transcript holds '{mark}', which may begin a turn of its"
        ):
            CONVERSATION.read(row)


def test_a_mark_within_a_turn_is_content() -> None:
    """As in HH, where it may follow another mark, and in an indented dialogue or code."""
    for content in ("Human: why?", "Say 'Human: hi'.", "```\n    Human: str\n```", "> Human: hi\n> Assistant: hi"):
        row = CONVERSATION.read({"text": f"\n\nHuman: Hi\n\nAssistant: {content}"})
        assert row["messages"] == [USER, {"role": "assistant", "content": content}]


def test_a_text_that_begins_like_a_turn_is_a_transcript_only_if_both_speak() -> None:
    question = "User: I cannot log in\nPassword: is it case-sensitive?"
    for answer in ("AI: the study of machines.", "AI: a field.\n\nAI: also a film.", "### AI: an overview\n\nIt is."):
        assert conversation({"prompt": question, "completion": answer}) == [("user", question), ("assistant", answer)]
        pair = PAIR.read({"prompt": question, "chosen": answer, "rejected": "User: b"})
        assert [pair[key][0]["content"] for key in ("prompt", "chosen", "rejected")] == [question, answer, "User: b"]
        assert DOCUMENT.read({"text": answer})["text"] == answer
    for prompt, answer in (("\n\nHuman: Hi", "\n\nAssistant: Hello!"), ("Human: Hi", "Assistant: Hello!")):
        assert CONVERSATION.read({"prompt": prompt, "completion": answer})["messages"] == [USER, MODEL]
    assert CONVERSATION.read({"prompt": "\n\nUser: Hi", "completion": "\n\nAI: Hello!"})["messages"] == [USER, MODEL]


@pytest.mark.parametrize("text", [TRANSCRIPTS[name] for name in ("HH", "without leading newlines", "Guanaco")])
def test_two_transcripts_are_a_pair(text: str) -> None:
    pair = PAIR.read({"chosen": f"{text} Bye!", "rejected": f"{text} Go!"})
    assert (pair["prompt"], pair["chosen"]) == ([USER, MODEL, AGAIN], [BYE])
    assert CONVERSATION.read({"text": f"{text} Bye!"})["messages"] == CHAT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"Continue this:{HH}", "a transcript follows other text, 'Continue this"),
        ("[INST] Hi [/INST]", r"a text begins with \[INST\], another chat format"),
        ("<|user|>\nHi", r"a text begins with <\|user\|>"),
        ("### Instruction:\nHi\n\n### Response:", "a text begins with ### Instruction:"),
        ("<|im_start|>user\nHi", "text is not ChatML"),
    ],
)
def test_markers_that_are_not_understood_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRow, match=message):
        PROMPT.read({"prompt": text})


def test_a_question_about_a_speaker_is_no_transcript() -> None:
    for text in ("What does Human: mean?", "Say 'Assistant: hi'.", "Why ### here?"):
        assert PROMPT.read({"prompt": text})["prompt"] == [{"role": "user", "content": text}]


# --- preferences ---

LAYOUTS = {
    "instruction": {"instruction": "Hi", "chosen": "a", "rejected": "b"},
    "Orca": {"system": "", "question": "Hi", "chosen": "a", "rejected": "b"},
    "messages": {
        "chosen_messages": [USER, {"role": "assistant", "content": "a"}],
        "rejected_messages": [USER, {"role": "assistant", "content": "b"}],
    },
    "responses": {"prompt": "Hi", "chosen_response": "a", "rejected_response": "b"},
    "HelpSteer2": {"prompt": "Hi", "response_1": "b", "response_2": "a", "preference_strength": 2},
    "HelpSteer2, first": {"prompt": "Hi", "response_1": "a", "response_2": "b", "preference_strength": -3},
    "HelpSteer3": {"context": [USER], "response1": "b", "response2": "a", "overall_preference": 1, "domain": "x"},
    "SHP": {"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 5, "score_B": 2},
    "SHP, second": {"history": "Hi", "human_ref_A": "b", "human_ref_B": "a", "labels": 0},
    "PKU": {
        "prompt": "Hi", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 0,
        "is_response_0_safe": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_layouts_of_known_preference_data(row: Row) -> None:
    pair = PAIR.read(row)
    assert pair["prompt"] == [USER] and not pair["is_tie"]
    assert pair["chosen"] == [{"role": "assistant", "content": "a"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "names",
    [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score")],
)
def test_scores_have_many_names(names: tuple[str, str]) -> None:
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    assert PAIR.read(row | dict(zip(names, (3, 3), strict=True)))["is_tie"]
    assert PAIR.read(row | dict(zip(names, ("4.5", "3"), strict=True)))["is_tie"] is False  # as CSV has them
    with pytest.raises(InvalidRow, match=f"{names[0]} 1 is below {names[1]} 2"):
        PAIR.read(row | dict(zip(names, (1, 2), strict=True)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": "It rains.", "prompt": [USER]}, "column context would be lost"),
        ({"chosen": [USER, BYE], "rejected": [USER, MODEL], "prompt": "Other?"}, "the prompt is no part of"),
        ({"chosen": [USER, BYE], "rejected": [USER, MODEL], "prompt": "Hi", "system": "Be kind."}, "is no part of"),
    ],
)
def test_what_a_pair_would_lose_is_refused(changes: Row, message: str) -> None:
    with pytest.raises(InvalidRow, match=message):
        PAIR.read({"prompt": "Hi", "chosen": "a", "rejected": "b"} | changes)
    with pytest.raises(InvalidRow, match="labels is 2; it must be one of 0, 1"):
        PAIR.read({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": 2})


def test_equal_preferences_are_ties(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [LAYOUTS["HelpSteer2"] | {"preference_strength": strength} for strength in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        assert len(load_preferences([Source(str(tmp_path / "rows.jsonl"))], 0.0, 0)) == 1
    assert "dropped 1 of 2 pairs as ties" in caplog.text


def test_pairs_with_the_weights_of_their_turns_are_read(real_data: Path) -> None:
    path = real_data / "preference" / "llamafactory" / "v1_dpo_demo.jsonl"
    pairs = load_preferences([Source(str(path))], 0.0, 0)
    assert len(pairs) == 10
    first = json.loads(path.read_text().splitlines()[0])
    assert pairs[0]["chosen"][0]["content"] == first["chosen_messages"][-1]["content"][0]["value"]


# --- documents, and rows of several formats ---


def test_documents_are_texts_and_conversations() -> None:
    assert DOCUMENT.read({"text": "Once upon a time."}) == {
        "text": "Once upon a time.", "messages": [], "had_system": False
    }  # fmt: skip
    assert DOCUMENT.read({"text": TRANSCRIPTS["ChatML"] + "Bye!<|im_end|>"})["messages"] == CHAT
    assert DOCUMENT.read({"messages": CHAT})["messages"] == CHAT


def test_a_file_may_hold_rows_of_several_formats(tmp_path: Path) -> None:
    rows = [{"messages": CHAT[:2]}, {"prompt": "Hi", "completion": "Hello!"}, {"question": "Hi", "answer": "Hello!"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_conversations([Source(str(tmp_path / "rows.jsonl"))], 0.0, 0)["messages"] == [CHAT[:2]] * 3
    Dataset.from_list(
        [{name: row.get(name) for name in ("prompt", "completion", "messages")} for row in rows[:2]]
    ).to_parquet(tmp_path / "rows.parquet")
    assert load_conversations([Source(str(tmp_path / "rows.parquet"))], 0.0, 0)["messages"] == [CHAT[:2]] * 2


def test_gsm8k_is_read(real_data: Path) -> None:
    path = real_data / "benchmarks" / "gsm8k" / "train.first2000.jsonl"
    rows = load_conversations([Source(str(path))], 0.0, 0)
    first = json.loads(path.read_text().splitlines()[0])
    assert len(rows) == 2000
    assert [turn["content"] for turn in rows[0]["messages"]] == [first["question"], first["answer"]]
