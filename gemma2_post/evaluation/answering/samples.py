"""Samples answers from a model, and counts what can be counted in them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.models.utils import unwrap_model_for_generation

from gemma2_post.data.functions import load_grader
from gemma2_post.evaluation.keys import SampleArguments
from gemma2_post.models.tokens import PAD, STOP_TOKEN_IDS
from gemma2_post.stage.errors import OneProcessError, UserError

Grader = Callable[..., list[float]]
"""Called like TRL's reward functions: `grader(completions=[text, ...], column=[value, ...], ...)`."""


@dataclass
class Answer:
    """An answer as text and as token ids."""

    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    """The answer's token ids, with the stop token if it ended with one."""

    @property
    def stopped(self) -> bool:
        """Whether the answer ended by itself."""
        return bool(self.token_ids) and self.token_ids[-1] in STOP_TOKEN_IDS

    @property
    def num_tokens(self) -> int:
        """Number of tokens, without the stop token."""
        return len(self.token_ids) - self.stopped


@dataclass
class PartlyAnswered:
    """A list of prompts of which some are answered."""

    answers: dict[int, Answer] = field(default_factory=dict)
    """By the number of the prompt."""
    random_states: list[str] = field(default_factory=list)
    """Torch's random states after the last of these answers, of the CPU and of each GPU, in hexadecimal digits; empty
    where answers do not depend on those before."""
    write: Callable[[dict[int, Answer], list[str]], None] = lambda *_: None
    """Takes further answers as they come, with the random states after them."""

    def add(self, answers: dict[int, Answer], random_states: list[str]) -> None:
        """Adds further answers, and writes them."""
        self.answers |= answers
        self.write(answers, random_states)

    def in_order(self) -> list[Answer]:
        """All answers; call this when no prompt is without one."""
        return [self.answers[number] for number in range(len(self.answers))]


def load_graders(sample_args: SampleArguments, rows: Dataset) -> dict[str, Grader]:
    """The graders, by their functions' names; also checks the other arguments.

    Raises:
        UserError: The rows lack the `group_by` column, or a grader cannot be loaded.
    """
    if sample_args.group_by and sample_args.group_by not in rows.column_names:
        raise UserError(f"group_by is {sample_args.group_by}, which held-out rows lack; add it to columns")
    return {path.rpartition(":")[2]: load_grader(path, rows.column_names) for path in sample_args.graders or []}


def rows_to_answer(sample_args: SampleArguments, held_out: Dataset) -> tuple[Dataset, dict[str, Grader]]:
    """The first `num_samples` held-out rows, which the model answers, and the graders of the answers."""
    graders = load_graders(sample_args, held_out)
    return held_out.select(range(min(sample_args.num_samples, len(held_out)))), graders


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    stop_token_ids: list[int] = STOP_TOKEN_IDS,
    pad: int = PAD,
    partly: PartlyAnswered | None = None,
) -> list[Answer]:
    """Samples one answer per prompt from the model's own distribution: no top-k, no top-p; greedy at temperature 0.

    Restores the model's training mode and torch's random state afterwards.

    Args:
        stop_token_ids: The tokens that end an answer; Gemma 2's, unless the model is of another family.
        pad: The token that fills up shorter answers.
        partly: The answers of the first batches, if they are there; takes those of each further one.
    """
    partly = partly or PartlyAnswered()
    with evaluating(model), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        _set_random_states(partly.random_states)
        for start in range(len(partly.answers), len(prompts), batch_size):
            batch = tokenizer.apply_chat_template(
                prompts[start : start + batch_size],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
                tokenizer_kwargs={"padding_side": "left"},
            ).to(model.device)
            sampling: dict[str, float] = {"do_sample": False}
            if temperature:
                sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            with finite_probabilities():
                generated = model.generate(
                    **batch,
                    **sampling,
                    max_new_tokens=max_new_tokens,
                    synced_gpus=False,  # the weights are gathered; do not wait for processes with fewer prompts
                    eos_token_id=stop_token_ids,
                    pad_token_id=pad,
                )
            width = batch["input_ids"].shape[1]
            answers: dict[int, Answer] = {}
            for mask, ids in zip(batch["attention_mask"].bool(), generated.cpu(), strict=True):
                prompt_ids, token_ids = ids[:width][mask.cpu()].tolist(), ids[width:].tolist()
                end = next((i for i, token in enumerate(token_ids) if token in stop_token_ids), len(token_ids))
                text = tokenizer.decode(token_ids[:end]).strip()
                answers[start + len(answers)] = Answer(text, prompt_ids, token_ids[: end + 1])
            partly.add(answers, _random_states())
    return partly.in_order()


def _random_states() -> list[str]:
    return [state.numpy().tobytes().hex() for state in [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]]


def _set_random_states(states: list[str]) -> None:
    if states:
        of_cpu, *of_gpus = [torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8) for state in states]
        torch.set_rng_state(of_cpu)
        torch.cuda.set_rng_state_all(of_gpus[: torch.cuda.device_count()])  # of a run that saw more of them


class NoProbabilityError(OneProcessError):
    """A model's probabilities are NaN or infinite, so nothing can be sampled from it."""


@contextmanager
def finite_probabilities() -> Iterator[None]:
    """Raises a `NoProbabilityError` where torch cannot sample."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise NoProbabilityError(
            "the model's probabilities are NaN or infinite; look for NaN in its weights, or for weights that are huge"
        ) from error


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Keeps the model in evaluation mode, then restores its mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def grade(
    answers: list[Answer], rows: Dataset, graders: dict[str, Grader], group_by: str | None = None
) -> dict[str, float]:
    """Stop rate, mean length in tokens, and each grader's mean: overall and by the column `group_by`.

    Empty if there are no answers.
    """
    if not answers:
        return {}
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


def distinctness(answers: list[Answer]) -> dict[str, float]:
    """Share of distinct answers, and of distinct bigrams among all pairs of neighboring tokens."""
    pairs = Counter(pair for answer in answers for pair in zip(answer.token_ids, answer.token_ids[1:], strict=False))
    return {
        "distinct_answers": len({answer.text for answer in answers}) / len(answers),
        "distinct_bigrams": len(pairs) / max(1, pairs.total()),
    }


def share_of(num_rows: int, processes: Accelerator | PartialState) -> list[int]:
    """This process's rows. Each process gets equally many, to keep sharded models in step; some rows come twice."""
    world = processes.num_processes
    return [i % num_rows for i in range(processes.process_index, -(-num_rows // world) * world, world)]


def gather_rows(mine: list[int], results: list, num_rows: int) -> list:
    """All processes' results on their `share_of` the rows, in the order of the rows; each process gets them all."""
    gathered = dict(gather_object(list(zip(mine, results, strict=True))))
    return [gathered[i] for i in range(num_rows)]


def sample_held_out(
    trainer: Trainer, wrapped_model: torch.nn.Module, prompts: list[list[dict[str, str]]], max_new_tokens: int
) -> list[Answer]:
    """Answers at temperature 1 from a model that the trainer holds; each process samples its share of the prompts."""
    if not prompts:
        return []
    mine = share_of(len(prompts), trainer.accelerator)
    with unwrap_model_for_generation(
        wrapped_model, trainer.accelerator, gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs
    ) as model:
        answers = sample_answers(
            model,
            trainer.processing_class,
            [prompts[i] for i in mine],
            max_new_tokens,
            batch_size=trainer.args.per_device_eval_batch_size,
            seed=trainer.args.seed,
        )
    return gather_rows(mine, answers, len(prompts))
