"""Which of several candidates is the best by its wins against a baseline, where the interval allows to say so."""

from dataclasses import dataclass
from statistics import mean

from gemma2_post.evaluation.judging.winrate import difference


@dataclass(frozen=True)
class Choice:
    """What is chosen; candidates by number."""

    chosen: int
    best: int
    """The one with the highest win rate; among equal ones, the first."""
    tied: list[int]
    """Those that cannot be told from the best one, itself included."""


def choose(wins: list[list[float | None]], work: list[float]) -> Choice:
    """The best candidate by its win rate, or the cheapest of those that cannot be told from it.

    Two cannot be told apart if the 95% interval of the difference of their wins, paired by prompt, holds 0. Among
    equally cheap ones, the highest win rate decides.

    Args:
        wins: Of each candidate and prompt: 1, 0, or a value in between; None without a verdict. The baseline, against
            which they are won, has 0.5 everywhere.
        work: What each candidate's training cost, in any unit.
    """
    rates = [mean(given(each)) for each in wins]
    best = rates.index(max(rates))
    tied = [i for i, each in enumerate(wins) if i == best or _are_tied(wins[best], each)]
    cheapest = min(work[i] for i in tied)
    chosen = max((i for i in tied if work[i] == cheapest), key=lambda i: rates[i])
    return Choice(chosen, best, tied)


def given(wins: list[float | None]) -> list[float]:
    """The wins with a verdict."""
    return [win for win in wins if win is not None]


def _are_tied(wins: list[float | None], others: list[float | None]) -> bool:
    both = [(win, other) for win, other in zip(wins, others, strict=True) if win is not None and other is not None]
    if len(both) < 2:
        return True
    found = difference([win for win, _ in both], [other for _, other in both])
    return found.low <= 0 <= found.high
