"""The conversational reward model: from preference pairs to a score for each answer in its conversation.

Reads a base (an instruction model, preferably larger than the policy) and pairs with any number of turns; writes a
`Gemma2ForSequenceClassification` with one label, its score head in fp32, and `reward_model.json`, which shows a loader
that the model is unchanged. The loss is Bradley-Terry, -log sigmoid(r(chosen) - r(rejected) - margin), plus
`center_rewards_coefficient` times the square of the sum of both rewards.

    accelerate launch --config_file accelerate_configs/cpu.yaml \\
        -m gemma2_post.reward --config recipes/tiny/reward.yaml
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from gemma2_post.data.keys import PreferenceArguments
from gemma2_post.data.pairs import PAIR
from gemma2_post.models import cost
from gemma2_post.models import work as passes
from gemma2_post.models.arguments import REFUSED_KEYS, check_length
from gemma2_post.models.folder import tensor_digest
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.stage import contract
from gemma2_post.stage.bounds import COUNT
from gemma2_post.stage.command import Checked, Command, Curve, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.paths import FunctionPath, ModelPath, Reference, check_names
from gemma2_post.stage.recipe import Effect, key, part
from gemma2_post.stage.work import Pass, Rows, times
from gemma2_post.training import memory as held
from gemma2_post.training import work as computed
from gemma2_post.training.checks import check_disk, check_training, complete_training, metrics_of
from gemma2_post.training.keys import TRAINING_BOUNDS, TrainingRecipe, decisive

if TYPE_CHECKING:
    from trl import RewardConfig

    from gemma2_post.evaluation.pairs import ScoredPair
    from gemma2_post.training.run import Metrics

REFUSED = {
    "lora_task_type": "it is always SEQ_CLS, with the score head trained; remove it",
    "lora_modules_to_save": "the score head is always trained and saved; remove it",
    "remove_unused_columns": "the trainer is given tokenized pairs only; remove it",
    "group_by": "accuracy is broken down by turns and by length; remove it",
}


@dataclass(kw_only=True)
class Recipe(TrainingRecipe):
    """The keys of a reward model's training."""

    trains_score_head: ClassVar[bool] = True

    training: "RewardConfig" = part("trl:RewardConfig", bounds=TRAINING_BOUNDS)
    preferences: PreferenceArguments = part(PreferenceArguments)
    policies: list[ModelPath] | None = key(
        None,
        "Models whose answers to held-out prompts are scored, for normalization and for graders.",
        effect=Effect.MEASUREMENTS,
    )
    max_new_tokens: int = key(256, "Longest answer of a policy, in tokens.", effect=Effect.MEASUREMENTS, bounds=COUNT)
    score_head: ModelPath | None = key(
        None, "A reward model whose score head this one begins with; members that are averaged share one (WARM)."
    )
    only_score_head: bool = key(False, "Train the score head alone, on the features of the model as it is.")
    noise_ceiling: FunctionPath | None = key(
        None,
        "Function (module:function) of the held-out rows: the best accuracy that noisy labels allow.",
        effect=Effect.MEASUREMENTS,
    )

    @property
    def trains_model(self) -> bool:
        return not self.only_score_head


def main(stage: Stage, recipe: Recipe) -> None:
    """Trains on the pairs; measures held-out pairs and answers of policies; writes what a loader checks."""
    from trl import RewardTrainer, get_peft_config

    from gemma2_post.data.preparation import balance_turns, check_enough, drop_too_long, split_held_out
    from gemma2_post.evaluation import policies
    from gemma2_post.evaluation.answering.samples import rows_to_answer
    from gemma2_post.evaluation.pairs import measure_pairs, plot_pairs
    from gemma2_post.models import reward_model
    from gemma2_post.models.tokenizer import load_config_and_tokenizer
    from gemma2_post.training.run import run

    config, tokenizer = load_config_and_tokenizer(recipe.model)
    max_length = check_length(recipe.training.max_length, config)
    check_disk(stage, recipe, config)
    if recipe.score_head:
        reward_model.check_head(recipe.score_head, config, tokenizer)
    seed, share = recipe.training.seed, recipe.preferences.multi_turn_share
    pair_format = PAIR.with_settings({"score_margin": recipe.preferences.score_margin})
    train_pairs, held_out_pairs = (
        drop_too_long(pairs, "max_length", max_length, recipe.data.max_too_long_share)
        for pairs in split_held_out(recipe.data, seed, pair_format, tokenizer)
    )
    train_pairs = train_pairs if share is None else balance_turns(train_pairs, share, seed)
    train, held_out = train_pairs.dataset(), held_out_pairs.dataset()
    check_enough(train, recipe.global_batch_size, f"global_batch_size {recipe.global_batch_size}", "pairs")
    to_answer, graders = rows_to_answer(recipe.samples, held_out)
    named, names = recipe.noise_ceiling, recipe.policies or []
    ceiling = {"noise_ceiling": policies.noise_ceiling_of(named, held_out)} if named else {}
    policies.check_tokenizers(names, tokenizer)
    prompts = to_answer["prompt"]
    answers = policies.sample_policies(names, recipe.training, tokenizer, prompts, recipe.max_new_tokens)
    recipe.training.seed = recipe.seed_of()

    trainer = RewardTrainer(
        model=reward_model.start(recipe.model, recipe.training, recipe.score_head),
        args=recipe.training,
        train_dataset=train.select_columns(["chosen_ids", "rejected_ids", "margin", "length"]),
        eval_dataset=held_out.select_columns(["chosen_ids", "rejected_ids", "margin"]),
        processing_class=tokenizer,
        peft_config=get_peft_config(recipe.model),
    )
    if recipe.only_score_head:
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "score" in name)
    pairs: list[ScoredPair] = []
    rewards: dict[str, list[float]] = {}

    def measure() -> "Metrics":
        nonlocal pairs, rewards
        pairs, rewards = policies.score_held_out(trainer, held_out, to_answer, answers)
        return measure_pairs(pairs) | policies.rank_correlations(to_answer, answers, rewards, graders) | ceiling

    def complete(before: "Metrics", after: "Metrics") -> "Metrics":
        plot_pairs(pairs, stage.output_dir, after.get("noise_ceiling"))
        canary = [[*row["prompt"], *row["chosen"]] for row in held_out.select(range(min(4, len(held_out))))]
        mean, spread = reward_model.mean_and_spread(rewards.values())
        reward_model.seal(stage.output_dir, tokenizer, canary, mean, spread, max_length, trainer.args.device)
        return {"answer_reward_mean": mean, "answer_reward_spread": spread}

    run(stage, recipe, trainer, measure, complete)


def check(recipe: Recipe, launcher: Launcher) -> None:
    check_training(recipe, launcher)
    dropout = recipe.model.lora_dropout
    if (
        recipe.model.use_peft
        and recipe.training.disable_dropout
        and dropout not in (0, type(recipe.model).lora_dropout)
    ):
        raise UserError(f"lora_dropout {dropout:g} does nothing while disable_dropout is true; write it as false")
    policies = recipe.policies or []
    if recipe.samples.graders and not policies:
        raise UserError("graders grade what policies answer, and there are none; add policies")
    if policies and not recipe.samples.num_samples:
        raise UserError("num_samples is 0, so the policies answer nothing; raise it, or remove policies")
    check_names("policies", policies)


def complete(recipe: Recipe, launcher: Launcher) -> None:
    complete_training(recipe, launcher)
    recipe.training.remove_unused_columns = False  # the sampler needs length
    recipe.model.lora_task_type, recipe.model.lora_modules_to_save = "SEQ_CLS", ["score"]


def metrics(recipe: Recipe) -> set[str]:
    from gemma2_post.evaluation.pairs import PAIR_METRICS

    measured = {f"{name}_rank_correlation{of}" for name in recipe.samples.grader_names for of in ("", "_ceiling")}
    measured |= {"noise_ceiling"} if recipe.noise_ceiling else set()
    return metrics_of(PAIR_METRICS | measured, {"answer_reward_mean", "answer_reward_spread"})


def compute_of_policies(checked: Checked[Recipe]) -> cost.Compute:
    """How policies answer: in bf16 on a GPU."""
    on_cpu = checked.launcher.use_cpu
    return cost.Compute(cost.FP32 if on_cpu else cost.BF16, "eager", on_cpu)


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    config, recipe, compute = held.config_of(checked), checked.recipe, held.compute_of(checked)
    rows, eval_rows = 2 * recipe.training.per_device_train_batch_size, recipe.training.per_device_eval_batch_size
    length = recipe.training.max_length or config.max_position_embeddings
    parts = held.held(checked)
    phases = held.training_step(checked, parts, rows, length)  # chosen and rejected side by side
    if policy := checked.models.get("policies"):  # before the reward model is loaded
        policy_compute = compute_of_policies(checked)
        answering = cost.sampling(policy, eval_rows, length, recipe.max_new_tokens, policy_compute)
        phases["answers of policies"] = {"policies": cost.weights(policy, policy_compute.itemsize)} | answering
    scoring = {"activations": cost.forward(config, eval_rows, length, compute), "gathered": held.gathered(checked)}
    return phases | {"scoring": parts | scoring}


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    recipe, model = checked.recipe, computed.model_of(checked)
    training, samples = recipe.training, computed.per_process(checked, recipe.samples.num_samples)
    lengths = rows.conversations_up_to(training.max_length or model.config.max_position_embeddings)
    batch, eval_rows = 2 * training.per_device_train_batch_size, training.per_device_eval_batch_size
    prompts, answers = rows.prompts_up_to(training.max_length), rows.answers_up_to(recipe.max_new_tokens)
    by_length = training.train_sampling_strategy == "group_by_length"  # pads little more than the shorter of a pair
    padded = lengths.longest(2 if by_length else batch)
    step = passes.training(model, batch, lengths, passes.Loss(), training.activation_checkpointing, padded)
    pairs = 2 * computed.per_process(checked, computed.num_held_out(checked, rows))
    scored = [passes.reading(model, pairs, eval_rows, lengths)]
    found: list[Pass] = []
    for _ in recipe.policies or []:
        policy = checked.models["policies"]
        assert policy is not None, "the planner asks only about models whose shapes it knows"
        answering = passes.Model(policy, compute_of_policies(checked))
        found += passes.sampling(answering, samples, eval_rows, prompts, answers)
        scored.append(passes.reading(model, samples, eval_rows, prompts.plus(answers)))
    steps = computed.accumulation(checked) * computed.num_steps(checked, rows)
    return [*found, *times(steps, [step]), *times(2, scored)]


def digest_of(named: Reference) -> str | None:
    """Of a finished score head, the tensor alone: what was measured of its model decides nothing here."""
    if named.key == "score_head" and contract.read_done(Path(named.name), "output"):
        return tensor_digest(Path(named.name), SCORE_HEAD)
    return contract.input_digest(named.name)


COMMAND = Command(
    "reward",
    Recipe,
    main,
    metrics,
    check,
    complete,
    decisive=decisive,
    digest_of=digest_of,
    refused=REFUSED_KEYS | REFUSED,
    row_formats={"datasets": PAIR, "held_out_datasets": PAIR},
    headline=["accuracy"],
    below_gate="are the preferences consistent, is the base large enough, is learning_rate right for the method?",
    curves=[Curve("log.jsonl", "accuracy", "accuracy on the pairs it learns from")],
    pictures={
        "calibration.png": "Is the reward model as sure of held-out pairs as it is right?",
        "turns.png": "Is it as often right in longer conversations?",
    },
    needed_models=["model_name_or_path", "policies"],
    memory=memory,
    disk=held.disk,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
