"""What a reward model is measured on: policies' answers and held-out pairs, scored by the trained model."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from gemma2_post.data.functions import call, finite, load_function
from gemma2_post.data.turns import Message
from gemma2_post.evaluation.answering.samples import Answer, Grader, gather_rows, sample_answers, share_of
from gemma2_post.evaluation.pairs import ScoredPair, rank_correlation, rank_correlation_ceiling
from gemma2_post.models import reward_model
from gemma2_post.models.loading import frozen_arguments, load_config, load_model, unsharded
from gemma2_post.models.tokenizer import load_tokenizer, tokenizer_digest
from gemma2_post.stage.errors import UserError


def noise_ceiling_of(path: str, pairs: Dataset) -> float:
    """The best accuracy that noisy pairs allow, from the user's function `module:function`."""
    try:
        return finite(path, call(path, load_function(path), pairs.to_list()))
    except UserError as error:
        if isinstance(error.__cause__, KeyError):
            raise UserError(f"{path} needs the column {error.__cause__}; add it to columns") from error
        raise


def check_tokenizers(policies: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses policies with another tokenizer."""
    for path in policies:
        policy_tokenizer = load_tokenizer(path, load_config(path))
        if tokenizer_digest(policy_tokenizer) != tokenizer_digest(tokenizer):
            raise UserError(
                f"policies: {path} has another tokenizer than the reward model's base; choose models with "
                "the same vocabulary"
            )


def sample_policies(
    policies: list[str],
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    max_new_tokens: int,
) -> dict[str, list[Answer]]:
    """Each policy's answers to held-out prompts, by its folder's name; each process asks its share of the prompts."""
    mine = share_of(len(prompts), training_args.distributed_state)
    settings = max_new_tokens, training_args.per_device_eval_batch_size, training_args.seed
    answers = {}
    for path in policies:
        with unsharded(training_args):
            sampled = answer(path, training_args.device, tokenizer, [prompts[i] for i in mine], *settings)
        answers[Path(path).name] = gather_rows(mine, sampled, len(prompts))
    return answers


def score_held_out(
    trainer: Trainer, held_out: Dataset, to_answer: Dataset, answers: dict[str, list[Answer]]
) -> tuple[list[ScoredPair], dict[str, list[float]]]:
    """The held-out pairs with their rewards, and those of the policies' answers (or of all answers in the pairs)."""
    tokenizer = trainer.processing_class
    rows = [*held_out["chosen_ids"], *held_out["rejected_ids"]]
    for each in answers.values():
        rows += [reward_model.conversation_ids(tokenizer, chat) for chat in _answered(to_answer["prompt"], each)]
    mine = share_of(len(rows), trainer.accelerator)
    batch_size = trainer.args.per_device_eval_batch_size
    own_scores = reward_model.score_ids(trainer.model_wrapped, [rows[i] for i in mine], batch_size)
    scores = iter(gather_rows(mine, own_scores, len(rows)))
    chosen, rejected = ([next(scores) for _ in range(len(held_out))] for _ in range(2))
    by_policy = {name: [next(scores) for _ in each] for name, each in answers.items()}
    return _as_pairs(chosen, rejected, held_out), by_policy or {"pairs": [*chosen, *rejected]}


def score_pairs(model: torch.nn.Module, pairs: Dataset, batch_size: int) -> list[ScoredPair]:
    """Tokenized pairs with their rewards, by one process."""
    rows = [*pairs["chosen_ids"], *pairs["rejected_ids"]]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # else nearly half of the computation is padding
    scored = reward_model.score_ids(model, [rows[i] for i in by_length], batch_size)
    scores = [score for _, score in sorted(zip(by_length, scored, strict=True))]
    return _as_pairs(scores[: len(pairs)], scores[len(pairs) :], pairs)


def _as_pairs(chosen: list[float], rejected: list[float], rows: Dataset) -> list[ScoredPair]:
    return [
        ScoredPair(better, worse, row["num_turns"], len(row["chosen_ids"]), len(row["rejected_ids"]))
        for better, worse, row in zip(chosen, rejected, rows, strict=True)
    ]


def answer(
    policy: str,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[Answer]:
    """A policy's answers to prompts, by one process; the policy is freed then."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = load_model(frozen_arguments(policy, dtype), device_map={"": device})
    return sample_answers(model, tokenizer, prompts, max_new_tokens, batch_size=batch_size, seed=seed)


def score_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    answers: dict[str, list[Answer]],
    batch_size: int,
) -> dict[str, list[float]]:
    """The rewards of the policies' answers to prompts, by one process."""
    return {
        name: reward_model.score(model, tokenizer, _answered(prompts, each), batch_size)
        for name, each in answers.items()
    }


def _answered(prompts: list[list[Message]], answers: list[Answer]) -> list[list[Message]]:
    """Conversations that end with the answers."""
    return [
        [*prompt, {"role": "assistant", "content": answer.text}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def rank_correlations(
    rows: Dataset, answers: dict[str, list[Answer]], rewards: dict[str, list[float]], graders: dict[str, Grader]
) -> dict[str, float]:
    """Spearman's correlation of reward and grade, over the answers of all policies and of each policy.

    Next to each is its ceiling: a good policy has many equal grades, which keep even perfect rewards below 1.
    """
    columns = {column: rows[column] for column in rows.column_names}
    metrics = {}
    for name, grader in graders.items():
        grades = {
            policy: grader(completions=[answer.text for answer in each], **columns) for policy, each in answers.items()
        }
        if grades:
            all_grades = [grade for policy in grades for grade in grades[policy]]
            metrics[f"{name}_rank_correlation"] = rank_correlation(
                [reward for policy in grades for reward in rewards[policy]], all_grades
            )
            metrics[f"{name}_rank_correlation_ceiling"] = rank_correlation_ceiling(all_grades)
        metrics |= {
            f"{name}_rank_correlation/{policy}": rank_correlation(rewards[policy], grades[policy]) for policy in grades
        }
        metrics |= {
            f"{name}_rank_correlation_ceiling/{policy}": rank_correlation_ceiling(grades[policy]) for policy in grades
        }
    return metrics
