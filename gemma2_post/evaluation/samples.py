"""Answers sampled from a model, and what can be counted in them."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.models.utils import unwrap_model_for_generation

from gemma2_post.core.gemma import PAD, STOP_TOKEN_IDS

Grader = Callable[..., list[float]]
"""Called as TRL calls a reward function: `grader(completions=[text, ...], column=[value, ...], ...)`."""


@dataclass
class Answer:
    text: str
    num_tokens: int
    """Without the stop token."""
    stopped: bool
    """Whether it ended by itself, with one of the stop tokens."""


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Answer]:
    """One answer per prompt, from the model's own distribution: no top-k, no top-p; greedy at temperature 0.

    The model is in evaluation mode while it samples and as before afterwards; so is torch's random state.
    """
    answers = []
    with _evaluating(model), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer.apply_chat_template(
                prompts[start : start + batch_size],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
                tokenizer_kwargs={"padding_side": "left"},
            ).to(model.device)
            sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
            generated = model.generate(
                **batch,
                **sampling,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                synced_gpus=False,  # the weights are gathered; processes with fewer prompts must not be waited for
                eos_token_id=STOP_TOKEN_IDS,
                pad_token_id=PAD,
            )
            for ids in generated[:, batch["input_ids"].shape[1] :].tolist():
                num_tokens = next((i for i, token in enumerate(ids) if token in STOP_TOKEN_IDS), len(ids))
                text = tokenizer.decode(ids[:num_tokens], skip_special_tokens=True).strip()
                answers.append(Answer(text, num_tokens, stopped=num_tokens < len(ids)))
    return answers


@contextmanager
def _evaluating(model: PreTrainedModel):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def grade(
    answers: list[Answer], rows: Dataset, graders: dict[str, Grader], group_by: str | None = None
) -> dict[str, float]:
    """Stop rate, mean length in tokens, and the mean of each grader: overall, and by a column if one is named."""
    metrics = {
        "stop_rate": sum(answer.stopped for answer in answers) / len(answers),
        "mean_tokens": sum(answer.num_tokens for answer in answers) / len(answers),
    }
    columns = {column: rows[column] for column in rows.column_names}
    for name, grader in graders.items():
        scores = grader(completions=[answer.text for answer in answers], **columns)
        metrics[name] = sum(scores) / len(scores)
        groups = defaultdict(list)
        for group, score in zip(columns[group_by] if group_by else [], scores, strict=bool(group_by)):
            groups[group].append(score)
        metrics |= {f"{name}/{group}": sum(values) / len(values) for group, values in sorted(groups.items())}
    return metrics


def measure_samples(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    graders: dict[str, Grader],
    group_by: str | None,
    max_new_tokens: int,
    seed: int,
) -> dict[str, float]:
    """`grade` on answers of the model in training, at temperature 1; each process samples its part of the prompts.

    Args:
        rows: conversations; the prompt is all but the model's last turn. Without rows there is nothing to measure.
    """
    if not len(rows):
        return {}
    accelerator = trainer.accelerator
    prompts = [messages[:-1] for messages in rows["messages"]]
    mine = list(range(accelerator.process_index, len(prompts), accelerator.num_processes))
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        accelerator,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        answers = sample_answers(
            model,
            tokenizer,
            [prompts[i] for i in mine],
            max_new_tokens,
            batch_size=trainer.args.per_device_eval_batch_size,
            seed=seed,
        )
    gathered = gather_object(list(zip(mine, answers, strict=True)))
    return grade([answer for _, answer in sorted(gathered, key=lambda pair: pair[0])], rows, graders, group_by)
