"""The EMA anchor of WARP's RL stage: an fp32 reference that slowly follows the policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

if TYPE_CHECKING:
    from trl import RLOOTrainer

FILE = "anchor.json"
"""Written into a checkpoint last, after every process has written its part of the anchor."""
REFERENCE_ADAPTER = "ref"
"""TRL's name for it."""

_Sharded = Any
"""A `torch.nn.Parameter` with the attributes that DeepSpeed adds: `ds_*` for ZeRO-3, `_hp_mapping` for ZeRO-2."""


class EmaAnchor(TrainerCallback):
    """anchor <- (1 - mu) anchor + mu policy, after every optimizer step (WARP, arXiv 2406.16768, algorithm 1, line 8).

    The anchor is kept in fp32 and follows the policy's fp32 weights: at mu = 0.01, bf16 cannot resolve most of an
    update. If the policy is sharded, each process keeps the shard whose fp32 master it has; nothing is gathered. TRL
    computes with a rounded copy of the anchor, in the reference model or in the adapter `ref`.
    """

    def __init__(self, trainer: "RLOOTrainer", mu: float):
        self.trainer, self.mu = trainer, mu
        self.shadows: dict[str, torch.Tensor] = {}
        """The anchor by parameter name: fp32, whole, or this process's shard if DeepSpeed shards the parameter."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.tracked = _tracked(self.trainer)
        if state.global_step:
            self.restore(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        else:
            self.shadows = {name: _local_fp32(policy).clone() for name, (policy, _) in self.tracked.items()}
            self._write_reference()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        for name, (policy, _) in self.tracked.items():
            self.shadows[name].lerp_(_local_fp32(policy), self.mu)
        self._write_reference()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.trainer.is_deepspeed_enabled or self.trainer.accelerator.is_main_process:
            save_file(self.shadows, self._part(checkpoint))
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.accelerator.is_main_process:
            parts = self.trainer.accelerator.num_processes if self.trainer.is_deepspeed_enabled else 1
            contract.write_json(checkpoint / FILE, {"mu": self.mu, "parts": parts})

    def restore(self, checkpoint: Path) -> None:
        """Goes back to the anchor of a checkpoint.

        Raises:
            UserError: Another number of processes wrote it.
        """
        accelerator, advice = self.trainer.accelerator, "resume with as many processes as the run began with"
        if not self._part(checkpoint).is_file():
            raise UserError(f"{checkpoint} holds no anchor of process {accelerator.process_index}; {advice}")
        saved = load_file(self._part(checkpoint))
        masters = {name: _local_fp32(policy) for name, (policy, _) in self.tracked.items()}
        if {name: each.shape for name, each in saved.items()} != {name: each.shape for name, each in masters.items()}:
            raise UserError(f"{checkpoint} was sharded differently; {advice}")
        # ZeRO-2 may offload the masters, which the shadows follow, to the CPU.
        self.shadows = {name: each.to(masters[name].device) for name, each in saved.items()}
        self._write_reference()

    def _part(self, checkpoint: Path) -> Path:
        index = self.trainer.accelerator.process_index if self.trainer.is_deepspeed_enabled else 0
        return checkpoint / f"anchor-{index:05}.safetensors"

    def whole(self, name: str) -> torch.Tensor:
        """A whole parameter of the anchor, fp32, on the CPU; every process must call it."""
        return _gathered(self.tracked[name][0], self.shadows[name]).cpu()

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the whole parameters."""
        return {name: getattr(each, "ds_shape", each.shape) for name, (each, _) in self.tracked.items()}

    @torch.no_grad()
    def _write_reference(self) -> None:
        for name, (policy, reference) in self.tracked.items():
            _write(reference, policy, self.shadows[name])


def _tracked(trainer: "RLOOTrainer") -> dict[str, tuple[_Sharded, _Sharded]]:
    """The trained parameters, each with its counterpart in the reference, by name in the policy."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name: each for name, each in policy.named_parameters() if each.requires_grad}
    if isinstance(policy, PeftModel):
        return {
            name: (each, policy.get_parameter(name.replace(".default.", f".{REFERENCE_ADAPTER}.")))
            for name, each in trained.items()
        }
    reference: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.ref_model)
    return {name: (each, reference.get_parameter(name)) for name, each in trained.items()}


# --- the fp32 weights are in the parameter, in its ZeRO-3 shard, or in its ZeRO-2 fragment ---


def _local_fp32(parameter: _Sharded) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param  # a slow import

        return safe_get_local_fp32_param(parameter)
    if hasattr(parameter, "_hp_mapping"):
        fragment = parameter._hp_mapping  # None if other processes have all of it
        return torch.empty(0, device=parameter.device) if fragment is None else fragment.get_hp_fragment()
    return parameter.data


def _gathered(policy: _Sharded, shadow: torch.Tensor) -> torch.Tensor:
    if hasattr(policy, "ds_id"):
        shards = [torch.empty_like(shadow) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(shards, shadow.contiguous())
        return torch.cat([shard.flatten() for shard in shards])[: policy.ds_numel].view(policy.ds_shape)
    if hasattr(policy, "_hp_mapping"):
        return _sum_of_fragments(policy, shadow)
    return shadow


def _sum_of_fragments(policy: _Sharded, shadow: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(policy.numel(), dtype=shadow.dtype, device=policy.device)
    if policy._hp_mapping is not None:
        address = policy._hp_mapping.lp_fragment_address
        whole.narrow(0, address.start, address.numel).copy_(shadow.flatten())
    torch.distributed.all_reduce(whole)
    return whole.view_as(policy)


def _write(reference: _Sharded, policy: _Sharded, shadow: torch.Tensor) -> None:
    if hasattr(reference, "ds_id"):
        reference.ds_tensor.data.copy_(shadow.view_as(reference.ds_tensor))
        if reference.ds_persist:  # small parameters are also kept whole, and must be updated there too
            reference.partition([reference])
            reference.all_gather([reference])
    elif hasattr(policy, "_hp_mapping"):
        # Under ZeRO-2 each process has the whole reference: processes exchange rounded weights, never fp32 ones.
        reference.data.copy_(_sum_of_fragments(policy, shadow.to(reference.dtype)))
    else:
        reference.data.copy_(shadow)
