"""The distance of two models on sampled answers is what its formula says, in a batch as alone."""

from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM, PreTrainedTokenizerBase

from gemma2_post.evaluation.answering.samples import Answer
from gemma2_post.evaluation.divergence import Divergence, measure_divergence, token_kl
from tests.conftest import random_model

PROMPT_IDS = [[2, 106, 500, 501], [2, 600], [2, 106, 700, 701, 702, 703, 704, 705, 706, 707], [2, 800]]
TOKEN_IDS = [[300, 301, 302, 107], [303], [304, 305, 1], list(range(310, 450))]


@pytest.fixture(scope="module")
def models(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Gemma2ForCausalLM, Gemma2ForCausalLM]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    return model, random_model(len(tokenizer), seed=1, hidden_size=32, sliding_window=4).eval()


def measure(
    models: tuple[Gemma2ForCausalLM, Gemma2ForCausalLM], answers: list[Answer], batch_size: int
) -> list[Divergence]:
    accelerator = Accelerator(cpu=True)
    return measure_divergence(accelerator, *models, answers, batch_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_kl_is_the_divergence_of_the_two_softmaxes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, other_logits = (10 * torch.randn(3, 5, 1024, dtype=torch.float64).to(dtype) for _ in range(2))
    found = token_kl(logits, other_logits)
    assert found.shape == (3, 5) and found.dtype == torch.promote_types(dtype, torch.float32)
    expected = kl_divergence(Categorical(logits=logits.double()), Categorical(logits=other_logits.double()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
    assert torch.equal(token_kl(logits, logits), torch.zeros(3, 5, dtype=found.dtype))


def test_a_padded_batch_is_each_answer_alone(models: tuple[Gemma2ForCausalLM, Gemma2ForCausalLM]) -> None:
    """Against float64 sums over one unpadded row at a time; prompts and answers both beyond the sliding windows."""
    answers = [Answer("", prompt, tokens) for prompt, tokens in zip(PROMPT_IDS, TOKEN_IDS, strict=True)]
    expected = []
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids + answer.token_ids])
        places = slice(len(answer.prompt_ids) - 1, -1)
        with torch.no_grad():
            own, others = (Categorical(logits=model(input_ids=ids).logits[0, places].double()) for model in models)
        expected.append(
            (
                kl_divergence(own, others).sum().item(),
                kl_divergence(others, own).sum().item(),
                -own.log_prob(torch.tensor(answer.token_ids)).sum().item(),
                len(answer.token_ids),
            )
        )
    for batch_size in (1, 3, 4):
        found = measure(models, answers, batch_size)
        assert [astuple(each) for each in found] == [pytest.approx(each, rel=1e-4) for each in expected]


def test_the_mean_over_sampled_answers_is_the_divergence_of_the_models_over_answers(
    models: tuple[Gemma2ForCausalLM, Gemma2ForCausalLM],
) -> None:
    """Over all answers of two tokens, weighted by their probability, instead of a sample of them.

    The expectation of log p(answer) - log q(answer) is that of the summed KLs, though these know only the first token.
    """
    prompt_ids, vocabulary = PROMPT_IDS[0], range(1024)
    ids = torch.tensor([[*prompt_ids, first] for first in vocabulary])
    with torch.no_grad():
        log_p, log_q = (model(input_ids=ids, logits_to_keep=2).logits.double().log_softmax(-1) for model in models)
    # [first, second]: log-probability of the two tokens
    joint_p, joint_q = (part[0, 0][:, None] + part[:, 1] for part in (log_p, log_q))
    assert joint_p.exp().sum().item() == pytest.approx(1)
    expected = (joint_p.exp() * (joint_p - joint_q)).sum().item()

    found = measure(models, [Answer("", prompt_ids, [first, 500]) for first in vocabulary], batch_size=256)
    first_p = measure(models, [Answer("", prompt_ids, [first]) for first in vocabulary], batch_size=256)
    weights = [torch.tensor(-each.nll).exp().item() for each in first_p]
    assert sum(weights) == pytest.approx(1, rel=1e-4)
    mean = sum(weight * each.forward for weight, each in zip(weights, found, strict=True))
    assert mean == pytest.approx(expected, rel=1e-4)


def test_a_model_is_measured_in_evaluation_mode_and_left_in_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    model = random_model(len(tokenizer), attention_dropout=0.5)
    other = random_model(len(tokenizer), seed=1).eval()
    answers = [Answer("", PROMPT_IDS[0], TOKEN_IDS[0])]
    for training in (True, False):
        model.train(training)
        first, second = (measure((model, other), answers, batch_size=1) for _ in range(2))
        assert first == second
        assert model.training == training and not other.training
