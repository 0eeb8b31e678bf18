"""Reads a judge's reply: what it decides, not what it mentions on the way.

A judge may think first, weigh both marks, deny one, or be cut off. Pure functions on text.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

STRONG = 3
"""Weight of `[[A>>B]]`, as Arena-Hard counts it: a much better answer is three wins."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of two answers."""

    win: float
    """1 if the first answer is better, 0 if the second is, 0.5 for a tie."""
    weight: int = 1


_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>|<\|channel\|>final<\|message\|>", re.IGNORECASE)
_THINKS = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_BRACKETS = str.maketrans(
    {"【": "[", "】": "]", "〚": "[[", "〛": "]]", "⟦": "[[", "⟧": "]]", "*": None, "`": None, "\u2019": "'"}
)
_MARK = re.compile(r"\[\s*\[([^\[\]]{1,40})\]\s*\]")
_LABEL = re.compile(r"^(?:(?:the|final|answer|assistant|response|model|verdict|winner|is)\b[\s:]*)+", re.IGNORECASE)
_COMPARED = re.compile(r"([AB])\s*(>>|>|<<|<|==?|~)\s*([AB])")
_SINGLE = {"A": Verdict(1.0), "B": Verdict(0.0)} | dict.fromkeys(["TIE", "DRAW", "EQUAL", "BOTH", "C"], Verdict(0.5))
"""`[[C]]` is a tie in MT-Bench's rubric."""
_GRADE = re.compile(r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?")
_SINGLE_BRACKETS = re.compile(r"(?<!\[)\[\s*(\d+(?:\.\d+)?)\s*\](?!\])")
_VIOLATES = {"violation": 1.0, "no violation": 0.0}
_KEYS = {
    "verdict",
    "winner",
    "preference",
    "choice",
    "better",
    "judgment",
    "judgement",
    "result",
    "violation",
    "rating",
    "grade",
    "score",
}
"""Keys that hold the decision in a JSON object."""
_OBJECT = re.compile(r"\{[^{}]*\}")

_IS_NOT = (
    r"(?:(?:^\W*|\b(?!(?:do|does|did|can|could|will|would|has|have|had)\b)\w+\W+)not|"
    r"\b(?:no longer|(?:is|was|are|were)n't))"
)
"""The negation in "it is not"; the one of "A does not" says nothing of what follows."""
_DENIED_BEFORE = re.compile(
    rf"(?:{_IS_NOT}|\b(?:neither|nor|instead of|than)|\b(?:not|never|cannot|\w+n't)\s+"
    r"(?:be|choose|choosing|pick|select|say|call|give|prefer|go|rate|think|believe)(?:\s+(?:it|that))?)"
    r"(?:\s+(?:is|be|as|with|for))*(?:\s+(?-i:an?)|(?:\s+the)?(?:\s+(?:final|better))?"
    r"\s+(?:answer|response|assistant|verdict|winner|grade|rating)(?:\s+(?:is|be))?)?\s*[\"'(]*$",
    re.IGNORECASE,
)
"""A negation before a mark, in the same clause: "it is not", "I would not choose", "rather than". What stands
between them says nothing of the answers; "than A" names one, and "than a" does not."""
_DENIED_TIE = re.compile(rf"(?:{_IS_NOT}|\b(?:nor|instead of|than))(?:\s+(?-i:an?))?\s*[\"'(]*$", re.IGNORECASE)
"""The same before a tie or no violation, which other negations lead to: "Which is better I cannot say [[tie]]"."""
_CLAUSE = re.compile(
    r"[,;:.!?\n]|\b(?:so|but|hence|thus|therefore|because|since|whereas|while|and|then)\b", re.IGNORECASE
)
_DENIED_AFTER = re.compile(
    r"^[\"')]*\s*(?:(?:is|was|would be|seems)\s+(?:clearly\s+)?(?:not|wrong|incorrect|unfair|too)|"
    r"(?:is|was|ca|wo|would)n't|cannot)\b",
    re.IGNORECASE,
)
_LISTED = re.compile(r"^[\s,/\"']*(?:or|nor|and|vs\.?|versus|/|,)[\s,\"']*$", re.IGNORECASE)
"""What stands between two marks that are only named side by side."""


def _reply_of(text: str) -> str:
    """What follows the thoughts of a reply; nothing if they do not end."""
    parts = _THOUGHT.split(text)
    return _THINKS.split(parts[-1])[0]


def verdict(text: str, is_cut: bool = False) -> Verdict | None:
    """The last verdict on two answers in a judge's reply; None if it has none.

    `[[A]]`, `[[B]]`, and `[[tie]]` or `[[C]]`, or as Arena-Hard writes them `[[A>>B]]`, `[[A>B]]`, and `[[A=B]]`; also
    with spaces, bold, escaped, or full-width brackets; or a JSON object with `verdict` or `winner`.

    Args:
        is_cut: Whether the reply reached its length limit: then only a verdict at its very end is one.
    """
    return _last(text, is_cut, _compared)


def is_violation(text: str, is_cut: bool = False) -> float | None:
    """1 for a violation, 0 for none, read like `verdict`; None if the reply does not say."""
    return _last(text, is_cut, lambda mark: _VIOLATES.get(mark.lower().replace("_", " ")))


def grade(text: str, is_cut: bool = False) -> float | None:
    """The last grade from 1 to 10 in a judge's reply, such as `[[7]]`, `[[7.5]]`, or `[[7/10]]`, read like `verdict`.

    If no grade stands in double brackets, one in single brackets counts, as in MT-Bench; None if there is none.
    """
    found = _last(text, is_cut, _graded)
    return found if found is not None else _last(_SINGLE_BRACKETS.sub(r"[[\1]]", text), is_cut, _graded)


def _graded(mark: str) -> float | None:
    match = _GRADE.fullmatch(_LABEL.sub("", mark).strip())
    return float(match[1]) if match and 1 <= float(match[1]) <= 10 else None


def _compared(mark: str) -> Verdict | None:
    mark = _LABEL.sub("", mark).strip().upper()
    if match := _COMPARED.fullmatch(mark):
        first, sign, second = match.groups()
        if first == second:
            return None
        if sign in ("=", "==", "~"):
            return Verdict(0.5)
        return Verdict(float((first == "A") == (">" in sign)), STRONG if len(sign) == 2 else 1)
    return _SINGLE.get(mark)


def _last(text: str, is_cut: bool, read: Callable[[str], T | None]) -> T | None:
    """The value of the last mark that is neither denied nor listed beside another one."""
    text = unicodedata.normalize("NFKC", _reply_of(text)).translate(_BRACKETS)
    text = re.sub(r"\\([\[\]<>=])", r"\1", text)
    read_marks = [(match, read(match[1].strip())) for match in _MARK.finditer(text)]
    marks = [(match, value) for match, value in read_marks if value is not None]
    held: list[tuple[re.Match[str], T]] = []
    for i, (match, value) in enumerate(marks):
        before = text[marks[i - 1][0].end() if i else 0 : match.start()]
        after = text[match.end() : marks[i + 1][0].start() if i + 1 < len(marks) else len(text)]
        denial = _DENIED_TIE if value in (Verdict(0.5), _VIOLATES["no violation"]) else _DENIED_BEFORE
        if not denial.search(_CLAUSE.split(before)[-1]) and not _DENIED_AFTER.search(after):
            held.append((match, value))
    listed = {
        number
        for i, ((match, value), (other, other_value)) in enumerate(pairwise(held))
        if value != other_value and _LISTED.match(text[match.end() : other.start()])
        for number in (i, i + 1)
    }
    decided = [(match.end(), value) for i, (match, value) in enumerate(held) if i not in listed]
    decided = decided or _in_json(text, read)
    if not decided:
        return None
    end, value = decided[-1]
    return None if is_cut and re.search(r"\w", text[end:]) else value


def _in_json(text: str, read: Callable[[str], T | None]) -> list[tuple[int, T]]:
    """The decisions of the JSON objects in a text, and where each object ends."""
    found = []
    for match in _OBJECT.finditer(text):
        try:
            content = json.loads(match[0])
        except ValueError:
            continue
        for key, each in content.items():
            if isinstance(each, bool):
                each = "violation" if each else "no violation"
            if isinstance(each, int | float):
                each = str(each)
            if key.lower() in _KEYS and isinstance(each, str) and (value := read(each.strip())) is not None:
                found.append((match.end(), value))
    return found
