"""Finds rows that hold what evaluation sets ask: by sequences of words that they share, and by prompts that are near.

Containment is the share of a prompt's sequences of `size` words that are in a row, as in the decontamination of Tulu 3
(arXiv 2411.15124, section 3.2, there 8 words and half of the prompt). A prompt of fewer words must be in a user's turn
as a whole, and be at least half of it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gemma2_post.data.near_duplicates import Sketches, similarity_if_near
from gemma2_post.data.words import hashes_of, ngrams, words

_SHARE_OF_TURN = 0.5
"""What share of a user's turn a prompt of few words must be."""


@dataclass(frozen=True)
class Asked:
    """A prompt of an evaluation set."""

    name: str
    """Of the set."""
    number: int
    """Of the row in it."""
    text: str


@dataclass(frozen=True)
class Leak:
    """What a row shares with an evaluation set."""

    asked: Asked
    share: float
    how: str
    """In words that follow the share: `of its sequences of 8 words`."""

    def __str__(self) -> str:
        return f"{self.asked.name} row {self.asked.number}: {self.share:.0%} {self.how}"


class Outside:
    """The prompts that must stay out of a mixture, ready to be looked for."""

    def __init__(self, prompts: Sequence[Asked], size: int, least_share: float, max_edits: float | None):
        """
        Args:
            size: Words of the sequences that are compared.
            least_share: Share of a prompt's sequences from which it counts as leaked.
            max_edits: Share of the words that may differ in a near-duplicate prompt; None: no such prompts are found.
        """
        self.prompts, self.size, self.least_share, self.max_edits = prompts, size, least_share, max_edits
        self._short: dict[int, dict[int, int]] = defaultdict(dict)
        self._counts = np.zeros(len(prompts), np.int64)
        members, sequences = [], []
        for number, asked in enumerate(prompts):
            hashes = hashes_of(words(asked.text))
            if len(hashes) < size:
                if len(hashes):
                    self._short[len(hashes)].setdefault(int(ngrams(hashes, len(hashes))[0]), number)
                continue
            found = np.unique(ngrams(hashes, size))
            self._counts[number] = len(found)
            sequences.append(found)
            members.append(np.full(len(found), number, np.int32))
        every = np.concatenate(sequences) if sequences else np.empty(0, np.uint64)
        numbers = np.concatenate(members) if members else np.empty(0, np.int32)
        order = np.argsort(every, kind="stable")
        self._members = numbers[order]
        self._known, self._starts = np.unique(every[order], return_index=True)
        self._ends = np.append(self._starts[1:], len(every))
        self._sketches: Sketches | None = None
        self._by_band: dict[tuple[int, int], list[int]] = defaultdict(list)

    def add_sketches(self, sketches: Sketches) -> None:
        """Adds what near-duplicate prompts are found by.

        Args:
            sketches: Of the prompts, each as one part.
        """
        self._sketches = sketches
        for number, bands in enumerate(sketches.bands.tolist()):
            for place, band in enumerate(bands):
                self._by_band[place, band].append(number)

    def find(self, users: Sequence[str], answers: Sequence[str]) -> Leak | None:
        """What a row shares with one of the prompts: the largest share of sequences, or a prompt of few words.

        Args:
            users: The user's turns; a prompt of several turns is looked for in all of them together.
            answers: The assistant's turns, which may hold a prompt, too.
        """
        together = "\n".join(users)
        return self._by_sequences([together, *answers]) or self._by_whole_prompts(dict.fromkeys([together, *users]))

    def find_near(self, sketches: Sketches, number: int) -> Leak | None:
        """The prompt of which a row's first prompt is a near duplicate.

        Args:
            sketches: Of the first prompts of several rows.
            number: Of the row among them.
        """
        if self._sketches is None or self.max_edits is None:
            return None
        shared: Counter[int] = Counter()
        for place, band in enumerate(sketches.bands[number].tolist()):
            shared.update(self._by_band.get((place, band), ()))
        pairs, num_words = sketches.pairs_of(number), int(sketches.num_words[number])
        for other, _ in shared.most_common():
            own = self._sketches.pairs_of(other)
            value = similarity_if_near(pairs, own, num_words, int(self._sketches.num_words[other]), self.max_edits)
            if value is not None:
                return Leak(self.prompts[other], value, "of its pairs of words, as a near-duplicate prompt")
        return None

    def _by_sequences(self, texts: Sequence[str]) -> Leak | None:
        if not len(self._known):
            return None
        found = np.unique(np.concatenate([ngrams(hashes_of(words(text)), self.size) for text in texts]))
        places = np.searchsorted(self._known, found)
        places[places == len(self._known)] = 0
        places = places[self._known[places] == found]
        if not len(places):
            return None
        members = np.concatenate([self._members[self._starts[each] : self._ends[each]] for each in places])
        numbers, counts = np.unique(members, return_counts=True)
        shares = counts / self._counts[numbers]
        best = int(np.argmax(shares))
        if shares[best] < self.least_share:
            return None
        return Leak(self.prompts[numbers[best]], float(shares[best]), f"of its sequences of {self.size} words")

    def _by_whole_prompts(self, users: Iterable[str]) -> Leak | None:
        for text in users if self._short else ():
            hashes = hashes_of(words(text))
            for length, known in self._short.items():
                if length < _SHARE_OF_TURN * len(hashes):
                    continue
                for each in ngrams(hashes, length).tolist():
                    if each in known:
                        return Leak(self.prompts[known[each]], 1.0, "of its words")
        return None
