"""Measures a judge on pairs that people have labeled, before anyone believes it.

gemma2-post judge-check pairs.json --judge NAME --judge_endpoint URL
"""

import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma2_post.data.keys import Source
from gemma2_post.data.labeled_pairs import LABELED_PAIR
from gemma2_post.data.sources import no_rows, rows_of
from gemma2_post.data.turns import InvalidRow
from gemma2_post.evaluation.inputs import load_judge
from gemma2_post.evaluation.judging.judge_quality import LabeledPair, Quality, Rate, by_group, quality
from gemma2_post.evaluation.judging.rubrics import comparison
from gemma2_post.evaluation.keys import JudgeArguments
from gemma2_post.stage import contract
from gemma2_post.stage.bounds import COUNT
from gemma2_post.stage.errors import UserError

_FIGURES = {
    "agreement": "agrees with the label",
    "agreement_in_both_orders": "in both orders",
    "consistency": "says the same in both orders",
    "first_shown": "prefers the answer shown first",
    "longer": "prefers the longer answer",
    "longer_by_labels": "the labels do",
    "verbosity_bias": "more often than the labels",
}


def judge_check(path: str, args: JudgeArguments, limit: int | None, file: Path) -> None:
    """Asks a judge about labeled pairs in both orders, prints what it is worth, and writes it to a file.

    Replies are kept beside that file, so that a second run asks only what is missing.

    Args:
        limit: The first so many pairs; None for all.

    Raises:
        UserError: The pairs cannot be read, or the judge cannot be asked.
    """
    counts = {"--limit": 1 if limit is None else limit, "--judge_max_tokens": args.judge_max_tokens}
    for name, value in (counts | {"--concurrency": args.endpoint.concurrency}).items():
        if problem := COUNT.problem(value):
            raise UserError(f"{name} {problem}")
    args.check()
    pairs = read_pairs(path)[:limit]
    judge = load_judge(args, file.with_suffix(".judgments.jsonl"))
    assert judge is not None, "the command line names one"
    began = time.monotonic()
    with closing(judge):
        verdicts = judge.in_both_orders(
            [
                (comparison(pair.prompt, pair.first, pair.second), comparison(pair.prompt, pair.second, pair.first))
                for pair in pairs
            ]
        )
    found, groups = quality(pairs, verdicts), by_group(pairs, verdicts)
    content: dict[str, Any] = {"pairs": path, "judge": args.judge, "endpoint": args.judge_endpoint}
    content |= asdict(found) | {"tokens": dict(judge.tokens), "seconds": round(time.monotonic() - began, 1)}
    contract.write_json(file, content | {"groups": {name: asdict(each) for name, each in groups.items()}})
    print("\n".join([*lines(found), *_costs(found, content), *_reasons(judge.silent), *_table(groups)]))


def read_pairs(path: str) -> list[LabeledPair]:
    """The labeled pairs of a file, a folder, or a Hub data set.

    Raises:
        UserError: They cannot be read, or a row has none of the known layouts.
    """
    source, found = Source(path), []
    for number, row in enumerate(rows_of(source, {*LABELED_PAIR.columns})):
        try:
            found.append(LabeledPair(**LABELED_PAIR.read(row)))
        except InvalidRow as problem:
            raise UserError(f"{path}: row {number}: {problem}") from problem
    if not found:
        raise no_rows(source)
    return found


def lines(found: Quality) -> list[str]:
    """The figures in words, each with its 95% interval."""
    return [
        f"{words:32} {_words(getattr(found, name))}"
        for name, words in _FIGURES.items()
        if getattr(found, name) is not None
    ]


def _words(rate: Rate) -> str:
    return f"{rate.share:6.1%}  ({rate.low:.1%} to {rate.high:.1%}, {rate.num_pairs} pairs)"


def _costs(found: Quality, content: dict[str, Any]) -> list[str]:
    tokens = content["tokens"]
    return [
        f"{'no verdict':32} {found.num_missing} of {found.num_verdicts}",
        f"{'tokens, question and reply':32} {tokens.get('questions', 0)} and {tokens.get('replies', 0)}",
    ]


def _reasons(silent: dict[str, int]) -> list[str]:
    return [f"  {count} {why}" for why, count in silent.items()]


def _table(groups: dict[str, Quality]) -> list[str]:
    if len(groups) < 2:
        return []
    width = max(map(len, groups))
    return ["", *(f"{name:{width}}  {_words(each.agreement)}" for name, each in groups.items() if each.agreement)]
