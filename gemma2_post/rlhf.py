"""RLHF: the policy answers prompts, a reward model scores the answers, and a slowly moving anchor keeps it close.

Reads a policy that ends its turns, a reward model and prompts; writes a plain Hugging Face model for each policy of
WARP (arXiv 2406.16768), `policy-0`, `policy-1`, ..., which differ in their seeds and the order of their prompts. The
update is REINFORCE with a leave-one-out baseline on reward - beta * log(policy / anchor), summed over an answer's
tokens, or J-BOND (arXiv 2407.14622), which distills the best of two of the anchor's answers. The anchor is an
exponential moving average of the policy, the model that training starts from, or none.

    accelerate launch --config_file accelerate_configs/cpu.yaml \\
        -m gemma2_post.rlhf --config recipes/tiny/rlhf.yaml
"""

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Literal

from gemma2_post.data.rows import PROMPT
from gemma2_post.evaluation.keys import RewardFunctionArguments, SampleArguments, WatchArguments
from gemma2_post.models import cost
from gemma2_post.models import work as passes
from gemma2_post.models.arguments import REFUSED_KEYS, check_prompt_length
from gemma2_post.stage.bounds import COUNT, NOT_NEGATIVE, SHARE, Bounds
from gemma2_post.stage.command import GRADER, Checked, Command, Curve, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.recipe import key, keys_of, part
from gemma2_post.stage.work import Pass, Rows, times
from gemma2_post.training import keys as training_keys
from gemma2_post.training import memory as held
from gemma2_post.training import work as computed
from gemma2_post.training.checks import check_disk, check_sampling, check_training, complete_training, metrics_of
from gemma2_post.training.keys import TRAINING_BOUNDS, TrainingRecipe

if TYPE_CHECKING:
    from trl import RLOOConfig

JBOND_ANSWERS = 3
"""Answers to a prompt in J-BOND: one of the policy, two of the anchor."""

REFUSED = {
    "sync_ref_model": "TRL's average stands still in bf16; set anchor and anchor_mu",
    "ref_model_mixup_alpha": "it is called anchor_mu here",
    "ref_model_sync_steps": "the anchor is updated after every step; remove it",
    "generation_batch_size": "answers are generated for one step at a time; set global_batch_size",
    "steps_per_generation": "answers are generated for one step at a time; remove it",
    "disable_dropout": "dropout is always off, so that what is sampled is what is trained; remove it",
    "use_transformers_continuous_batching": "it rounds fp32 weights to bf16 in place; remove it",
    "group_by": "no grade is broken down while a policy trains; evaluate breaks grades down by turns; remove it",
    "num_iterations": "each answer is learned from once, as in REINFORCE; remove it",
    "save_steps": "a checkpoint is written at each measurement under the budget; set watch_steps",
    "save_strategy": "a checkpoint is written at each measurement under the budget; set watch_steps",
    "chat_template_kwargs": "the Gemma 2 chat format is set for you; remove it",
    "remove_unused_columns": "the columns go to the reward functions; remove it",
    "model_init_kwargs": "the model's keys are dtype, attn_implementation, ...; remove it",
}


@dataclass(kw_only=True)
class Recipe(TrainingRecipe):
    """The keys of RLHF."""

    training: "RLOOConfig" = part("trl:RLOOConfig", bounds=TRAINING_BOUNDS | {"beta": NOT_NEGATIVE})
    rewards: RewardFunctionArguments = part(RewardFunctionArguments)
    watch: WatchArguments = part(WatchArguments)
    algorithm: Literal["rloo", "jbond"] = key("rloo", "REINFORCE with a leave-one-out baseline, or J-BOND.")
    backward_weight: float = key(0.5, "Weight of J-BOND's backward KL; its forward KL has the rest.", bounds=SHARE)
    anchor: Literal["ema", "start", "none"] = key(
        "ema", "Model that the KL is measured to: an average of the policy, its start, or none."
    )
    anchor_mu: float = key(
        0.01, "Share of the policy in each update of the average.", bounds=Bounds(above=0, at_most=1)
    )
    policy: int = key(0, "Number of this policy; sets its seed and its folder policy-N.", bounds=NOT_NEGATIVE)
    max_prompt_length: int | None = key(
        None, "Longer prompts are dropped; None: what the answer leaves of the model's positions.", bounds=COUNT
    )


def main(stage: Stage, recipe: Recipe) -> None:
    """Trains one policy, and stops it past its KL budget or when it collapses."""
    from trl import RLOOTrainer

    from gemma2_post.data.preparation import check_enough, drop_too_long, split_held_out
    from gemma2_post.evaluation.answering.samples import rows_to_answer
    from gemma2_post.evaluation.rewards import ModelReward, load_reward_functions
    from gemma2_post.models.tokenizer import load_config_and_tokenizer
    from gemma2_post.training.checkpoints import TRAINER_FILE
    from gemma2_post.training.jbond import jbond_trainer
    from gemma2_post.training.policy import load_policy, models_beside, prepare_frozen, save_anchor
    from gemma2_post.training.rollouts import compare as compare_rollouts
    from gemma2_post.training.rollouts import prepare as prepare_rollouts
    from gemma2_post.training.run import run
    from gemma2_post.training.watch import FirstDivergenceIsZero, Watch
    from gemma2_post.weights.anchor import FILE as ANCHOR_FILE
    from gemma2_post.weights.anchor import EmaAnchor

    config, tokenizer = load_config_and_tokenizer(recipe.model)
    score = ModelReward(recipe.rewards, tokenizer) if recipe.rewards.reward_model else None
    positions, whose = config.max_position_embeddings, "the model's"
    if score and score.max_length < positions:  # it must not score anything longer than its training rows
        positions, whose = score.max_length, "the reward model's"
    longest_answer = recipe.training.max_completion_length
    longest = check_prompt_length(recipe.max_prompt_length, "max_completion_length", longest_answer, positions, whose)
    check_disk(stage, recipe, config, has_anchor=recipe.anchor == "ema", saves_every=recipe.watch.watch_steps)
    train, held_out = (
        drop_too_long(rows, "max_prompt_length", longest, recipe.data.max_too_long_share).dataset()
        for rows in split_held_out(recipe.data, recipe.training.seed, PROMPT, tokenizer)
    )
    num_prompts = recipe.global_batch_size // recipe.training.num_generations
    check_enough(train, num_prompts, f"the {num_prompts} of a step (global_batch_size / num_generations)")
    to_answer, graders = rows_to_answer(recipe.samples, held_out)
    reward_functions = load_reward_functions(recipe.rewards, train.column_names, score, recipe.training.reward_weights)

    prepare_rollouts(recipe.training, longest, stage.is_made)
    recipe.training.save_strategy = "no"  # the watch decides when
    recipe.training.seed = recipe.seed_of(recipe.policy)  # only now: all policies share the held-out prompts
    policy = load_policy(recipe.model, recipe.training)
    if recipe.algorithm == "jbond":
        trainer = jbond_trainer(policy, recipe.training, train, tokenizer, reward_functions, recipe.backward_weight)
    else:
        trainer = RLOOTrainer(
            model=policy,
            reward_funcs=reward_functions,
            args=recipe.training,
            train_dataset=train,
            processing_class=tokenizer,
        )
    compare_rollouts(trainer)
    if score:
        score.load(trainer.args.device, partial(prepare_frozen, trainer))
    start, reference = models_beside(trainer, recipe.model, is_moving=recipe.anchor != "start")
    anchor = EmaAnchor(trainer, recipe.anchor_mu) if recipe.anchor == "ema" else None
    restore = anchor.restore if anchor else lambda checkpoint: None
    moving = reference if anchor and not stage.is_made else None  # a finished policy has left its average behind
    weights = recipe.training.reward_weights
    watch = Watch(trainer, recipe.watch, to_answer, start, moving, graders, reward_functions, weights, restore)
    for callback in (FirstDivergenceIsZero(), *([anchor] if anchor else []), watch):
        trainer.add_callback(callback)
    run(
        stage,
        recipe,
        trainer,
        watch.measure,
        watch.complete,
        save_more=partial(save_anchor, trainer, anchor) if anchor else lambda: None,
        last_file=ANCHOR_FILE if anchor else TRAINER_FILE,
    )


def check(recipe: Recipe, launcher: Launcher) -> None:
    check_training(recipe, launcher)
    recipe.rewards.check()
    if recipe.rewards.reward_model_load_in and launcher.zero_stage == 3:
        raise UserError(
            "a quantized reward model cannot be sharded by ZeRO-3; remove reward_model_load_in, ZeRO-3 spreads its "
            "weights over the processes"
        )
    if recipe.samples.num_samples < 1:
        raise UserError("num_samples is 0, so nobody would watch the policy; write 1 or more")
    check_sampling(recipe, launcher)
    beta = recipe.training.beta
    if recipe.algorithm == "jbond":
        _check_jbond(recipe, launcher)
    elif recipe.backward_weight != keys_of(Recipe)["backward_weight"].default:
        raise UserError("backward_weight does nothing without algorithm: jbond; remove it")
    elif recipe.anchor != "none" and beta == 0:
        raise UserError(f"beta is 0, so the anchor {recipe.anchor} holds nothing; write anchor: none, or raise beta")
    if recipe.anchor == "none" and beta:
        raise UserError(f"anchor is none with beta {beta:g}; write beta: 0, or name an anchor")
    if recipe.training.save_total_limit is not None and recipe.training.save_total_limit < 2:
        raise UserError(
            f"save_total_limit is {recipe.training.save_total_limit}, but the last checkpoint is needed until "
            "the next one is complete; write 2 or more"
        )
    if not recipe.training.ds3_gather_for_generation:
        raise UserError("ds3_gather_for_generation is false, which takes hours a step; remove it")


def _check_jbond(recipe: Recipe, launcher: Launcher) -> None:
    training, processes = recipe.training, launcher.num_processes
    if recipe.anchor == "none":
        raise UserError("anchor is none, but J-BOND learns from the anchor's answers; write ema or start")
    if training.use_vllm:
        raise UserError(
            "use_vllm is true, but J-BOND samples from the anchor, too, which vLLM does not hold; remove it"
        )
    if training.normalize_advantages or training.reward_clip_range:
        raise UserError(
            "normalize_advantages and reward_clip_range do nothing in J-BOND, which compares rewards; remove them"
        )
    if recipe.global_batch_size < 2 * JBOND_ANSWERS:
        raise UserError(
            f"global_batch_size is {recipe.global_batch_size}; write {2 * JBOND_ANSWERS} or more, because J-BOND's "
            f"baseline is the return of other prompts, and each has {JBOND_ANSWERS} answers"
        )
    if recipe.global_batch_size % (JBOND_ANSWERS * processes):
        raise UserError(
            f"global_batch_size {recipe.global_batch_size} does not divide by J-BOND's {JBOND_ANSWERS} answers a "
            f"prompt x {processes} processes; change one of them"
        )


def complete(recipe: Recipe, launcher: Launcher) -> None:
    complete_training(recipe, launcher)
    recipe.training.disable_dropout = True


def implied(values: dict[str, object]) -> dict[str, object]:
    """The size of TRL's generation batch, and the folder of this policy.

    Raises:
        UserError: `num_generations` is below 2 or does not divide `global_batch_size`.
    """
    is_jbond = values.get("algorithm") == "jbond"
    batch, group = values.get("global_batch_size"), values.get("num_generations", JBOND_ANSWERS if is_jbond else 2)
    if is_jbond and group != JBOND_ANSWERS:
        raise UserError(f"num_generations is {group}, but J-BOND samples {JBOND_ANSWERS} answers a prompt; remove it")
    if not isinstance(group, int) or group < 2:
        raise UserError(f"num_generations is {group}; write 2 or more, because answers to a prompt are compared")
    if isinstance(batch, int) and batch % group:
        raise UserError(f"global_batch_size {batch} does not divide by num_generations {group}; change one")
    keys = {"generation_batch_size": batch, **({"num_generations": group} if is_jbond else {})}
    if values.get("output_dir"):
        keys["output_dir"] = f"{values['output_dir']}/policy-{values.get('policy', 0)}"
    return keys


def decisive(values: dict[str, object]) -> dict[str, object]:
    """With a `kl_budget`, also how the KL is measured, which says when the run ends; with functions, their columns."""
    found, names = training_keys.decisive(values), []
    if values.get("kl_budget"):
        found["num_samples"] = values.get("num_samples", keys_of(SampleArguments)["num_samples"].default)
        names += ["held_out_datasets", "per_device_eval_batch_size"]
    if values.get("reward_functions"):
        names.append("columns")
    return found | {name: values[name] for name in names if name in values}


def metrics(recipe: Recipe) -> set[str]:
    measured = {"reward", "kl_to_start", "distinct_answers", "distinct_bigrams"} | recipe.samples.metrics
    measured |= recipe.rewards.names | ({"kl_to_anchor"} if recipe.anchor == "ema" else set())
    return metrics_of(measured, {"kept_step"} if recipe.watch.kl_budget else set())


def frozen(checked: Checked[Recipe]) -> Parts:
    """Bytes of the frozen models: reward model, anchor and start."""
    launcher, recipe, trained = checked.launcher, checked.recipe, held.trained_parameters(checked)
    found: Parts = {}
    if scorer := checked.models.get("reward_model"):  # bf16 on a GPU
        itemsize = cost.FP32 if launcher.use_cpu else cost.BF16
        size = cost.weights(scorer, itemsize, recipe.rewards.reward_model_load_in)
        found["reward model"] = held.shared(size, launcher, 3)
    shadow = held.shared(cost.FP32 * trained, launcher, 2) if recipe.anchor == "ema" else 0
    if recipe.model.use_peft:  # reference and start are the policy with another adapter, or without one
        return found | {"anchor": shadow + (cost.FP32 * trained if recipe.anchor != "none" else 0)}
    itemsize = cost.FP32 if held.keeps_fp32(checked) else cost.BF16
    model = held.shared(cost.weights(held.config_of(checked), itemsize), launcher, 3)
    found["anchor"] = shadow + (model if recipe.anchor != "none" else 0)
    found["start"] = model if recipe.anchor != "start" else 0  # the reference itself is the start
    return found


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    config, recipe, compute = held.config_of(checked), checked.recipe, held.compute_of(checked)
    answer = recipe.training.max_completion_length
    prompt = cost.longest_prompt(checked.models.values(), recipe.max_prompt_length, answer)
    rows, length = recipe.training.per_device_train_batch_size, prompt + answer
    tokens = rows * (length if compute.on_cpu else answer)
    loss = cost.fused_loss(config, tokens, compute, trains_all=not recipe.model.use_peft)
    vllm = held.rollouts(checked, prompt, answer)
    parts = held.held(checked, frozen(checked)) | ({} if recipe.training.vllm_enable_sleep_mode else vllm)
    phases = {
        "rollouts": parts | vllm,
        **held.training_step(checked, parts, rows, length, loss),
        **held.sampling(checked, parts, prompt, answer, trains_on_answers=True),
        **held.divergence(checked, parts, prompt, answer),
    }
    if scorer := checked.models.get("reward_model"):
        scoring = cost.Compute(cost.FP32 if compute.on_cpu else cost.BF16, "eager", compute.on_cpu)
        conversations = max(recipe.training.per_device_eval_batch_size, recipe.rewards.reward_batch_size)
        scored = cost.forward(scorer, conversations, length, scoring)
        scored += cost.dequantized(scorer, recipe.rewards.reward_model_load_in)
        phases["rewards"] = parts | {"activations": scored, "gathered": held.gathered(checked)}
    return phases


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    recipe, training, policy = checked.recipe, checked.recipe.training, computed.model_of(checked)
    answers = rows.answers_up_to(training.max_completion_length)
    prompts = rows.prompts_up_to(
        cost.longest_prompt(checked.models.values(), recipe.max_prompt_length, training.max_completion_length)
    )
    sampled, both = computed.per_process(checked, recipe.global_batch_size), prompts.plus(answers)
    batch = training.per_device_train_batch_size
    # The answers of a step are padded once, and each prompt is there `num_generations` times.
    prompt = prompts.longest(sampled / training.num_generations)
    padded = prompt + answers.longest(sampled)
    # Triton scores only the answers; without it, the prompts are scored, too.
    scored = padded if policy.compute.on_cpu else answers.mean
    if recipe.algorithm == "jbond":
        by_policy = sampled / JBOND_ANSWERS
        step = [
            *passes.sampling(policy, by_policy, by_policy, prompts, answers, padded=prompt),
            *passes.sampling(policy, sampled - by_policy, sampled - by_policy, prompts, answers, padded=prompt),
        ]
        # Only the policy's answers are read again, as the policy and as the anchor.
        read = passes.reading(policy, by_policy, batch, both, scored, padded)
    else:
        step = passes.sampling(policy, sampled, sampled, prompts, answers, training.use_vllm, prompt)
        # TRL reads the answers again as the policy, whether or not it has changed, and as the anchor.
        read = passes.reading(policy, sampled, batch, both, scored, padded)
    step += [read, read] if training.beta or recipe.algorithm == "jbond" else [read]
    step.append(computed.a_step(checked, policy, both, passes.fused_loss(policy, batch * scored), padded))
    watched = [
        *computed.answering(checked, policy, prompts, answers),
        *computed.comparing(checked, [policy] * (4 if recipe.anchor == "ema" else 2), prompts, answers),
    ]
    if scorer := checked.models.get("reward_model"):
        on_cpu = checked.launcher.use_cpu
        compute = cost.Compute(cost.FP32 if on_cpu else cost.BF16, "eager", on_cpu)
        scoring = passes.Model(scorer, compute, quantization=recipe.rewards.reward_model_load_in)
        conversations, number = recipe.rewards.reward_batch_size, recipe.samples.num_samples
        step.append(passes.reading(scoring, sampled, conversations, both))
        watched.append(passes.reading(scoring, computed.per_process(checked, number), conversations, both))
    steps = computed.num_steps(checked, rows)
    return [*times(steps, step), *times(1 + ceil(steps / recipe.watch.watch_steps), watched)]


def disk(checked: Checked[Recipe]) -> tuple[float, float]:
    return held.disk(checked, checked.recipe.anchor == "ema", checked.recipe.watch.watch_steps)


COMMAND = Command(
    "rlhf",
    Recipe,
    main,
    metrics,
    check,
    complete,
    implied,
    decisive,
    refused=REFUSED_KEYS | REFUSED,
    row_formats={"datasets": PROMPT, "held_out_datasets": PROMPT},
    headline=[GRADER, "reward"],
    below_gate="read samples/ and watch.jsonl: is the reward what you want, are beta and learning_rate right?",
    curves=[
        Curve("log.jsonl", "reward", "reward on the prompts it learns from"),
        Curve("watch.jsonl", "reward", "reward, held out"),
        Curve("watch.jsonl", GRADER, f"{GRADER}, held out"),
        Curve("watch.jsonl", "kl_to_start", "KL to the start, nats"),
    ],
    needed_models=["model_name_or_path", "reward_model"],
    memory=memory,
    disk=disk,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
