"""What the rows of a mixture can be: conversations, pairs, or prompts."""

from typing import Any

from gemma2_post.curation.keys import Kind
from gemma2_post.data.pairs import PAIR, has_answers
from gemma2_post.data.rows import ANSWERS, CONVERSATION, CONVERSATIONS, PROMPT, Row, RowFormat

FORMATS: dict[Kind, RowFormat] = {"conversations": CONVERSATION, "pairs": PAIR, "prompts": PROMPT}


def read_any(row: Row) -> dict[str, Any]:
    """A row of any of these kinds, as a prompt or a conversation or a pair: what a check without a recipe can say."""
    kind = kind_of(row)
    return FORMATS[kind].parse(row)


def kind_of(row: Row) -> Kind:
    """What a row is, by its columns."""
    if has_answers(row):
        return "pairs"
    answers = [name for name in ANSWERS if name not in row.for_graders]
    return "conversations" if row.has(*CONVERSATIONS, *answers, "text") else "prompts"


ANY = RowFormat(
    read_any, ("messages", "prompt"), "rows that sft, reward or rlhf read", CONVERSATION.columns | PAIR.columns
)
