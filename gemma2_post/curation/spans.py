"""Where long numbers stand in a text, and what stands around them."""

import re
from collections.abc import Iterator

Spans = Iterator[tuple[int, int]]
"""Where something begins and ends in a text."""
_NUMBER = re.compile(
    r"\d(?:(?:[ .\-/()]{0,2}\d){6}|(?<=[A-Z]{4}\d)\d|(?<=[A-Z]{2}\d)\d(?: ?\d\d){2}|(?<=[A-Z]{2} \d)\d(?: ?\d\d){2})"
)
"""Seven digits with at most two separators between any two, or an id that begins with letters. It starts with a digit,
which `re` finds fastest."""
_AROUND = 40
"""Characters around a long number where other parts of it may be."""


def number_regions(text: str) -> list[tuple[int, int]]:
    """Where long numbers stand, with what is around them; regions do not overlap."""
    regions: list[tuple[int, int]] = []
    for match in _NUMBER.finditer(text):
        start, end = max(0, match.start() - _AROUND), min(len(text), match.end() + _AROUND)
        if regions and start <= regions[-1][1]:
            regions[-1] = (regions[-1][0], end)
        else:
            regions.append((start, end))
    return regions


def matches(form: re.Pattern[str], text: str, regions: list[tuple[int, int]]) -> Iterator[re.Match[str]]:
    """Where a form stands in a text, in the regions of its long numbers."""
    for start, end in regions:
        for match in form.finditer(text, start, end):
            if match.end() < end or end == len(text):  # What ends where a region ends may be cut.
                yield match


def has_context(words: re.Pattern[str], text: str, start: int, end: int, before: int = 60, after: int = 25) -> bool:
    """Whether one of these words is in `text[start:end]`, or so many characters before or after it."""
    return bool(words.search(text, max(0, start - before), min(len(text), end + after)))
