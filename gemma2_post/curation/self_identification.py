"""Finds the sentence in which an assistant says that it is, or was made by, somebody else.

Known names of assistants and makers, what assistants call themselves ("language model"), and verbs of making are
replaced by one symbol each. Then forms of self-identification are looked for, written for each language with these
symbols: "I was MADE by WHO", "my creators at WHO", "WHO MADE me". Where a form is clear by itself ("I am X, an AI
made by Y"), any name counts.

What is said *about* an assistant stays: "ChatGPT was made by OpenAI", quotations, dialogues with speakers' names,
conditions ("if I were ChatGPT"), and people whose name an assistant has, too ("I'm Claude Dubois, a baker").
"""
# ruff: noqa: RUF001 (letters of other scripts)

import re
from collections.abc import Iterator
from functools import cache

from gemma2_post.curation.identities import (
    AI,
    AI_NOUNS,
    ASSISTANTS,
    FORMS,
    MADE,
    MAKER,
    MAKERS,
    MAKING,
    MODEL,
    NAMESAKES,
    PARTS,
    SPEAKERS,
)

_NAMESAKE = "\ue004"
"""Stands for a name of NAMESAKES until the sentence decides whether it is an assistant's."""
_KINDS = {
    name: kind
    for entries, kind in ((MAKERS, MAKER), (NAMESAKES, _NAMESAKE), (ASSISTANTS, MODEL))
    for entry in entries
    for name in entry.lower().split("|")
}
"""Each known name in lower case, and its symbol."""
_LETTERS = "A-Za-zÀ-ÖØ-öø-ÿ"
_NAME = re.compile(
    rf"(?<![{_LETTERS}\d])(?P<name>{'|'.join(re.escape(name) for name in sorted(_KINDS, key=len, reverse=True))})"
    r"(?:(?<=[а-я])[а-я]+)?(?:[ -]?v?\d[\w.]*\w|[ -]?\d|-[A-Z]\w*| (?:Instant|Haiku|Sonnet|Opus|Turbo)\b"
    r"| AI(?![A-Za-z]))*"
    rf"(?![{_LETTERS}])",
    re.IGNORECASE,
)
"""A known name with its ending and version. Only Latin letters around it make another word of it."""
_AI_PATTERN = re.compile(AI_NOUNS, re.IGNORECASE)
_MAKING_PATTERN = re.compile(MAKING, re.IGNORECASE)
_HELPS = re.compile(rf"{AI_NOUNS}|\b(?:help|assist|language|models?\b)", re.IGNORECASE)
_ALONE = re.compile(r"[ .!]*$|です|हू|입니다|이고")
_NAME_ONLY = re.compile(rf"(?:{'|'.join(map(re.escape, _KINDS))}|[A-Z][\w.-]{{1,20}}) ?[\d.]*", re.IGNORECASE)
_COMMON_WORDS = set(
    "meta amazon apple opera inflection perplexity cohere upstage stanford berkeley kimi guanaco".split()
)
_WORD = re.compile(r"[a-z]+")
_NAMES_OF_ONE_WORD = {name for name in _KINDS if _WORD.fullmatch(name) and len(name) > 3}
_TRIGGER_WORDS = _NAMES_OF_ONE_WORD.union(
    "gpt llm ki bot chatbot assistant assistent asistente assistente artificial artificielle artificiale".split(),
    "taalmodel sprachmodell virtuel".split(),
)
_TRIGGER_PHRASES = [
    *(name for name in _KINDS if name.isascii() and name not in _NAMES_OF_ONE_WORD and len(name) > 3),
    *"language model|modelo de l|modello |bot,|bot.|bot!|bot ".split("|"),
]
_TRIGGERS_IN_ANY_SCRIPT = [
    *_TRIGGER_PHRASES,
    *(name for name in _KINDS if not name.isascii()),
    *"modèle de langage|künstliche|модел|интеллект|нейросет|помощник|模型|助手|智能|我是由|我由|，由|了我".split("|"),
    *"モデル|アシスタント|मॉडल|सहायक|एआई|모델|어시스턴트|인공지능|챗봇".split("|"),
]
"""A text without any of these, in lower case, is not looked at. Whole words are found fastest."""
_SPEAKER = re.compile("|".join(SPEAKERS.values()), re.IGNORECASE)

_QUOTED = re.compile(
    r"\"[^\"\n]{1,600}\"|“[^”\n]{1,600}”|„[^“”\n]{1,600}[“”]|«[^»\n]{1,600}»|「[^」\n]{1,600}」|『[^』\n]{1,600}』"
    r"|```[\s\S]*?```"
)
_SPOKEN = re.compile(r"(?m)^[ \t]*[A-Z][\w .'-]{0,30}: .*$")
_EMPHASIS = re.compile(r"[*`]+")
_AROUND_IDEOGRAPHS = re.compile(r"(?<=[\u4e00-\u9fff，。]) +| +(?=[\u4e00-\u9fff])")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n+|(?<=[。！？।])")
_LONGEST = 400
"""Characters of a sentence that are looked at together."""
_UNREAL_BEFORE = re.compile(
    r"(?:\b(?:if|whether|though|while|when|pretend(?:ing)?(?: that)?|imagine|suppose|wouldn't say|don't think|doubt"
    r"|not|never"
    r"|(?:believe|think|claim|say|assume|suspect)s?(?: that)?|wenn|ob|falls|si|se|als|no|non|não|если|не)"
    r"|如果|假如|假设|是否|もし|अगर|यदि|만약|만일)\s*(?:yo |eu |я |I )?$",
    re.IGNORECASE,
)
_UNREAL_AFTER = re.compile(r"^[^.。，,]{0,12}(?:नहीं|होता|होती|ではあり|じゃな|ではな|なら|아닙|아니)")
_REPORTED = re.compile(
    r"\b(?:he|she|it|they|the \w+|[A-Z][a-z]+) (?:said|says|wrote|replied|whispered|answered|sang|told)\b"
    r"|\b(?:said|wrote|replied|whispered|answered|sang) (?:the|a|an|one|my|his|her|[A-Z])\w*"
)
_GENERIC = re.compile(
    r"(?i)^(?:humans?|people|researchers|engineers|a team|Menschen|Forsch|Entwickl|Ingenieur|Expert|Wissenschaft"
    r"|einem Team"
    r"|.*(?:研究|人类|工程师|团队|人员|科学家|开发者|人们|专家|人間|開発者|エンジニア|チーム|人々|शोधकर्ता|इंजीनियर|टीम|वैज्ञानिक|लोगों|이용))"
)
"""Makers who are nobody in particular."""


def find(text: str, name: str = "", maker: str = "") -> str | None:
    """The first sentence in which an assistant's turn says that it is, or was made by, somebody else.

    Args:
        text: one turn of the assistant.
        name: the name that it may give itself, in any script where it is known ("Gemma").
        maker: who may have made it ("Google" allows "Google DeepMind" and "谷歌", too). What is empty permits nobody.

    Returns:
        The sentence without marks of emphasis; None where there is none.
    """
    if not _has_trigger(text):
        return None
    text = _EMPHASIS.sub("", _without_quotations(text.replace("’", "'").strip()))
    text = _AROUND_IDEOGRAPHS.sub("", text)
    permitted = _permitted(name, maker)
    for sentence in _sentences(text):
        speaks = _has_trigger(sentence) and _SPEAKER.search(sentence)
        if speaks and _states_identity(_with_symbols(sentence, permitted), permitted):
            return sentence.strip()
    return None


def _sentences(text: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(text):
        # The time of a form can grow with the square of the length.
        yield from (sentence[start : start + _LONGEST] for start in range(0, len(sentence), _LONGEST))


def _has_trigger(text: str) -> bool:
    lowered = text.lower()
    return (
        not _TRIGGER_WORDS.isdisjoint(_WORD.findall(lowered))
        or "AI" in text
        or any(each in lowered for each in (_TRIGGER_PHRASES if lowered.isascii() else _TRIGGERS_IN_ANY_SCRIPT))
    )


def _without_quotations(text: str) -> str:
    if text.startswith(('"', "“")) and text.endswith(('"', "”")):
        text = text[1:-1]
    # A name in quotation marks is still a name.
    text = _QUOTED.sub(lambda match: match[0] if _NAME_ONLY.fullmatch(match[0][1:-1]) else "…", text)
    return _SPOKEN.sub("", text) if len(_SPOKEN.findall(text)) > 1 else text


def _with_symbols(sentence: str, permitted: frozenset[str]) -> str:
    """The sentence with a symbol for each name that is not permitted, each noun for assistants, and verb of making."""

    def symbol(match: re.Match[str]) -> str:
        found = match["name"].lower()
        kind = _KINDS[found]
        is_common = match["name"][0].islower() and not sentence.islower()
        if found in permitted:
            return match[0]
        if kind == _NAMESAKE:
            rest = sentence[match.end() :]
            has_surname = re.match(r"\s[A-ZÀ-Þ][a-zà-ÿ]", rest)
            is_alone = len(sentence.split()) <= 5 and _ALONE.match(rest)
            has_version = re.search(r"\d", match[0])
            if has_surname or is_common or not (is_alone or has_version or speaks_of_assistants):
                return match[0]
            return MODEL
        return match[0] if is_common and found in _COMMON_WORDS else kind

    has_maker = any(_KINDS[match["name"].lower()] == MAKER for match in _NAME.finditer(sentence))
    speaks_of_assistants = has_maker or _HELPS.search(sentence)
    return _MAKING_PATTERN.sub(MADE, _AI_PATTERN.sub(AI, _NAME.sub(symbol, sentence)))


def _states_identity(symbols: str, permitted: frozenset[str]) -> bool:
    if not re.search(f"[{MAKER}{MODEL}{AI}]", symbols) and "Bot" not in symbols and "GPT" not in symbols:
        return False
    for speaker, forms in _compiled_forms():
        if speaker.search(symbols):
            for form in forms:
                for match in form.finditer(symbols):
                    anyone = match.groupdict().get("other")
                    if anyone and (_GENERIC.search(anyone) or any(each in anyone.lower() for each in permitted)):
                        continue
                    before, after = symbols[: match.start()], symbols[match.end() :]
                    if not (_UNREAL_BEFORE.search(before) or _UNREAL_AFTER.search(after) or _REPORTED.search(symbols)):
                        return True
    return False


@cache
def _compiled_forms() -> list[tuple[re.Pattern[str], list[re.Pattern[str]]]]:
    compiled = []
    for language, lines in FORMS.items():
        forms = []
        for line in lines.strip().splitlines():
            form = line.strip()
            for part, pattern in PARTS.items():
                form = form.replace(part, pattern)
            forms.append(re.compile(form, re.IGNORECASE))
        compiled.append((re.compile(SPEAKERS[language], re.IGNORECASE), forms))
    return compiled


@cache
def _permitted(name: str, maker: str) -> frozenset[str]:
    """Lower-case names that are allowed: those given, and those that mean the same."""
    given = {each.lower() for each in (name, maker) if each}
    entries = [set(entry.lower().split("|")) for entry in (*ASSISTANTS, *NAMESAKES, *MAKERS)]
    return frozenset(given.union(*(entry for entry in entries if entry & given)))
