"""The conversational reward model: from preference pairs to a score for each answer in its conversation.

Reads a base (an instruction model, larger than the policy if possible) and pairs of any number of turns; writes a
`Gemma2ForSequenceClassification` with one label, its score head in fp32, and `reward_model.json`, by which whoever
loads it sees that it is what it was. The loss is Bradley-Terry, -log sigmoid(r(chosen) - r(rejected) - margin), plus
`center_rewards_coefficient` times the square of the sum of both rewards.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m gemma2_post.reward --config recipes/tiny/reward.yaml
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from trl import ModelConfig, RewardConfig

from gemma2_post.core import data, gemma, preferences, reward_model
from gemma2_post.core.command import Command, Stage
from gemma2_post.core.data import DataArguments, Message
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.core.preferences import PreferenceArguments
from gemma2_post.core.training import Metrics, StageArguments, check_disk, check_training, metrics_of, run
from gemma2_post.evaluation.pairs import (
    PAIR_METRICS,
    ScoredPair,
    measure_pairs,
    plot_pairs,
    rank_correlation,
    rank_correlation_ceiling,
)
from gemma2_post.evaluation.samples import (
    Answer,
    Grader,
    SampleArguments,
    gather_rows,
    load_graders,
    sample_answers,
    share_of,
)

REFUSED_KEYS = {
    "lora_task_type": "it is always SEQ_CLS, with the score head trained; remove it",
    "lora_modules_to_save": "the score head is always trained and saved; remove it",
    "remove_unused_columns": "the trainer is given tokenised pairs only; remove it",
    "group_by": "accuracy is broken down by turns and by length; remove it",
}


@dataclass
class RewardArguments:
    policies: list[str] | None = field(
        default=None,
        metadata={"help": "Models whose answers to held-out prompts are scored: for normalising, and for graders."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer of a policy, in tokens."})
    noise_ceiling: str | None = field(
        default=None,
        metadata={"help": "Function module:function of the held-out rows: the best accuracy that noisy labels allow."},
    )


def main(
    stage: Stage,
    training_args: RewardConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    preference_args: PreferenceArguments,
    reward_args: RewardArguments,
) -> None:
    # Imported here: who has made a mistake in a recipe should not have to wait for it.
    from trl import RewardTrainer, get_peft_config

    config = gemma.load_config(stage.where, model_args.model_name_or_path, model_args.model_revision)
    max_length = gemma.check_length(stage.where, training_args.max_length, config)
    tokenizer = gemma.load_tokenizer(stage.where, model_args.model_name_or_path, config, model_args.model_revision)
    check_disk(stage, stage_args, training_args, model_args, config)
    with training_args.main_process_first():
        load = partial(preferences.load_preferences, score_margin=preference_args.score_margin)
        train, held_out = data.split_held_out(stage.where, data_args, training_args.seed, load)
        train, held_out = (
            preferences.tokenize_pairs(stage.where, pairs, tokenizer, max_length, data_args.max_too_long_share)
            for pairs in (train, held_out)
        )
        if preference_args.multi_turn_share is not None:
            train = preferences.balance_turns(stage.where, train, preference_args.multi_turn_share, training_args.seed)
    graders = load_graders(stage.where, sample_args, held_out)
    to_answer = held_out.select(range(min(sample_args.num_samples, len(held_out))))
    ceiling = {}
    if reward_args.noise_ceiling:
        ceiling["noise_ceiling"] = noise_ceiling_of(stage.where, reward_args.noise_ceiling, held_out)
    check_tokenizers(stage.where, reward_args, tokenizer)
    answers = sample_policies(stage.where, training_args, reward_args, tokenizer, to_answer["prompt"])

    training_args.remove_unused_columns = False  # length is for the sampler
    model_args.lora_task_type, model_args.lora_modules_to_save = "SEQ_CLS", ["score"]
    trainer = RewardTrainer(
        model=reward_model.start(stage.where, model_args, training_args),
        args=training_args,
        train_dataset=train.select_columns(["chosen_ids", "rejected_ids", "margin", "length"]),
        eval_dataset=held_out.select_columns(["chosen_ids", "rejected_ids", "margin"]),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    pairs: list[ScoredPair] = []
    rewards: dict[str, list[float]] = {}

    def measure() -> Metrics:
        nonlocal pairs, rewards
        pairs, rewards = score_held_out(trainer, tokenizer, held_out, to_answer, answers)
        metrics = measure_pairs(pairs) | rank_correlations(to_answer, answers, rewards, graders)
        return metrics | ceiling

    def complete(before: Metrics, after: Metrics) -> Metrics:
        plot_pairs(pairs, stage.output_dir, after.get("noise_ceiling"))
        of_answers = numpy.array([reward for each in rewards.values() for reward in each])
        mean, spread = float(of_answers.mean()), float(of_answers.std())
        canary = [[*row["prompt"], *row["chosen"]] for row in held_out.select(range(min(4, len(held_out))))]
        reward_model.seal(stage.output_dir, tokenizer, canary, mean, spread, max_length)
        return {"answer_reward_mean": mean, "answer_reward_spread": spread}

    run(stage, stage_args, model_args, trainer, tokenizer, measure, complete)


def noise_ceiling_of(where: str, path: str, pairs: Dataset) -> float:
    function = data.load_function(where, path)
    try:
        return function(pairs.to_list())
    except KeyError as error:
        raise UserError(f"{where}: {path} needs the column {error}; add it to columns") from error


def check(
    where: str,
    launcher: Launcher | None,
    training_args: RewardConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    preference_args: PreferenceArguments,
    reward_args: RewardArguments,
) -> None:
    check_training(where, launcher, training_args, model_args, stage_args)
    policies = reward_args.policies or []
    if sample_args.graders and not policies:
        raise UserError(f"{where}: graders grade what policies answer, and there are none; add policies")
    if policies and not sample_args.num_samples:
        raise UserError(f"{where}: num_samples is 0, so the policies answer nothing; raise it, or remove policies")
    names = [Path(path).name for path in policies]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: policies: two folders have the same name ({', '.join(names)}); rename one")


def check_tokenizers(where: str, reward_args: RewardArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses policies with another tokenizer."""
    for path in reward_args.policies or []:
        policy_tokenizer = gemma.load_tokenizer(where, path, gemma.load_config(where, path))
        if gemma.tokenizer_digest(policy_tokenizer) != gemma.tokenizer_digest(tokenizer):
            raise UserError(
                f"{where}: policies: {path} has another tokenizer than the reward model's base; choose models with "
                "the same vocabulary"
            )


def sample_policies(
    where: str,
    training_args: RewardConfig,
    reward_args: RewardArguments,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
) -> dict[str, list[Answer]]:
    """What each policy answers to held-out prompts, by its folder's name; each process asks its share of them."""
    mine = share_of(len(prompts), training_args.distributed_state)
    answers = {}
    for path in reward_args.policies or []:
        policy_args = ModelConfig(
            model_name_or_path=path,
            dtype="bfloat16" if training_args.device.type == "cuda" else "float32",
            attn_implementation="eager",
        )
        with gemma.unsharded(training_args):
            policy = gemma.load_model(where, policy_args, device_map={"": training_args.device})
        sampled = sample_answers(
            policy,
            tokenizer,
            [prompts[i] for i in mine],
            reward_args.max_new_tokens,
            batch_size=training_args.per_device_eval_batch_size,
            seed=training_args.seed,
        )
        answers[Path(path).name] = gather_rows(mine, sampled, len(prompts))
    return answers


def score_held_out(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Dataset,
    to_answer: Dataset,
    answers: dict[str, list[Answer]],
) -> tuple[list[ScoredPair], dict[str, list[float]]]:
    """The held-out pairs with their rewards; and those of the policies' answers, or of all answers in the pairs."""
    rows = [*held_out["chosen_ids"], *held_out["rejected_ids"]]
    for each in answers.values():
        rows += [
            reward_model.conversation_ids(tokenizer, [*prompt, {"role": "assistant", "content": answer.text}])
            for prompt, answer in zip(to_answer["prompt"], each, strict=True)
        ]
    mine = share_of(len(rows), trainer.accelerator)
    batch_size = trainer.args.per_device_eval_batch_size
    scores = reward_model.score_ids(trainer.model_wrapped, [rows[i] for i in mine], batch_size)
    scores = iter(gather_rows(mine, scores, len(rows)))
    chosen, rejected = ([next(scores) for _ in range(len(held_out))] for _ in range(2))
    pairs = [
        ScoredPair(better, worse, row["num_turns"], len(row["chosen_ids"]), len(row["rejected_ids"]))
        for better, worse, row in zip(chosen, rejected, held_out, strict=True)
    ]
    by_policy = {name: [next(scores) for _ in each] for name, each in answers.items()}
    return pairs, by_policy or {"pairs": [*chosen, *rejected]}


def rank_correlations(
    rows: Dataset, answers: dict[str, list[Answer]], rewards: dict[str, list[float]], graders: dict[str, Grader]
) -> Metrics:
    """Spearman's, of reward and grade: over the answers of all policies, and of each; beside it what equal grades,
    of which a good policy's answers have many, leave of a perfect 1."""
    columns = {column: rows[column] for column in rows.column_names}
    metrics = {}
    for name, grader in graders.items():
        grades = {
            policy: grader(completions=[answer.text for answer in each], **columns) for policy, each in answers.items()
        }
        if grades:
            all_grades = [grade for policy in grades for grade in grades[policy]]
            metrics[f"{name}_rank_correlation"] = rank_correlation(
                [reward for policy in grades for reward in rewards[policy]], all_grades
            )
            metrics[f"{name}_rank_correlation_ceiling"] = rank_correlation_ceiling(all_grades)
        metrics |= {
            f"{name}_rank_correlation/{policy}": rank_correlation(rewards[policy], grades[policy]) for policy in grades
        }
        metrics |= {
            f"{name}_rank_correlation_ceiling/{policy}": rank_correlation_ceiling(grades[policy]) for policy in grades
        }
    return metrics


def metrics(
    training_args: RewardConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    preference_args: PreferenceArguments,
    reward_args: RewardArguments,
) -> set[str]:
    graders = {path.rpartition(":")[2] for path in sample_args.graders or []}
    measured = PAIR_METRICS | {f"{name}_rank_correlation" for name in graders}
    measured |= {f"{name}_rank_correlation_ceiling" for name in graders}
    measured |= {"noise_ceiling"} if reward_args.noise_ceiling else set()
    return metrics_of(measured, {"answer_reward_mean", "answer_reward_spread"})


COMMAND = Command(
    "reward",
    main,
    [
        *(RewardConfig, ModelConfig, DataArguments, StageArguments),
        *(SampleArguments, PreferenceArguments, RewardArguments),
    ],
    __doc__,
    metrics,
    check,
    gemma.REFUSED_KEYS | REFUSED_KEYS,
)

if __name__ == "__main__":
    COMMAND.launch()
