"""How far training is, in a file that `gemma2-post status` reads while it runs, also on another machine."""

import resource
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2_post.stage import contract
from gemma2_post.training.finite import Metrics

_SECONDS_APART = 2.0
"""Two writings are at least so far apart; steps may be shorter, and the disk may be shared by many machines."""


class Progress(TrainerCallback):
    """Writes `progress.json`: the step, tokens per second since the last log, seconds left, and memory."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / contract.HOW_FAR
        self.logged: Metrics = {}
        self.tokens_per_second: float | None = None
        self.counted: tuple[float, float] | None = None
        """When tokens were last counted, and how many; some of TRL's trainers begin at 0 again when they resume."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.began, self.first_step, self.written = time.monotonic(), state.global_step, 0.0
        self.counted = None if state.global_step else (self.began, 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if time.monotonic() - self.written > _SECONDS_APART:
            self._write(args, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Metrics, **_: object
    ) -> None:
        if "num_tokens" not in logs:  # a measurement, not training steps
            return
        now, self.logged = time.monotonic(), dict(logs)
        if self.counted and logs["num_tokens"] > self.counted[1]:
            self.tokens_per_second = (logs["num_tokens"] - self.counted[1]) / (now - self.counted[0])
        self.counted = now, logs["num_tokens"]
        self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        self.written = time.monotonic()
        per_step = (self.written - self.began) / max(1, state.global_step - self.first_step)
        content = {
            "time": time.time(),
            "step": state.global_step,
            "max_steps": state.max_steps,
            "seconds_left": per_step * (state.max_steps - state.global_step),
            "tokens_per_second": self.tokens_per_second,
            "memory_gb": peak_memory_gb(args),
            "logged": self.logged,
        }
        contract.write_json(self.path, content)


def peak_memory_gb(args: TrainingArguments) -> float:
    """The most memory of this process so far: of its GPU, or, without one, of the machine."""
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
