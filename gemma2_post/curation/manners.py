"""Answers that refuse, and answers that hedge: counted, because a mixture should hold some of them.

The Gemma 2 report (arXiv 2408.00118, section 4) includes such answers on purpose, to reduce what models make up.
"""

import re
from typing import Literal

Manner = Literal["refusal", "hedging"]

_BEGINNING = 300
"""Characters in which an answer that refuses says so."""
_REFUSALS = re.compile(
    r"\bI(?:'|\u2019)?m (?:very |really |so |truly )?(?:sorry|afraid),? ?(?:but )?(?:that )?I (?:can ?not|can(?:'|\u2019)t|am (?:not able|unable)|(?:'|\u2019)m (?:not able|unable)|won(?:'|\u2019)t)"
    r"|\bI(?: am|(?:'|\u2019)m)? (?:sorry, )?(?:unable to|not able to|not going to|cannot|can(?:'|\u2019)t|can not|won(?:'|\u2019)t|will not|refuse to|must decline to|have to decline to|decline to)"
    r" (?:help|assist|provide|give you|do (?:that|this)|answer|comply|fulfil|fulfill|support|create|write|generate|engage|discuss|condone|recommend that|tell you how|participate)"
    r"|\bas an (?:AI|artificial)[^.]{0,80}\bI (?:cannot|can(?:'|\u2019)t|am (?:not able|unable))"
    r"|\b(?:lo siento|désolé|es tut mir leid|tut mir leid|mi dispiace|sinto muito|desculpe|przykro mi)\b[^.]{0,60}\b(?:no puedo|ne peux pas|ne suis pas en mesure|kann (?:ich )?(?:dir|ihnen|dabei|das|nicht)|non posso|não posso|nie mogę)"
    r"|(?:对不起|抱歉|很抱歉)[^。]{0,20}(?:无法|不能)|申し訳(?:ありません|ございません)が",
    re.IGNORECASE,
)
_HEDGING = re.compile(
    r"\bI(?:'|\u2019)?m not (?:entirely |completely |quite |totally |really |100% )?(?:sure|certain)\b|\bI am not (?:entirely |completely |quite )?(?:sure|certain)\b"
    r"|\bI (?:do not|don(?:'|\u2019)t) (?:really |actually )?know\b|\bto the best of my knowledge\b|\bas far as I (?:know|can tell|am aware)\b"
    r"|\bI (?:could|may|might) be (?:wrong|mistaken)\b|\bI (?:do not|don(?:'|\u2019)t) have (?:enough|sufficient|any) (?:information|context|data)\b"
    r"|\b(?:no estoy segur[oa]|je ne suis pas sûre?|ich bin (?:mir )?nicht sicher|non sono sicur[oa]|não tenho certeza|nie jestem pew)",
    re.IGNORECASE,
)


def manner(answer: str) -> Manner | None:
    """Whether an answer refuses what it is asked, or else says that it is not sure; None if neither."""
    if _REFUSALS.search(answer[:_BEGINNING]):
        return "refusal"
    return "hedging" if _HEDGING.search(answer) else None
