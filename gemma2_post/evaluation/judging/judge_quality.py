"""How good a judge is on pairs that people have labeled, and which biases it has. Pure functions."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import mean

from gemma2_post.evaluation.judging.judge import Both
from gemma2_post.evaluation.judging.winrate import difference, rate_interval


@dataclass(frozen=True)
class LabeledPair:
    """Two answers to a prompt, and which one people prefer."""

    prompt: list[dict[str, str]]
    first: str
    second: str
    label: float
    """1 if the first is better, 0 if the second is, 0.5 for a tie."""
    group: str


@dataclass(frozen=True)
class Rate:
    """A share, with its 95% interval."""

    share: float
    low: float
    high: float
    num_pairs: int
    """Number of the pairs that it is over."""


@dataclass(frozen=True)
class Quality:
    """What a judge is worth on labeled pairs, each judged in both orders."""

    agreement: Rate | None
    """Verdicts that are the label, a tie included; both orders count."""
    agreement_in_both_orders: Rate | None
    """Pairs on which both verdicts are the label, as Auto-J counts (arXiv 2310.05470)."""
    consistency: Rate | None
    """Pairs with the same verdict in both orders."""
    first_shown: Rate | None
    """Position bias: decided verdicts for the answer that is shown first. Each answer is shown first once, so a judge
    without this bias has 50%."""
    longer: Rate | None
    """Decided verdicts for the longer answer, in characters."""
    longer_by_labels: Rate | None
    """Decided labels for the longer answer."""
    verbosity_bias: Rate | None
    """How much more often verdicts than labels are for the longer answer, over pairs that have both."""
    num_verdicts: int
    num_missing: int
    """Verdicts that the judge did not give."""


def quality(pairs: list[LabeledPair], verdicts: list[Both | None]) -> Quality:
    """What a judge is worth; a figure without pairs is None.

    Args:
        verdicts: For each pair, the verdict with its first answer first, and with its second one first.
    """
    found: dict[str, list[float]] = defaultdict(list)
    longer: list[tuple[float, float]] = []  # by the judge, by the label
    num_missing = 0
    for pair, both in zip(pairs, verdicts, strict=True):
        one, two = both or (None, None)
        wins = [one.win] if one else []
        wins += [1 - two.win] if two else []
        num_missing += 2 - len(wins)
        if wins:
            found["agreement"].append(mean(float(win == pair.label) for win in wins))
        if len(wins) == 2:
            found["in_both_orders"].append(float(wins[0] == wins[1] == pair.label))
            found["consistency"].append(float(wins[0] == wins[1]))
        shown = [each.win for each in (one, two) if each and each.win != 0.5]
        if shown:
            found["first_shown"].append(mean(shown))
        more = len(pair.first) - len(pair.second)
        decided = [float((win == 1) == (more > 0)) for win in wins if win != 0.5]
        if more and decided:
            found["longer"].append(mean(decided))
        if more and pair.label != 0.5:
            found["longer_by_labels"].append(float((pair.label == 1) == (more > 0)))
        if more and decided and pair.label != 0.5:
            longer.append((found["longer"][-1], found["longer_by_labels"][-1]))
    return Quality(
        agreement=_rate(found["agreement"]),
        agreement_in_both_orders=_rate(found["in_both_orders"]),
        consistency=_rate(found["consistency"]),
        first_shown=_rate(found["first_shown"]),
        longer=_rate(found["longer"]),
        longer_by_labels=_rate(found["longer_by_labels"]),
        verbosity_bias=_difference(longer),
        num_verdicts=2 * len(pairs),
        num_missing=num_missing,
    )


def by_group(pairs: list[LabeledPair], verdicts: list[Both | None]) -> dict[str, Quality]:
    """The quality on each group of pairs."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        groups[pair.group].append(number)
    return {
        group: quality([pairs[i] for i in rows], [verdicts[i] for i in rows]) for group, rows in sorted(groups.items())
    }


def _rate(values: list[float]) -> Rate | None:
    if not values:
        return None
    return Rate(mean(values), *rate_interval(values), num_pairs=len(values))


def _difference(values: list[tuple[float, float]]) -> Rate | None:
    if len(values) < 2:
        return None
    found = difference(*map(list, zip(*values, strict=True)))
    return Rate(found.mean, found.low, found.high, len(values))
