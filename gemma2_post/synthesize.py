"""SFT data written by a teacher: prompts in, conversations out.

Reads prompts (conversations lose the model's last turn) and a teacher: a Gemma 2 model, or whatever an
OpenAI-compatible endpoint serves. Writes `data.jsonl`, a data set for `sft`: `messages`, the columns that were asked
for, and in `teacher` who wrote the answer and how it was sampled. An answer is kept if it ended by itself, is a valid
turn, is the best of its prompt (with `reward_model`), and does not repeat another row.

Every answer is appended to `progress/answers.jsonl` as it comes, so that an interrupted run goes on where it was.

    python -m gemma2_post.synthesize --config recipes/tiny/synthesize.yaml
"""

import dataclasses
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from openai import OpenAI
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from gemma2_post.core import contract, data, endpoint, gemma, reward_model
from gemma2_post.core.data import DataArguments, Message
from gemma2_post.core.duplicates import find_duplicates
from gemma2_post.core.errors import UserError
from gemma2_post.core.training import Stage, launch
from gemma2_post.evaluation.samples import sample_answers

REFUSED_KEYS = dict.fromkeys(
    ["held_out_datasets", "held_out_share"], "every prompt is answered; give sft the rows to hold out"
)

Job = tuple[int, int]
"""A prompt's row and the number of the answer to it."""


@dataclass
class SynthesizeArguments:
    output_dir: str = field(metadata={"help": "Folder of the output."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, and of the mixture."})
    num_answers: int = field(default=1, metadata={"help": "Answers sampled to each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, without top-p and top-k; 0 is greedy."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer; what reaches it is dropped."})
    reward_model: str | None = field(
        default=None,
        metadata={"help": "Keeps the best answer to each prompt: a reward model's folder, or module:function."},
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts that a local model answers at once."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts are dropped; None for what a local model's positions allow."}
    )
    endpoint: str | None = field(
        default=None, metadata={"help": "Base URL of an OpenAI-compatible server of model_name_or_path."}
    )
    api_key_variable: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable with the endpoint's key."}
    )
    concurrency: int = field(default=8, metadata={"help": "Requests to the endpoint at a time."})
    endpoint_timeout: float = field(default=120.0, metadata={"help": "Seconds for one attempt."})
    endpoint_retries: int = field(default=5, metadata={"help": "Further attempts, with exponential back-off."})


def main(
    stage: Stage, synthesize_args: SynthesizeArguments, model_args: ModelConfig, data_args: DataArguments
) -> None:
    args = synthesize_args
    check_arguments(stage, args, model_args)
    rewards_of = load_rewards(stage.where, args.reward_model, args.batch_size) if args.reward_model else None
    prompts = data.load_prompts(
        stage.where, data_args.datasets, data_args.max_invalid_share, args.seed, data_args.columns
    )
    if args.endpoint:
        client = endpoint.connect(
            stage.where, args.endpoint, args.api_key_variable, args.endpoint_timeout, args.endpoint_retries
        )
        ask = partial(ask_endpoint, stage, args, model_args, client)
    else:
        config = gemma.load_config(stage.where, model_args.model_name_or_path, model_args.model_revision)
        tokenizer = gemma.load_tokenizer(stage.where, model_args.model_name_or_path, config, model_args.model_revision)
        longest = gemma.check_prompt_length(
            stage.where,
            args.max_prompt_length,
            "max_new_tokens",
            args.max_new_tokens,
            config.max_position_embeddings,
        )
        prompts = data.drop_long_prompts(stage.where, prompts, tokenizer, longest, data_args.max_too_long_share)
        ask = partial(ask_model, stage, args, model_args, tokenizer)

    contract.begin(stage.output_dir, stage.fingerprint)
    progress = stage.output_dir / contract.PROGRESS / "answers.jsonl"
    progress.parent.mkdir(exist_ok=True)
    answers = read_answers(progress)
    num_earlier, began = sum(answer["num_tokens"] for answer in answers.values()), time.monotonic()
    with (
        open(progress, "a", encoding="utf-8") as file,
        tqdm(total=len(prompts) * args.num_answers, initial=len(answers), unit="answer") as bar,
    ):
        for batch in ask(list(prompts["prompt"]), answers):
            file.write("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in batch))
            file.flush()
            answers |= {(answer["row"], answer["sample"]): answer for answer in batch}
            bar.update(len(answers) - bar.n)
    num_tokens = sum(answer["num_tokens"] for answer in answers.values())
    seconds = time.monotonic() - began

    kept, dropped = select(candidates_of(prompts, answers), rewards_of)
    if not kept:
        raise UserError(
            f"{stage.where}: none of the {len(answers)} answers can be kept ({dropped}); if they are cut, raise "
            "max_new_tokens, or choose a teacher that ends its turns"
        )
    sampling = {
        "model": model_args.model_name_or_path,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    write_rows(stage.output_dir / "data.jsonl", kept, sampling)
    counts = {"num_prompts": len(prompts), "num_answers": len(answers), **dropped, "num_kept": len(kept)}
    metrics = counts | {
        "mean_tokens": num_tokens / len(answers),
        "tokens_per_second": (num_tokens - num_earlier) / seconds,
    }
    facts = {"teacher": model_args.model_name_or_path, "teacher_revision": model_args.model_revision}
    wall_seconds = time.monotonic() - stage.began
    contract.finish(stage.output_dir, stage.name, stage.fingerprint, wall_seconds, facts, metrics)
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{stage.output_dir}: done in {wall_seconds:.0f} s; {found}")


def check_arguments(stage: Stage, args: SynthesizeArguments, model_args: ModelConfig) -> None:
    """Refuses what cannot work, or would have no effect."""
    if min(args.num_answers, args.batch_size, args.concurrency, args.max_new_tokens) < 1:
        raise UserError(
            f"{stage.where}: num_answers, batch_size, concurrency and max_new_tokens are counts; write 1 or more"
        )
    if args.temperature < 0 or (args.temperature == 0 and args.num_answers > 1):
        raise UserError(
            f"{stage.where}: temperature {args.temperature:g} with num_answers {args.num_answers} gives no different "
            "answers; write a temperature above 0"
        )
    if args.reward_model and args.num_answers == 1:
        raise UserError(f"{stage.where}: reward_model picks the best of num_answers, which is 1; raise num_answers")
    local = {each.name for each in dataclasses.fields(ModelConfig)} | {"batch_size", "max_prompt_length"}
    without_effect = sorted(stage.fingerprint["recipe"].keys() & local - {"model_name_or_path"})
    if args.endpoint and without_effect:
        raise UserError(f"{stage.where}: {without_effect[0]} has no effect with an endpoint; remove one of them")
    gemma.check_model_arguments(stage.where, model_args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{stage.where}: synthesize is one process; start it with accelerate_configs/single_gpu.yaml (one model "
            "may spread over several GPUs), or serve the teacher with vLLM and name it as endpoint"
        )


# --- asking the teacher ---


def ask_model(
    stage: Stage,
    args: SynthesizeArguments,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    answered: dict[Job, dict],
) -> Iterator[list[dict]]:
    """Answers of a local model, in batches of prompts of like length, the longest first: what does not fit fails soon.

    A batch is always sampled whole, from its own seed: who was interrupted gets the same answers again.
    """
    lengths = [sum(len(message["content"]) for message in prompt) for prompt in prompts]
    jobs = [(row, sample) for row in range(len(prompts)) for sample in range(args.num_answers)]
    jobs.sort(key=lambda job: -lengths[job[0]])
    batches = [jobs[start : start + args.batch_size] for start in range(0, len(jobs), args.batch_size)]
    model = None
    for number, batch in enumerate(batches):
        if all(job in answered for job in batch):
            continue
        model = model or gemma.load_model(stage.where, model_args, device_map="auto")
        sampled = sample_answers(
            model,
            tokenizer,
            [prompts[row] for row, _ in batch],
            args.max_new_tokens,
            args.temperature,
            args.batch_size,
            seed=random.Random(f"{args.seed} {number}").getrandbits(32),
        )
        yield [
            record(job, answer.text, "stop" if answer.stopped else "length", answer.num_tokens)
            for job, answer in zip(batch, sampled, strict=True)
        ]


def ask_endpoint(
    stage: Stage,
    args: SynthesizeArguments,
    model_args: ModelConfig,
    client: OpenAI,
    prompts: list[list[Message]],
    answered: dict[Job, dict],
) -> Iterator[list[dict]]:
    """Answers of an endpoint, one by one as they come; each request has a seed of its own."""

    def ask(job: Job) -> dict:
        row, sample = job
        text, finish_reason, num_tokens = endpoint.answer(
            client,
            f"{stage.where}: prompt in row {row}",
            model_args.model_name_or_path,
            prompts[row],
            args.temperature,
            args.max_new_tokens,
            seed=random.Random(f"{args.seed} {row} {sample}").getrandbits(31),
        )
        return record(job, text.strip(), finish_reason, num_tokens)

    jobs = [(row, sample) for row in range(len(prompts)) for sample in range(args.num_answers)]
    with ThreadPoolExecutor(args.concurrency) as pool:
        asked = [pool.submit(ask, job) for job in jobs if job not in answered]
        try:
            for answer in as_completed(asked):
                yield [answer.result()]
        finally:
            pool.shutdown(cancel_futures=True)


def record(job: Job, text: str, finish_reason: str, num_tokens: int) -> dict:
    row, sample = job
    return {"row": row, "sample": sample, "text": text, "finish_reason": finish_reason, "num_tokens": num_tokens}


def read_answers(path: Path) -> dict[Job, dict]:
    """What an interrupted run has left; a line that it had not finished is taken off the file."""
    if not path.is_file():
        return {}
    written = path.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    answers = [json.loads(line) for line in whole.decode().splitlines()]
    return {(answer["row"], answer["sample"]): answer for answer in answers}


# --- from answers to rows ---


@dataclass
class Candidate:
    """An answer with its prompt, on its way into the data set."""

    row: int
    messages: list[Message]
    columns: dict[str, object]
    sample: int
    finish_reason: str
    reward: float | None = None


def candidates_of(prompts: Dataset, answers: dict[Job, dict]) -> list[Candidate]:
    """All answers, in the order of their prompts."""
    rows = prompts.to_list()
    return [
        Candidate(
            row,
            [*rows[row]["prompt"], {"role": "assistant", "content": answer["text"]}],
            {column: value for column, value in rows[row].items() if column != "prompt"},
            sample,
            answer["finish_reason"],
        )
        for (row, sample), answer in sorted(answers.items())
    ]


def select(
    candidates: list[Candidate], rewards_of: Callable[[list[Candidate]], list[float]] | None
) -> tuple[list[Candidate], dict[str, int]]:
    """What is kept, and how many were dropped for which reason, in this order.

    Unfinished: it did not end by itself. Invalid: empty, or with a control token. Not the best: another answer to the
    same prompt has a higher reward. Duplicates: see `find_duplicates`.

    Args:
        rewards_of: the reward of each candidate; None to keep all answers to a prompt.
    """
    dropped: dict[str, int] = {}

    def keep(candidates: list[Candidate], reason: str, wanted: list[bool]) -> list[Candidate]:
        dropped[f"dropped_{reason}"] = wanted.count(False)
        return [candidate for candidate, is_wanted in zip(candidates, wanted, strict=True) if is_wanted]

    kept = keep(candidates, "unfinished", [candidate.finish_reason == "stop" for candidate in candidates])
    kept = keep(kept, "invalid", [data.is_valid(candidate.messages) for candidate in kept])
    if rewards_of:
        best: dict[int, Candidate] = {}
        for candidate, reward in zip(kept, rewards_of(kept), strict=True):
            candidate.reward = reward
            if candidate.row not in best or reward > best[candidate.row].reward:
                best[candidate.row] = candidate
        kept = keep(kept, "not_best", [best[candidate.row] is candidate for candidate in kept])
    texts = [[message["content"] for message in candidate.messages] for candidate in kept]
    duplicates = find_duplicates([("\n".join(prompt), answer) for *prompt, answer in texts])
    dropped["dropped_exact_duplicate"] = duplicates.count("exact")
    dropped["dropped_near_duplicate"] = duplicates.count("near")
    return [candidate for candidate, duplicate in zip(kept, duplicates, strict=True) if not duplicate], dropped


def write_rows(path: Path, candidates: list[Candidate], sampling: dict[str, object]) -> None:
    """A data set for `sft`: `messages`, the columns, and in `teacher` who wrote the answer, and how."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for candidate in candidates:
            teacher = sampling | {"sample": candidate.sample}
            if candidate.reward is not None:
                teacher["reward"] = candidate.reward
            row = {"messages": candidate.messages, **candidate.columns, "teacher": teacher}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def load_rewards(where: str, path: str, batch_size: int) -> Callable[[list[Candidate]], list[float]]:
    """The reward of candidates, by a function `module:function` (as TRL's reward functions) or by a reward model."""
    if ":" in path:
        function = data.load_function(where, path)

        def by_function(candidates: list[Candidate]) -> list[float]:
            columns = {column: [each.columns[column] for each in candidates] for column in candidates[0].columns}
            return function(completions=[each.messages[-1]["content"] for each in candidates], **columns)

        return by_function
    loaded = reward_model.load(where, path)

    def by_model(candidates: list[Candidate]) -> list[float]:
        # Only now, when a local teacher has left the GPU.
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return reward_model.score(loaded.model, loaded.tokenizer, [each.messages for each in candidates], batch_size)

    return by_model


if __name__ == "__main__":
    launch("synthesize", main, [SynthesizeArguments, ModelConfig, DataArguments], REFUSED_KEYS, __doc__)
