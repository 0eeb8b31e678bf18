"""What the trackers of `report_to` are told: a run's name, its group, its id, and what we measure.

The callbacks of transformers do the reporting. What a user has set, in the recipe or in the environment, stays.
"""

import os
from functools import partial
from pathlib import Path

from transformers import Trainer, TrainerControl
from transformers.integrations import TensorBoardCallback

from gemma2_post.stage.paths import MEMBER
from gemma2_post.training.finite import Metrics

PROJECT = "gemma2-post"
FOLDER = "tracker"
"""Folder in a stage's output for TensorBoard's files."""
_DEFAULT_PROJECT = "huggingface"  # of transformers


def begin(trainer: Trainer, output_dir: Path, run_id: str, step: int) -> None:
    """Names the run, so that a resumed stage goes on in the same one; called before training, on the main process.

    Args:
        run_id: The id in the stage's contract.
        step: The first step that will be logged; what an interrupted run has logged from there on no longer counts.
    """
    args, (name, group) = trainer.args, name_and_group(output_dir)
    if args.run_name is None:
        # Trackio knows a run by its name alone.
        args.run_name = f"{name} {run_id}"
    if args.project == _DEFAULT_PROJECT:
        args.project = PROJECT
    if "wandb" in args.report_to:
        variables = {"WANDB_PROJECT": PROJECT, "WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"}
        for variable, value in (variables | ({"WANDB_RUN_GROUP": group} if group else {})).items():
            os.environ.setdefault(variable, value)
    if "trackio" in args.report_to and group:
        import trackio

        trackio.init = partial(trackio.init, group=group)  # transformers has no key for it
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output_dir / FOLDER)
            callback.tb_writer = callback._SummaryWriter(log_dir=callback.logging_dir, purge_step=step)


def name_and_group(output_dir: Path) -> tuple[str, str | None]:
    """The name of a run, and the group of policies that it belongs to, if it is one: both begin with the run folder.

    `runs/tiny/sft` is named `tiny/sft`; `runs/tiny/rlhf/policy-0` is named `tiny/rlhf/policy-0`, in `tiny/rlhf`.
    """
    parts = output_dir.absolute().parts
    if MEMBER.fullmatch(output_dir.name):
        return "/".join(parts[-3:]), "/".join(parts[-3:-1])
    return "/".join(parts[-2:]), None


def log(trainer: Trainer, metrics: Metrics) -> None:
    """Reports measured values as `eval/NAME` at the current step; every process may call it.

    `trainer.log` would also put them into the log of the training steps, and begin the next averages there anew.
    """
    measured = {f"eval_{name}": value for name, value in metrics.items()}
    # A control of its own: the trainer's may say that this step's own log is still to come.
    trainer.callback_handler.on_log(trainer.args, trainer.state, TrainerControl(), measured)
