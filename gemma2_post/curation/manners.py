"""Answers that refuse, and answers that hedge: counted, because a mixture should hold some of them.

The Gemma 2 report (arXiv 2408.00118, section 4) includes such answers on purpose, to reduce what models make up.
"""

import re
from typing import Literal

Manner = Literal["refusal", "hedging"]

_BEGINNING = 300
"""Characters in which an answer that refuses says so."""
_WHAT_IS_REFUSED = (
    "help assist provide answer comply fulfill fulfil support create write generate engage discuss condone participate"
).split()
_REFUSALS = [
    r"\bi'?m (?:very |really |so )?(?:sorry|afraid),? (?:but )?(?:that )?i (?:can ?not|can't|won't|am unable)",
    r"\bi'?m (?:very |really |so )?(?:sorry|afraid),? (?:but )?(?:that )?i'm (?:not able|unable)",
    r"(?<!if )\bi(?: am|'m)? "
    r"(?:unable to|not able to|not going to|can ?not|can't|won't|will not|refuse to|decline to) "
    rf"(?:{'|'.join(_WHAT_IS_REFUSED)}|give you|do (?:that|this)|tell you how)\b(?! but\b)",
    r"\bas an (?:ai|artificial)[^.]{0,80}\bi (?:can ?not|can't|am (?:not able|unable))",
    r"\blo siento\b[^.]{0,60}\bno puedo\b",
    r"\bdésolée?\b[^.]{0,60}\bne (?:peux pas|suis pas en mesure)\b",
    r"\btut mir leid\b[^.]{0,60}\bkann\b[^.]{0,40}\bnicht\b",
    r"\bmi dispiace\b[^.]{0,60}\bnon posso\b",
    r"\b(?:sinto muito|desculpe)\b[^.]{0,60}\bnão posso\b",
    r"(?:对不起|抱歉)[^。]{0,20}(?:无法|不能)",
    r"申し訳(?:ありません|ございません)が",
]
_HEDGING = [
    r"\bi(?:'m| am) not (?:entirely |completely |quite |totally |really |100% )?(?:sure|certain)\b",
    r"\bi (?:do not|don't) (?:really |actually )?know\b(?! why you)",
    r"\bto the best of my knowledge\b",
    r"\bas far as i (?:know|can tell|am aware)\b",
    r"\bi (?:could|may|might) be (?:wrong|mistaken)\b",
    r"\bi (?:do not|don't) have (?:enough|sufficient|any) (?:information|context|data)\b",
    r"\bno estoy segur[oa]\b|\bje ne suis pas sûre?\b|\bich bin (?:mir )?nicht sicher\b|\bnon sono sicur[oa]\b",
    r"\bnão tenho certeza\b",
]
_refusal, _hedging = re.compile("|".join(_REFUSALS)), re.compile("|".join(_HEDGING))


def manner(answer: str) -> Manner | None:
    """Whether an answer refuses what it is asked, or else says that it is not sure; None if neither."""
    text = answer.casefold().replace("\u2019", "'")
    if _refusal.search(text[:_BEGINNING]):
        return "refusal"
    return "hedging" if _hedging.search(text) else None
