"""The values that a key of a recipe may have: stated once, and used by the check, the help and the JSON Schema."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """A range of numbers; for a list, of each item."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: float | None = None
    """A number outside of the range that is allowed, such as -1 for "no limit"."""
    is_filled: bool = False
    """Whether a list must have an item."""

    def problem(self, value: object) -> str:
        """Why a value is not allowed, in words that follow its key; empty if it is."""
        if isinstance(value, list):
            if self.is_filled and not value:
                return "is empty; write one or more"
            return next((found for item in value if (found := self.problem(item))), "")
        if isinstance(value, bool) or not isinstance(value, int | float) or value == self.also:
            return ""
        is_inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )
        if is_inside and math.isfinite(value):
            return ""
        if self.at_least is None:
            return f"is {value:.12g}; write a {'number' if self.words else 'finite number'} {self.words}".rstrip()
        return f"is {value:.12g}; write {self.words}"

    @property
    def words(self) -> str:
        """The range in words, for help and errors: `1 or more`, `above 0, at most 1`."""
        low = [f"{self.at_least:.12g} or more"] if self.at_least is not None else []
        low += [f"above {self.above:.12g}"] if self.above is not None else []
        high = [f"at most {self.at_most:.12g}"] if self.at_most is not None else []
        high += [f"below {self.below:.12g}"] if self.below is not None else []
        words = ", ".join(low + high)
        return f"{words} (or {self.also:.12g})" if self.also is not None else words

    @property
    def schema(self) -> dict[str, object]:
        """The range as keywords of JSON Schema, which apply to numbers only."""
        keywords = {
            "minimum": self.at_least, "exclusiveMinimum": self.above,
            "maximum": self.at_most, "exclusiveMaximum": self.below,
        }  # fmt: skip
        found: dict[str, object] = {name: value for name, value in keywords.items() if value is not None}
        if self.also is not None:
            found = {"anyOf": [{"const": self.also}, found]}
        return found | ({"minItems": 1} if self.is_filled else {})


ANY = Bounds()
"""Any finite number."""
COUNT = Bounds(at_least=1)
NOT_NEGATIVE = Bounds(at_least=0)
POSITIVE = Bounds(above=0)
SHARE = Bounds(at_least=0, at_most=1)
SEED = Bounds(at_least=0, at_most=2**32 - 1)
FILLED = Bounds(is_filled=True)
