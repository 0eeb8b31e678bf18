"""Answers to a list of prompts, kept in a file as they come, so that a killed run goes on where it was."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from gemma2_post.data.turns import Message
from gemma2_post.evaluation.answering.samples import Answer, PartlyAnswered
from gemma2_post.stage import contract

_RECORD: contract.Keys = {"call": int, "answers": dict, "random_states": list}


class Sampling(Protocol):
    """Answers prompts at a temperature; what is answered already is not asked again."""

    def __call__(
        self, prompts: list[list[Message]], temperature: float, partly: PartlyAnswered, /
    ) -> list[Answer]: ...


class Sample(Protocol):
    """Answers prompts at a temperature."""

    def __call__(self, prompts: list[list[Message]], temperature: float, /) -> list[Answer]: ...


Other = Callable[[], AbstractContextManager[Sample]]
"""Lets a model answer that is not of this chain."""


def kept(sampling: Sampling, file: Path, name: str) -> Sample:
    """Samples, with each answer appended to a file as it comes.

    Args:
        file: Answers of one run. The calls of each run must be the same, in the same order.
        name: What the progress bar calls the model.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    records, calls = contract.read_lines(file, _RECORD), count()

    def sample(prompts: list[list[Message]], temperature: float) -> list[Answer]:
        call, began, num_tokens = next(calls), time.monotonic(), 0
        partly = PartlyAnswered()
        for record in records:
            if record["call"] == call:
                partly.answers |= {int(number): Answer(**each) for number, each in record["answers"].items()}
                partly.random_states = record["random_states"]
        with tqdm(desc=name, unit="answer", total=len(prompts), initial=len(partly.answers), leave=False) as bar:

            def write(answers: dict[int, Answer], random_states: list[str]) -> None:
                nonlocal num_tokens
                content = {number: vars(each) for number, each in answers.items()}
                contract.append_lines(file, [{"call": call, "answers": content, "random_states": random_states}])
                num_tokens += sum(each.num_tokens for each in answers.values())
                bar.set_postfix_str(f"{num_tokens / (time.monotonic() - began):.0f} tokens/s", refresh=False)
                bar.update(len(answers))

            partly.write = write
            return sampling(prompts, temperature, partly)

    return sample
