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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from datasets import Dataset
from openai import OpenAI
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from gemma2_post.core import contract, data, digests, endpoint, gemma, reward_model
from gemma2_post.core.command import Command, Stage
from gemma2_post.core.data import DataArguments, Message
from gemma2_post.core.duplicates import find_duplicates
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.evaluation.samples import sample_answers

REFUSED_KEYS = dict.fromkeys(
    ["held_out_datasets", "held_out_share"], "every prompt is answered; give sft the rows to hold out"
)

FIRST_REFUSALS = 20
"""So many refusals and no answer yet mean that something is wrong with the endpoint, not with the prompts."""

Job = tuple[int, int]
"""A prompt's row and the number of the answer to it."""


@dataclass
class SynthesizeArguments:
    output_dir: str = field(metadata={"help": "Folder of the output."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling, and of the mixture."})
    num_answers: int = field(default=1, metadata={"help": "Answers sampled to each prompt."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of sampling, without top-p (top-k: the endpoint's own); 0 is greedy."}
    )
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
    api_key_variable: str | None = field(
        default=None, metadata={"help": "Environment variable with the endpoint's key; None if it needs none."}
    )
    concurrency: int = field(default=8, metadata={"help": "Requests to the endpoint at a time."})
    endpoint_timeout: float = field(default=120.0, metadata={"help": "Seconds for one attempt."})
    endpoint_retries: int = field(
        default=20, metadata={"help": "Further attempts, at most 8 s apart: 20 are about two and a half minutes."}
    )


def main(stage: Stage, args: SynthesizeArguments, model_args: ModelConfig, data_args: DataArguments) -> None:
    local = {each.name for each in dataclasses.fields(ModelConfig)} | {"batch_size", "max_prompt_length"}
    without_effect = sorted(stage.fingerprint["recipe"].keys() & local - {"model_name_or_path"})
    if args.endpoint and without_effect:
        raise UserError(f"{stage.where}: {without_effect[0]} has no effect with an endpoint; remove one of them")
    prompts = data.load_prompts(
        stage.where, data_args.datasets, data_args.max_invalid_share, args.seed, data_args.columns
    )
    if args.endpoint:
        revision = None
        client = endpoint.connect(
            stage.where, args.endpoint, args.api_key_variable, args.endpoint_timeout, args.endpoint_retries
        )
        ask = partial(ask_endpoint, stage, args, model_args, client)
    else:
        config = gemma.load_config(stage.where, model_args.model_name_or_path, model_args.model_revision)
        revision = getattr(config, "_commit_hash", None)
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
    rewards_of = load_rewards(stage.where, args, prompts) if args.reward_model else None

    teacher = {
        "model": model_args.model_name_or_path,
        "revision": revision,
        "quantization": "4bit" if model_args.load_in_4bit else "8bit" if model_args.load_in_8bit else None,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    contract.begin(stage.output_dir, stage.fingerprint)
    progress = stage.output_dir / contract.PROGRESS / "answers.jsonl"
    answers = resume(stage, args, prompts, teacher, progress)
    num_earlier, began = sum(answer["num_tokens"] for answer in answers.values()), time.monotonic()
    with (
        open(progress, "a", encoding="ascii") as file,
        tqdm(total=len(prompts) * args.num_answers, initial=len(answers), unit="answer") as bar,
    ):

        def write(batch: list[dict]) -> None:
            file.write("".join(json.dumps(answer) + "\n" for answer in batch))
            file.flush()
            answers.update({(answer["row"], answer["sample"]): answer for answer in batch})
            bar.update(len(answers) - bar.n)

        ask(list(prompts["prompt"]), dict(answers), write)
    num_tokens = sum(answer["num_tokens"] for answer in answers.values())
    seconds = time.monotonic() - began

    kept, dropped = select(candidates_of(prompts, answers), rewards_of)
    if not kept:
        raise UserError(
            f"{stage.where}: none of the {len(answers)} answers can be kept ({dropped}); if they are cut, raise "
            "max_new_tokens, or choose a teacher that ends its turns"
        )
    write_rows(stage.output_dir / "data.jsonl", kept, teacher)
    counts = {"num_prompts": len(prompts), "num_answers": len(answers), **dropped, "num_kept": len(kept)}
    metrics = counts | {
        "mean_tokens": num_tokens / len(answers),
        "tokens_per_second": (num_tokens - num_earlier) / seconds,
    }
    wall_seconds = time.monotonic() - stage.began
    contract.finish(stage.output_dir, stage.name, stage.fingerprint, wall_seconds, {"teacher": teacher}, metrics)
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{stage.output_dir}: done in {wall_seconds:.0f} s; {found}")


def check(
    where: str, launcher: Launcher | None, args: SynthesizeArguments, model_args: ModelConfig, data_args: DataArguments
) -> None:
    if min(args.num_answers, args.batch_size, args.concurrency, args.max_new_tokens) < 1:
        raise UserError(
            f"{where}: num_answers, batch_size, concurrency and max_new_tokens are counts; write 1 or more"
        )
    if args.temperature < 0 or (args.temperature == 0 and args.num_answers > 1):
        raise UserError(
            f"{where}: temperature {args.temperature:g} with num_answers {args.num_answers} gives no different "
            "answers; write a temperature above 0"
        )
    if args.reward_model and args.num_answers == 1:
        raise UserError(f"{where}: reward_model picks the best of num_answers, which is 1; raise num_answers")
    if not args.endpoint:
        gemma.check_model_arguments(where, model_args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{where}: synthesize is one process; start it with accelerate_configs/single_gpu.yaml (one model "
            "may spread over several GPUs), or serve the teacher with vLLM and name it as endpoint"
        )


# --- asking the teacher ---


def resume(
    stage: Stage, args: SynthesizeArguments, prompts: Dataset, teacher: dict[str, object], path: Path
) -> dict[Job, dict]:
    """The answers that an interrupted run has left, if they were sampled from this teacher for these prompts."""
    path.parent.mkdir(exist_ok=True)
    sampling = teacher | {
        "model_digest": stage.fingerprint["inputs"].get(str(teacher["model"])),
        "endpoint": args.endpoint is not None,
        "num_answers": args.num_answers,
        "batch_size": args.batch_size,
        "prompts": digests.of_text(json.dumps(list(prompts["prompt"]))),
    }
    answers = {(answer["row"], answer["sample"]): answer for answer in contract.read_lines(path)}
    earlier = contract.read_json(path.with_name("sampling.json"))
    if answers and earlier != sampling:
        changes = contract.differences({"": earlier}, {"": sampling})
        raise UserError(
            f"{stage.where}: {path.parent} holds {len(answers)} answers that were sampled in another way "
            f"({'; '.join(changes)}); go back to that, choose another output_dir, or move the folder away"
        )
    contract.write_json(path.with_name("sampling.json"), sampling)
    return answers


def ask_model(
    stage: Stage,
    args: SynthesizeArguments,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    answered: dict[Job, dict],
    write: Callable[[list[dict]], None],
) -> None:
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
        write(
            [
                record(job, answer.text, "stop" if answer.stopped else "length", answer.num_tokens)
                for job, answer in zip(batch, sampled, strict=True)
            ]
        )


def ask_endpoint(
    stage: Stage,
    args: SynthesizeArguments,
    model_args: ModelConfig,
    client: OpenAI,
    prompts: list[list[Message]],
    answered: dict[Job, dict],
    write: Callable[[list[dict]], None],
) -> None:
    """Answers of an endpoint, one by one as they come, also those in flight when something fails.

    Each request has a seed of its own. What the endpoint refuses to answer counts as an answer that is dropped, unless
    it refuses everything.
    """
    lock = Lock()
    num_refused, has_answered = 0, any(answer["finish_reason"] != "refused" for answer in answered.values())

    def ask(job: Job) -> None:
        nonlocal num_refused, has_answered
        row, sample = job
        place = f"{stage.where}: prompt in row {row} ({prompts[row][-1]['content'][:40]!r})"
        seed = random.Random(f"{args.seed} {row} {sample}").getrandbits(31)
        try:
            answer = record(
                job,
                *endpoint.answer(
                    client,
                    place,
                    model_args.model_name_or_path,
                    prompts[row],
                    args.temperature,
                    args.max_new_tokens,
                    seed,
                ),
            )
        except endpoint.RefusedError as refusal:
            answer = record(job, "", "refused", 0)
            with lock:
                num_refused += 1
                if num_refused >= FIRST_REFUSALS and not has_answered:
                    raise UserError(
                        f"{place}: {refusal}, as all {num_refused} before; check endpoint and model_name_or_path"
                    ) from refusal
        with lock:
            has_answered = has_answered or answer["finish_reason"] != "refused"
            write([answer])

    jobs = [(row, sample) for row in range(len(prompts)) for sample in range(args.num_answers)]
    with ThreadPoolExecutor(args.concurrency) as pool:
        asked = [pool.submit(ask, job) for job in jobs if job not in answered]
        try:
            for each in as_completed(asked):
                each.result()
        finally:
            pool.shutdown(cancel_futures=True)


def record(job: Job, text: str, finish_reason: str, num_tokens: int) -> dict:
    row, sample = job
    return {"row": row, "sample": sample, "text": text, "finish_reason": finish_reason, "num_tokens": num_tokens}


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

    Refused: the endpoint would not answer. Unfinished: it did not end by itself. Invalid: empty, or with a control
    token. Not the best: another answer to the same prompt has a higher reward. Duplicates: see `find_duplicates`.

    Args:
        rewards_of: the reward of each candidate; None to keep all answers to a prompt.
    """
    dropped: dict[str, int] = {}

    def keep(candidates: list[Candidate], reason: str, wanted: list[bool]) -> list[Candidate]:
        dropped[f"dropped_{reason}"] = wanted.count(False)
        return [candidate for candidate, is_wanted in zip(candidates, wanted, strict=True) if is_wanted]

    kept = keep(candidates, "refused", [candidate.finish_reason != "refused" for candidate in candidates])
    kept = keep(kept, "unfinished", [candidate.finish_reason == "stop" for candidate in kept])
    kept = keep(kept, "invalid", [data.is_valid(candidate.messages) for candidate in kept])
    if rewards_of and kept:
        best: dict[int, Candidate] = {}
        for candidate, reward in zip(kept, rewards_of(kept), strict=True):
            candidate.reward = reward
            if candidate.row not in best or reward > best[candidate.row].reward:
                best[candidate.row] = candidate
        kept = keep(kept, "not_best", [best[candidate.row] is candidate for candidate in kept])
    texts = [[message["content"] for message in candidate.messages] for candidate in kept]
    duplicates = find_duplicates([("\n".join(history), question, answer) for *history, question, answer in texts])
    dropped["dropped_exact_duplicate"] = duplicates.count("exact")
    dropped["dropped_near_duplicate"] = duplicates.count("near")
    return [candidate for candidate, duplicate in zip(kept, duplicates, strict=True) if not duplicate], dropped


def write_rows(path: Path, candidates: list[Candidate], teacher: dict[str, object]) -> None:
    """A data set for `sft`: `messages`, the columns, and in `teacher` who wrote the answer, and how."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for candidate in candidates:
            written_by = teacher | {"sample": candidate.sample}
            if candidate.reward is not None:
                written_by["reward"] = candidate.reward
            row = {"messages": candidate.messages, **candidate.columns, "teacher": written_by}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def load_rewards(where: str, args: SynthesizeArguments, prompts: Dataset) -> Callable[[list[Candidate]], list[float]]:
    """The reward of candidates, by a function `module:function` (as TRL's reward functions) or by a reward model."""
    if ":" in args.reward_model:
        columns = [column for column in prompts.column_names if column != "prompt"]
        function = data.load_grader(where, args.reward_model, columns)

        def by_function(candidates: list[Candidate]) -> list[float]:
            values = {column: [each.columns[column] for each in candidates] for column in columns}
            return function(completions=[each.messages[-1]["content"] for each in candidates], **values)

        return by_function
    loaded = reward_model.load(where, args.reward_model)

    def by_model(candidates: list[Candidate]) -> list[float]:
        # Only now, when a local teacher has left the GPU.
        loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return reward_model.score(
            loaded.model, loaded.tokenizer, [each.messages for each in candidates], args.batch_size
        )

    return by_model


def metrics(args: SynthesizeArguments, *_: object) -> set[str]:
    dropped = ("refused", "unfinished", "invalid", "not_best", "exact_duplicate", "near_duplicate")
    counts = {"num_prompts", "num_answers", "num_kept", *(f"dropped_{reason}" for reason in dropped)}
    return counts | {"mean_tokens", "tokens_per_second"}


COMMAND = Command(
    "synthesize",
    main,
    [SynthesizeArguments, ModelConfig, DataArguments],
    __doc__,
    metrics,
    check,
    gemma.REFUSED_KEYS | REFUSED_KEYS,
)

if __name__ == "__main__":
    COMMAND.launch()
