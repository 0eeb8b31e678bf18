"""Distillation: the loss is its formula, the stage trains on the student's own ended answers, mistakes are refused."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
)
from trl import DistillationConfig, DistillationTrainer
from trl.import_utils import is_vllm_available

from gemma2_post import distill
from gemma2_post.core import contract, data
from gemma2_post.core.errors import UserError
from gemma2_post.core.training import launch
from gemma2_post.tiny.data import prompts
from tests.conftest import BASE, DISTILL_CLASSES, TEACHER, losses, random_model
from tests.test_bad_input import MODEL, USER, make_adapter, with_rows, with_values

Run = Callable[[dict[str, object]], Path]
Recipe = dict[str, object]
Change = Callable[[Recipe, Path], Recipe]

GREEDY = {"generation_kwargs": {"do_sample": False}}
QLORA = {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16", "lora_r": 4, "lora_alpha": 8}

# --- the loss ---

PROMPTS = [list(range(200, 212)), [300, 301], [400, 401, 402, 403, 404]]
ANSWERS = [[500, 501, 107], [502], list(range(510, 521))]


def far_apart(tokenizer: PreTrainedTokenizerBase) -> tuple[Gemma2ForCausalLM, Gemma2ForCausalLM]:
    """Student and teacher with weights so large that both soft-caps bite."""
    models = tuple(random_model(len(tokenizer), size, hidden_size=size, initializer_range=0.6) for size in (32, 48))
    for model in models:
        for norm in (model.model.norm, *(layer.post_attention_layernorm for layer in model.model.layers)):
            torch.nn.init.constant_(norm.weight, 9.0)
    return models


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; what is padded is filled with a token that would matter if it were seen."""
    width = max(map(len, rows))
    pairs = [([777] * (width - len(row)), [0] * (width - len(row)), row, [1] * len(row)) for row in rows]
    if side == "left":
        return tuple(torch.tensor([pair[i] + pair[i + 2] for pair in pairs]) for i in range(2))
    return tuple(torch.tensor([pair[i + 2] + pair[i] for pair in pairs]) for i in range(2))


def trained_loss(
    student: Gemma2ForCausalLM, teacher: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerBase, **values: object
) -> torch.Tensor:
    """TRL's loss of the answers above, as its trainer computes it."""
    rows = Dataset.from_dict({"prompt": [[USER]]})
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**settings, **values),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    prompt_ids, prompt_mask = padded(PROMPTS, "left")
    completion_ids, completion_mask = padded(ANSWERS, "right")
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    inputs |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
    return trainer.compute_loss(trainer.model, inputs)


def answer_logits(model: Gemma2ForCausalLM, final_cap: float = 30.0) -> torch.Tensor:
    """In front of each token of each answer, one row at a time, without padding: (tokens, vocabulary)."""
    rows = []
    for prompt_ids, answer_ids in zip(PROMPTS, ANSWERS, strict=True):
        hidden = model.model(input_ids=torch.tensor([prompt_ids + answer_ids])).last_hidden_state
        logits = hidden[0, len(prompt_ids) - 1 : -1] @ model.model.embed_tokens.weight.T
        rows.append(final_cap * torch.tanh(logits / final_cap))
    return torch.cat(rows)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def expected_loss(student: Gemma2ForCausalLM, teacher: Gemma2ForCausalLM, beta: float, temp: float) -> torch.Tensor:
    with torch.no_grad():
        teacher_log_p = (answer_logits(teacher) / temp).log_softmax(-1)
    student_log_p = (answer_logits(student) / temp).log_softmax(-1)
    if beta == 0:
        return kl(teacher_log_p, student_log_p).mean()
    if beta == 1:
        return kl(student_log_p, teacher_log_p).mean()
    mixed = (beta * teacher_log_p.exp() + (1 - beta) * student_log_p.exp()).log()
    return (beta * kl(teacher_log_p, mixed) + (1 - beta) * kl(student_log_p, mixed)).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_loss_and_its_gradient_are_the_divergence_of_the_soft_capped_distributions(
    beta: float, temperature: float, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    student, teacher = far_apart(tokenizer)
    reference = copy.deepcopy(student).double()
    expected = expected_loss(reference, copy.deepcopy(teacher).double(), beta, temperature)
    expected.backward()
    loss = trained_loss(
        student, teacher, tokenizer, beta=beta, temperature=temperature, output_dir=str(tmp_path / "out")
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in student.named_parameters():
        error = (parameter.grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert error < 1e-4, f"{name}: {error}"


def test_both_soft_caps_matter_in_the_models_of_the_test_above(tokenizer: PreTrainedTokenizerBase) -> None:
    student, teacher = far_apart(tokenizer)
    with torch.no_grad():
        divergence = kl(*(answer_logits(model).log_softmax(-1) for model in (student, teacher))).mean().item()
        without = kl(*(answer_logits(model, 1e9).log_softmax(-1) for model in (student, teacher))).mean().item()
        print(divergence, without)
        for model in (student, teacher):
            capped = answer_logits(model)
            print((answer_logits(model, 1e9) - capped).abs().mean())
            for layer in model.model.layers:
                assert layer.self_attn.attn_logit_softcapping == 50
                layer.self_attn.attn_logit_softcapping = None
            print((answer_logits(model) - capped).abs().mean())
        without = kl(*(answer_logits(model).log_softmax(-1) for model in (student, teacher))).mean().item()
        print(divergence, without)


def test_between_the_two_kls_the_loss_shrinks_with_its_weight(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The generalised JSD is beta KL(teacher||student) near 0 and (1 - beta) KL(student||teacher) near 1.

    So beta: 0.001 is no forward KL with a little of something else: its gradient is a thousandth as large.
    """
    student = random_model(len(tokenizer), seed=1, initializer_range=0.05)
    teacher = random_model(len(tokenizer), seed=2, initializer_range=0.15)

    def loss(beta: float) -> float:
        return trained_loss(student, teacher, tokenizer, beta=beta, output_dir=str(tmp_path / "out")).item()

    print()
    print(loss(1e-3) / 1e-3, loss(0.0))
    print(loss(1 - 1e-3) / 1e-3, loss(1.0))
