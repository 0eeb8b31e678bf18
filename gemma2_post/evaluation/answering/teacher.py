"""A teacher's answers, from a local model or an endpoint, written to disk as they come, and their rewards."""

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from openai import OpenAI
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from gemma2_post.data.functions import load_grader
from gemma2_post.data.selection import Candidate
from gemma2_post.data.turns import Message
from gemma2_post.evaluation.answering.endpoint import Completion, Endpoint, RefusedError, Request
from gemma2_post.evaluation.answering.samples import Answer, PartlyAnswered, sample_answers
from gemma2_post.evaluation.answering.side_by_side import side_by_side
from gemma2_post.evaluation.answering.vllm_server import Server, serving
from gemma2_post.evaluation.judging.judge import Judge
from gemma2_post.evaluation.judging.rubrics import grading
from gemma2_post.evaluation.keys import SynthesisArguments
from gemma2_post.models import reward_model
from gemma2_post.models.loading import load_config, load_model

Job = tuple[int, int]
"""A prompt's row, and which of its answers."""


def jobs_of(args: SynthesisArguments, prompts: list[list[Message]]) -> list[Job]:
    """All answers that are wanted."""
    return [(row, sample) for row in range(len(prompts)) for sample in range(args.num_answers)]


def ask_model(
    args: SynthesisArguments,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    answered: dict[Job, dict],
    write: Callable[[list[dict]], None],
) -> None:
    """Answers of a local model, in batches of prompts of similar length; the longest come first, to fail early.

    Each batch is sampled as a whole from its own seed, so an interrupted run gets the same answers again, and several
    processes get those of one.
    """
    lengths = [sum(len(message["content"]) for message in prompt) for prompt in prompts]
    jobs = sorted(jobs_of(args, prompts), key=lambda job: -lengths[job[0]])
    batches = [jobs[start : start + args.batch_size] for start in range(0, len(jobs), args.batch_size)]
    missing = [each for each in enumerate(batches) if not all(job in answered for job in each[1])]
    begin = partial(_load, args, model_args, tokenizer, prompts)
    if args.answer_processes > 1 and len(missing) > 1:
        for records in side_by_side(missing, args.answer_processes, begin):
            write(records)
    elif missing:
        answer = begin()
        for each in missing:
            write(answer(each))


def _load(
    args: SynthesisArguments, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, prompts: list[list[Message]]
) -> Callable[[tuple[int, list[Job]]], list[dict]]:
    """Loads the model, which then answers batches, each given with its number."""
    model = load_model(model_args, device_map="auto")

    def answer(numbered: tuple[int, list[Job]]) -> list[dict]:
        number, batch = numbered
        asked = [prompts[row] for row, _ in batch]
        settings = args.max_new_tokens, args.temperature, args.batch_size
        seed = random.Random(f"{args.seed} {number}").getrandbits(32)
        sampled = sample_answers(model, tokenizer, asked, *settings, seed)
        return [record_of(job, each) for job, each in zip(batch, sampled, strict=True)]

    return answer


def ask_vllm(
    args: SynthesisArguments,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    log: Path,
    prompts: list[list[Message]],
    answered: dict[Job, dict],
    write: Callable[[list[dict]], None],
) -> None:
    """Answers of a local model by vLLM, written as they come; each has the seed of its place among all of them.

    Args:
        log: File for what vLLM says.
    """
    jobs = jobs_of(args, prompts)
    given = {i: Answer(answered[job]["text"], [], []) for i, job in enumerate(jobs) if job in answered}
    if len(given) == len(jobs):
        return
    name, config = model_args.model_name_or_path, load_config(model_args.model_name_or_path)
    server = Server(args.vllm_program, name, log, config.max_position_embeddings, config.num_key_value_heads)

    def write_some(answers: dict[int, Answer], _: list[str]) -> None:
        write([record_of(jobs[number], each) for number, each in answers.items()])

    load = partial(load_model, model_args, "auto")
    with serving(server, tokenizer, load, args.max_new_tokens, args.seed) as sample:
        sample([prompts[row] for row, _ in jobs], args.temperature, PartlyAnswered(given, write=write_some))


def ask_endpoint(
    args: SynthesisArguments,
    model: str,
    client: OpenAI,
    prompts: list[list[Message]],
    answered: dict[Job, dict],
    write: Callable[[list[dict]], None],
) -> None:
    """Answers of an endpoint, written as they come, even those in flight when something fails.

    Each request has its own seed. A refusal counts as an answer to be dropped, unless the endpoint refuses everything.
    """
    missing = [job for job in jobs_of(args, prompts) if job not in answered]
    requests = [
        Request(
            f"prompt in row {row} ({prompts[row][-1]['content'][:40]!r})",
            prompts[row],
            args.temperature,
            args.max_new_tokens,
            seed=random.Random(f"{args.seed} {row} {sample}").getrandbits(31),
        )
        for row, sample in missing
    ]

    def write_one(number: int, said: Completion | RefusedError) -> None:
        if isinstance(said, RefusedError):
            write([record(missing[number], "", "refused", 0)])
        else:
            write([record(missing[number], said.text, said.finish_reason, said.completion_tokens)])

    has_answered = any(answer["finish_reason"] != "refused" for answer in answered.values())
    Endpoint(client, model, has_answered=has_answered).answer_all(requests, args.server.concurrency, write_one)


def record_of(job: Job, answer: Answer) -> dict:
    """The JSON record of a model's answer."""
    return record(job, answer.text, "stop" if answer.stopped else "length", answer.num_tokens)


def record(job: Job, text: str, finish_reason: str, num_tokens: int) -> dict:
    """The JSON record of an answer."""
    return {"row": job[0], "sample": job[1], "text": text, "finish_reason": finish_reason, "num_tokens": num_tokens}


def load_rewards(
    args: SynthesisArguments, prompts: Dataset, judge: Judge | None = None
) -> Callable[[list[Candidate]], Sequence[float | None]]:
    """A function that rewards candidates: a judge's grades, the user's `module:function` (called like TRL's), or a
    reward model."""
    if judge:

        def by_judge(candidates: list[Candidate]) -> list[float | None]:
            with closing(judge):
                questions = [grading(each.messages[:-1], each.messages[-1]["content"], None) for each in candidates]
                grades = judge.grades(questions)
                judge.check_most(grades.count(None), len(grades), "answers")
            return grades

        return by_judge
    assert args.reward_model is not None, "called only for recipes that name one"
    if ":" in args.reward_model:
        columns = [column for column in prompts.column_names if column != "prompt"]
        function = load_grader(args.reward_model, columns)

        def by_function(candidates: list[Candidate]) -> list[float]:
            values = {column: [each.columns[column] for each in candidates] for column in columns}
            return function(completions=[each.messages[-1]["content"] for each in candidates], **values)

        return by_function
    loaded = reward_model.load(args.reward_model)

    def by_model(candidates: list[Candidate]) -> list[float | None]:
        # Moved only now: a local teacher has left the GPU.
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        ids = [reward_model.conversation_ids(loaded.tokenizer, each.messages) for each in candidates]
        readable = [each for each in ids if len(each) <= loaded.max_length]
        scores = iter(reward_model.score_ids(loaded.model, readable, args.batch_size))
        return [next(scores) if len(each) <= loaded.max_length else None for each in ids]

    return by_model
