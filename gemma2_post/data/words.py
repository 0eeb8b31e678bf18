"""Texts as words for comparing: what is trained on is never changed by it."""

import re
from collections.abc import Iterable

import numpy as np
import xxhash

from gemma2_post.data.overlap import normalized

# Scripts without spaces between words: Thai, kana, Chinese characters. There each character is a word.
_SPACELESS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_WORDS_AND_MARKS = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+|[^\w\s]")
_MOST_CACHED = 1_000_000
_MIX = np.uint64(0x9E3779B97F4A7C15)


def words(text: str, with_marks: bool = False) -> list[str]:
    """The words of a text, normalized; with punctuation marks as words of their own, or without them."""
    return (_WORDS_AND_MARKS if with_marks else _WORDS).findall(normalized(text))


class _Hashes(dict[str, int]):
    """64-bit hashes of words, each computed once: most words of a text are frequent ones."""

    def __missing__(self, word: str) -> int:
        if len(self) > _MOST_CACHED:
            self.clear()
        found = self[word] = xxhash.xxh3_64_intdigest(word.encode(errors="surrogatepass"))
        return found


_hashes = _Hashes()


def hashes_of(texts: Iterable[str]) -> np.ndarray:
    """uint64 hashes of words."""
    return np.array([_hashes[text] for text in texts], np.uint64)


def ngrams(hashes: np.ndarray, size: int) -> np.ndarray:
    """uint64 hashes of all sequences of `size` words, in order; none if there are fewer words.

    Args:
        hashes: Of the words.
    """
    num = len(hashes) - size + 1
    if num <= 0:
        return np.empty(0, np.uint64)
    found = hashes[:num].copy()
    for place in range(1, size):
        found *= _MIX  # wraps around
        found ^= found >> np.uint64(29)
        found += hashes[place : place + num]
    return found * _MIX ^ found >> np.uint64(32)
