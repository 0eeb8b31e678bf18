"""Supervised fine-tuning: a base model learns to answer from demonstrations.

Reads a base model and conversations; writes a plain Hugging Face model with the Gemma 2 chat template. The recipe
chooses between LoRA adapters on a 4-bit base (QLoRA) or an unquantized one, and all weights. The loss covers what the
model itself says: its words, each `<end_of_turn>`, and the final `<eos>`.

    accelerate launch --config_file accelerate_configs/cpu.yaml \\
        -m gemma2_post.sft --config recipes/tiny/sft.yaml
"""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from gemma2_post.data.rows import CONVERSATION
from gemma2_post.models import cost
from gemma2_post.models import work as passes
from gemma2_post.models.arguments import REFUSED_KEYS, attention_of, check_length, check_prompt_length
from gemma2_post.stage.bounds import COUNT
from gemma2_post.stage.command import GRADER, Checked, Command, Curve, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.recipe import Effect, key, part
from gemma2_post.stage.work import Lengths, Pass, Rows, times
from gemma2_post.training import memory as held
from gemma2_post.training import work as computed
from gemma2_post.training.checks import check_disk, check_training, complete_training, metrics_of
from gemma2_post.training.keys import TRAINING_BOUNDS, TrainingRecipe, decisive

if TYPE_CHECKING:
    from trl import SFTConfig

REFUSED = {
    **dict.fromkeys(
        ["dataset_text_field", "dataset_kwargs", "shuffle_dataset", "truncation_mode"],
        "conversations are rendered and checked for you, and never cut; remove it",
    ),
    **dict.fromkeys(
        ["assistant_only_loss", "completion_only_loss"], "the loss is always on the model's turns only; remove it"
    ),
    **dict.fromkeys(
        ["packing_strategy", "padding_free", "eval_packing"], "packing: true packs whole conversations; remove it"
    ),
}


@dataclass(kw_only=True)
class Recipe(TrainingRecipe):
    """The keys of supervised fine-tuning."""

    training: "SFTConfig" = part("trl:SFTConfig", bounds=TRAINING_BOUNDS)
    max_new_tokens: int = key(256, "Longest sampled answer, in tokens.", effect=Effect.MEASUREMENTS, bounds=COUNT)


def main(stage: Stage, recipe: Recipe) -> None:
    """Trains on the data, and measures `held_out_nll` (nats a token) and the graders before and after it."""
    from trl import SFTTrainer, get_peft_config

    from gemma2_post.data.preparation import check_enough, drop_too_long, split_held_out
    from gemma2_post.evaluation.answering.samples import grade, rows_to_answer, sample_held_out
    from gemma2_post.evaluation.likelihood import mean_nll
    from gemma2_post.models.loading import load_for_training
    from gemma2_post.models.tokenizer import load_config_and_tokenizer
    from gemma2_post.training.run import run

    config, tokenizer = load_config_and_tokenizer(recipe.model)
    max_length = check_length(recipe.training.max_length, config)
    check_prompt_length(None, "max_new_tokens", recipe.max_new_tokens, config.max_position_embeddings)
    check_disk(stage, recipe, config)
    train, held_out = (
        drop_too_long(rows, "max_length", max_length, recipe.data.max_too_long_share).dataset()
        for rows in split_held_out(recipe.data, recipe.training.seed, CONVERSATION, tokenizer)
    )
    check_enough(train, recipe.global_batch_size, f"global_batch_size {recipe.global_batch_size}", "conversations")
    to_answer, graders = rows_to_answer(recipe.samples, held_out)
    prompts = [messages[:-1] for messages in to_answer["messages"]]
    recipe.training.seed = recipe.seed_of()

    trainer = SFTTrainer(
        model=load_for_training(recipe.model, recipe.training),
        args=recipe.training,
        train_dataset=train.select_columns(["input_ids", "labels"]),
        eval_dataset=held_out.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        peft_config=get_peft_config(recipe.model),
    )

    def measure() -> dict[str, float]:
        answers = sample_held_out(trainer, trainer.model_wrapped, prompts, recipe.max_new_tokens)
        grades = grade(answers, to_answer, graders, recipe.samples.group_by)
        return {"held_out_nll": mean_nll(trainer, held_out)} | grades

    run(stage, recipe, trainer, measure)


def check(recipe: Recipe, launcher: Launcher) -> None:
    check_training(recipe, launcher)
    if recipe.training.packing:
        _check_packing(recipe)


def _check_packing(recipe: Recipe) -> None:
    """Refuses what does not fit: TRL makes one row of a batch, also where it evaluates while it trains."""
    training, is_eager = recipe.training, attention_of(recipe.model) == "eager"
    evaluates = training.eval_strategy != "no" or training.eval_on_start
    if training.max_length is None:
        raise UserError("max_length is none, and packing needs the length of a packed row; write a number of tokens")
    if is_eager and training.per_device_train_batch_size > 1:
        raise UserError(
            "packing with eager attention needs memory for (batch x length) squared; write "
            "per_device_train_batch_size: 1, or attn_implementation: flash_attention_2 or flex_attention"
        )
    if is_eager and evaluates and training.per_device_eval_batch_size > 1:
        raise UserError(
            f"per_device_eval_batch_size is {training.per_device_eval_batch_size}, and eval_strategy or eval_on_start "
            "with packing and eager attention needs memory for (batch x length) squared; write 1, or remove them (the "
            "stage measures before and after training anyway)"
        )


def complete(recipe: Recipe, launcher: Launcher) -> None:
    complete_training(recipe, launcher)
    recipe.training.eval_packing = False
    if not recipe.training.packing:  # TRL would copy all rows once more, in each process, to truncate none of them
        recipe.training.dataset_kwargs = {"skip_prepare_dataset": True}


def metrics(recipe: Recipe) -> set[str]:
    return metrics_of({"held_out_nll"} | recipe.samples.metrics, additional=set())


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    config, recipe, compute = held.config_of(checked), checked.recipe, held.compute_of(checked)
    rows, eval_rows = recipe.training.per_device_train_batch_size, recipe.training.per_device_eval_batch_size
    length = recipe.training.max_length or config.max_position_embeddings
    loss = cost.fused_loss(config, rows * length, compute, trains_all=not recipe.model.use_peft)
    parts = held.held(checked)
    reading = cost.forward(config, eval_rows, length, compute) + cost.dequantized(config, recipe.quantization)
    scoring = cost.fused_loss(config, eval_rows * length, compute, trains_all=False)
    return {
        **held.training_step(checked, parts, rows, length, loss),
        **held.sampling(checked, parts, length, recipe.max_new_tokens),
        "held-out loss": parts | {"activations": max(reading, scoring), "gathered": held.gathered(checked)},
    }


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    """Its answers before training are as long as they may be: a base model does not end its turns."""
    recipe, model = checked.recipe, computed.model_of(checked)
    training = recipe.training
    limit = training.max_length or model.config.max_position_embeddings
    lengths, steps = rows.conversations_up_to(limit), computed.num_steps(checked, rows)
    num_held_out = computed.per_process(checked, computed.num_held_out(checked, rows))
    if training.packing:
        steps = steps if training.max_steps > 0 else ceil(steps * lengths.mean / limit)
    trained = Lengths((limit,)) if training.packing else lengths
    batch = training.per_device_train_batch_size
    # Triton scores only the tokens in the loss, at most all but padding; without it, padding is scored, too.
    scored = batch * (trained.longest(batch) if model.compute.on_cpu else trained.mean)
    loss = passes.fused_loss(model, scored)
    eval_rows = training.per_device_eval_batch_size
    evaluated = passes.reading(model, num_held_out, eval_rows, lengths, logits=lengths.longest(eval_rows))
    prompts, answers = rows.prompts_up_to(limit), rows.answers_up_to(recipe.max_new_tokens)
    return [
        *times(steps, [computed.a_step(checked, model, trained, loss)]),
        *times(2, [evaluated]),
        *computed.answering(checked, model, prompts, Lengths((recipe.max_new_tokens,))),
        *computed.answering(checked, model, prompts, answers),
    ]


COMMAND = Command(
    "sft",
    Recipe,
    main,
    metrics,
    check,
    complete,
    decisive=decisive,
    refused=REFUSED_KEYS | REFUSED,
    row_formats={"datasets": CONVERSATION, "held_out_datasets": CONVERSATION},
    headline=[GRADER, "held_out_nll"],
    below_gate="is the data what it should be, is there enough of it, is learning_rate right for the method?",
    curves=[Curve("log.jsonl", "loss", "loss")],
    memory=memory,
    disk=held.disk,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
