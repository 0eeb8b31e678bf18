"""Sampling gives what the model itself says, and leaves it and the random state as they were."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gemma2_post.evaluation.answering.partly import kept
from gemma2_post.evaluation.answering.samples import Answer, PartlyAnswered, grade, sample_answers
from gemma2_post.evaluation.answering.side_by_side import side_by_side
from gemma2_post.models.tokens import PAD, STOP_TOKEN_IDS
from gemma2_post.stage.errors import UserError
from tests.conftest import TEACHER

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", "What is 3 plus 5? Please add.", "And plus 2?")]


def test_sampling_in_a_padded_batch_is_sampling_one_by_one(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    together = sample_answers(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0)
    alone = [sample_answers(model, tokenizer, [prompt], max_new_tokens=12, temperature=0.0)[0] for prompt in PROMPTS]
    assert together == alone
    rendered = tokenizer.apply_chat_template(PROMPTS, add_generation_prompt=True)["input_ids"]
    assert [answer.prompt_ids for answer in together] == rendered


def test_a_run_that_is_killed_between_batches_goes_on_to_the_same_answers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Each call finds its own answers, and only what is missing is sampled."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32, attn_implementation="eager")
    asked = {"max_new_tokens": 12, "batch_size": 2, "seed": 3}
    expected = [sample_answers(model, tokenizer, prompts, **asked) for prompts in (PROMPTS, PROMPTS[::-1])]
    sampled: list[int] = []

    def run(killed_after: int) -> list[list[Answer]]:
        def sampling(prompts: list, _: float, partly: PartlyAnswered) -> list[Answer]:
            keep = partly.write

            def write(answers: dict[int, Answer], states: list[str]) -> None:
                keep(answers, states)
                sampled.extend(answers)
                if len(sampled) == killed_after:
                    raise KeyboardInterrupt

            partly.write = write
            return sample_answers(model, tokenizer, prompts, **asked, partly=partly)

        sample = kept(sampling, tmp_path / "partly.jsonl", "model")
        return [sample(prompts, 1.0) for prompts in (PROMPTS, PROMPTS[::-1])]

    for killed_after in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            run(killed_after)
    assert run(killed_after=0) == expected
    assert sampled == [0, 1, 2, 0, 1, 2]


def test_an_answer_ends_with_its_first_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """In one batch with a longer one, and with either of the two stop tokens."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    answers = sample_answers(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0)
    assert len({len(answer.token_ids) for answer in answers}) > 1
    for answer in answers:
        *words, last = answer.token_ids
        assert answer.stopped == (last in STOP_TOKEN_IDS) == (answer.num_tokens < 12)
        assert not {PAD, *STOP_TOKEN_IDS} & set(words)
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()


def test_sampling_in_training_with_checkpointing_is_sampling_in_evaluation(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = sample_answers(model.eval(), tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0)
    state = torch.get_rng_state()
    model.train()
    model.activation_checkpointing_enable()
    assert sample_answers(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0) == expected
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_grades_are_means_overall_and_by_group() -> None:
    """Lengths of 1, 3 and 5 letters: mean 3; group a (1 + 5) / 2 = 3, group b 3. The stop token is no length."""
    answers = [Answer("x", [2], [7, 1]), Answer("xxx", [2], [7, 7, 7, 107]), Answer("xxxxx", [2], [7] * 5)]
    rows = Dataset.from_dict({"skill": ["a", "b", "a"]})
    metrics = grade(
        answers, rows, {"length": lambda completions, **_: [float(len(text)) for text in completions]}, "skill"
    )
    assert metrics == {"stop_rate": 2 / 3, "mean_tokens": 3.0, "length": 3.0, "length/a": 3.0, "length/b": 3.0}


def cannot_begin() -> Callable[[int], int]:
    raise UserError("there is no model; make one")


def is_killed() -> Callable[[int], int]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize(
    ("begin", "message"),
    [(cannot_begin, "there is no model; make one"), (is_killed, "killed a process .* lower answer_processes")],
)
def test_a_process_beside_others_that_cannot_begin_says_why(begin: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(side_by_side([1], 1, begin))
