"""Supervised fine-tuning: a base model learns to answer from demonstrations.

Reads a base model and conversations; writes a plain Hugging Face model with the Gemma 2 chat template. Trains LoRA
adapters on a 4-bit base (QLoRA) or on an unquantised one, or all weights, as the recipe says. The loss is on what the
model says itself: its words, each `<end_of_turn>`, and the final `<eos>`.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m gemma2_post.sft --config recipes/tiny/sft.yaml
"""

from dataclasses import dataclass, field

from trl import ModelConfig, SFTConfig

from gemma2_post.core import data, gemma
from gemma2_post.core.command import Command, Stage
from gemma2_post.core.data import DataArguments
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.core.training import StageArguments, check_disk, check_training, metrics_of, run
from gemma2_post.evaluation.samples import SampleArguments, grade, graded, load_graders, sample_held_out

REFUSED_KEYS = {
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


@dataclass
class SFTArguments:
    max_new_tokens: int = field(default=256, metadata={"help": "Longest sampled answer, in tokens."})


def main(
    stage: Stage,
    training_args: SFTConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    sft_args: SFTArguments,
) -> None:
    # Imported here: who has made a mistake in a recipe should not have to wait for it.
    from trl import SFTTrainer, get_peft_config

    config = gemma.load_config(stage.where, model_args.model_name_or_path, model_args.model_revision)
    max_length = gemma.check_length(stage.where, training_args.max_length, config)
    tokenizer = gemma.load_tokenizer(stage.where, model_args.model_name_or_path, config, model_args.model_revision)
    check_disk(stage, stage_args, training_args, model_args, config)
    training_args.eval_packing = False
    with training_args.main_process_first():
        train, held_out = data.split_held_out(stage.where, data_args, training_args.seed)
        train, held_out = (
            data.tokenize(stage.where, rows, tokenizer, max_length, data_args.max_too_long_share)
            for rows in (train, held_out)
        )
    graders = load_graders(stage.where, sample_args, held_out)
    to_answer = held_out.select(range(min(sample_args.num_samples, len(held_out))))
    prompts = [messages[:-1] for messages in to_answer["messages"]]

    trainer = SFTTrainer(
        model=gemma.load_for_training(stage.where, model_args, training_args),
        args=training_args,
        train_dataset=train.select_columns(["input_ids", "labels"]),
        eval_dataset=held_out.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )

    def measure() -> dict[str, float]:
        answers = sample_held_out(trainer, trainer.model_wrapped, tokenizer, prompts, sft_args.max_new_tokens)
        grades = grade(answers, to_answer, graders, sample_args.group_by)
        return {"held_out_nll": trainer.evaluate()["eval_loss"]} | grades

    run(stage, stage_args, model_args, trainer, tokenizer, measure)


def check(
    where: str,
    launcher: Launcher | None,
    training_args: SFTConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    *_: object,
) -> None:
    check_training(where, launcher, training_args, model_args, stage_args)
    batch_size = training_args.per_device_train_batch_size
    if training_args.packing and model_args.attn_implementation == "eager" and batch_size > 1:
        raise UserError(
            f"{where}: packing with eager attention needs memory for (batch x length) squared; write "
            "per_device_train_batch_size: 1, or attn_implementation: flash_attention_2 or flex_attention"
        )


def metrics(
    training_args: SFTConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    *_: object,
) -> set[str]:
    return metrics_of({"held_out_nll"} | graded(sample_args), further=set())


COMMAND = Command(
    "sft",
    main,
    [SFTConfig, ModelConfig, DataArguments, StageArguments, SampleArguments, SFTArguments],
    __doc__,
    metrics,
    check,
    gemma.REFUSED_KEYS | REFUSED_KEYS,
)

if __name__ == "__main__":
    COMMAND.launch()
