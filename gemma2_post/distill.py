"""On-policy distillation: the student answers the prompts itself and learns what the teacher would have said next.

Reads a fine-tuned student (it must end its turns), a larger teacher with the same vocabulary, and prompts; writes a
plain Hugging Face model. At each token of the student's own answers the loss is a divergence between the two
distributions over the whole vocabulary (GKD with lambda = 1, arXiv 2306.13649). TRL's `beta` selects it: 1 (default)
is the reverse KL(student || teacher), 0 the forward KL(teacher || student), and values between are generalized JSDs.

Several `teachers` take the micro-batches in turn. The loss is then, in expectation, the mean of the
divergences from all of them; of the reverse KL, the best student is the normalized geometric mean of the teachers'
distributions. It is what merging by distillation is held against merging by weights with.

    accelerate launch --config_file accelerate_configs/cpu.yaml \\
        -m gemma2_post.distill --config recipes/tiny/distill.yaml
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from gemma2_post.data.rows import PROMPT
from gemma2_post.models import cost
from gemma2_post.models import work as passes
from gemma2_post.models.arguments import REFUSED_KEYS, check_model_arguments, check_prompt_length
from gemma2_post.stage.bounds import COUNT, FILLED, SHARE
from gemma2_post.stage.command import GRADER, Checked, Command, Curve, Parts, Stage
from gemma2_post.stage.errors import UserError, located
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.paths import ModelPath, check_names
from gemma2_post.stage.recipe import key, part
from gemma2_post.stage.work import Pass, Rows, times
from gemma2_post.training import memory as held
from gemma2_post.training import work as computed
from gemma2_post.training.checks import check_disk, check_sampling, check_training, complete_training, metrics_of
from gemma2_post.training.keys import TRAINING_BOUNDS, TrainingRecipe, decisive

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2Config
    from trl import DistillationConfig, ModelConfig

    from gemma2_post.evaluation.answering.samples import Answer
    from gemma2_post.training.run import Metrics

REFUSED = {
    "teacher_model_init_kwargs": "use teacher_dtype, teacher_load_in_4bit or teacher_load_in_8bit",
    "disable_dropout": "dropout is always off, so that what is sampled is what is trained; remove it",
    "chat_template_kwargs": "the Gemma 2 chat format is set for you; remove it",
    "max_tool_calling_iterations": "Gemma 2 has no tools; remove it",
    "remove_unused_columns": "the trainer is given the prompts only; remove it",
}
DIVERGENCES = {"student_nll"} | {
    f"kl_{pair}{per}" for pair in ("student_teacher", "teacher_student") for per in ("", "_per_token")
}
"""Metrics that compare student and teacher."""


@dataclass(kw_only=True)
class Recipe(TrainingRecipe):
    """The keys of a distillation."""

    training: "DistillationConfig" = part("trl:DistillationConfig", bounds=TRAINING_BOUNDS | {"beta": SHARE})
    teachers: list[ModelPath] | None = key(
        None,
        "Several teachers instead of teacher_model_name_or_path; they take the micro-batches in turn.",
        bounds=FILLED,
    )
    teacher_dtype: Literal["bfloat16", "float32"] = key("bfloat16", "Dtype in which the teacher is loaded.")
    teacher_load_in_4bit: bool = key(False, "Quantize the teacher to NF4.")
    teacher_load_in_8bit: bool = key(False, "Quantize the teacher to LLM.int8.")
    max_prompt_length: int | None = key(
        None, "Longer prompts are dropped; None: what the answer leaves of the model's positions.", bounds=COUNT
    )

    @property
    def teacher_names(self) -> list[str]:
        """The teachers, even if there is only one."""
        return self.teachers or [self.training.teacher_model_name_or_path]

    @property
    def loaded_teachers(self) -> "list[ModelConfig]":
        """How the teachers are loaded."""
        from trl import ModelConfig

        return [
            ModelConfig(
                model_name_or_path=name,
                model_revision=self.training.teacher_model_revision or "main",
                dtype=self.teacher_dtype,
                attn_implementation=self.model.attn_implementation,
                load_in_4bit=self.teacher_load_in_4bit,
                load_in_8bit=self.teacher_load_in_8bit,
            )
            for name in self.teacher_names
        ]


def main(stage: Stage, recipe: Recipe) -> None:
    """Trains the student; measures the divergences (nats) and the graders, and how much of the gap it closed."""
    from trl import DistillationTrainer, get_peft_config

    from gemma2_post.data.preparation import check_enough, drop_too_long, split_held_out
    from gemma2_post.evaluation.answering.samples import grade, rows_to_answer, sample_held_out
    from gemma2_post.evaluation.divergence import mean_divergences
    from gemma2_post.models.loading import load_for_training
    from gemma2_post.models.tokenizer import check_same_vocabulary, load_config_and_tokenizer
    from gemma2_post.training.rollouts import compare as compare_rollouts
    from gemma2_post.training.rollouts import prepare as prepare_rollouts
    from gemma2_post.training.run import run
    from gemma2_post.training.teachers import TeachersInTurn
    from gemma2_post.training.watch import StopIfAnswersAreCut

    config, tokenizer = load_config_and_tokenizer(recipe.model)
    positions, student_path = config.max_position_embeddings, recipe.model.model_name_or_path
    for each in recipe.loaded_teachers:
        teacher_config, teacher_tokenizer = load_config_and_tokenizer(each)
        check_same_vocabulary(tokenizer, student_path, teacher_tokenizer, each.model_name_or_path)
        positions = min(positions, teacher_config.max_position_embeddings)
    longest_answer = recipe.training.max_completion_length
    longest = check_prompt_length(recipe.max_prompt_length, "max_completion_length", longest_answer, positions)
    check_disk(stage, recipe, config)
    train, held_out = (
        drop_too_long(rows, "max_prompt_length", longest, recipe.data.max_too_long_share).dataset()
        for rows in split_held_out(recipe.data, recipe.training.seed, PROMPT, tokenizer)
    )
    check_enough(train, recipe.global_batch_size, f"global_batch_size {recipe.global_batch_size}")
    to_answer, graders = rows_to_answer(recipe.samples, held_out)
    recipe.training.seed = recipe.seed_of()

    prepare_rollouts(recipe.training, longest, stage.is_made)
    first, *others = recipe.loaded_teachers
    trainer = DistillationTrainer(
        model=load_for_training(recipe.model, recipe.training),
        teacher_model=load_for_training(first, recipe.training),
        args=recipe.training,
        train_dataset=train.select_columns("prompt"),
        eval_dataset=held_out.select_columns("prompt"),
        processing_class=tokenizer,
        peft_config=get_peft_config(recipe.model),
        callbacks=[StopIfAnswersAreCut(longest_answer)],
    )
    compare_rollouts(trainer)
    in_turn = TeachersInTurn(trainer, [load_for_training(each, recipe.training) for each in others])
    trainer.add_callback(in_turn)
    names = [Path(name).name for name in recipe.teacher_names]
    teachers = dict(zip(names, in_turn.teachers, strict=True))

    def sampled(model: "torch.nn.Module") -> "list[Answer]":
        return sample_held_out(trainer, model, to_answer["prompt"], longest_answer)

    # Graded once, because the teachers do not change.
    grades = {name: grade(sampled(each), to_answer, graders) for name, each in teachers.items()} if graders else {}
    teacher_grades = mean_of(grades)

    def measure() -> "Metrics":
        answers = sampled(trainer.model_wrapped)
        found = {name: mean_divergences(trainer, each, answers) for name, each in teachers.items()}
        return mean_of(found) | grade(answers, to_answer, graders, recipe.samples.group_by)

    def complete(before: "Metrics", after: "Metrics") -> "Metrics":
        return {f"teacher_{name}": value for name, value in teacher_grades.items()} | {
            f"{name}_gap_closed": (after[name] - before[name]) / (teacher_grades[name] - before[name])
            for name in graders
            if before and teacher_grades[name] != before[name]
        }

    run(stage, recipe, trainer, measure, complete)


def mean_of(found: "dict[str, Metrics]") -> "Metrics":
    """The means of metrics over several teachers, and the metrics of each: `kl_student_teacher/policy-0`."""
    if len(found) < 2:
        return next(iter(found.values()), {})
    names = next(iter(found.values()))
    means = {metric: fmean(each[metric] for each in found.values()) for metric in names}
    return means | {f"{metric}/{name}": each[metric] for metric in names for name, each in found.items()}


def check(recipe: Recipe, launcher: Launcher) -> None:
    check_training(recipe, launcher)
    check_sampling(recipe, launcher)
    if recipe.training.bf16 and recipe.model.dtype == "float32" and not launcher.zero_stage:
        raise UserError(
            "bf16 is true with dtype float32, but TRL computes the distillation loss past accelerate's "
            "autocast, in float32; write bf16: false, or dtype: bfloat16 with adapters or DeepSpeed"
        )
    if recipe.training.teacher_model_name_or_path is None and not recipe.teachers:
        raise UserError("teacher_model_name_or_path is missing; name a directory or a Hub model")
    if recipe.training.teacher_model_name_or_path and recipe.teachers:
        raise UserError("teacher_model_name_or_path and teachers both name teachers; remove one of them")
    if recipe.training.teacher_model_revision and recipe.teachers:
        raise UserError("teacher_model_revision is for one teacher; remove it, or name a folder of that revision")
    if recipe.teachers and recipe.training.eval_strategy != "no":
        raise UserError(
            "eval_strategy would evaluate with the teacher whose turn it is; remove it, the stage measures all of "
            "them before and after training"
        )
    check_names("teachers", recipe.teachers or [])
    if recipe.teacher_load_in_4bit and recipe.teacher_load_in_8bit:
        raise UserError("teacher_load_in_4bit and teacher_load_in_8bit are both true; remove one of them")
    if (recipe.teacher_load_in_4bit or recipe.teacher_load_in_8bit) and launcher.zero_stage == 3:
        raise UserError(
            "a quantized teacher cannot be sharded by ZeRO-3; remove teacher_load_in_4bit and "
            "teacher_load_in_8bit, ZeRO-3 spreads the teacher's weights over the processes"
        )
    with located("the teacher"):
        for each in recipe.loaded_teachers:
            check_model_arguments(each)


def complete(recipe: Recipe, launcher: Launcher) -> None:
    complete_training(recipe, launcher)
    recipe.training.disable_dropout = True


def metrics(recipe: Recipe) -> set[str]:
    graders, grades = recipe.samples.grader_names, recipe.samples.metrics
    additional = {f"{name}_gap_closed" for name in graders} if grades else set()
    additional |= {f"teacher_{name}" for name in grades if graders}
    return metrics_of(grades | DIVERGENCES if grades else set(), additional)


def teacher_quantization(recipe: Recipe) -> str | None:
    """How the teacher is quantized: `4bit`, `8bit` or None."""
    return "4bit" if recipe.teacher_load_in_4bit else "8bit" if recipe.teacher_load_in_8bit else None


def teacher_of(checked: Checked[Recipe]) -> "Gemma2Config":
    """The config of a teacher."""
    config = checked.models["teachers" if checked.recipe.teachers else "teacher_model_name_or_path"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    return config


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    config, recipe, compute = held.config_of(checked), checked.recipe, held.compute_of(checked)
    teacher, quantization = teacher_of(checked), teacher_quantization(recipe)
    in_fp32 = recipe.teacher_dtype == "float32"
    itemsize = cost.FP32 if in_fp32 and not checked.launcher.zero_stage else cost.BF16
    size = len(recipe.teacher_names) * cost.weights(teacher, itemsize, quantization)
    frozen = {"teacher": held.shared(size, checked.launcher, 3)}
    answer = recipe.training.max_completion_length
    prompt = cost.longest_prompt(checked.models.values(), recipe.max_prompt_length, answer)
    rows, length = recipe.training.per_device_train_batch_size, prompt + answer
    loss = cost.divergence_loss(config, rows * answer, compute, trains_all=not recipe.model.use_peft)
    teacher_compute = cost.Compute(cost.FP32 if in_fp32 else cost.BF16, compute.attention, compute.on_cpu)
    teacher_pass = cost.forward(teacher, rows, length, teacher_compute) + cost.dequantized(teacher, quantization)
    vllm = held.rollouts(checked, prompt, answer)
    parts = held.held(checked, frozen) | ({} if recipe.training.vllm_enable_sleep_mode else vllm)
    return {
        "rollouts": parts | vllm,
        **held.training_step(checked, parts, rows, length, loss, [teacher_pass]),
        **held.sampling(checked, parts, prompt, answer, trains_on_answers=True),
        **held.divergence(checked, parts, prompt, answer),
    }


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    recipe, training, student = checked.recipe, checked.recipe.training, computed.model_of(checked)
    teacher_config, compute, number = teacher_of(checked), student.compute, len(recipe.teacher_names)
    compute = cost.Compute(
        cost.FP32 if recipe.teacher_dtype == "float32" else cost.BF16, compute.attention, compute.on_cpu
    )
    teacher = passes.Model(teacher_config, compute, teacher_quantization(recipe))
    answers = rows.answers_up_to(training.max_completion_length)
    prompts = rows.prompts_up_to(
        cost.longest_prompt(checked.models.values(), recipe.max_prompt_length, training.max_completion_length)
    )
    sampled = computed.per_process(checked, recipe.global_batch_size)
    batch, both = training.per_device_train_batch_size, prompts.plus(answers)
    padded = both.longest(sampled)  # the answers of a step are padded once
    loss = passes.divergence_loss(student, teacher, batch * answers.mean, training.beta)
    step = [
        *passes.sampling(student, sampled, sampled, prompts, answers, training.use_vllm),
        passes.reading(teacher, sampled, batch, both, padded=padded),
        computed.a_step(checked, student, both, loss, padded),
    ]
    measured = [
        *computed.answering(checked, student, prompts, answers),
        *computed.comparing(checked, [student, *[teacher] * number], prompts, answers),
    ]
    grades_teacher = bool(recipe.samples.graders)
    return [
        *times(computed.num_steps(checked, rows), step),
        *times(2, measured),
        *(times(number, computed.answering(checked, teacher, prompts, answers)) if grades_teacher else []),
    ]


COMMAND = Command(
    "distill",
    Recipe,
    main,
    metrics,
    check,
    complete,
    decisive=decisive,
    refused=REFUSED_KEYS | REFUSED,
    row_formats={"datasets": PROMPT, "held_out_datasets": PROMPT},
    headline=[GRADER, "kl_student_teacher"],
    below_gate="does the student end its turns, is the teacher better than it, is learning_rate high enough?",
    curves=[Curve("log.jsonl", "loss", "loss")],
    needed_models=["model_name_or_path", "teacher_model_name_or_path", "teachers"],
    memory=memory,
    disk=held.disk,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
