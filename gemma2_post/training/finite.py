"""Stops a training stage at the first loss, gradient norm, weight or measured value that is NaN or infinite."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2_post.evaluation.answering.samples import NoProbabilityError, finite_probabilities
from gemma2_post.stage.errors import OneProcessError, UserError
from gemma2_post.training.checkpoints import TRAINER_FILE, what_is_left

Metrics = dict[str, float]
_LOGGED = ("loss", "grad_norm", "eval_loss", "reward", "kl")


class StopIfNotFinite(TrainerCallback):
    """Checks the weights after every step, before another callback samples from them, and what is logged.

    A loss or a gradient that is NaN or infinite makes the weights so in the same step.
    """

    def __init__(self, output_dir: Path, last_file: str = TRAINER_FILE):
        self.output_dir, self.last_file = output_dir, last_file

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **_: object,
    ) -> None:
        # For a sharded model, only the weights of this process.
        trained = [getattr(each, "ds_tensor", each) for each in model.parameters() if each.requires_grad]
        if not are_finite(trained):
            raise OneProcessError(self._stopped("weights are NaN or infinite", state.global_step + 1))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Metrics, **_: object
    ) -> None:
        self.check({name: logs[name] for name in _LOGGED if name in logs}, state.global_step)

    def check(self, metrics: Metrics, step: int) -> None:
        """Raises a `UserError` if a value is NaN or infinite, or None, which TRL logs for what is always NaN."""
        for name, value in metrics.items():
            if value is None or not math.isfinite(value):
                raise UserError(self._stopped(f"{name} is {value}", step))

    @contextmanager
    def sampling(self, trainer: Trainer) -> Iterator[None]:
        """Raises a `UserError` if the model cannot be sampled from; finite weights may be too large for that."""
        try:
            with finite_probabilities():
                yield
        except NoProbabilityError as error:
            problem = "the model's probabilities are NaN or infinite"
            raise OneProcessError(self._stopped(problem, trainer.state.global_step)) from error

    def _stopped(self, problem: str, step: int) -> str:
        """What is wrong at which step, what is left, and what to change."""
        if step == 0:
            return f"{problem} before the first step; look for NaN in the model and the data"
        left = what_is_left(self.output_dir, self.last_file)
        return f"{problem} at step {step}; {left}; lower learning_rate or max_grad_norm, or, in RLHF, raise beta"


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no number in the tensors is NaN or infinite."""
    tensors = [each.detach() for each in tensors]
    # One fused pass; the norm of huge finite numbers may itself be infinite.
    return bool(torch.nn.utils.get_total_norm(tensors).isfinite()) or all(each.isfinite().all() for each in tensors)
