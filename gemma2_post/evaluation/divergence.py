"""The divergence of two models, over the whole vocabulary, on answers that one of them sampled."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import Trainer

from gemma2_post.evaluation.answering.samples import Answer, evaluating, gather_rows, share_of
from gemma2_post.models.tokens import PAD


@dataclass
class Divergence:
    """The divergence on one answer, in nats, summed over its tokens (including the stop token)."""

    forward: float
    """KL(model || other); if the model sampled the answers, its mean estimates the sequence-level KL."""
    backward: float
    """KL(other || model), at the same positions."""
    nll: float
    """-log p(answer) under the model."""
    num_tokens: int


def token_kl(logits: torch.Tensor, other_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) at each position, in nats, fp32 or better.

    Args:
        logits: Logits of p, (..., vocabulary), with soft-capping already applied.
        other_logits: Logits of q, the same shape.
    """
    log_p, log_q = (
        part.to(torch.promote_types(part.dtype, torch.float32)).log_softmax(-1) for part in (logits, other_logits)
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def measure_divergence(
    accelerator: Accelerator, model: torch.nn.Module, other: torch.nn.Module, answers: list[Answer], batch_size: int
) -> list[Divergence]:
    """Both divergences on each answer; each process takes its share of the answers.

    Args:
        model: The model as the trainer holds it (perhaps a ZeRO engine); every process calls it equally often.
        other: The other model, held in the same way, with the same vocabulary.
    """
    mine = share_of(len(answers), accelerator)
    results = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(mine), batch_size):
            batch = [answers[i] for i in mine[start : start + batch_size]]
            longest = max(len(answer.token_ids) for answer in batch)
            logits, other_logits = (answer_logits(part, accelerator, batch, longest) for part in (model, other))
            for row, answer in enumerate(batch):
                num_tokens = len(answer.token_ids)
                own, others = logits[row, -num_tokens - 1 : -1], other_logits[row, -num_tokens - 1 : -1]
                others = others.to(own.device)  # if the models are spread over GPUs
                targets = torch.tensor(answer.token_ids, device=own.device)
                found = Divergence(0.0, 0.0, 0.0, num_tokens)
                # With 256k tokens, each fp32 copy of the logits of 128 positions takes 0.13 GB.
                for p, q, target in zip(own.split(128), others.split(128), targets.split(128), strict=True):
                    found.forward += token_kl(p, q).sum().item()
                    found.backward += token_kl(q, p).sum().item()
                    found.nll += torch.nn.functional.cross_entropy(p.float(), target, reduction="sum").item()
                results.append(found)
    return gather_rows(mine, results, len(answers))


def answer_logits(
    model: torch.nn.Module, accelerator: Accelerator, answers: list[Answer], num_tokens: int
) -> torch.Tensor:
    """Logits at the last positions of left-padded conversations, (answers, num_tokens + 1, vocabulary)."""
    rows = [answer.prompt_ids + answer.token_ids for answer in answers]
    width = max(map(len, rows))
    input_ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows], device=accelerator.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=accelerator.device)
    return model(input_ids=input_ids, attention_mask=mask, logits_to_keep=num_tokens + 1, use_cache=False).logits


def mean_divergences(trainer: Trainer, teacher: torch.nn.Module, answers: list[Answer]) -> dict[str, float]:
    """Divergences of student and teacher on the student's answers: nats per answer (the mean of sums) and per token.

    Args:
        trainer: The trainer that holds the student.
        teacher: The teacher as the trainer holds it.
    """
    if not answers:
        return {}
    batch_size = trainer.args.per_device_eval_batch_size
    found = measure_divergence(trainer.accelerator, trainer.model_wrapped, teacher, answers, batch_size)
    student_teacher, teacher_student = sum(each.forward for each in found), sum(each.backward for each in found)
    num_tokens = sum(each.num_tokens for each in found)
    return {
        "kl_student_teacher": student_teacher / len(found),
        "kl_student_teacher_per_token": student_teacher / num_tokens,
        "kl_teacher_student": teacher_student / len(found),
        "kl_teacher_student_per_token": teacher_student / num_tokens,
        "student_nll": sum(each.nll for each in found) / num_tokens,
    }
