"""The rules that need a model: unsafe answers by a judge, rewards; and the shares of answers that refuse or hedge."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from pyarrow import parquet
from tqdm import tqdm

from gemma2_post.curation import rows
from gemma2_post.curation.keys import CurationArguments
from gemma2_post.curation.reading import Mixture, without_nulls
from gemma2_post.curation.removed import Verdict
from gemma2_post.curation.scoring import Score
from gemma2_post.curation.sifting import MANNER, Row
from gemma2_post.data.turns import Message
from gemma2_post.evaluation.judging.judge import Judge

Place = tuple[int, int]
"""A row that is left: its part, and its place among those that the part has left."""
Verdicts = dict[Place, Verdict]
_JUDGED_AT_ONCE = 20
"""Parts whose answers are asked about together."""


def left(mixture: Mixture, without: Verdicts) -> Iterator[tuple[Place, Row]]:
    """The rows that no rule has removed so far."""
    for part in range(mixture.num_parts):
        for place, row in enumerate(parquet.read_table(mixture.path(part, "sifted")).to_pylist()):
            if (part, place) not in without:
                yield (part, place), without_nulls(row)


def unsafe(mixture: Mixture, judge: Judge) -> tuple[Verdicts, int]:
    """The rows with an answer that the judge finds unsafe, and the number of answers that it did not judge.

    Each reply is kept as it comes, so a judge that fails is asked only about what is missing when the run goes on.

    Raises:
        UserError: The judge cannot be asked, or gives no verdict on half of the answers.
    """
    found: Verdicts = {}
    num_missing = 0
    with closing(judge), tqdm(desc="judging answers", total=mixture.num_parts, unit=" parts", delay=1) as bar:
        for first in range(0, mixture.num_parts, _JUDGED_AT_ONCE):
            parts = range(first, min(first + _JUDGED_AT_ONCE, mixture.num_parts))
            asked: list[tuple[Place, list[Message], str]] = []
            for part in parts:
                for place, row in enumerate(parquet.read_table(mixture.path(part, "sifted")).to_pylist()):
                    turns = rows.said(without_nulls(row)).wanted
                    asked += [
                        ((part, place), turns[:i], turn["content"])
                        for i, turn in enumerate(turns)
                        if turn["role"] == "assistant"
                    ]
            verdicts = judge.violations([prompt for _, prompt, _ in asked], [answer for _, _, answer in asked])
            missing = verdicts.count(None)
            judge.check_most(missing, len(verdicts), "answers")
            num_missing += missing
            for (row_place, _, answer), verdict in zip(asked, verdicts, strict=True):
                if verdict:
                    found.setdefault(row_place, Verdict("unsafe", answer))
            bar.update(len(parts))
    return found, num_missing


def low_rewards(mixture: Mixture, args: CurationArguments, without: Verdicts, score: Score | None) -> Verdicts:
    """The conversations whose reward is below `min_reward`.

    Args:
        score: The reward model; None with a reward column. Its scores of each part are kept.
    """
    found: Verdicts = {}
    least, column = args.quality.min_reward, args.duplicates.reward_column
    assert least is not None, "called only with a limit"
    with tqdm(desc="scoring conversations", total=mixture.num_parts, unit=" parts", delay=1) as bar:
        for part in range(mixture.num_parts):
            content = [without_nulls(row) for row in parquet.read_table(mixture.path(part, "sifted")).to_pylist()]
            if score is None:
                rewards = [rows.reward_of(row, column) for row in content]
            else:
                rewards = _scores(mixture.path(part, "scores"), [row["messages"] for row in content], score)
            for place, reward in enumerate(rewards):
                if (part, place) not in without and not reward >= least:
                    found[part, place] = Verdict("low_reward", f"reward {reward:.3g}, below {least:g}")
            bar.update()
    return found


def _scores(path: Path, conversations: list[list[Message]], score: Score) -> list[float]:
    """The scores of a part, from its file if they are there."""
    if not path.is_file():
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as stream:
            np.save(stream, np.array(score(conversations) if conversations else [], np.float64))
        temporary.replace(path)
    with open(path, "rb") as stream:
        found: list[float] = np.load(stream).tolist()
    return found


def beyond_share(mixture: Mixture, args: CurationArguments, without: Verdicts, seed: int) -> Verdicts:
    """The answers that refuse or hedge beyond their shares of the rows that stay; which ones is drawn."""
    limits = {"refusal": args.quality.max_refusal_share, "hedging": args.quality.max_hedging_share}
    manners = {place: row.get(MANNER) for place, row in left(mixture, without)} if any_of(limits) else {}
    found: Verdicts = {}
    for manner, limit in limits.items():
        if limit is None or limit == 1:
            continue
        places = [place for place, each in manners.items() if each == manner]
        num_others = len(manners) - len(found) - len(places)
        most = int(limit / (1 - limit) * num_others)  # most / (most + others) is the limit
        drawn = np.random.default_rng(seed).permutation(len(places))[most:]
        share = len(places) / max(1, len(places) + num_others)
        for i in drawn.tolist():
            found[places[i]] = Verdict(manner, f"{share:.1%} of the answers are like this, above {limit:.1%}")
    return found


def any_of(limits: dict[str, float | None]) -> bool:
    """Whether there is a limit."""
    return any(limit is not None for limit in limits.values())
