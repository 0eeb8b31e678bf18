"""Selects which of a teacher's answers become rows of a data set, and counts why others are dropped."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from gemma2_post.data.duplicates import find_duplicates
from gemma2_post.data.turns import Message, is_valid
from gemma2_post.stage import contract


@dataclass
class Candidate:
    """An answer with its prompt that may become a row of the data set."""

    row: int
    messages: list[Message]
    columns: dict[str, object]
    sample: int
    finish_reason: str
    reward: float | None = None


def candidates_of(prompts: Dataset, answers: dict[tuple[int, int], dict[str, Any]]) -> list[Candidate]:
    """All answers, in the order of their prompts; the keys of `answers` are prompt row and sample number."""
    rows = prompts.to_list()
    return [
        Candidate(
            row,
            [*rows[row]["prompt"], {"role": "assistant", "content": answer["text"]}],
            {column: value for column, value in rows[row].items() if column != "prompt"},
            sample,
            answer["finish_reason"],
        )
        for (row, sample), answer in sorted(answers.items())
    ]


def select(
    candidates: list[Candidate], rewards_of: Callable[[list[Candidate]], Sequence[float | None]] | None
) -> tuple[list[Candidate], dict[str, int]]:
    """The candidates to keep, and how many were dropped for each reason, in this order.

    Refused: the endpoint would not answer. Unfinished: the answer did not end by itself. Invalid: empty, or with a
    control token. Ungraded: the judge has given it no grade, or the reward model does not read as much. Not best:
    another answer to the prompt has a higher reward. Duplicate: see `find_duplicates`.

    Args:
        rewards_of: Computes the reward of each candidate, which it is then kept with; None keeps all answers to a
            prompt.
    """
    dropped: dict[str, int] = {}

    def keep(candidates: list[Candidate], reason: str, wanted: list[bool]) -> list[Candidate]:
        dropped[f"dropped_{reason}"] = wanted.count(False)
        return [candidate for candidate, is_wanted in zip(candidates, wanted, strict=True) if is_wanted]

    kept = keep(candidates, "refused", [candidate.finish_reason != "refused" for candidate in candidates])
    kept = keep(kept, "unfinished", [candidate.finish_reason == "stop" for candidate in kept])
    kept = keep(kept, "invalid", [is_valid(candidate.messages) for candidate in kept])
    if rewards_of and kept:
        for candidate, reward in zip(kept, rewards_of(kept), strict=True):
            candidate.reward = reward
        kept = keep(kept, "ungraded", [candidate.reward is not None for candidate in kept])
        best = {row: ranked[0] for row, ranked in _ranked(kept).items()}
        kept = keep(kept, "not_best", [best[candidate.row] is candidate for candidate in kept])
    texts = [[message["content"] for message in candidate.messages] for candidate in kept]
    duplicates = find_duplicates([("\n".join(history), question, answer) for *history, question, answer in texts])
    dropped["dropped_exact_duplicate"] = duplicates.count("exact")
    dropped["dropped_near_duplicate"] = duplicates.count("near")
    return [candidate for candidate, duplicate in zip(kept, duplicates, strict=True) if not duplicate], dropped


def _ranked(candidates: list[Candidate]) -> dict[int, list[Candidate]]:
    """The candidates that have a reward, by row, the best first; of equal ones, the earliest."""
    by_row: dict[int, list[tuple[float, Candidate]]] = defaultdict(list)
    for candidate in candidates:
        if candidate.reward is not None:
            by_row[candidate.row].append((candidate.reward, candidate))
    return {
        row: [candidate for _, candidate in sorted(each, key=lambda pair: -pair[0])] for row, each in by_row.items()
    }


def pairs_of(candidates: list[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """The best and the worst answer to each prompt, by the rewards that `select` has given; none if they are equal.

    Two answers of one text are equal, too: their rewards may differ by a rounding, which depends on the batch.
    """
    ranked = [(each[0], each[-1]) for each in _ranked(candidates).values()]
    return [
        (best, worst)
        for best, worst in ranked
        if best.reward != worst.reward and best.messages[-1] != worst.messages[-1]
    ]


def write_pairs(path: Path, pairs: list[tuple[Candidate, Candidate]], teacher: dict[str, object]) -> int:
    """Writes a data set for `reward`; returns the number of pairs.

    Each row has `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected` (from which `score_margin` makes the
    margin), the columns, and `teacher`.
    """
    lines = []
    for best, worst in pairs:
        *prompt, chosen = best.messages
        answers = {"prompt": prompt, "chosen": [chosen], "rejected": [worst.messages[-1]]}
        row = answers | {"score_chosen": best.reward, "score_rejected": worst.reward}
        lines.append(json.dumps(row | best.columns | {"teacher": teacher}, ensure_ascii=False) + "\n")
    path.parent.mkdir(exist_ok=True)
    contract.write_text(path, "".join(lines))
    return len(lines)


def write_rows(path: Path, candidates: list[Candidate], teacher: dict[str, object]) -> None:
    """Writes a data set for `sft`: `messages`, the columns, and `teacher`, which says who wrote the answer and how."""
    lines = []
    for candidate in candidates:
        written_by = teacher | {"sample": candidate.sample}
        if candidate.reward is not None:
            written_by["reward"] = candidate.reward
        row = {"messages": candidate.messages, **candidate.columns, "teacher": written_by}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    contract.write_text(path, "".join(lines))
