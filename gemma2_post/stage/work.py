"""What a stage computes, pass by pass; from this the planner says how long it takes."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Gemma2Config


class UnknownRows(Exception):
    """The work depends on the number of rows of a data set, which is not known without downloading it."""


@dataclass(frozen=True)
class Pass:
    """Equal passes of one process through a model, one after another."""

    config: "Gemma2Config"
    itemsize: int
    """Bytes per value that is computed."""
    count: float
    """Number of passes; the other numbers are those of one pass."""
    tokens: float
    """Tokens that are read, without padding."""
    generated: float
    """Tokens that are sampled."""
    flops: float
    """Floating-point operations of the matrix products, of padding, too."""
    num_bytes: float
    """Bytes of weights and caches that are read."""
    layers: float
    """Layers that run one after another; a backward pass counts twice."""

    def times(self, number: float) -> "Pass":
        """These passes, repeated."""
        return dataclasses.replace(self, count=self.count * number)


def times(number: float, passes: Iterable[Pass]) -> list[Pass]:
    """All these passes, repeated."""
    return [each.times(number) for each in passes]


@dataclass(frozen=True)
class Lengths:
    """How long texts are, in tokens."""

    sample: tuple[float, ...]
    """Lengths of some of the texts, the shortest first."""

    @property
    def mean(self) -> float:
        """The mean length."""
        return sum(self.sample) / len(self.sample)

    def longest(self, number: float) -> float:
        """The expected length of the longest of `number` texts, which a batch is padded to.

        The i-th of n lengths is the longest with probability (i/n)^number - ((i-1)/n)^number.
        """
        size = len(self.sample)
        ranked = enumerate(self.sample, start=1)
        return sum(each * ((i / size) ** number - ((i - 1) / size) ** number) for i, each in ranked)

    def up_to(self, limit: float) -> "Lengths":
        """The lengths that are not longer than the limit; the limit, if all are."""
        return Lengths(tuple(each for each in self.sample if each <= limit) or (limit,))

    def cut(self, limit: float) -> "Lengths":
        """The lengths, cut at the limit."""
        return Lengths(tuple(min(each, limit) for each in self.sample))

    def plus(self, other: "Lengths") -> "Lengths":
        """Lengths of two texts together, the longest with the longest, as where a batch pads each of them."""
        size = max(len(self.sample), len(other.sample))
        both = [[each.sample[i * len(each.sample) // size] for i in range(size)] for each in (self, other)]
        return Lengths(tuple(map(sum, zip(*both, strict=True))))


def evenly(limit: float) -> Lengths:
    """The assumption about texts that cannot be read: all lengths up to the limit are equally frequent."""
    return Lengths(tuple(limit * (i + 1) / 16 for i in range(16)))


@dataclass(frozen=True)
class Rows:
    """What is known about the rows that a stage reads, without downloading anything."""

    known: int | None = None
    """Number of rows in `datasets`; None if some are on the Hub."""
    known_held_out: int | None = None
    """Number of rows in `held_out_datasets`; None if there are none, or some are on the Hub."""
    conversations: Lengths | None = None
    """Lengths of whole conversations, both of a pair; None, here and below, if they cannot be read."""
    prompts: Lengths | None = None
    """Lengths of prompts."""
    answers: Lengths | None = None
    """Lengths of the model's last turns, here or in the data of an earlier stage."""

    @property
    def number(self) -> int:
        """Number of rows in `datasets`.

        Raises:
            UnknownRows: Some are on the Hub.
        """
        if self.known is None:
            raise UnknownRows
        return self.known

    def conversations_up_to(self, limit: float) -> Lengths:
        """Lengths of conversations; longer ones are dropped."""
        return self.conversations.up_to(limit) if self.conversations else evenly(limit)

    def prompts_up_to(self, limit: float) -> Lengths:
        """Lengths of prompts; longer ones are dropped."""
        return self.prompts.up_to(limit) if self.prompts else evenly(limit)

    def answers_up_to(self, limit: float) -> Lengths:
        """Lengths of the answers of a model that ends its turns; longer ones are cut."""
        return self.answers.cut(limit) if self.answers else evenly(limit)


def batches(number: float, rows: float) -> int:
    """Number of batches of at most this many rows."""
    return ceil(number / rows)
