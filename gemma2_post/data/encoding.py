"""Token ids of rows in Gemma 2's chat format, many rows at a time: a call for each row takes twice as long."""

from typing import Any

import pyarrow
from transformers import PreTrainedTokenizerBase

from gemma2_post.data.rows import RowFormat
from gemma2_post.models.tokenizer import render

LENGTH = "_length"
"""Column of the number of tokens: of a conversation, of a prompt, of the longer side of a pair."""
_IDS, _COUNT = pyarrow.list_(pyarrow.int32()), pyarrow.int32()


def types_of(row_format: RowFormat) -> dict[str, pyarrow.DataType]:
    """The columns that `encode` adds to rows of this format; none to documents, which are not tokenized."""
    if "text" in row_format.result:
        return {}
    if "chosen" in row_format.result:
        return {"chosen_ids": _IDS, "rejected_ids": _IDS, "length": _COUNT, LENGTH: _COUNT}
    if "trained" in row_format.result:
        return {"input_ids": _IDS, "labels": _IDS, LENGTH: _COUNT}
    return {LENGTH: _COUNT}


def encode(
    row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> dict[str, list[Any]]:
    """The columns of `types_of` for these rows.

    A conversation has `input_ids` and `labels` (-100 where there is no loss); a pair has the ids of two whole
    conversations, rendered like the answers of a policy, and `length`, for `train_sampling_strategy: group_by_length`.
    """

    def ids_of(conversations: list[list[dict[str, str]]], is_prompt: bool) -> list[list[int]]:
        found = tokenizer.apply_chat_template(conversations, add_generation_prompt=is_prompt, return_dict=True)
        return found["input_ids"]

    if "chosen" in row_format.result:
        sides = [ids_of([[*row["prompt"], *row[side]] for row in rows], False) for side in ("chosen", "rejected")]
        lengths = [max(map(len, pair)) for pair in zip(*sides, strict=True)]
        return {"chosen_ids": sides[0], "rejected_ids": sides[1], "length": lengths, LENGTH: lengths}
    if "answers" in row_format.result:
        lengths = []
        for row in rows:
            answered = [[*row["prompt"], {"role": "assistant", "content": text}] for text in row["answers"]]
            lengths.append(max(map(len, ids_of(answered, False))))
        return {LENGTH: lengths}
    if "trained" in row_format.result:
        found = render(tokenizer, [row["messages"] for row in rows], [row["trained"] for row in rows])
        return {**found, LENGTH: list(map(len, found["input_ids"]))}
    return {LENGTH: list(map(len, ids_of([row["prompt"] for row in rows], True)))}
