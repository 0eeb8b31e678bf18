"""Models side by side: all answer the same held-out prompts, at temperature 1 from the same seed.

The reward is the one that training would give; KL is KL(model || start) of whole answers over the full vocabulary, in
nats. The models are loaded one at a time next to the start, and the reward model after they are gone.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from gemma2_post.data.mixture import load_rows
from gemma2_post.data.preparation import drop_too_long
from gemma2_post.data.rows import QUESTION
from gemma2_post.data.turns import Message
from gemma2_post.evaluation import rewards
from gemma2_post.evaluation.answering import partly
from gemma2_post.evaluation.answering.partly import Sample, Sampling
from gemma2_post.evaluation.answering.samples import Answer, PartlyAnswered, load_graders, sample_answers
from gemma2_post.evaluation.answering.side_by_side import side_by_side
from gemma2_post.evaluation.answering.vllm_server import Server, check_program, serving
from gemma2_post.evaluation.divergence import measure_divergence
from gemma2_post.evaluation.keys import MeasureArguments
from gemma2_post.models.arguments import check_prompt_length
from gemma2_post.models.loading import frozen_arguments, load_config, load_model
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.models.tokens import END_OF_TURN
from gemma2_post.stage import contract, digests
from gemma2_post.stage.errors import UserError, located

_ANSWERS = "answers.jsonl"
_RECORD: contract.Keys = {"key": str, "model": str, **dict.fromkeys(("prompts", "answers", "kl", "lengths"), list)}
"""The keys of a model's answers in the file that keeps them."""


@dataclass
class Answered:
    """A model's answers to the held-out prompts."""

    prompts: list[list[Message]]
    """The prompts; in a question of several turns, with the model's own answers to the earlier ones."""
    answers: list[Answer]
    """Answers to the last turn."""
    kl: list[float] | None
    """KL(model || start) on each answer, in nats; its mean estimates the sequence-level KL. None for answers that were
    given elsewhere."""
    lengths: list[int]
    """Tokens of the model's answers to all turns of each prompt."""


class Measurement:
    """Measures models on the same prompts; checks its arguments when it is created, and loads models later."""

    def __init__(self, start: str, measured: MeasureArguments, kept: Path, reward_weights: list[float] | None = None):
        """
        Args:
            start: The model to which KL is measured.
            kept: Folder for answers as they come, and for what vLLM says, if it answers.
            reward_weights: Weights of the rewards, one for each; None: 1 each.

        Raises:
            UserError: Data, tokenizers, graders or rewards do not fit together.
        """
        self.settings = start, measured, kept, reward_weights
        self.start, self.args, self.kept, data_args = start, measured.answers, kept, measured.data
        self.engine: dict[str, object] = {}
        """The version of the program that sampled, if it is not transformers; empty before it has."""
        args, sample_args, reward_args = measured.answers, measured.samples, measured.rewards
        config = load_config(start)
        self.tokenizer = load_tokenizer(start, config)
        self.score = rewards.ModelReward(reward_args, self.tokenizer) if reward_args.reward_model else None
        self.longest = check_prompt_length(
            args.max_prompt_length,
            "max_completion_length",
            args.max_completion_length,
            min(config.max_position_embeddings, self.score.max_length if self.score else 1 << 30),
        )
        settings = data_args.max_invalid_share, args.seed, data_args.columns
        found = load_rows(data_args.datasets, *settings, row_format=QUESTION, tokenizer=self.tokenizer)
        rows = drop_too_long(found, "max_prompt_length", self.longest, data_args.max_too_long_share).dataset()
        if len(data_args.datasets) > 1:
            rows = rows.shuffle(seed=args.seed)  # some of each
        self.num_prompts = len(rows)
        """Number of available prompts; the models answer `num_samples` of them."""
        self.rows = rows.select(range(min(sample_args.num_samples, len(rows))))
        if len(self.rows) < 2:
            raise UserError(f"datasets have {len(self.rows)} prompt, from which no spread can be told; give more")
        self.later: list[list[str]] = list(self.rows["later"])
        self.rows = self.rows.remove_columns("later")
        self.check_conversations(self.rows["prompt"], self.later, "question {}")
        self.columns = {name: self.rows[name] for name in self.rows.column_names if name != "prompt"}
        self.graders, self.group_by = load_graders(sample_args, self.rows), sample_args.group_by
        self.reward_weights = reward_weights
        self.functions = rewards.load_reward_functions(reward_args, self.rows.column_names, self.score, reward_weights)
        if args.engine == "vllm":
            check_program(args.vllm_program)
        self.accelerator = Accelerator()
        disable_progress_bar()  # there would be one for each model that is loaded

    def check_conversations(self, prompts: list[list[Message]], later: list[list[str]], what: str) -> None:
        """Refuses questions that are too long, or may grow too long by their last turn, for the models to read.

        Args:
            what: What a question is called, with `{}` for its number, for the error.
        """
        for i, (prompt, turns) in enumerate(zip(prompts, later, strict=True)):
            users = [[{"role": "user", "content": text}] for text in turns]
            ids = self.tokenizer.apply_chat_template([prompt, *users], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
            longest = sum(map(len, ids)) + len(users) * self.args.max_completion_length
            if longest > self.longest:
                raise UserError(
                    f"{what.format(i)} may have {longest} tokens by its last turn, at most {self.longest} can "
                    "be read; lower max_completion_length, or raise max_prompt_length if that is what limits it"
                )

    def answer(self, models: list[Path]) -> dict[Path, Answered]:
        """The answers of each model.

        What is kept is not sampled again, whatever else has changed, if the model, the start, the prompts, and the
        sampling are the same.
        """
        self.kept.mkdir(exist_ok=True)
        asked = [list(self.rows["prompt"]), self.later, self.sampling, digest_of(Path(self.start))]
        keys = {path: digests.of_text(json.dumps([digest_of(path), *asked])) for path in models}
        is_kept = {record["key"] for record in contract.read_lines(self.kept / _ANSWERS, _RECORD)}
        first: dict[str, Path] = {}  # models with the same content answer once
        for path, key in keys.items():
            first.setdefault(key, path)
        missing = {path: key for key, path in first.items() if key not in is_kept}
        if self.args.answer_processes > 1 and len(missing) > 1:
            done = side_by_side(list(missing.items()), self.args.answer_processes, partial(_begin, *self.settings))
            for _ in tqdm(done, desc="answers", unit="model", total=len(missing)):
                pass  # it is in the file
        elif missing:
            start = load(Path(self.start), self.accelerator.device)
            for path, key in tqdm(missing.items(), desc="answers", unit="model"):
                self.answer_one(path, key, start)
        known: dict[str, Answered] = {}
        for record in contract.read_lines(self.kept / _ANSWERS, _RECORD):
            self.engine |= record.get("engine", {}) if record["key"] in keys.values() else {}
            answers = [Answer(**answer) for answer in record["answers"]]
            known[record["key"]] = Answered(record["prompts"], answers, record["kl"], record["lengths"])
        return {path: known[keys[path]] for path in models}

    def answer_one(self, path: Path, key: str, start: PreTrainedModel) -> None:
        """Lets one model answer, which is freed before the next one is loaded, and keeps its answers.

        Args:
            key: What they are kept under.
        """
        with located(path):
            keep = self._keep(path, key)
            if self.args.engine == "transformers":
                model = load(path, self.accelerator.device)
                answered = self.converse(keep(partial(self._sample, model)))
            else:
                with self._serving(path) as sampling:
                    answered = self.converse(keep(sampling))
                model = load(path, self.accelerator.device)
            found = measure_divergence(self.accelerator, model, start, answered.answers, self.args.batch_size)
            answered = replace(answered, kl=[each.forward for each in found])
            record: dict[str, Any] = {"key": key, "model": str(path)}
            record |= {"answers": [vars(each) for each in answered.answers]}
            record |= {"engine": self.engine} if self.engine else {}
            contract.append_lines(self.kept / _ANSWERS, [vars(answered) | record])
            self.forget(key)

    @contextmanager
    def answering(self, path: Path, key: str) -> Iterator[Sample]:
        """Lets one model answer, by the recipe's engine; the calls of each run must be the same, in the same order.

        Args:
            key: What each answer is kept under as it comes, until `forget`.
        """
        keep = self._keep(path, key)
        if self.args.engine == "transformers":
            yield keep(partial(self._sample, load(path, self.accelerator.device)))
        else:
            with self._serving(path) as sampling:
                yield keep(sampling)

    def forget(self, key: str) -> None:
        """Deletes the answers that were kept one by one; call this once all of them are kept elsewhere."""
        self._partly(key).unlink(missing_ok=True)

    def _keep(self, path: Path, key: str) -> Callable[[Sampling], Sample]:
        return partial(partly.kept, file=self._partly(key), name=path.name)

    def _partly(self, key: str) -> Path:
        return self.kept / "partly" / f"{key}.jsonl"

    @contextmanager
    def _serving(self, path: Path) -> Iterator[Sampling]:
        config, args = load_config(str(path)), self.args
        longest = self.longest + args.max_completion_length
        server = Server(args.vllm_program, str(path), self.kept / "vllm.log", longest, config.num_key_value_heads)
        loaded = partial(load, path, self.accelerator.device)
        with (
            located("engine"),
            serving(server, self.tokenizer, loaded, args.max_completion_length, args.seed) as sampling,
        ):
            self.engine = {"vllm": server.version()}
            yield sampling

    def converse(self, sample: Sample) -> Answered:
        """What a model answers, without KL."""
        prompts, answers = converse(sample, list(self.rows["prompt"]), self.later)
        lengths = [sum(answer.num_tokens for answer in each) for each in answers]
        return Answered(prompts, [each[-1] for each in answers], None, lengths)

    def given(self, texts: list[str]) -> Answered:
        """Answers to the prompts that were given elsewhere, as if the model had ended them itself."""
        answers = [as_answer(self.tokenizer, text, has_ended=True) for text in texts]
        return Answered(list(self.rows["prompt"]), answers, None, [each.num_tokens for each in answers])

    @property
    def sampling(self) -> dict[str, int | str]:
        """What decides a model's answers to given prompts."""
        args = self.args
        if args.engine == "vllm":  # the batches are its own affair
            return {"length": args.max_completion_length, "engine": args.engine, "seed": args.seed}
        return {"length": args.max_completion_length, "batch_size": args.batch_size, "seed": args.seed}

    def _sample(
        self, model: PreTrainedModel, prompts: list[list[Message]], temperature: float, partly: PartlyAnswered
    ) -> list[Answer]:
        args = self.args
        settings = args.max_completion_length, temperature, args.batch_size, args.seed
        return sample_answers(model, self.tokenizer, prompts, *settings, partly=partly)

    def load_reward_model(self) -> None:
        """Loads the reward model, if there is one; call this once all models have answered."""
        if self.score:
            device = self.accelerator.device
            self.score.load(device, lambda model: model.to(device).eval())

    def unload_reward_model(self) -> None:
        """Frees the memory of the reward model."""
        if self.score:
            del self.score.loaded

    def values(self, answered: Answered) -> dict[str, list[float]]:
        """The values of each metric and grader, one for each prompt."""
        ids = [answer.token_ids for answer in answered.answers]
        by_function = rewards.values_of(self.functions, self.tokenizer, answered.prompts, ids, self.columns)
        texts = [answer.text for answer in answered.answers]
        return {
            **({} if answered.kl is None else {"kl_to_init": answered.kl}),
            "reward": rewards.weighted(by_function, self.reward_weights) if by_function else [0.0] * len(ids),
            **{name: grader(completions=texts, **self.columns) for name, grader in self.graders.items()},
            "stop_rate": [float(answer.stopped) for answer in answered.answers],
            "mean_tokens": [float(answer.num_tokens) for answer in answered.answers],
        }


def _begin(*settings: Any) -> Callable[[tuple[Path, str]], None]:
    """Begins to measure in a process beside others; the settings are those of `Measurement`."""
    measurement = Measurement(*settings)
    start = load(Path(measurement.start), measurement.accelerator.device)
    return lambda path_and_key: measurement.answer_one(*path_and_key, start)


def converse(
    sample: Sample, first: list[list[Message]], later: list[list[str]], temperatures: list[float] | None = None
) -> tuple[list[list[Message]], list[list[Answer]]]:
    """The prompt of each question's last turn, with the model's own earlier answers, and its answers by turn.

    Args:
        first: The prompt of each question's first turn.
        later: The user's later turns of each question.
        temperatures: Of each question; None: 1.
    """
    prompts = [list(prompt) for prompt in first]
    answers: list[list[Answer]] = [[] for _ in prompts]
    temperatures = temperatures or [1.0] * len(prompts)
    for turn in range(1 + max(map(len, later))):
        for temperature in sorted(set(temperatures)):
            rows = [i for i, each in enumerate(later) if len(each) >= turn and temperatures[i] == temperature]
            for i in rows if turn else []:
                prompts[i] += [
                    {"role": "assistant", "content": answers[i][-1].text},
                    {"role": "user", "content": later[i][turn - 1]},
                ]
            for i, answer in zip(rows, sample([prompts[i] for i in rows], temperature), strict=True):
                answers[i].append(answer)
    return prompts, answers


def as_answer(tokenizer: PreTrainedTokenizerBase, text: str, has_ended: bool) -> Answer:
    """An answer that another model gave, as if one with this tokenizer had."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Answer(text, [], [*ids, END_OF_TURN] if has_ended else ids)


def digest_of(model: Path) -> str:
    """What a model is: the hash of its folder, or its name on the Hub."""
    return contract.input_digest(str(model)) or str(model)


def load(path: Path, device: torch.device | None = None, quantization: str | None = None) -> PreTrainedModel:
    """Loads a model in bf16, spread over all GPUs; in fp32 on a CPU."""
    device = device or Accelerator().device
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    device_map = "balanced" if torch.cuda.device_count() > 1 else {"": device}
    return load_model(frozen_arguments(str(path), dtype, quantization), device_map).eval()


def summarize(values: dict[str, list[float]]) -> dict[str, float]:
    """Means over the prompts and their standard errors."""
    found = {}
    for name, each in values.items():
        found[name] = mean(each)
        found[f"{name}/standard_error"] = stdev(each) / sqrt(len(each))
    return found
