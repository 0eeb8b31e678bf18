"""Models side by side: all answer the same held-out prompts, at temperature 1 from the same seed.

The reward is the one that training would give; KL is KL(model || start) of whole answers over the full vocabulary, in
nats. The models are loaded one at a time next to the start, and the reward model after they are gone.
"""

import json
from collections import Counter
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from gemma2_post.data.mixture import load_rows
from gemma2_post.data.preparation import drop_too_long
from gemma2_post.data.rows import QUESTION
from gemma2_post.data.turns import Message
from gemma2_post.evaluation import rewards
from gemma2_post.evaluation.divergence import measure_divergence
from gemma2_post.evaluation.keys import MeasureArguments
from gemma2_post.evaluation.samples import Answer, load_graders, sample_answers
from gemma2_post.models.arguments import check_prompt_length
from gemma2_post.models.loading import frozen_arguments, load_config, load_model
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.stage import contract, digests
from gemma2_post.stage.errors import UserError, located

_RECORD: contract.Keys = {"key": str, "model": str, **dict.fromkeys(("prompts", "answers", "kl", "lengths"), list)}
"""The keys of a model's answers in the file that keeps them."""


@dataclass
class Answered:
    """A model's answers to the held-out prompts."""

    prompts: list[list[Message]]
    """The prompts; in a question of several turns, with the model's own answers to the earlier ones."""
    answers: list[Answer]
    """Answers to the last turn."""
    kl: list[float]
    """KL(model || start) on each answer, in nats; its mean estimates the sequence-level KL."""
    lengths: list[int]
    """Tokens of the model's answers to all turns of each prompt."""


class Measurement:
    """Measures models on the same prompts; checks its arguments when it is created, and loads models later."""

    def __init__(self, start: str, measured: MeasureArguments, reward_weights: list[float] | None = None):
        """
        Args:
            start: The model to which KL is measured.
            reward_weights: Weights of the rewards, one for each; None: 1 each.

        Raises:
            UserError: Data, tokenizers, graders or rewards do not fit together.
        """
        self.start, self.args, data_args = start, measured.answers, measured.data
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
        self._check_conversations()
        self.columns = {name: self.rows[name] for name in self.rows.column_names if name != "prompt"}
        self.graders = load_graders(sample_args, self.rows)
        self.reward_weights = reward_weights
        self.functions = rewards.load_reward_functions(reward_args, self.rows.column_names, self.score, reward_weights)
        self.accelerator = Accelerator()
        disable_progress_bar()  # there would be one for each model that is loaded

    def _check_conversations(self) -> None:
        """Refuses questions of several turns that may grow longer than the models can read."""
        for i in [i for i, later in enumerate(self.later) if later]:
            users = [[{"role": "user", "content": text}] for text in self.later[i]]
            turns = [self.rows["prompt"][i], *users]
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            longest = sum(map(len, ids)) + len(users) * self.args.max_completion_length
            if longest > self.longest:
                raise UserError(
                    f"question {i} may have {longest} tokens by its last turn, at most {self.longest} can "
                    "be read; lower max_completion_length, or raise max_prompt_length if that is what limits it"
                )

    def answer(self, models: list[Path], cache: Path) -> dict[Path, Answered]:
        """The answers of each model.

        Args:
            cache: File to which each model's answers are appended. What is there is not sampled again, whatever else
                has changed, if the model, the start, the prompts, and the sampling are the same.
        """
        cache.parent.mkdir(exist_ok=True)
        asked = [list(self.rows["prompt"]), self.later, vars(self.args), digest_of(Path(self.start))]
        keys = {path: digests.of_text(json.dumps([digest_of(path), *asked])) for path in models}
        known: dict[str, Answered] = {}
        for record in contract.read_lines(cache, _RECORD):
            answers = [Answer(**answer) for answer in record["answers"]]
            known[record["key"]] = Answered(record["prompts"], answers, record["kl"], record["lengths"])
        missing = [path for path in models if keys[path] not in known]
        start = load(Path(self.start), self.accelerator.device) if missing else None
        for path in tqdm(missing, desc="answers", unit="model"):
            with located(path):
                found = known[keys[path]] = self._answer_one(path, start)
            record = {"key": keys[path], "model": str(path), "answers": [vars(each) for each in found.answers]}
            contract.append_lines(cache, [vars(found) | record])
        return {path: known[keys[path]] for path in models}

    def _answer_one(self, path: Path, start: PreTrainedModel) -> Answered:
        """Answers turn by turn. The model is freed before the next one is loaded."""
        model = load(path, self.accelerator.device)
        prompts = [list(prompt) for prompt in self.rows["prompt"]]
        answers: dict[int, Answer] = {}
        lengths: Counter[int] = Counter()
        for turn in range(1 + max(map(len, self.later))):
            rows = [i for i, later in enumerate(self.later) if len(later) >= turn]
            for i in rows if turn else []:
                prompts[i] += [
                    {"role": "assistant", "content": answers[i].text},
                    {"role": "user", "content": self.later[i][turn - 1]},
                ]
            sampled = self.sample(model, [prompts[i] for i in rows])
            answers |= dict(zip(rows, sampled, strict=True))
            lengths.update({i: answer.num_tokens for i, answer in zip(rows, sampled, strict=True)})
        last = [answers[i] for i in range(len(prompts))]
        divergences = measure_divergence(self.accelerator, model, start, last, self.args.batch_size)
        kl = [each.forward for each in divergences]
        return Answered(prompts, last, kl, [lengths[i] for i in range(len(prompts))])

    def sample(self, model: PreTrainedModel, prompts: list[list[Message]]) -> list[Answer]:
        """One answer of the model to each prompt."""
        length, batch_size, seed = self.args.max_completion_length, self.args.batch_size, self.args.seed
        return sample_answers(model, self.tokenizer, prompts, length, batch_size=batch_size, seed=seed)

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
            "kl_to_init": answered.kl,
            "reward": rewards.weighted(by_function, self.reward_weights),
            **{name: grader(completions=texts, **self.columns) for name, grader in self.graders.items()},
            "stop_rate": [float(answer.stopped) for answer in answered.answers],
            "mean_tokens": [float(answer.num_tokens) for answer in answered.answers],
        }


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
