"""From a trainer to a finished directory: what every training stage does after building its trainer."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import Gemma2Config, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2_post.models.loading import find_weights
from gemma2_post.models.saving import save_adapter, save_configs, save_sum
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.models.streaming import write_tensors
from gemma2_post.models.templates import template_digest
from gemma2_post.models.tokenizer import save_tokenizer, tokenizer_digest
from gemma2_post.stage import card, contract
from gemma2_post.stage.command import Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.training import rollouts, trackers
from gemma2_post.training.again import KEPT, MeasuredAgain, MeasureFinished
from gemma2_post.training.checkpoints import TRAINER_FILE, newest_checkpoint
from gemma2_post.training.finite import Metrics, StopIfNotFinite
from gemma2_post.training.keys import TrainingRecipe
from gemma2_post.training.progress import Progress, peak_memory_gb


class _MeasureBefore(TrainerCallback):
    """Measures before the first step, once the model is where it is trained (a ZeRO engine exists only then)."""

    def __init__(self, path: Path, measure: Callable[[], Metrics], is_resumed: bool):
        self.path, self.measure, self.is_resumed = path, measure, is_resumed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if not self.is_resumed:
            metrics = self.measure()
            if state.is_world_process_zero:
                contract.write_json(self.path, metrics)
        self.ended, self.tokens_before = time.monotonic(), state.num_input_tokens_seen


class _NoLastCheckpoint(TrainerCallback):
    """Writes no checkpoint after the last step, whose weights are saved anyway.

    A run that dies while it measures or saves then resumes before the last step; from a checkpoint after the last
    step, the Trainer would take one step too many.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_save = control.should_save and state.global_step < state.max_steps

    on_epoch_end = on_step_end


def run(
    stage: Stage,
    recipe: TrainingRecipe,
    trainer: Trainer,
    measure: Callable[[], Metrics],
    complete: Callable[[Metrics, Metrics], Metrics] = lambda before, after: {},
    save_more: Callable[[], None] = lambda: None,
    last_file: str = TRAINER_FILE,
) -> None:
    """Trains (from the newest checkpoint, if there is one), saves a plain Hugging Face model, then the contract.

    A finished stage whose measurements have changed is measured again, before and after, and not trained. A run that
    resumes with other measurements than it began with finishes as what it began, because its values from before the
    first step are of that kind; what starts it then measures it again.

    Args:
        measure: Measures the stage's metrics; called on every process before the first and after the last step.
        complete: Called on the main process with the metrics before and after, once the weights are saved; writes what
            belongs next to them and returns additional metrics.
        save_more: Called on every process after the last step; saves what else was trained.
        last_file: The file that is written last into a checkpoint.
    """
    tokenizer = trainer.processing_class
    if not trainer.is_deepspeed_enabled:  # TRL casts a quantized model's adapters to bf16, which loses small updates
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    finished = contract.read_done(stage.output_dir)
    checkpoint = None if finished else newest_checkpoint(stage.output_dir, last_file)
    if checkpoint and (begun := contract.read_begun(stage.output_dir)):
        stage.fingerprint = stage.fingerprint | {"measurements": begun["fingerprint"]["measurements"]}
    before_file = stage.output_dir / "before.json"
    if checkpoint and contract.read_json(before_file, {}) is None:
        raise UserError(
            f"{before_file} is missing, which was measured before the first step of {checkpoint.name}; move "
            f"{stage.output_dir} away to begin again"
        )
    # Before training, because what is missing would show only after it.
    base = find_weights(recipe.model) if recipe.model.use_peft and trainer.is_world_process_zero() else None
    trainer.accelerator.wait_for_everyone()  # before the main process writes what the others look for
    if trainer.is_world_process_zero():
        run_id = contract.begin(stage.output_dir, stage.fingerprint)
        logged = contract.read_lines(stage.output_dir / "log.jsonl", {"step": int}) if finished else []
        next_step = contract.step_of(checkpoint) + 1 if checkpoint else logged[-1]["step"] + 1 if logged else 0
        trackers.begin(trainer, stage.output_dir, run_id, next_step)
    if checkpoint:
        logging.getLogger(__name__).warning(
            "resuming from %s: weights, optimizer, scheduler, data order and random state", checkpoint
        )
    finite = StopIfNotFinite(stage.output_dir, last_file)

    def measure_finite() -> Metrics:
        metrics = measure()
        finite.check(metrics, trainer.state.global_step)
        trackers.log(trainer, metrics)
        return metrics

    measure_before = _MeasureBefore(before_file, measure_finite, is_resumed=checkpoint is not None)
    for callback in (finite, measure_before, _NoLastCheckpoint(), Progress(stage.output_dir)):
        trainer.add_callback(callback)
    if finished:
        kept_step = finished["metrics"].get("kept_step")
        measure_finished = MeasureFinished(trainer, stage.output_dir, kept_step, measure_finite)
        trainer.add_callback(measure_finished)
        with finite.sampling(trainer), contextlib.suppress(MeasuredAgain):
            trainer.train()
        after = measure_finished.after
        kept = {name: finished["metrics"][name] for name in KEPT if name in finished["metrics"]}
    else:
        with finite.sampling(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            seconds = time.monotonic() - measure_before.ended
            after = measure_finite()
        save(stage.output_dir, trainer, recipe, base)
        save_more()
        kept = throughput(trainer, seconds, measure_before.tokens_before)
    if trainer.is_world_process_zero():
        if not finished:
            save_tokenizer(tokenizer, stage.output_dir)
            log = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
            contract.write_text(stage.output_dir / "log.jsonl", log)
        before: Metrics = contract.read_json(before_file, {})
        additional = complete(before, after)
        finite.check(additional, trainer.state.global_step)
        trackers.log(trainer, additional | kept)
        metrics = {f"{name}_before": value for name, value in before.items()} | after
        metrics |= additional | kept
        model_args = recipe.model
        facts = {
            "base_model": model_args.model_name_or_path,
            "base_revision": getattr(trainer.model.config, "_commit_hash", None) or model_args.model_revision,
            "base_digest": stage.fingerprint["inputs"].get(model_args.model_name_or_path),
            "adapter": "adapter" if model_args.use_peft else None,
            "dtype": recipe.save_dtype,
            "tokenizer_digest": tokenizer_digest(tokenizer),
            "template_digest": template_digest(tokenizer.chat_template),
            "num_processes": trainer.accelerator.num_processes,
        }
        if getattr(trainer, "use_vllm", False):
            facts["vllm"] = rollouts.version(trainer)
        start = card.shown(model_args.model_name_or_path)
        account = (
            f"The stage `{stage.name}` of gemma2_post trained it, with TRL, from `{start}`. Its weights are "
            f"{recipe.save_dtype}."
        )
        card.begin(stage.output_dir, stage.name, model_args.model_name_or_path, stage.name, account)
        changes = [f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in before if "/" not in name]
        stage.finish(facts, metrics, ", ".join(changes))
    trainer.end()


def save(output_dir: Path, trainer: Trainer, recipe: TrainingRecipe, base: dict[str, Path] | None) -> None:
    """Saves the model; an adapter goes to `adapter/`, and its sum with the unquantized base next to it.

    Every process calls this, because under DeepSpeed all of them take part in gathering, one parameter at a time.
    Adapters, a score head and, with `save_dtype: float32`, all weights come from DeepSpeed's fp32 masters, the others
    from the copies that it computes with.

    Args:
        base: The file of each of the base's tensors if an adapter was trained; only the main process needs them.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    dtype = getattr(torch, recipe.save_dtype)
    is_main, has_adapter = trainer.is_world_process_zero(), isinstance(model, PeftModel)
    parameters = {
        name: each
        for name, each in model.named_parameters()
        if each.requires_grad or not has_adapter or ".lora_" in name  # frozen where only a score head is trained
    }

    def whole(name: str) -> torch.Tensor:
        has_master = parameters[name].requires_grad  # not what is frozen beside a score head
        is_exact = has_master and (has_adapter or name == SCORE_HEAD or dtype == torch.float32)
        if trainer.is_deepspeed_enabled and is_exact:
            return fp32_master(parameters[name])
        return gathered(parameters[name])

    if not has_adapter:
        shapes = {name: getattr(each, "ds_shape", each.shape) for name, each in parameters.items()}
        write_tensors(output_dir if is_main else None, shapes, dtype, whole, {SCORE_HEAD})
        if is_main:
            save_configs(type(model), model.config, output_dir, dtype)
        return
    trained = {name: whole(name) for name in parameters}
    if is_main:
        save_adapter(model, trained, output_dir / "adapter")
        model_class = type(model.get_base_model())
        labels = {} if model_class.can_generate() else {"num_labels": 1}
        model_args = recipe.model
        config = Gemma2Config.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, **labels
        )
        assert base is not None, "the main process has opened the base"
        save_sum(model_class, config, base, output_dir / "adapter", output_dir, dtype)


def gathered(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole parameter as the model computes with it; under ZeRO-3 every process must call this."""
    if not hasattr(parameter, "ds_id"):
        return parameter.data
    from deepspeed.runtime.zero import GatheredParameters  # a slow import

    with GatheredParameters([parameter]):
        return parameter.data.cpu()


def fp32_master(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole parameter in fp32, from DeepSpeed's optimizer, on the CPU; every process must call this."""
    from deepspeed.utils import safe_get_full_fp32_param  # a slow import

    return safe_get_full_fp32_param(parameter).cpu()


def throughput(trainer: Trainer, seconds: float, tokens_before: int) -> Metrics:
    """Tokens per second of training over all processes, without padding, and peak memory in GB.

    Args:
        seconds: Since the training began or resumed.
        tokens_before: Tokens that the trainer had counted by then.
    """
    num_tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry][-1]
    num_tokens -= tokens_before
    return {"tokens_per_second": num_tokens / seconds, "peak_memory_gb": peak_memory_gb(trainer.args)}
