"""Sampling gives what the model itself says, and leaves it and the random state as they were."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gemma2_post.evaluation.samples import Answer, grade, sample_answers

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", "What is 3 plus 5? Please add.", "And plus 2?")]


def test_sampling_in_a_padded_batch_is_sampling_one_by_one(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    together = sample_answers(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0)
    alone = [sample_answers(model, tokenizer, [prompt], max_new_tokens=12, temperature=0.0)[0] for prompt in PROMPTS]
    assert together == alone


def test_sampling_in_training_with_checkpointing_is_sampling_in_evaluation(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = sample_answers(model.eval(), tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0)
    state = torch.get_rng_state()
    model.train()
    model.gradient_checkpointing_enable()
    assert sample_answers(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0) == expected
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_grades_are_means_overall_and_by_group() -> None:
    """Lengths of 1, 3 and 5 letters: mean 3; group a (1 + 5) / 2 = 3, group b 3."""
    answers = [Answer("x", 1, True), Answer("xxx", 3, True), Answer("xxxxx", 5, False)]
    rows = Dataset.from_dict({"skill": ["a", "b", "a"]})
    metrics = grade(
        answers, rows, {"length": lambda completions, **_: [float(len(text)) for text in completions]}, "skill"
    )
    assert metrics == {"stop_rate": 2 / 3, "mean_tokens": 3.0, "length": 3.0, "length/a": 3.0, "length/b": 3.0}
