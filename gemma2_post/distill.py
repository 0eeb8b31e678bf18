"""On-policy distillation: the student answers the prompts itself and learns what the teacher would have said next.

Reads a student that has been fine-tuned (it must end its turns), a larger teacher with the same vocabulary, and
prompts; writes a plain Hugging Face model. At each token of the student's own answers the loss is a divergence between
the two distributions over the whole vocabulary (GKD with lambda = 1, arXiv 2306.13649), by TRL's `beta`: 1 is the
reverse KL(student || teacher) and the default, 0 the forward KL(teacher || student), between them the generalised JSD.

    accelerate launch --config_file accelerate_configs/cpu.yaml \\
        -m gemma2_post.distill --config recipes/tiny/distill.yaml
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import Trainer, TrainerCallback
from trl import DistillationConfig, ModelConfig
from trl.import_utils import is_vllm_available

from gemma2_post.core import data, gemma
from gemma2_post.core.command import Command, Stage
from gemma2_post.core.data import DataArguments
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.core.training import Metrics, StageArguments, check_disk, check_training, metrics_of, run
from gemma2_post.evaluation.divergence import measure_divergence
from gemma2_post.evaluation.samples import Answer, SampleArguments, grade, graded, load_graders, sample_held_out

REFUSED_KEYS = {
    "teacher_model_init_kwargs": "use teacher_dtype, teacher_load_in_4bit or teacher_load_in_8bit",
    "disable_dropout": "dropout is always off, so that what is sampled is what is trained; remove it",
    "chat_template_kwargs": "the Gemma 2 chat format is set for you; remove it",
    "max_tool_calling_iterations": "Gemma 2 has no tools; remove it",
    "remove_unused_columns": "the trainer is given the prompts only; remove it",
}
FIRST_STEPS, MOST_CUT = 20, 0.9
DIVERGENCES = {
    *("kl_student_teacher", "kl_student_teacher_per_token", "kl_teacher_student", "kl_teacher_student_per_token"),
    "student_nll",
}
"""What is measured between the two."""


@dataclass
class DistillArguments:
    teacher_dtype: Literal["bfloat16", "float32"] = field(
        default="bfloat16", metadata={"help": "Type in which the teacher is loaded."}
    )
    teacher_load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the teacher to NF4."})
    teacher_load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the teacher to LLM.int8."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longer prompts are dropped; None for what the model's positions leave to the answer."},
    )


class StopIfAnswersAreCut(TrainerCallback):
    """Ends a run whose first answers nearly all hit the length limit: it would teach the student to go on talking."""

    def __init__(self, where: str, max_completion_length: int) -> None:
        self.where, self.max_completion_length = where, max_completion_length
        self.num_steps, self.cut_steps = 0, 0.0

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == FIRST_STEPS:
            control.should_log = True

    def on_log(self, args, state, control, logs, **_) -> None:
        # TRL logs the mean over the steps since its last log.
        if state.global_step > FIRST_STEPS or "completions/clipped_ratio" not in logs:
            return
        self.cut_steps += logs["completions/clipped_ratio"] * (state.global_step - self.num_steps)
        self.num_steps = state.global_step
        share = self.cut_steps / self.num_steps
        if self.num_steps >= min(FIRST_STEPS, state.max_steps) and share > MOST_CUT:
            raise UserError(
                f"{self.where}: {share:.0%} of the student's answers in the first {self.num_steps} steps were cut at "
                f"max_completion_length {self.max_completion_length}; usually the student is a base model that never "
                "learned to end its turn: start from the output of sft, or, if its answers are meant to be that long, "
                "raise max_completion_length"
            )


def main(
    stage: Stage,
    training_args: DistillationConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    distill_args: DistillArguments,
) -> None:
    teacher_args = teacher_arguments(training_args, model_args, distill_args)
    # Imported here: who has made a mistake in a recipe should not have to wait for it.
    from trl import DistillationTrainer, get_peft_config

    config = gemma.load_config(stage.where, model_args.model_name_or_path, model_args.model_revision)
    tokenizer = gemma.load_tokenizer(stage.where, model_args.model_name_or_path, config, model_args.model_revision)
    teacher_config = gemma.load_config(stage.where, teacher_args.model_name_or_path, teacher_args.model_revision)
    gemma.check_same_vocabulary(stage.where, tokenizer, model_args, teacher_config, teacher_args)
    max_prompt_length = gemma.check_prompt_length(
        stage.where,
        distill_args.max_prompt_length,
        "max_completion_length",
        training_args.max_completion_length,
        min(config.max_position_embeddings, teacher_config.max_position_embeddings),
    )
    check_disk(stage, stage_args, training_args, model_args, config)
    with training_args.main_process_first():
        train, held_out = data.split_held_out(stage.where, data_args, training_args.seed, data.load_prompts)
        train, held_out = (
            data.drop_long_prompts(stage.where, rows, tokenizer, max_prompt_length, data_args.max_too_long_share)
            for rows in (train, held_out)
        )
    if len(train) < stage_args.global_batch_size:
        raise UserError(
            f"{stage.where}: {len(train)} prompts are fewer than global_batch_size {stage_args.global_batch_size}, "
            "and TRL leaves out steps that are not full; lower it, or give more prompts"
        )
    graders = load_graders(stage.where, sample_args, held_out)
    to_answer = held_out.select(range(min(sample_args.num_samples, len(held_out))))

    training_args.disable_dropout = True
    trainer = DistillationTrainer(
        model=gemma.load_for_training(stage.where, model_args, training_args),
        teacher_model=gemma.load_for_training(stage.where, teacher_args, training_args),
        args=training_args,
        train_dataset=train.select_columns("prompt"),
        eval_dataset=held_out.select_columns("prompt"),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[StopIfAnswersAreCut(stage.where, training_args.max_completion_length)],
    )

    def sampled(model: torch.nn.Module) -> list[Answer]:
        return sample_held_out(trainer, model, tokenizer, to_answer["prompt"], training_args.max_completion_length)

    # Once, by itself: the teacher stays as it is.
    teacher_grades = grade(sampled(trainer.teacher_model), to_answer, graders) if graders else {}

    def measure() -> Metrics:
        answers = sampled(trainer.model_wrapped)
        return divergences(trainer, answers) | grade(answers, to_answer, graders, sample_args.group_by)

    def complete(before: Metrics, after: Metrics) -> Metrics:
        return {f"teacher_{name}": value for name, value in teacher_grades.items()} | {
            f"{name}_gap_closed": (after[name] - before[name]) / (teacher_grades[name] - before[name])
            for name in graders
            if before and teacher_grades[name] != before[name]
        }

    run(stage, stage_args, model_args, trainer, tokenizer, measure, complete)


def check(
    where: str,
    launcher: Launcher | None,
    training_args: DistillationConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    distill_args: DistillArguments,
) -> None:
    launcher = check_training(where, launcher, training_args, model_args, stage_args)
    if training_args.use_vllm and not is_vllm_available():
        raise UserError(f"{where}: use_vllm is true, but vLLM is not installed; pip install 'trl[vllm]'")
    if training_args.temperature <= 0:
        raise UserError(f"{where}: temperature is {training_args.temperature:g}; write a number above 0")
    if training_args.bf16 and model_args.dtype == "float32" and not launcher.zero_stage:
        raise UserError(
            f"{where}: bf16 is true with dtype float32, but TRL computes the distillation loss past accelerate's "
            "autocast, in float32; write bf16: false, or dtype: bfloat16 with adapters or DeepSpeed"
        )
    if training_args.teacher_model_name_or_path is None:
        raise UserError(f"{where}: teacher_model_name_or_path is missing; name a directory or a Hub model")
    quantized = distill_args.teacher_load_in_4bit or distill_args.teacher_load_in_8bit
    if distill_args.teacher_load_in_4bit and distill_args.teacher_load_in_8bit:
        raise UserError(f"{where}: teacher_load_in_4bit and teacher_load_in_8bit are both true; remove one of them")
    if quantized and launcher.zero_stage == 3:
        raise UserError(
            f"{where}: a quantised teacher cannot be sharded by ZeRO-3; remove teacher_load_in_4bit and "
            "teacher_load_in_8bit, ZeRO-3 spreads the teacher's weights over the processes"
        )
    gemma.check_model_arguments(f"{where}: the teacher", teacher_arguments(training_args, model_args, distill_args))


def teacher_arguments(
    training_args: DistillationConfig, model_args: ModelConfig, distill_args: DistillArguments
) -> ModelConfig:
    """How the teacher is loaded."""
    return ModelConfig(
        model_name_or_path=training_args.teacher_model_name_or_path,
        model_revision=training_args.teacher_model_revision or "main",
        dtype=distill_args.teacher_dtype,
        attn_implementation=model_args.attn_implementation,
        load_in_4bit=distill_args.teacher_load_in_4bit,
        load_in_8bit=distill_args.teacher_load_in_8bit,
    )


def divergences(trainer: Trainer, answers: list[Answer]) -> Metrics:
    """Student and teacher on the student's answers: nats per answer (the mean of sums) and per token."""
    if not answers:
        return {}
    found = measure_divergence(
        trainer.accelerator,
        trainer.model_wrapped,
        trainer.teacher_model,
        answers,
        trainer.args.per_device_eval_batch_size,
    )
    student_teacher, teacher_student = sum(each.forward for each in found), sum(each.backward for each in found)
    num_tokens = sum(each.num_tokens for each in found)
    return {
        "kl_student_teacher": student_teacher / len(found),
        "kl_student_teacher_per_token": student_teacher / num_tokens,
        "kl_teacher_student": teacher_student / len(found),
        "kl_teacher_student_per_token": teacher_student / num_tokens,
        "student_nll": sum(each.nll for each in found) / num_tokens,
    }


def metrics(
    training_args: DistillationConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    *_: object,
) -> set[str]:
    grades = graded(sample_args)
    graders = grades - {"stop_rate", "mean_tokens"}
    further = {f"{name}_gap_closed" for name in graders} | {f"teacher_{name}" for name in grades if graders}
    return metrics_of(grades | DIVERGENCES if grades else set(), further)


COMMAND = Command(
    "distill",
    main,
    [DistillationConfig, ModelConfig, DataArguments, StageArguments, SampleArguments, DistillArguments],
    __doc__,
    metrics,
    check,
    gemma.REFUSED_KEYS | REFUSED_KEYS,
)

if __name__ == "__main__":
    COMMAND.launch()
