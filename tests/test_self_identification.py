"""Who an assistant says that it is, on written cases in twelve languages, and on real conversations."""
# ruff: noqa: RUF001 (letters of other scripts)

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from gemma2_post.curation.self_identification import find

CASES = [json.loads(line) for line in Path("tests/self_identification.jsonl").read_text(encoding="utf-8").splitlines()]
"""Turns of an assistant named Gemma, made by Google. Those held out were written before any form was, and no form was
changed for them."""


def test_the_cases_are_many_and_half_of_them_only_look_like_it() -> None:
    assert len({case["text"] for case in CASES}) == len(CASES) >= 300
    assert len({case["language"] for case in CASES}) >= 6
    kinds = Counter(case["self_identification"] for case in CASES)
    assert 0.45 < kinds[False] / len(CASES) < 0.55


@pytest.mark.parametrize("held_out", [False, True])
def test_recall_and_precision(held_out: bool) -> None:
    cases = [case for case in CASES if case["held_out"] is held_out]
    found = [case for case in cases if find(case["text"], "Gemma", "Google")]
    right = sum(case["self_identification"] for case in found)
    assert right / sum(case["self_identification"] for case in cases) >= 0.95
    assert right / len(found) >= 0.95


def test_the_sentence_is_given() -> None:
    text = "That is hard to say.\nAs an AI language model trained by OpenAI, I have no opinion. Anything else?"
    assert find(text) == "As an AI language model trained by OpenAI, I have no opinion."


@pytest.mark.parametrize(
    "text", ["I am Gemma, made by Google.", "我是Gemma，由谷歌开发。", "I'm Gemma 2, from Google DeepMind."]
)
def test_a_name_is_foreign_unless_it_is_permitted(text: str) -> None:
    assert find(text, "Gemma", "Google") is None
    assert find(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "I am OtherBot, an AI assistant made by Acme.",
        "I am OtherBot.",
        "I am Zorbit, your virtual assistant.",
        "I am an AI assistant built by Acme Labs.",
        "您好，我是小蓝，一个由星河科技开发的人工智能助手。",
        "Ich bin Zorbit, ein KI-Assistent der Firma Acme.",
    ],
)
def test_a_name_that_nobody_knows_counts_where_the_form_is_clear(text: str) -> None:
    assert find(text, "Gemma", "Google") is not None


@pytest.mark.parametrize("name", ["OtherBot", "otherbot"])
def test_a_name_of_ones_own_is_permitted(name: str) -> None:
    assert find("I am OtherBot, an AI assistant made by Acme.", name, "Acme") is None
    assert find("I am OtherBot, an AI assistant made by Acme.", name, "Initech") is not None


def test_quotations_dialogues_and_code_are_not_the_assistants_own_words() -> None:
    assert find('The robot says: "I am ChatGPT, made by OpenAI." Then it leaves.') is None
    assert find("Alice: Who are you?\nRobot: I am ChatGPT, made by OpenAI.") is None
    assert find("```\nprint('I am ChatGPT, made by OpenAI.')\n```") is None
    assert find('"I am ChatGPT, made by OpenAI."') is not None  # The whole turn in quotation marks is the turn.
    assert find("I am **ChatGPT**, made by OpenAI.") is not None


def test_real_conversations() -> None:
    """FastChat's conversations have Vicuna's answers about itself; nobody in HH or GSM8K says who made them."""
    if not os.environ.get("GEMMA2_POST_DATA"):
        pytest.skip("GEMMA2_POST_DATA does not name the folder of real data")
    data = Path(os.environ["GEMMA2_POST_DATA"])
    conversations = json.loads((data / "sft/fastchat/dummy_conversation.json").read_text(encoding="utf-8"))
    answers = [turn["value"] for row in conversations for turn in row["conversations"] if turn["from"] == "gpt"]
    own = [answer for answer in answers if "LMSYS" in answer or "Vicuna" in answer]
    assert own and all(find(answer, "Gemma", "Google") for answer in own)
    assert not any(find(answer, "Vicuna", "Large Model Systems") for answer in own)
    for line in (data / "benchmarks/gsm8k/train.first2000.jsonl").read_text(encoding="utf-8").splitlines():
        assert find(json.loads(line)["answer"], "Gemma", "Google") is None
    for line in (
        (data / "preference/hh-rlhf/harmless-base-test.first1156.jsonl").read_text(encoding="utf-8").splitlines()
    ):
        for turn in json.loads(line)["chosen"].split("\n\nAssistant:")[1:]:
            assert find(turn.split("\n\nHuman:")[0], "Gemma", "Google") is None


def test_a_text_without_sentence_ends_takes_no_more_time_than_its_length() -> None:
    began = time.process_time()
    find("我是由" * 10_000)
    assert time.process_time() - began < 10  # It took forty seconds when forms saw the whole text.
