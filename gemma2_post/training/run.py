"""From a trainer to a finished directory: what every training stage does after building its trainer."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2_post.models.saving import merge_adapter, save_configs, save_model
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.models.shards import write_shards
from gemma2_post.models.tokenizer import save_tokenizer, tokenizer_digest
from gemma2_post.stage import card, contract, digests
from gemma2_post.stage.command import Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.training import trackers
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
        save(stage.output_dir, trainer, recipe)
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
            "template_digest": digests.of_text(tokenizer.chat_template),
            "num_processes": trainer.accelerator.num_processes,
        }
        base, dtype = card.shown(model_args.model_name_or_path), recipe.save_dtype
        account = (
            f"The stage `{stage.name}` of gemma2_post trained it, with TRL, from `{base}`. Its weights are {dtype}."
        )
        card.begin(stage.output_dir, stage.name, model_args.model_name_or_path, stage.name, account)
        changes = [f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in before if "/" not in name]
        stage.finish(facts, metrics, ", ".join(changes))
    trainer.end()


def save(output_dir: Path, trainer: Trainer, recipe: TrainingRecipe) -> None:
    """Saves the model; an adapter goes to `adapter/`, and its sum with the unquantized base next to it.

    Every process calls this, because under DeepSpeed all of them take part in gathering. DeepSpeed gathers the copies
    that it computes with; adapters, a score head and, with `save_dtype: float32`, all weights come from fp32 masters.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    dtype = getattr(torch, recipe.save_dtype)
    is_main = trainer.is_world_process_zero()
    parameters = dict(model.named_parameters())
    if trainer.is_deepspeed_enabled and not isinstance(model, PeftModel) and dtype == torch.float32:
        sizes = {name: 4 * getattr(each, "ds_numel", each.numel()) for name, each in parameters.items()}
        write_shards(output_dir if is_main else None, sizes, lambda name: fp32_master(parameters[name]))
        if is_main:
            save_configs(model, output_dir, dtype)
        return
    # Outside DeepSpeed the wrapped model may be a compiled one.
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else model)
    if trainer.is_deepspeed_enabled:
        for name, parameter in parameters.items():
            if name == SCORE_HEAD or (isinstance(model, PeftModel) and parameter.requires_grad):
                master = fp32_master(parameter)
                if is_main:
                    state_dict[name] = master
    if not is_main:
        return
    if isinstance(model, PeftModel):
        model.save_pretrained(output_dir / "adapter", state_dict=state_dict, selected_adapters=["default"])
        base = model.get_base_model()
        labels = {} if base.can_generate() else {"num_labels": 1}
        model = merge_adapter(output_dir / "adapter", recipe.model, type(base), **labels)
        # Rounded in place, one parameter at a time: a copy of 27b would take another 54 GB.
        for name, parameter in model.named_parameters():
            if name != SCORE_HEAD:
                parameter.data = parameter.data.to(dtype)
        state_dict = dict(model.state_dict())
    save_model(model, state_dict, output_dir, dtype)


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
