"""What a mixture is like: turns, lengths, languages, sources. Pure functions."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from gemma2_post.curation import rows
from gemma2_post.data.words import words

_PERCENTILES = (5, 25, 50, 75, 95)


def describe(sample: Iterable[dict[str, Any]], num_tokens: Callable[[str], int] | None) -> dict[str, Any]:
    """Shares of the rows by number of user turns and by language, and percentiles of their lengths.

    Args:
        sample: Rows, drawn at random.
        num_tokens: Counts the tokens of a text; None: its words.
    """
    turns, languages, lengths = Counter[int](), Counter[str](), []
    for row in sample:
        said = rows.said(row)
        turns[len(said.users)] += 1
        text = "\n".join(said.parts)
        lengths.append(num_tokens(text) if num_tokens else len(words(text)))
        languages[language_of(text)] += 1
    lengths.sort()
    return {
        "num_rows": len(lengths),
        "unit": "tokens" if num_tokens else "words",
        "lengths": {str(each): lengths[(len(lengths) - 1) * each // 100] for each in _PERCENTILES} if lengths else {},
        "turns": _shares(turns),
        "languages": _shares(languages),
    }


def language_of(text: str) -> str:
    """The language of a text, as ISO 639-1 (py3langid, which says one for every text)."""
    import py3langid

    return str(py3langid.classify(text[:1000])[0])


def _shares(counts: Counter) -> dict[str, float]:
    """The shares of the ten most frequent ones, the most frequent first."""
    return {str(name): count / counts.total() for name, count in counts.most_common(10)}
