"""Models beside each other: all answer the same held-out prompts, at temperature 1 from the same seed.

Reward is what training would have given; KL is KL(model || start) of whole answers over the full vocabulary, in nats.
Models are loaded one after the other beside the start, the reward model when they are gone.
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
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from gemma2_post.data.preparation import drop_long_prompts
from gemma2_post.data.rows import Message
from gemma2_post.data.sources import load_questions
from gemma2_post.evaluation import rewards
from gemma2_post.evaluation.divergence import measure_divergence
from gemma2_post.evaluation.keys import MeasureArguments
from gemma2_post.evaluation.samples import Answer, load_graders, sample_answers
from gemma2_post.models.arguments import check_prompt_length
from gemma2_post.models.loading import generation_config, load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError


@dataclass
class Answered:
    prompts: list[list[Message]]
    """With the answers of the model itself to the earlier turns, where a question has several."""
    answers: list[Answer]
    """To the last turn."""
    kl: list[float]
    """KL(model || start) at each answer, in nats; its mean estimates that of whole answers."""
    lengths: list[int]
    """In tokens, of all that the model has said to a prompt and to what followed."""


class Measurement:
    """Checked when it is made; models are loaded afterwards."""

    def __init__(self, start: str, measured: MeasureArguments):
        """
        Args:
            start: the model that KL is measured to.

        Raises:
            UserError: data, tokenizers, graders or rewards that do not go together.
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
        rows = load_questions(data_args.datasets, data_args.max_invalid_share, args.seed, data_args.columns)
        rows = drop_long_prompts(rows, self.tokenizer, self.longest, data_args.max_too_long_share)
        if len(data_args.datasets) > 1:
            rows = rows.shuffle(seed=args.seed)  # some of each
        self.num_prompts = len(rows)
        """That there are, of which `num_samples` are answered."""
        self.rows = rows.select(range(min(sample_args.num_samples, len(rows))))
        if len(self.rows) < 2:
            raise UserError(f"datasets have {len(self.rows)} prompt, from which no spread can be told; give more")
        self.later: list[list[str]] = list(self.rows["later"])
        self.rows = self.rows.remove_columns("later")
        self._check_conversations()
        self.columns = {name: self.rows[name] for name in self.rows.column_names if name != "prompt"}
        self.graders = load_graders(sample_args, self.rows)
        self.functions = rewards.load_reward_functions(reward_args, self.rows.column_names, self.score)
        self.accelerator = Accelerator()
        disable_progress_bar()  # of loading each of many models

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
        """What each model answers.

        Args:
            cache: file to which each model's answers are appended; those of an interrupted run are read from it.
        """
        cache.parent.mkdir(exist_ok=True)
        found: dict[Path, Answered] = {}
        for record in contract.read_lines(cache):
            answers = [Answer(**answer) for answer in record["answers"]]
            found[Path(record["model"])] = Answered(record["prompts"], answers, record["kl"], record["lengths"])
        missing = [path for path in models if path not in found]
        start = load(Path(self.start), self.accelerator.device) if missing else None
        for path in tqdm(missing, desc="answers", unit="model"):
            found[path] = self._answer_one(path, start)
            record = vars(found[path]) | {"model": str(path), "answers": [vars(each) for each in found[path].answers]}
            with open(cache, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return found

    def _answer_one(self, path: Path, start: PreTrainedModel) -> Answered:
        """Turn by turn. The model is gone when the next one is loaded."""
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
            sampled = sample_answers(
                model,
                self.tokenizer,
                [prompts[i] for i in rows],
                self.args.max_completion_length,
                batch_size=self.args.batch_size,
                seed=self.args.seed,
            )
            answers |= dict(zip(rows, sampled, strict=True))
            lengths.update({i: answer.num_tokens for i, answer in zip(rows, sampled, strict=True)})
        last = [answers[i] for i in range(len(prompts))]
        divergences = measure_divergence(self.accelerator, model, start, last, self.args.batch_size)
        kl = [each.forward for each in divergences]
        return Answered(prompts, last, kl, [lengths[i] for i in range(len(prompts))])

    def load_reward_model(self) -> None:
        """Once all models have answered."""
        if self.score:
            self.score.load(lambda model: model.to(self.accelerator.device).eval())

    def unload_reward_model(self) -> None:
        if self.score:
            del self.score.loaded

    def values(self, answered: Answered) -> dict[str, list[float]]:
        """What is measured, by measure and grader: a value for each prompt."""
        by_function = rewards.values_of(
            self.functions,
            self.tokenizer,
            answered.prompts,
            [answer.token_ids for answer in answered.answers],
            self.columns,
        )
        texts = [answer.text for answer in answered.answers]
        return {
            "kl_to_init": answered.kl,
            "reward": [sum(each) for each in zip(*by_function.values(), strict=True)],
            **{name: grader(completions=texts, **self.columns) for name, grader in self.graders.items()},
            "stop_rate": [float(answer.stopped) for answer in answered.answers],
            "mean_tokens": [float(answer.num_tokens) for answer in answered.answers],
        }


def load(path: Path, device: torch.device | None = None) -> PreTrainedModel:
    """In bf16, spread over all GPUs there are; in fp32 on a CPU."""
    device = device or Accelerator().device
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        attn_implementation="eager",
        device_map="balanced" if torch.cuda.device_count() > 1 else {"": device},
    )
    model.generation_config = generation_config()
    return model.eval()


def summarize(values: dict[str, list[float]]) -> dict[str, float]:
    """Means over the prompts, and their standard errors."""
    found = {}
    for name, each in values.items():
        found[name] = mean(each)
        found[f"{name}/standard_error"] = stdev(each) / sqrt(len(each))
    return found
