"""What one process of a training stage computes; see `models/work.py`."""

from math import ceil

from gemma2_post.models import work
from gemma2_post.models.work import Loss, Model
from gemma2_post.stage.work import Lengths, Pass, Rows
from gemma2_post.training import memory
from gemma2_post.training.checks import accumulation_steps
from gemma2_post.training.memory import Training


def model_of(checked: Training) -> Model:
    """The trained model."""
    recipe = checked.recipe
    return Model(
        memory.config_of(checked), memory.compute_of(checked), recipe.quantization, memory.adapted_of(checked)
    )


def num_steps(checked: Training, rows: Rows) -> int:
    """Optimizer steps: the recipe's `max_steps`, or those of its epochs.

    Raises:
        UnknownRows: It has no `max_steps`, and the number of rows is not known.
    """
    training = checked.recipe.training
    if training.max_steps > 0:
        return training.max_steps
    held_out = 0 if checked.recipe.data.held_out_datasets else num_held_out(checked, rows)
    return ceil(training.num_train_epochs * (rows.number - held_out) / checked.recipe.global_batch_size)


def num_held_out(checked: Training, rows: Rows) -> int:
    """Number of held-out rows; if they are unknown, `held_out_share` of the rows that training reads.

    Raises:
        UnknownRows: They are not known, and neither is how many rows training reads.
    """
    share, max_steps = checked.recipe.data.held_out_share, checked.recipe.training.max_steps
    if rows.known_held_out is not None:
        return rows.known_held_out
    if rows.known is None and max_steps > 0:
        return round(share * max_steps * checked.recipe.global_batch_size)
    return max(1, round(share * rows.number))


def per_process(checked: Training, number: float) -> int:
    """How many of these rows each process takes."""
    return ceil(number / checked.launcher.num_processes)


def answering(checked: Training, model: Model, prompts: Lengths, answers: Lengths) -> list[Pass]:
    """Answers to the held-out prompts."""
    number = per_process(checked, checked.recipe.samples.num_samples)
    return work.sampling(model, number, checked.recipe.training.per_device_eval_batch_size, prompts, answers)


def comparing(checked: Training, models: list[Model], prompts: Lengths, answers: Lengths) -> list[Pass]:
    """The logits of all held-out answers by each of the models."""
    number = per_process(checked, checked.recipe.samples.num_samples)
    rows, lengths = checked.recipe.training.per_device_eval_batch_size, prompts.plus(answers)
    return [work.reading(each, number, rows, lengths, answers.longest(rows)) for each in models]


def a_step(checked: Training, model: Model, lengths: Lengths, loss: Loss, padded: float | None = None) -> Pass:
    """The forward and backward passes of one optimizer step.

    Args:
        lengths: Lengths of rows.
        loss: The loss on one batch of `per_device_train_batch_size` rows.
        padded: See `models.work.reading`.
    """
    training = checked.recipe.training
    rows = training.per_device_train_batch_size
    each = work.training(model, rows, lengths, loss, training.activation_checkpointing, padded)
    return each.times(accumulation(checked))


def accumulation(checked: Training) -> int:
    """Batches of one process in an optimizer step; the plan may be for another number of processes than the recipe."""
    batch, processes = checked.recipe.training.per_device_train_batch_size, checked.launcher.num_processes
    return accumulation_steps(checked.recipe.global_batch_size, batch, processes)
