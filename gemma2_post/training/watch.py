"""Watches a policy while RLHF trains it: its answers to held-out prompts, and how far it has moved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from trl.trainer.utils import use_adapter

from gemma2_post.evaluation.answering.samples import (
    Answer,
    Grader,
    distinctness,
    gather_rows,
    grade,
    sample_held_out,
    share_of,
)
from gemma2_post.evaluation.divergence import measure_divergence
from gemma2_post.evaluation.keys import WatchArguments
from gemma2_post.evaluation.rewards import RewardFunction, values_of, weighted
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.training import trackers
from gemma2_post.training.checkpoints import what_is_left
from gemma2_post.training.finite import Metrics, StopIfNotFinite

if TYPE_CHECKING:
    from trl import RLOOTrainer

FIRST_STEPS, MOST_CUT = 20, 0.9
"""In its first 20 steps, distillation must not have more than this share of its answers cut."""


class StopIfAnswersAreCut(TrainerCallback):
    """Ends a run whose first answers nearly all hit the length limit: it would teach the student never to stop."""

    def __init__(self, max_completion_length: int) -> None:
        self.max_completion_length = max_completion_length
        self.num_steps, self.cut_steps = 0, 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step == FIRST_STEPS:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Metrics, **_: object
    ) -> None:
        # TRL logs the mean over the steps since its last log.
        if state.global_step > FIRST_STEPS or "completions/clipped_ratio" not in logs:
            return
        self.cut_steps += logs["completions/clipped_ratio"] * (state.global_step - self.num_steps)
        self.num_steps = state.global_step
        share = self.cut_steps / self.num_steps
        if self.num_steps >= min(FIRST_STEPS, state.max_steps) and share > MOST_CUT:
            raise UserError(
                f"{share:.0%} of the student's answers in the first {self.num_steps} steps were cut at "
                f"max_completion_length {self.max_completion_length}; usually the student is a base model that never "
                "learned to end its turn: start from the output of sft, or, if its answers are meant to be that long, "
                "raise max_completion_length"
            )


class WithAdapter(torch.nn.Module):
    """The policy with another of its adapters, or without one (None)."""

    def __init__(self, trainer: "RLOOTrainer", adapter: str | None):
        super().__init__()
        self.trainer, self.adapter = trainer, adapter

    def forward(self, **inputs: object) -> object:
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with use_adapter(policy, self.adapter):
            return self.trainer.model_wrapped(**inputs)


class FirstDivergenceIsZero(TrainerCallback):
    """Ends a run in which the policy differs from the reference before the first update: TRL loaded another one."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        args.logging_first_step = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Metrics, **_: object
    ) -> None:
        if state.global_step == 1 and abs(logs.get("kl", 0.0)) > 1e-3:
            raise UserError(
                f"before the first update the policy is {logs['kl']:.3g} nats a token away from its "
                "reference; name a saved model that has not changed since"
            )


class Watch(TrainerCallback):
    """Measures every `watch_steps` steps; ends the run past the KL budget (after going back) and on a collapse."""

    def __init__(
        self,
        trainer: "RLOOTrainer",
        args: WatchArguments,
        rows: Dataset,
        start: torch.nn.Module,
        anchor: torch.nn.Module | None,
        graders: dict[str, Grader],
        reward_functions: list[RewardFunction],
        reward_weights: list[float] | None,
        restore_anchor: Callable[[Path], None],
    ):
        self.trainer, self.args, self.rows = trainer, args, rows
        self.reward_functions, self.reward_weights = reward_functions, reward_weights
        self.start, self.anchor, self.graders, self.restore_anchor = start, anchor, graders, restore_anchor
        self.output_dir = Path(trainer.args.output_dir)
        self.curve: list[Metrics] = []
        finished = (self.output_dir / contract.DONE).is_file()
        self.earlier: list[Metrics] = self._read() if finished else []
        """What was watched while a finished policy, which is only measured again, was trained."""
        self.kept_step: int | None = None
        """The last step under the budget, once the run has passed the budget."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.global_step:
            self.curve = [entry for entry in self._read() if entry["step"] <= state.global_step]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step % self.args.watch_steps and state.global_step < state.max_steps:
            return
        metrics = self.measure()
        if state.global_step < state.max_steps:  # the last measurement is logged with all others after training
            trackers.log(self.trainer, metrics)
        if self.args.kl_budget is not None and metrics["kl_to_start"] > self.args.kl_budget:
            self._go_back(metrics["kl_to_start"])
            control.should_training_stop, control.should_save = True, False
        else:
            control.should_save = True

    def measure(self) -> Metrics:
        """The current policy's metrics, measured once per step; all processes must call this together."""
        step = self.trainer.state.global_step if self.kept_step is None else self.kept_step
        if not self.curve or self.curve[-1]["step"] != step:
            answers = sample_held_out(
                self.trainer, self.trainer.model_wrapped, self.rows["prompt"], self.trainer.args.max_completion_length
            )
            rewards = self._rewards(answers)
            metrics = self._divergences(answers) | grade(answers, self.rows, self.graders) | distinctness(answers)
            metrics |= {name: sum(values) / len(values) for name, values in rewards.items()}
            StopIfNotFinite(self.output_dir).check(metrics, step)
            self.curve.append({"step": step} | metrics)
            if self.trainer.is_world_process_zero():
                self._write(step, answers, rewards)
            if len(answers) > 1 and (metrics["stop_rate"] == 0 or len({answer.text for answer in answers}) == 1):
                what = "none of its answers ends" if metrics["stop_rate"] == 0 else "all its answers are the same"
                raise UserError(
                    f"the policy has collapsed at step {step}: {what}; {what_is_left(self.output_dir)}; lower "
                    "learning_rate, or raise beta"
                )
        return {name: value for name, value in self.curve[-1].items() if name != "step"}

    def complete(self, before: Metrics, after: Metrics) -> Metrics:
        """The additional metric `kept_step`, if the run went back; see `training.run.run`."""
        return {} if self.kept_step is None else {"kept_step": self.kept_step}

    def _divergences(self, answers: list[Answer]) -> Metrics:
        """KL(policy || start) and KL(policy || anchor) of whole answers, over the full vocabulary, in nats."""
        trainer, metrics = self.trainer, {}
        batch_size = trainer.args.per_device_eval_batch_size
        for name, other in (("kl_to_start", self.start), ("kl_to_anchor", self.anchor)):
            if other is not None:
                found = measure_divergence(trainer.accelerator, trainer.model_wrapped, other, answers, batch_size)
                metrics[name] = sum(each.forward for each in found) / len(found)
        return metrics

    def _rewards(self, answers: list[Answer]) -> dict[str, list[float]]:
        """The rewards that training would give the answers, by reward function, and `reward`, their weighted sum."""
        mine = share_of(len(answers), self.trainer.accelerator)
        values = values_of(
            self.reward_functions,
            self.trainer.processing_class,
            [self.rows["prompt"][i] for i in mine],
            [answers[i].token_ids for i in mine],
            {name: [self.rows[name][i] for i in mine] for name in self.rows.column_names if name != "prompt"},
            self.trainer.state,
        )
        by_function = {name: gather_rows(mine, each, len(answers)) for name, each in values.items()}
        return by_function | {"reward": weighted(by_function, self.reward_weights)}

    def _write(self, step: int, answers: list[Answer], rewards: dict[str, list[float]]) -> None:
        """Writes the curve, and the answers for people to read."""
        directory = self.output_dir / "samples"
        directory.mkdir(parents=True, exist_ok=True)
        self._write_curve()
        lines = [
            {"prompt": prompt, "answer": answer.text, "ended": answer.stopped, "reward": reward}
            for prompt, answer, reward in zip(self.rows["prompt"], answers, rewards["reward"], strict=True)
        ]
        contract.write_text(
            directory / f"step-{step}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )

    def _read(self) -> list[Metrics]:
        return contract.read_lines(self.output_dir / "watch.jsonl", {"step": int}, is_appended_to=False)

    def _write_curve(self) -> None:
        found = {entry["step"]: entry for entry in self.earlier}
        for entry in self.curve:
            found[entry["step"]] = found.get(entry["step"], {}) | entry
        lines = [json.dumps(found[step]) + "\n" for step in sorted(found)]
        contract.write_text(self.output_dir / "watch.jsonl", "".join(lines))

    def _go_back(self, kl: float) -> None:
        """Restores the weights and the anchor of the last checkpoint under the budget."""
        step = self.trainer.state.global_step
        under = [int(entry["step"]) for entry in self.curve[:-1] if entry["step"] > 0]
        if not under:
            raise UserError(
                f"kl_budget {self.args.kl_budget:g} is passed at the first measurement (step {step}: "
                f"{kl:.3g} nats); lower watch_steps or learning_rate, or raise beta or kl_budget"
            )
        self.kept_step = under[-1]
        checkpoint = self.output_dir / f"checkpoint-{self.kept_step}"
        if self.trainer.is_deepspeed_enabled:
            is_adapter = isinstance(self.trainer.accelerator.unwrap_model(self.trainer.model), PeftModel)
            # A checkpoint of an adapter holds no frozen weights.
            deepspeed_load_checkpoint(self.trainer.model_wrapped, str(checkpoint), load_module_strict=not is_adapter)
        else:
            self.trainer._load_from_checkpoint(str(checkpoint))
        self.restore_anchor(checkpoint)
        self.curve.pop()
        if self.trainer.is_world_process_zero():
            self._write_curve()  # its last line is the policy's
