"""Gemma's own tokenizer, with its 256,000 pieces, on real chats."""

import json
import os
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.turns import Message, as_turns, fold_system, is_valid, without_weights
from gemma2_post.models.templates import INFERENCE_TEMPLATE, TRAINING_TEMPLATE
from gemma2_post.models.tokenizer import render
from gemma2_post.models.tokens import BOS, END_OF_TURN, EOS, SPECIAL_TOKENS

START_OF_TURN, NEWLINE = 106, 108
KINDS = {
    "lines": re.compile(r"\n\n"),
    "code": re.compile("```"),
    "emoji": re.compile("[\U0001f300-\U0001faff]"),
    "right to left": re.compile("[\u0590-\u08ff]"),
}
"""What a chat must hold to count as of this kind."""


@pytest.fixture(scope="module")
def chats(real_data: Path) -> list[list[Message]]:
    """Conversations of three public sets, system messages folded."""
    found = []
    for row in json.loads((real_data / "preference/llamafactory/dpo_en_demo.json").read_text()):
        found.append([*row["conversations"], row["chosen"]])
    for row in json.loads((real_data / "sft/fastchat/dummy_conversation.json").read_text())[:50]:
        found.append(row["conversations"])
    for line in (real_data / "sft/tulu-1/eval_instances_tulu_1.jsonl").read_text().splitlines()[::3]:
        row = json.loads(line)
        found.append(
            [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completions"][0]["completion"]}]
        )
    turns = [fold_system(as_turns(each, "user")) for each in found]
    return [without_weights(each) for each in turns if is_valid(each)]


def chats_of(kind: str, chats: list[list[Message]]) -> list[list[Message]]:
    return [chat for chat in chats if any(KINDS[kind].search(each["content"]) for each in chat)]


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def expected(tokenizer: PreTrainedTokenizerBase, chat: list[Message]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, put together turn by turn."""
    ids, labels = [BOS], [-100]
    for number, message in enumerate(chat):
        role = {"user": "user", "assistant": "model"}[message["role"]]
        header = [START_OF_TURN, *pieces(tokenizer, f"{role}\n")]
        said = [*pieces(tokenizer, message["content"].strip()), END_OF_TURN]
        between = [NEWLINE]
        if number == len(chat) - 1:
            said, between = [*said, EOS], []
        ids += header + said + between
        labels += [-100] * len(header) + (said if role == "model" else [-100] * len(said)) + [-100] * len(between)
    return ids, labels


def check_rendered(tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]]) -> list[int]:
    """Compares rendering, mask, and text of conversations; returns their numbers of tokens."""
    rendered = render(tokenizer, chats)
    for chat, ids, labels in zip(chats, rendered["input_ids"], rendered["labels"], strict=True):
        assert (ids.tolist(), labels.tolist()) == expected(tokenizer, chat)
        turns = [message | {"trained": True} for message in chat]
        text = tokenizer.apply_chat_template(turns, chat_template=TRAINING_TEMPLATE, tokenize=False)
        assert tokenizer.decode(ids) == text
        assert all(tokenizer.decode(pieces(tokenizer, each["content"])) == each["content"] for each in chat)
    return [len(ids) for ids in rendered["input_ids"]]


def test_the_published_ids(real_tokenizer: PreTrainedTokenizerBase, real_data: Path) -> None:
    golden = json.loads((real_data / "tokenizer/standin-gemma2/gemma_golden_ids.json").read_text())
    assert len(golden["encode"]) == 15 and len(real_tokenizer) == golden["ids"]["vocab_size"] == 256_000
    for vector in golden["encode"]:
        found = real_tokenizer(vector["text"], add_special_tokens=vector["add_bos"])["input_ids"]
        assert found == vector["ids"], vector["source"]


def test_every_added_token_is_one_token_inside_a_text(real_tokenizer: PreTrainedTokenizerBase) -> None:
    added = {str(token): token_id for token_id, token in real_tokenizer.added_tokens_decoder.items()}
    assert added.items() >= SPECIAL_TOKENS.items()
    for token, token_id in added.items():
        if not set(token) <= {"\n", " "}:  # runs of these grow together with what is beside them
            assert pieces(real_tokenizer, f"so{token}so") == [
                *pieces(real_tokenizer, "so"),
                token_id,
                *pieces(real_tokenizer, "so"),
            ]


@pytest.mark.parametrize("kind", KINDS)
def test_real_chats_are_rendered_and_masked_token_by_token(
    kind: str, real_tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]]
) -> None:
    found = chats_of(kind, chats)
    assert len(found) >= 2
    check_rendered(real_tokenizer, found[:40])


def test_a_chat_of_8000_tokens_is_rendered_and_masked_token_by_token(
    real_tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]]
) -> None:
    long: list[Message] = []
    for chat in [*chats_of("right to left", chats), *chats_of("emoji", chats), *chats_of("code", chats)]:
        long += chat
        if sum(len(each["content"]) for each in long) > 36_000:
            break
    (length,) = check_rendered(real_tokenizer, [long])
    assert 8_000 <= length < 20_000


def test_prompts_and_conversations_are_those_of_the_template_of_google(
    real_tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]]
) -> None:
    folder = Path(os.environ["GEMMA2_POST_TOKENIZER"])
    google = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert google != INFERENCE_TEMPLATE == real_tokenizer.chat_template
    some = chats[::5]
    for conversations, is_prompt in ((some, False), ([chat[:-1] for chat in some], True)):
        ours, theirs = (
            real_tokenizer.apply_chat_template(conversations, chat_template=template, add_generation_prompt=is_prompt)
            for template in (INFERENCE_TEMPLATE, google)
        )
        assert ours["input_ids"] == theirs["input_ids"]


def test_a_system_message_reads_as_in_training(
    real_tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]]
) -> None:
    for chat in chats[::50]:
        messages = [{"role": "system", "content": "Answer in one line.\n"}, *chat]
        prompt = real_tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert render(real_tokenizer, [fold_system(messages)])["input_ids"][0][: len(prompt)].tolist() == prompt
