"""Preference pairs: every usual form gives the same pair, what is no pair is refused by its row, none is cut."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.data import pairs
from gemma2_post.data.keys import Source
from gemma2_post.data.mixture import Rows, load_rows
from gemma2_post.data.preparation import balance_turns, drop_too_long
from gemma2_post.data.turns import InvalidRow
from gemma2_post.stage.errors import UserError, located
from tests.conftest import load_preferences

Row = dict[str, object]

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
AGAIN = {"role": "user", "content": "And now?"}
BYE, GO = {"role": "assistant", "content": "Goodbye!"}, {"role": "assistant", "content": "Go away."}
KIND = {"role": "system", "content": "Be kind."}
PAIR = {"prompt": [HI], "chosen": [BYE], "rejected": [GO]}


def to_pair(row: Row, score_margin: float = 0.0) -> Row:
    return pairs.PAIR.with_settings({"score_margin": score_margin}).read(row)


def sharegpt(*turns: dict[str, str]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def load(folder: Path, rows: list[Row] | str, **options: object) -> Dataset:
    """The pairs of a file with these rows, as a recipe's `datasets` are read."""
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text)
    settings = {"max_invalid_share": 0.0} | options
    return load_preferences([Source(str(folder / "pairs.jsonl"))], settings.pop("max_invalid_share"), 0, **settings)


# --- forms ---

SINGLE = {
    "prompt and answers as text": {"prompt": "Hi", "chosen": "Goodbye!", "rejected": "Go away."},
    "prompt as messages, answers as text": {"prompt": [HI], "chosen": "Goodbye!", "rejected": "Go away."},
    "prompt as text, answers as messages": {"prompt": "Hi", "chosen": [BYE], "rejected": [GO]},
    "prompt and answers as messages": PAIR,
    "prompt as messages, answers as a message": {"prompt": [HI], "chosen": BYE, "rejected": GO},
    "two conversations": {"chosen": [HI, BYE], "rejected": [HI, GO]},
    "a prompt and two conversations": {"prompt": "Hi", "chosen": [HI, BYE], "rejected": [HI, GO]},
    "an empty prompt and two conversations": {"prompt": "", "chosen": [HI, BYE], "rejected": [HI, GO]},
    "ShareGPT": {"conversations": sharegpt(HI), "chosen": sharegpt(BYE)[0], "rejected": sharegpt(GO)[0]},
    "ShareGPT with lists of one answer": {
        "conversations": sharegpt(HI),
        "chosen": sharegpt(BYE),
        "rejected": sharegpt(GO),
    },
    "two ShareGPT conversations": {"chosen": sharegpt(HI, BYE), "rejected": sharegpt(HI, GO)},
    "transcripts": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Goodbye!",
        "rejected": "\n\nHuman: Hi \n\nAssistant: Go away.\n",
    },
}
MULTI = {
    "prompt as messages": {"prompt": [HI, HELLO, AGAIN], "chosen": [BYE], "rejected": [GO]},
    "two conversations": {"chosen": [HI, HELLO, AGAIN, BYE], "rejected": [HI, HELLO, AGAIN, GO]},
    "a prompt and two conversations": {
        "prompt": "Hi",
        "chosen": [HI, HELLO, AGAIN, BYE],
        "rejected": [HI, HELLO, AGAIN, GO],
    },
    "ShareGPT": {"conversations": sharegpt(HI, HELLO, AGAIN), "chosen": sharegpt(BYE)[0], "rejected": sharegpt(GO)[0]},
    "transcripts": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And now?\n\nAssistant: Goodbye!",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And now?\n\nAssistant: Go away.",
    },
}
SYSTEM = {
    "in the prompt": {"prompt": [KIND, HI], "chosen": [BYE], "rejected": [GO]},
    "in both conversations": {"chosen": [KIND, HI, BYE], "rejected": [KIND, HI, GO]},
    "in the conversations beside a prompt": {"prompt": "Hi", "chosen": [KIND, HI, BYE], "rejected": [KIND, HI, GO]},
    "ShareGPT": {"conversations": sharegpt(KIND, HI), "chosen": sharegpt(BYE)[0], "rejected": sharegpt(GO)[0]},
}
FOLDED = {"role": "user", "content": "Be kind.\n\nHi"}
FORMS = [
    *((f"single turn: {name}", row, [HI]) for name, row in SINGLE.items()),
    *((f"multi-turn: {name}", row, [HI, HELLO, AGAIN]) for name, row in MULTI.items()),
    *((f"system: {name}", row, [FOLDED]) for name, row in SYSTEM.items()),
]


@pytest.mark.parametrize(("row", "prompt"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_every_form_gives_the_same_pair(row: Row, prompt: list[dict[str, str]]) -> None:
    expected = {"prompt": prompt, "chosen": [BYE], "rejected": [GO], "margin": 0.0, "is_tie": False}
    expected |= {"num_turns": 1 + (prompt == MULTI["prompt as messages"]["prompt"])}
    assert to_pair(row) == expected | {"had_system": prompt == [FOLDED]}


@pytest.mark.parametrize("forms", [SINGLE, MULTI, SYSTEM], ids=["single turn", "multi-turn", "system"])
def test_every_form_is_read_from_a_file(forms: dict[str, Row], tmp_path: Path) -> None:
    (prompt,) = {json.dumps(each) for _, row, each in FORMS if row in forms.values()}
    for name, row in forms.items():
        (loaded,) = load(tmp_path, [row | {"margin": 0.25}]).to_list()
        expected = {"prompt": json.loads(prompt), "chosen": [BYE], "rejected": [GO], "margin": 0.25}
        assert loaded == expected | {"num_turns": 2 if forms is MULTI else 1}, name


def test_turns_are_the_users_and_columns_are_kept(tmp_path: Path) -> None:
    chats = [[HI], [HI, HELLO, AGAIN], [KIND, HI, HELLO, AGAIN, HELLO, HI]]
    rows = [{"prompt": chat, "chosen": "a", "rejected": "b", "skill": f"{i}"} for i, chat in enumerate(chats)]
    pairs = load(tmp_path, rows, columns=["skill"])
    assert pairs["num_turns"] == [1, 2, 3] and pairs["skill"] == ["0", "1", "2"]
    assert set(pairs.column_names) == {"prompt", "chosen", "rejected", "margin", "num_turns", "skill"}


# --- refusals ---

TEXT = {"prompt": "Hi", "chosen": "Goodbye!", "rejected": "Go away."}
CHATS, TRANSCRIPTS = SINGLE["two conversations"], SINGLE["transcripts"]
OTHER_PROMPT = "chosen and rejected answer different prompts; only the model's last turn may differ"
NO_TRANSCRIPT = "chosen is text without a prompt and no transcript (\\n\\nHuman: ... \\n\\nAssistant: ...)"
USER_LAST = "chosen: the last turn is the user's; it must be the model's"
BAD: dict[str, tuple[Row | None, Row, str]] = {
    "chosen equals rejected": (PAIR, {"rejected": [BYE]}, "chosen and rejected are the same answer"),
    "equal but for spaces": (TEXT, {"rejected": " Goodbye!\n"}, "chosen and rejected are the same answer"),
    "other prompts": (CHATS, {"rejected": [AGAIN, GO]}, OTHER_PROMPT),
    "other prompts in transcripts": (TRANSCRIPTS, {"rejected": "\n\nHuman: Ho\n\nAssistant: Go."}, OTHER_PROMPT),
    "other turns of the model": (CHATS, MULTI["two conversations"] | {"rejected": [HI, GO, AGAIN, GO]}, OTHER_PROMPT),
    "a system message on one side": (CHATS, {"chosen": [KIND, HI, BYE]}, OTHER_PROMPT),
    "more turns on one side": (CHATS, {"rejected": [HI, HELLO, AGAIN, GO]}, OTHER_PROMPT),
    "an empty chosen answer": (TEXT, {"chosen": " \n"}, "chosen: the content of turn 1 is empty"),
    "an empty rejected answer": (
        TRANSCRIPTS,
        {"rejected": "\n\nHuman: Hi\n\nAssistant:"},
        "rejected: the content of tu",
    ),
    "no answer": (PAIR, {"rejected": []}, "column rejected is empty; expected chosen + rejected"),
    "null": (TEXT, {"chosen": None}, "column chosen is empty"),
    "the user last": (CHATS, {"chosen": [HI, BYE, AGAIN], "rejected": [HI, GO, AGAIN]}, USER_LAST),
    "the user last in a transcript": (TRANSCRIPTS, {"chosen": "\n\nHuman: Hi"}, USER_LAST),
    "the model first": (CHATS, {"chosen": [BYE], "rejected": [GO]}, "chosen: turn 0 is by assistant, expected user"),
    "the model last in the prompt": (PAIR, {"prompt": [HI, HELLO]}, "chosen: turn 2 is by assistant, expected user"),
    "candidates": (
        None,
        {"prompt": "Hi", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]},
        "chosen holds 3 candidates; give one chosen and one rejected answer",
    ),
    "one candidate": (
        None,
        {"prompt": "Hi", "chosen": "a", "rejected": ["d"]},
        "rejected holds 1 candidates; give one chosen and one rejected answer",
    ),
    "candidates as messages": (PAIR, {"rejected": [GO, HELLO]}, "rejected: turn 2 is by assistant, expected user"),
    "a score of text": (PAIR, {"score_chosen": "x", "score_rejected": "2"}, "score_chosen is 'x', not a number"),
    "no number as score": (PAIR, {"score_rejected": float("nan")}, "score_rejected is nan, not a number"),
    "an infinite score": (
        PAIR,
        {"score_chosen": float("inf"), "score_rejected": 1.0},
        "score_chosen is inf, not a nu",
    ),
    "a boolean as score": (PAIR, {"score_chosen": True}, "score_chosen is True, not a number"),
    "a list of scores": (PAIR, {"score_chosen": [7.0, 8.0]}, "score_chosen is [7.0, 8.0], not a number"),
    "a worse chosen": (PAIR, {"score_chosen": 2, "score_rejected": 7}, "score_chosen 2 is below score_rejected 7"),
    "a margin of text": (PAIR, {"margin": "large"}, "margin is 'large', not a number"),
    "no number as margin": (PAIR, {"margin": float("nan")}, "margin is nan, not a number"),
    "an infinite margin": (PAIR, {"margin": float("inf")}, "margin is inf, not a number"),
    "a negative margin": (PAIR, {"margin": -0.5}, "margin is -0.5; it must not be below 0"),
    "text without a prompt": (TRANSCRIPTS, {"chosen": "Goodbye!", "rejected": "Go away."}, NO_TRANSCRIPT),
    "text before a transcript": (TRANSCRIPTS, {"chosen": f"A chat:{TRANSCRIPTS['chosen']}"}, "a transcript follows"),
    "an unknown role": (CHATS, {"chosen": [HI, BYE | {"role": "tool"}]}, "role 'tool' is unknown"),
    "control tokens": (TEXT, {"chosen": "a<end_of_turn>"}, "chosen: turn 1 holds the control token <end_of_turn>"),
    "a column of tools": (PAIR, {"tools": "search"}, "column tools would be lost"),
    "a weight of 0": (PAIR, {"chosen": [BYE | {"weight": 0}]}, "chosen: the answer has a weight of 0"),
}


@pytest.mark.parametrize(("good", "changes", "message"), BAD.values(), ids=BAD.keys())
def test_a_row_that_is_no_pair_is_refused_by_its_number(
    good: Row | None, changes: Row, message: str, tmp_path: Path
) -> None:
    """Parquet, because it can hold what is no number; after a row that is a pair, where one fits into its columns."""
    rows = [good, good | changes] if good else [changes]
    columns = rows[-1].keys()
    file = tmp_path / "pairs.parquet"
    Dataset.from_list([{column: row.get(column) for column in columns} for row in rows]).to_parquet(file)
    with pytest.raises(UserError) as refused, located("recipe"):
        load_preferences([Source(str(file))], 0.0, 0)
    assert str(refused.value).startswith(f"recipe: {file}: row {len(rows) - 1}: {message}")


@pytest.mark.parametrize("score_margin", [float("nan"), float("inf")])
def test_a_margin_for_each_point_that_is_no_number_is_refused(score_margin: float) -> None:
    with pytest.raises(InvalidRow, match=r"margin is (nan|inf)"):
        to_pair(PAIR | {"score_chosen": 2.0, "score_rejected": 1.0}, score_margin)


def test_columns_of_no_pair_and_a_share_of_invalid_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        UserError, match=r"the columns prompt, chosen are of no known format; expected chosen \+ reject"
    ):
        load(tmp_path, [{"prompt": "Hi", "chosen": "a"}])
    rows = [TEXT, TEXT | {"rejected": ""}, TEXT | {"chosen": "Bye!"}]
    with pytest.raises(UserError, match=r"row 1: column rejected is empty; expected .*; fix the data, or allow"):
        load(tmp_path, rows, max_invalid_share=0.3)
    with caplog.at_level(logging.WARNING):
        pairs = load(tmp_path, rows, max_invalid_share=0.34)
    assert [row["chosen"][0]["content"] for row in pairs] == ["Goodbye!", "Bye!"]
    assert "dropped invalid rows; the first one is row 1: column rejected is empty" in caplog.text


# --- scores, margins and ties ---


@pytest.mark.parametrize(
    ("columns", "score_margin", "margin"),
    [
        ({}, 0.5, 0.0),
        ({"margin": 3}, 0.5, 3.0),
        ({"margin": None, "score_chosen": None, "score_rejected": None}, 0.5, 0.0),
        ({"score_chosen": 9, "score_rejected": 2.5}, 0.0, 0.0),
        ({"score_chosen": 9, "score_rejected": 2.5}, 0.5, 3.25),
        ({"score_chosen": -1, "score_rejected": -2, "margin": 0.25}, 2.0, 2.25),
    ],
)
def test_the_margin_is_the_rows_own_and_that_of_its_scores(columns: Row, score_margin: float, margin: float) -> None:
    assert to_pair(PAIR | columns, score_margin)["margin"] == margin


def test_ties_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = [(3, 3), (4, 3), (2.0, 2.0), (3, 1)]
    rows = [TEXT | {"score_chosen": better, "score_rejected": worse} for better, worse in scores]
    with caplog.at_level(logging.WARNING):
        pairs = load(tmp_path, rows, score_margin=0.5)
    assert pairs["margin"] == [0.5, 1.0] and "is_tie" not in pairs.column_names
    assert "dropped 2 of 4 pairs as ties (equal scores)" in caplog.text
    with (
        pytest.raises(UserError, match=r"^recipe: datasets: all 2 pairs are ties \(equal scores\); give pairs that"),
        located("recipe"),
    ):
        load(tmp_path, [rows[0], rows[2]])


# --- turns ---


def pairs_of_turns(*num_turns: int) -> Rows:
    found = Dataset.from_dict({"num_turns": num_turns, "row": range(len(num_turns))})
    return Rows(found, np.random.default_rng(1).permutation(len(found)))


@pytest.mark.parametrize(
    ("num_single", "num_multi", "share", "expected"),
    [
        (30, 10, 0.5, (10, 10)),
        (10, 30, 0.25, (10, 3)),
        (10, 30, 0.9, (3, 30)),
        (60, 20, 0.25, (60, 20)),
        (7, 5, 0.3, (7, 3)),
    ],
)
def test_the_largest_mixture_with_this_share_of_multi_turn_pairs(
    num_single: int, num_multi: int, share: float, expected: tuple[int, int]
) -> None:
    pairs = pairs_of_turns(*[1] * num_single, *(2 + i % 3 for i in range(num_multi)))
    balanced = balance_turns(pairs, share, seed=0).dataset()
    is_single = [num_turns == 1 for num_turns in balanced["num_turns"]]
    assert (sum(is_single), len(is_single) - sum(is_single)) == expected
    assert len(set(balanced["row"])) == len(balanced)
    order = {row: position for position, row in enumerate(pairs.numbers)}
    assert list(balanced["row"]) == sorted(balanced["row"], key=order.__getitem__)
    assert list(balance_turns(pairs, share, seed=0).numbers) == list(balanced["row"])
    other = list(balance_turns(pairs, share, seed=1).numbers)
    assert (other == list(balanced["row"])) == (len(balanced) == len(pairs))


@pytest.mark.parametrize(
    ("num_turns", "share", "message"),
    [
        ([1, 1, 1], 0.5, "multi_turn_share needs single- and multi-turn pairs, found 3 and 0; remove it"),
        ([2, 3], 0.5, "multi_turn_share needs single- and multi-turn pairs, found 0 and 2; remove it"),
    ],
)
def test_a_share_that_cannot_be_is_refused(num_turns: list[int], share: float, message: str) -> None:
    with pytest.raises(UserError) as refused, located("recipe"):
        balance_turns(pairs_of_turns(*num_turns), share, seed=0)
    assert str(refused.value) == f"recipe: {message}"


# --- tokens ---


def test_long_pairs_are_dropped_by_turns_and_none_is_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Either side may be the long one; at exactly max_length a pair is kept."""
    rows = [
        TEXT,
        TEXT | {"chosen": "plus " * 40},
        TEXT | {"rejected": "plus " * 40},
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        *(MULTI["prompt as messages"] for _ in range(2)),
    ]
    rows[4] = rows[4] | {"rejected": [GO | {"content": "plus " * 40}]}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(tmp_path / "pairs.jsonl"))
    read = load_rows([source], 0.0, 0, row_format=pairs.PAIR, tokenizer=tokenizer)
    whole = drop_too_long(read, "max_length", 256, 0.0).dataset()
    assert len(whole) == 6 and not caplog.text
    for row in whole:
        for side in ("chosen", "rejected"):
            text = "<bos>" + "".join(
                f"<start_of_turn>{'user' if turn['role'] == 'user' else 'model'}\n{turn['content'].strip()}"
                "<end_of_turn>\n"
                for turn in [*row["prompt"], *row[side]]
            )
            assert row[f"{side}_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    longest = max(len(whole[5]["chosen_ids"]), len(whole[5]["rejected_ids"]))
    by_turns = "(2 of 4 with 1 user turns, 1 of 2 with 2 user turns)"
    found = f"3 of 6 pairs are longer than max_length {longest} tokens {by_turns}"
    with caplog.at_level(logging.WARNING):
        kept = drop_too_long(read, "max_length", longest, 0.5).dataset()
    assert kept.to_list() == [whole[i] for i in (0, 3, 5)]
    assert f"dropped: {found}" in caplog.text
    with pytest.raises(UserError) as refused, located("recipe"):
        drop_too_long(read, "max_length", longest, 0.49)
    assert str(refused.value) == f"recipe: {found}; raise max_length, or allow a larger share with max_too_long_share"
    with pytest.raises(UserError, match="all 6 pairs are longer than max_length 3 tokens; raise max_length"):
        drop_too_long(read, "max_length", 3, 1.0)


# --- real data ---


def test_the_harmless_transcripts_parse_but_for_six(real_data: Path) -> None:
    """Four have an empty answer, in two the model speaks twice in a row."""
    file = real_data / "preference" / "hh-rlhf" / "harmless-base-test.first1156.jsonl"
    problems: dict[int, str] = {}
    pairs: dict[int, Row] = {}
    for row, line in enumerate(file.read_text().splitlines()):
        try:
            pairs[row] = to_pair(json.loads(line))
        except InvalidRow as problem:
            problems[row] = str(problem)
    out_of_turn = "expected user (they must alternate, user first)"
    assert problems == {
        86: "chosen: the content of turn 3 is empty",
        516: "chosen: the content of turn 1 is empty",
        667: f"chosen: turn 4 is by assistant, {out_of_turn}",
        763: f"chosen: turn 2 is by assistant, {out_of_turn}",
        925: "chosen: the content of turn 1 is empty",
        1103: "chosen: the content of turn 1 is empty",
    }
    loaded = load_preferences([Source(str(file))], 0.01, 0)
    assert len(loaded) == len(pairs) == 1150
    assert loaded.select_columns(["prompt", "chosen", "rejected"]).to_list() == [
        {column: pair[column] for column in ("prompt", "chosen", "rejected")} for pair in pairs.values()
    ]
    for row, line in enumerate(file.read_text().splitlines()):
        if row in pairs:  # nothing but white space is lost
            whole = "".join(turn["content"] for turn in [*pairs[row]["prompt"], *pairs[row]["chosen"]])
            text = json.loads(line)["chosen"].replace("\n\nHuman:", "").replace("\n\nAssistant:", "")
            assert "".join(whole.split()) == "".join(text.split())
    assert Counter(loaded["num_turns"]).keys() >= {1, 2, 3, 4}


def test_sharegpt_preferences_parse_completely(real_data: Path) -> None:
    file = real_data / "preference" / "llamafactory" / "dpo_en_demo.json"
    rows = json.loads(file.read_text())
    loaded = load_preferences([Source(str(file))], 0.0, 0)
    assert len(loaded) == len(rows)
    for pair, row in zip(loaded, rows, strict=True):
        assert [turn["content"] for turn in pair["chosen"]] == [row["chosen"]["value"]]
        assert [turn["content"] for turn in pair["rejected"]] == [row["rejected"]["value"]]
        turns = row["conversations"]
        if turns[0]["from"] != "system":
            assert [turn["content"] for turn in pair["prompt"]] == [turn["value"] for turn in turns]
