"""RLHF: the policy answers prompts, the reward model scores them, and an anchor that follows slowly holds it near.

Reads a policy that ends its turns, a reward model and prompts; writes a plain Hugging Face model for each policy of
WARP (arXiv 2406.16768), `policy-0`, `policy-1`, ..., which differ by seed and by the order of their prompts. The
update is REINFORCE with a leave-one-out baseline on reward - beta * log(policy / anchor), summed over an answer's
tokens. The anchor is an exponential moving average of the policy (`ema`), the model that it began as (`start`), or
`none`.

    accelerate launch --config_file accelerate_configs/cpu.yaml -m gemma2_post.rlhf --config recipes/tiny/rlhf.yaml
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, RLOOConfig, get_peft_config
from trl.import_utils import is_vllm_available
from trl.models.utils import prepare_deepspeed

from gemma2_post.core import data, gemma, rewards
from gemma2_post.core.command import Command, Stage
from gemma2_post.core.data import DataArguments
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.core.rewards import RewardFunction, RewardFunctionArguments
from gemma2_post.core.shards import write_shards
from gemma2_post.core.training import TRAINER_FILE, StageArguments, check_disk, check_training, metrics_of, run
from gemma2_post.evaluation.samples import SampleArguments, graded, load_graders
from gemma2_post.evaluation.watch import FirstDivergenceIsZero, Watch, WatchArguments, WithAdapter
from gemma2_post.weights.anchor import FILE as ANCHOR_FILE
from gemma2_post.weights.anchor import REFERENCE_ADAPTER, EmaAnchor

if TYPE_CHECKING:
    from trl import RLOOTrainer

SEEDS_APART = 1000
"""Between the policies, so that runs of neighbouring seeds share none."""

REFUSED_KEYS = {
    "sync_ref_model": "TRL's average stands still in bf16; the anchor is set by anchor and anchor_mu",
    "ref_model_mixup_alpha": "it is anchor_mu here",
    "ref_model_sync_steps": "the anchor is updated after every step; remove it",
    "generation_batch_size": "answers are generated for one step at a time; set global_batch_size",
    "steps_per_generation": "answers are generated for one step at a time; remove it",
    "disable_dropout": "dropout is always off, so that what is sampled is what is trained; remove it",
    "use_transformers_continuous_batching": "it rounds fp32 weights to bf16 in place; remove it",
    "num_iterations": "each answer is learned from once, as in REINFORCE; remove it",
    "save_steps": "a checkpoint is written at each measurement under the budget; set watch_steps",
    "save_strategy": "a checkpoint is written at each measurement under the budget; set watch_steps",
    "chat_template_kwargs": "the Gemma 2 chat format is set for you; remove it",
    "remove_unused_columns": "the columns go to the reward functions; remove it",
    "model_init_kwargs": "the model's keys are dtype, attn_implementation, ...; remove it",
}


@dataclass
class RlhfArguments:
    anchor: Literal["ema", "start", "none"] = field(
        default="ema", metadata={"help": "What the KL is to: an average of the policy, its start, or nothing."}
    )
    anchor_mu: float = field(default=0.01, metadata={"help": "Share of the policy in each update of the average."})
    policy: int = field(default=0, metadata={"help": "Which of the policies; sets the seed and the folder policy-N."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longer prompts are dropped; None for what the model's positions leave to the answer."},
    )


def main(
    stage: Stage,
    training_args: RLOOConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
    watch_args: WatchArguments,
    rlhf_args: RlhfArguments,
) -> None:
    # Imported here: who has made a mistake in a recipe should not have to wait for it.
    from trl import RLOOTrainer

    config = gemma.load_config(stage.where, model_args.model_name_or_path, model_args.model_revision)
    tokenizer = gemma.load_tokenizer(stage.where, model_args.model_name_or_path, config, model_args.model_revision)
    score = rewards.ModelReward(stage.where, reward_args, tokenizer) if reward_args.reward_model else None
    positions, whose = config.max_position_embeddings, "the model's"
    if score and score.max_length < positions:  # it must not score what is longer than all that it was trained on
        positions, whose = score.max_length, "the reward model's"
    max_prompt_length = gemma.check_prompt_length(
        stage.where,
        rlhf_args.max_prompt_length,
        "max_completion_length",
        training_args.max_completion_length,
        positions,
        whose,
    )
    check_disk(stage, stage_args, training_args, model_args, config, further_weights=rlhf_args.anchor == "ema")
    with training_args.main_process_first():
        train, held_out = data.split_held_out(stage.where, data_args, training_args.seed, data.load_prompts)
        train, held_out = (
            data.drop_long_prompts(stage.where, rows, tokenizer, max_prompt_length, data_args.max_too_long_share)
            for rows in (train, held_out)
        )
    num_prompts = stage_args.global_batch_size // training_args.num_generations
    if len(train) < num_prompts:
        raise UserError(
            f"{stage.where}: {len(train)} prompts are fewer than the {num_prompts} of a step (global_batch_size / "
            "num_generations), and TRL leaves out steps that are not full; lower it, or give more prompts"
        )
    graders = load_graders(stage.where, sample_args, held_out)
    to_answer = held_out.select(range(min(sample_args.num_samples, len(held_out))))
    reward_functions: list[RewardFunction] = [score] if score else []
    reward_functions += rewards.load_reward_functions(stage.where, reward_args, train.column_names)
    names = [function.__name__ for function in reward_functions]
    if training_args.reward_weights and len(training_args.reward_weights) != len(names):
        raise UserError(
            f"{stage.where}: reward_weights has {len(training_args.reward_weights)} values for {len(names)} rewards "
            f"({', '.join(names)}); give one for each"
        )

    training_args.disable_dropout = True
    training_args.save_strategy = "no"  # the watch says when
    training_args.seed += SEEDS_APART * rlhf_args.policy  # the held-out prompts are the same for all
    trainer = RLOOTrainer(
        model=load_policy(stage.where, training_args, model_args),
        reward_funcs=reward_functions,
        args=training_args,
        train_dataset=train,
        processing_class=tokenizer,
    )
    if score:
        score.load(partial(prepare_frozen, trainer))
    if model_args.use_peft:
        start, reference = WithAdapter(trainer, None), WithAdapter(trainer, REFERENCE_ADAPTER)
    else:
        start, reference = trainer.ref_model, trainer.ref_model
        if rlhf_args.anchor != "start":  # the reference moves, or there is none
            start = prepare_frozen(trainer, gemma.load_for_training(stage.where, model_args, training_args))
    anchor = EmaAnchor(stage.where, trainer, rlhf_args.anchor_mu) if rlhf_args.anchor == "ema" else None
    watch = Watch(
        stage.where,
        trainer,
        tokenizer,
        watch_args,
        to_answer,
        start,
        reference if anchor else None,
        graders,
        restore_anchor=anchor.restore if anchor else lambda checkpoint: None,
    )
    trainer.add_callback(FirstDivergenceIsZero(stage.where))
    if anchor:
        trainer.add_callback(anchor)
    trainer.add_callback(watch)
    run(
        stage,
        stage_args,
        model_args,
        trainer,
        tokenizer,
        watch.measure,
        watch.complete,
        save_more=partial(save_anchor, stage, trainer, anchor, tokenizer) if anchor else lambda: None,
        last_file=ANCHOR_FILE if anchor else TRAINER_FILE,
    )


def check(
    where: str,
    launcher: Launcher | None,
    training_args: RLOOConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
    watch_args: WatchArguments,
    rlhf_args: RlhfArguments,
) -> None:
    check_training(where, launcher, training_args, model_args, stage_args)
    rewards.check_arguments(where, reward_args)
    if sample_args.num_samples < 1:
        raise UserError(f"{where}: num_samples is 0, so nobody would watch the policy; write 1 or more")
    if training_args.use_vllm and not is_vllm_available():
        raise UserError(f"{where}: use_vllm is true, but vLLM is not installed; pip install 'trl[vllm]'")
    if training_args.temperature <= 0:
        raise UserError(f"{where}: temperature is {training_args.temperature:g}; write a number above 0")
    if rlhf_args.anchor != "none" and training_args.beta == 0:
        raise UserError(
            f"{where}: beta is 0, so the anchor {rlhf_args.anchor} holds nothing; write anchor: none, or raise beta"
        )
    if rlhf_args.anchor == "none" and training_args.beta:
        raise UserError(f"{where}: anchor is none with beta {training_args.beta:g}; write beta: 0, or name an anchor")
    if training_args.beta < 0:
        raise UserError(f"{where}: beta is {training_args.beta:g}, which would reward going away; write 0 or more")
    if not 0 < rlhf_args.anchor_mu <= 1:
        raise UserError(f"{where}: anchor_mu is {rlhf_args.anchor_mu:g}; write a number above 0, at most 1")
    if watch_args.watch_steps < 1:
        raise UserError(f"{where}: watch_steps is {watch_args.watch_steps}; write 1 or more")
    if watch_args.kl_budget is not None and not watch_args.kl_budget > 0:
        raise UserError(f"{where}: kl_budget is {watch_args.kl_budget:g} nats; write a number above 0, or remove it")
    if training_args.save_total_limit is not None and training_args.save_total_limit < 2:
        raise UserError(
            f"{where}: save_total_limit is {training_args.save_total_limit}, but the last checkpoint is needed until "
            "the next one is complete; write 2 or more"
        )
    if rlhf_args.policy < 0:
        raise UserError(f"{where}: policy is {rlhf_args.policy}; write 0, 1, ...")
    if not training_args.ds3_gather_for_generation:
        raise UserError(f"{where}: ds3_gather_for_generation is false, which takes hours a step; remove it")
    training_args.logging_nan_inf_filter = False  # it would hide that the loss is NaN


def implied(where: str, values: dict[str, object]) -> dict[str, object]:
    """Keys of TRL that follow from the recipe's, and the folder of this policy."""
    batch, group = values.get("global_batch_size"), values.get("num_generations", 2)
    if not isinstance(group, int) or group < 2:
        raise UserError(
            f"{where}: num_generations is {group}; write 2 or more, because each answer is compared with others of "
            "its prompt"
        )
    if isinstance(batch, int) and batch % group:
        raise UserError(f"{where}: global_batch_size {batch} does not divide by num_generations {group}; change one")
    keys = {"generation_batch_size": batch}
    if values.get("output_dir"):
        keys["output_dir"] = f"{values['output_dir']}/policy-{values.get('policy', 0)}"
    return keys


def load_policy(where: str, training_args: RLOOConfig, model_args: ModelConfig) -> PreTrainedModel | PeftModel:
    """The policy as it starts; with adapters, TRL keeps a copy of the new one as the reference `ref`."""
    policy = gemma.load_for_training(where, model_args, training_args)
    peft_config = get_peft_config(model_args)
    if peft_config is None:
        return policy
    set_seed(training_args.seed)  # of the new adapter
    # One type for all under ZeRO-3, whose gathering buffers have that of the first parameter.
    plugin = training_args.deepspeed_plugin
    sharded = plugin is not None and plugin.zero_stage == 3
    return get_peft_model(policy, peft_config, autocast_adapter_dtype=not sharded)


def prepare_frozen(trainer: "RLOOTrainer", model: PreTrainedModel) -> torch.nn.Module:
    """A model that is only read: on the trainer's device, or sharded as the policy is."""
    model.requires_grad_(False)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True).eval()  # computes in the policy's type


def save_anchor(stage: Stage, trainer: "RLOOTrainer", anchor: EmaAnchor, tokenizer: PreTrainedTokenizerBase) -> None:
    """The anchor as a model, or an adapter, of its own in fp32: the EMA of the policy's weights."""
    directory, is_main = stage.output_dir / "anchor", trainer.is_world_process_zero()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(policy, PeftModel):
        weights = {name: anchor.whole(name) for name in anchor.shadows}
        if is_main:
            policy.save_pretrained(directory, state_dict=weights, selected_adapters=["default"])
        return
    write_shards(directory if is_main else None, anchor.sizes(), anchor.whole)
    if is_main:
        gemma.save_configs(policy, directory, torch.float32)
        gemma.save_tokenizer(tokenizer, directory)


def metrics(
    training_args: RLOOConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    stage_args: StageArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
    watch_args: WatchArguments,
    rlhf_args: RlhfArguments,
) -> set[str]:
    measured = {"reward", "kl_to_start", "distinct_answers", "distinct_bigrams"} | graded(sample_args)
    measured |= rewards.names(reward_args) | ({"kl_to_anchor"} if rlhf_args.anchor == "ema" else set())
    return metrics_of(measured, {"kept_step"} if watch_args.kl_budget else set())


COMMAND = Command(
    "rlhf",
    main,
    [
        *(RLOOConfig, ModelConfig, DataArguments, StageArguments, SampleArguments),
        *(RewardFunctionArguments, WatchArguments, RlhfArguments),
    ],
    __doc__,
    metrics,
    check,
    gemma.REFUSED_KEYS | REFUSED_KEYS,
    implied,
)

if __name__ == "__main__":
    COMMAND.launch()
