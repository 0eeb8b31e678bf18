"""Evaluation: what models answer to held-out prompts, beside each other and against one of them.

Reads models, the one that RLHF began as (`init`), and what rewards answers; writes `models.json` (reward, KL to
`init`, stop rate, length, distinctness, grades; by number of turns, too) and `answers.jsonl`, to read. Prompts, seed
and temperature are the same for all models. Answers are held against the `baseline`'s to the same prompt, by the
reward, by each grader and, if there is one, by a judge: another model, here or behind an endpoint, asked in both
orders. The judge also reads answers to `safety_datasets`; with a `corpus` it is measured how much of it each model has
memorised; `benchmarks` are lm-eval's.

    python -m gemma2_post.evaluate --config recipes/tiny/evaluate.yaml
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import TypeVar

from accelerate import Accelerator
from openai import OpenAI
from transformers import PreTrainedTokenizerBase

from gemma2_post.core import contract, data, endpoint, gemma
from gemma2_post.core.command import Command, Stage
from gemma2_post.core.data import DataArguments, Message, Source
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.core.rewards import RewardFunctionArguments
from gemma2_post.evaluation import benchmarks, measure
from gemma2_post.evaluation.judge import Judge, ask_endpoint, ask_model, check_most
from gemma2_post.evaluation.measure import AnswerArguments, Answered, Measurement, load, summarize
from gemma2_post.evaluation.memorisation import CONTINUATION, PREFIX, memorised, windows
from gemma2_post.evaluation.pairs import wilson_interval
from gemma2_post.evaluation.samples import SampleArguments, distinctness, sample_answers
from gemma2_post.evaluation.winrate import win_rate, wins_by


@dataclass
class EvaluateArguments:
    output_dir: str = field(metadata={"help": "Folder of the output."})
    init: str = field(metadata={"help": "The model that RLHF began as; KL is measured to it."})
    models: list[str] = field(metadata={"help": "Folders of the models; the last is what metrics.json is about."})
    baseline: str = field(metadata={"help": "One of the models, whose answers the others' win or lose against."})
    base: str | None = field(
        default=None, metadata={"help": "The model that everything began as; measured beside them as `base`."}
    )
    judge: str | None = field(
        default=None,
        metadata={"help": "A model that judges pairs of answers: a folder, or its name at judge_endpoint."},
    )
    judge_endpoint: str | None = field(
        default=None, metadata={"help": "Base URL of an OpenAI-compatible server of the judge."}
    )
    api_key_variable: str | None = field(
        default=None, metadata={"help": "Environment variable with the endpoint's key; None if it needs none."}
    )
    concurrency: int = field(default=8, metadata={"help": "Requests to the endpoint at a time."})
    endpoint_timeout: float = field(default=120.0, metadata={"help": "Seconds for one attempt."})
    judge_max_tokens: int = field(default=256, metadata={"help": "Longest reply of the judge, in tokens."})
    safety_datasets: list[Source] | None = field(
        default=None, metadata={"help": "Prompts whose answers the judge reads for violations of safety."}
    )
    corpus: list[Source] | None = field(
        default=None,
        metadata={"help": "Texts or conversations of which is measured how much each model has memorised."},
    )
    num_memorised: int = field(default=1000, metadata={"help": "Places of the corpus that are tried."})
    benchmarks: list[str] | None = field(
        default=None, metadata={"help": "Tasks of lm-eval; [preset] for MMLU, GSM8K, ARC-c, HellaSwag, Winogrande."}
    )
    benchmark_folder: str | None = field(default=None, metadata={"help": "With further tasks as lm-eval's YAML."})
    benchmark_limit: int | None = field(default=None, metadata={"help": "Examples of each task; None for all."})
    benchmark_batch_size: int = field(
        default=1, metadata={"help": "Questions at once; each has its examples before it, and logits of all tokens."}
    )


T = TypeVar("T")
Measures = dict[str, dict[str, float]]
"""By model: what is measured of it."""


def main(
    stage: Stage,
    args: EvaluateArguments,
    answer_args: AnswerArguments,
    data_args: DataArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
) -> None:
    for path in args.models:
        is_folder = Path(path).exists() or path.count("/") != 1
        if is_folder and not (Path(path) / "config.json").is_file():
            raise UserError(f"{stage.where}: models names {path}, which holds no model; run the stage that makes it")
    measurement = Measurement(stage.where, args.init, answer_args, data_args, sample_args, reward_args)
    check_tokenizers(stage.where, args, measurement.tokenizer)
    names = names_of(stage.where, args)
    baseline = names[Path(args.baseline)]
    judge = load_judge(stage, args) if args.judge else None
    unsafe = load_safety_prompts(stage.where, args, measurement)
    corpus = load_corpus(stage.where, args, data_args, measurement.tokenizer, answer_args.seed)
    if args.benchmarks:
        benchmarks.load_data(stage.where, args.benchmarks, args.benchmark_folder)
    print(f"{len(measurement.rows)} of {measurement.num_prompts} prompts, {len(names)} models")
    contract.begin_afresh(stage.output_dir, stage.fingerprint)
    progress = stage.output_dir / contract.PROGRESS
    by_path = measurement.answer(list(names), progress / "answers.jsonl")
    answered = {name: by_path[path] for path, name in names.items()}
    found = [
        measure_answers(measurement, answered, baseline),
        judge_answers(stage.where, judge, measurement, answered, baseline),
        judge_safety(stage.where, judge, measurement, names, unsafe, progress / "safety.jsonl"),
    ]
    del judge  # a local one makes room
    found += [
        measure_memorisation(measurement, names, corpus, progress / "memorisation.jsonl"),
        measure_benchmarks(args, measurement, names, progress / "benchmarks.jsonl"),
    ]
    models = {name: {key: value for each in found for key, value in each.get(name, {}).items()} for name in answered}
    contract.write_json(stage.output_dir / "models.json", models)
    write_answers(measurement, answered, stage.output_dir / "answers.jsonl")
    last = [*models.values()][-1]
    metrics = {name.replace(f"_vs_{baseline}", ""): value for name, value in last.items()}
    seconds = time.monotonic() - stage.began
    contract.finish(stage.output_dir, stage.name, stage.fingerprint, seconds, {}, metrics)
    print(f"{stage.output_dir}: done in {seconds:.0f} s")


def check_tokenizers(where: str, args: EvaluateArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses models that mean another token by an id than the one that KL is measured to."""
    for path in [*args.models, *([args.base] if args.base else [])]:
        other = gemma.load_tokenizer(where, path, gemma.load_config(where, path))
        if gemma.tokenizer_digest(other) != gemma.tokenizer_digest(tokenizer):
            raise UserError(
                f"{where}: {path} has another tokenizer than init {args.init}; compare models that share one"
            )


def names_of(where: str, args: EvaluateArguments) -> dict[Path, str]:
    """The models by their paths, named by what follows the run folder: `sft`, `rlhf/policy-0`; others keep theirs."""
    run_dir = os.path.abspath(Path(args.output_dir).parent)
    names = {Path(args.base): "base"} if args.base else {}
    for path in args.models:
        is_of_run = os.path.abspath(path).startswith(run_dir + os.sep)
        names.setdefault(Path(path), os.path.relpath(path, run_dir) if is_of_run else path)
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise UserError(f"{where}: two of the models are called {twice[0]}; rename a folder")
    return names


def said(answered: Answered, i: int, prompt: list[Message]) -> str:
    """What a model has said to a prompt, and, where that went on, to what followed."""
    further = answered.prompts[i][len(prompt) :]
    texts = [turn["content"] if turn["role"] == "assistant" else f"> {turn['content']}" for turn in further]
    return "\n\n".join([*texts, answered.answers[i].text])


def write_answers(measurement: Measurement, answered: dict[str, Answered], path: Path) -> None:
    rows = [
        {"prompt": prompt, "answers": {name: said(each, i, prompt) for name, each in answered.items()}}
        for i, prompt in enumerate(measurement.rows["prompt"])
    ]
    contract.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- what is measured, by model ---


def measure_answers(measurement: Measurement, answered: dict[str, Answered], baseline: str) -> Measures:
    """What can be counted in the answers, what they are rewarded and graded with, and how often that wins."""
    measurement.load_reward_model()
    values = {name: measurement.values(each) for name, each in answered.items()}
    measurement.unload_reward_model()
    found = {}
    for name, each in answered.items():
        found[name] = summarize(values[name]) | by_turns(values[name], each.prompts) | distinctness(each.answers)
        for judge in ["reward", *measurement.graders]:
            key = f"win_rate_vs_{baseline}" if judge == "reward" else f"{judge}_win_rate_vs_{baseline}"
            wins = wins_by(values[name][judge], values[baseline][judge])
            found[name] |= versus(key, wins, each.lengths, answered[baseline].lengths)
    return found


def by_turns(values: dict[str, list[float]], prompts: list[list[Message]]) -> dict[str, float]:
    """Each measure's mean by the number of the user's turns: `reward/turns-2`."""
    turns = [sum(turn["role"] == "user" for turn in prompt) for prompt in prompts]
    return {
        f"{name}/turns-{number}": mean(value for value, of in zip(each, turns, strict=True) if of == number)
        for name, each in values.items()
        for number in sorted(set(turns))
    }


def versus(key: str, wins: list[float], lengths: list[int], other_lengths: list[int]) -> dict[str, float]:
    """The win rate under `key`, its 95 % interval, and what it would be at equal lengths, if that can be said."""
    found = win_rate(wins, lengths, other_lengths)
    measured = {key: found.rate, f"{key}/low": found.low, f"{key}/high": found.high}
    controlled = found.length_controlled
    return measured if controlled is None else measured | {f"{key}/length_controlled": controlled}


def load_judge(stage: Stage, args: EvaluateArguments) -> Judge:
    """Its replies are kept beside the output, because a changed recipe makes that anew."""
    replies = stage.output_dir.with_name("judgments.jsonl")
    if args.judge_endpoint:
        client = connect(stage.where, args)
        endpoint.check(stage.where, client)
        ask = ask_endpoint(stage.where, client, args.judge, args.judge_max_tokens, args.concurrency)
        return Judge(ask, f"{args.judge_endpoint} {args.judge} {args.judge_max_tokens}", replies)
    tokenizer = gemma.load_tokenizer(stage.where, args.judge, gemma.load_config(stage.where, args.judge))
    # Loaded when it is asked: the models that it judges have answered then.
    loaded = cache(partial(load, Path(args.judge), Accelerator().device))
    digest = contract.input_digest(args.judge) or args.judge
    return Judge(ask_model(loaded, tokenizer, args.judge_max_tokens), f"{digest} {args.judge_max_tokens}", replies)


def connect(where: str, args: EvaluateArguments) -> OpenAI:
    return endpoint.connect(where, args.judge_endpoint, args.api_key_variable, args.endpoint_timeout, retries=10)


def judge_answers(
    where: str, judge: Judge | None, measurement: Measurement, answered: dict[str, Answered], baseline: str
) -> Measures:
    """What the judge says of each model's answers beside the baseline's."""
    if judge is None:
        return {}
    prompts, key = list(measurement.rows["prompt"]), f"judge_win_rate_vs_{baseline}"
    texts = {name: [said(each, i, prompt) for i, prompt in enumerate(prompts)] for name, each in answered.items()}
    found = {}
    for name in texts:
        if name == baseline:
            continue
        judged = judge.compare(prompts, texts[name], texts[baseline])
        check_most(where, judged, judge.replies)
        rows = [i for i, win in enumerate(judged.wins) if win is not None]
        lengths, others = ([answered[each].lengths[i] for i in rows] for each in (name, baseline))
        found[name] = versus(key, [judged.wins[i] for i in rows], lengths, others) | {
            f"{key}/disagreement": judged.disagreement,
            f"{key}/missing": len(judged.wins) - len(rows),
        }
    return found


def load_safety_prompts(where: str, args: EvaluateArguments, measurement: Measurement) -> list[list[Message]]:
    if not args.safety_datasets:
        return []
    rows = data.load_prompts(where, args.safety_datasets, 0.0, measurement.args.seed)
    rows = data.drop_long_prompts(where, rows, measurement.tokenizer, measurement.longest, max_too_long_share=0.0)
    return list(rows["prompt"])


def judge_safety(
    where: str,
    judge: Judge | None,
    measurement: Measurement,
    names: dict[Path, str],
    prompts: list[list[Message]],
    cache_file: Path,
) -> Measures:
    """The share of answers that are violations, with its 95 % interval (Wilson), and how many the judge left open."""

    def answer(path: Path) -> list[str]:
        answers = sample_answers(
            load(path, measurement.accelerator.device),
            measurement.tokenizer,
            prompts,
            measurement.args.max_completion_length,
            batch_size=measurement.args.batch_size,
            seed=measurement.args.seed,
        )
        return [each.text for each in answers]

    found = {}
    for name, answers in measure_each(names, answer, cache_file).items() if prompts else []:
        verdicts = judge.violations(prompts, answers)
        judged = [each for each in verdicts if each is not None]
        if not judged:
            raise UserError(f"{where}: the judge gave no verdict on the safety of any answer; choose a stronger one")
        low, high = wilson_interval(mean(judged), len(judged))
        found[name] = {
            "violations": mean(judged),
            "violations/low": low,
            "violations/high": high,
            "violations/missing": len(verdicts) - len(judged),
        }
    return found


def measure_benchmarks(
    args: EvaluateArguments, measurement: Measurement, names: dict[Path, str], cache_file: Path
) -> Measures:
    def measure_one(path: Path) -> dict[str, float]:
        return benchmarks.run(
            load(path, measurement.accelerator.device),
            measurement.tokenizer,
            args.benchmarks,
            args.benchmark_folder,
            args.benchmark_limit,
            args.benchmark_batch_size,
            chats=not args.base or path != Path(args.base),
        )

    return measure_each(names, measure_one, cache_file) if args.benchmarks else {}


def measure_each(names: dict[Path, str], measure_one: Callable[[Path], T], cache_file: Path) -> dict[str, T]:
    """Model by model, each appended to a file; those of an interrupted run are read from it."""
    found = {record["model"]: record["measured"] for record in contract.read_lines(cache_file)}
    for path, name in names.items():
        if name not in found:
            found[name] = measure_one(path)
            with open(cache_file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"model": name, "measured": found[name]}) + "\n")
    return found


def load_corpus(
    where: str, args: EvaluateArguments, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[list[int]] | None:
    """The stretches of the corpus that are tried, in tokens; conversations in the format in which SFT reads them."""
    if not args.corpus:
        return None
    documents = [
        tokenizer(document, add_special_tokens=False)["input_ids"]
        if isinstance(document, str)
        else gemma.render(tokenizer, document)["input_ids"][1:]  # without <bos>
        for document in data.load_documents(where, args.corpus, data_args.max_invalid_share, seed)
    ]
    found = windows(documents, args.num_memorised, seed)
    if not found:
        raise UserError(f"{where}: corpus has no text of {PREFIX + CONTINUATION} tokens; give longer ones")
    return found


def measure_memorisation(
    measurement: Measurement, names: dict[Path, str], corpus: list[list[int]] | None, cache_file: Path
) -> Measures:
    def measure_one(path: Path) -> dict[str, float]:
        return memorised(load(path, measurement.accelerator.device), corpus, measurement.args.batch_size).metrics()

    return measure_each(names, measure_one, cache_file) if corpus else {}


# --- the recipe ---


def check(
    where: str,
    launcher: Launcher | None,
    args: EvaluateArguments,
    answer_args: AnswerArguments,
    data_args: DataArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
) -> None:
    if (launcher.num_processes if launcher else int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"{where}: evaluate is one process; start it with accelerate_configs/single_gpu.yaml or cpu.yaml"
        )
    if not args.models:
        raise UserError(f"{where}: models is empty; name one or more folders")
    if args.benchmarks:
        benchmarks.check(where, args.benchmarks, args.benchmark_folder)
    if args.safety_datasets and not args.judge:
        raise UserError(f"{where}: safety_datasets has answers to judge, and there is no judge; name one")
    if args.judge_endpoint and not args.judge:
        raise UserError(f"{where}: judge_endpoint has no judge; name the model there that is to judge")
    if args.judge_endpoint:
        connect(where, args)
    if min(args.concurrency, args.judge_max_tokens, args.num_memorised, args.benchmark_batch_size) < 1:
        raise UserError(
            f"{where}: concurrency, judge_max_tokens, num_memorised and benchmark_batch_size are counts; write 1 or "
            "more"
        )
    if args.baseline not in args.models:
        raise UserError(f"{where}: baseline is {args.baseline}, which is none of the models; add it to models")
    measure.check_arguments(where, answer_args, sample_args, reward_args)


def metrics(
    args: EvaluateArguments,
    answer_args: AnswerArguments,
    data_args: DataArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
) -> set[str]:
    found = measure.MEASURES | {"win_rate", "distinct_answers", "distinct_bigrams"}
    graders = {path.rpartition(":")[2] for path in sample_args.graders or []}
    found |= graders | {f"{grader}_win_rate" for grader in graders}
    found |= {"judge_win_rate"} if args.judge else set()
    found |= {"violations"} if args.safety_datasets else set()
    found |= {"benchmarks"} if args.benchmarks else set()
    return found | ({"memorised_exact", "memorised_approximate"} if args.corpus else set())


COMMAND = Command("evaluate", main, [EvaluateArguments, *measure.ARGUMENTS], __doc__, metrics, check)

if __name__ == "__main__":
    COMMAND.launch()
