"""The EMA anchor of WARP's RL stage: a reference that follows the policy slowly, in fp32."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

if TYPE_CHECKING:
    from trl import RLOOTrainer

FILE = "anchor.json"
"""Written last into a checkpoint, when the anchor's part of each process is there."""
REFERENCE_ADAPTER = "ref"  # as TRL calls it


@dataclass
class _Tracked:
    """A trained parameter and the reference's counterpart of it."""

    policy: torch.nn.Parameter
    reference: torch.nn.Parameter


class EmaAnchor(TrainerCallback):
    """anchor <- (1 - mu) anchor + mu policy, after every optimizer step (WARP, arXiv 2406.16768, algorithm 1, line 8).

    The anchor is kept in fp32, from the fp32 weights of the policy: at mu = 0.01 nearly all of an update is below what
    bf16 resolves. Of a sharded policy each process keeps the shard whose fp32 master it has, and nothing is gathered.
    Only its rounding is copied into the reference that TRL computes with, a model or the adapter `ref`.
    """

    def __init__(self, trainer: "RLOOTrainer", mu: float):
        self.trainer, self.mu = trainer, mu
        self.shadows: dict[str, torch.Tensor] = {}
        """By parameter: fp32, of the shape of the parameter or, where DeepSpeed shards it, of this process's shard."""

    def on_train_begin(self, args, state, control, **_) -> None:
        self.tracked = _tracked(self.trainer)
        if state.global_step:
            self.restore(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        else:
            self.shadows = {name: _local_fp32(each.policy).clone() for name, each in self.tracked.items()}
            self._write_reference()

    def on_step_end(self, args, state, control, **_) -> None:
        for name, each in self.tracked.items():
            self.shadows[name].lerp_(_local_fp32(each.policy), self.mu)
        self._write_reference()

    def on_save(self, args, state, control, **_) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.trainer.is_deepspeed_enabled or self.trainer.accelerator.is_main_process:
            save_file(self.shadows, self._part(checkpoint))
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.accelerator.is_main_process:
            parts = self.trainer.accelerator.num_processes if self.trainer.is_deepspeed_enabled else 1
            contract.write_json(checkpoint / FILE, {"mu": self.mu, "parts": parts})

    def restore(self, checkpoint: Path) -> None:
        """Goes back to the anchor of a checkpoint."""
        if not self._part(checkpoint).is_file():
            raise UserError(
                f"{checkpoint} holds no anchor of process {self.trainer.accelerator.process_index}; go "
                "on with as many processes as began"
            )
        device = self.trainer.accelerator.device  # which safetensors does not know as "cpu:0"
        saved = {name: each.to(device) for name, each in load_file(self._part(checkpoint)).items()}
        if {name: each.shape for name, each in saved.items()} != {
            name: _local_fp32(each.policy).shape for name, each in self.tracked.items()
        }:
            raise UserError(f"{checkpoint} was sharded otherwise; go on with as many processes as began")
        self.shadows = saved
        self._write_reference()

    def _part(self, checkpoint: Path) -> Path:
        index = self.trainer.accelerator.process_index if self.trainer.is_deepspeed_enabled else 0
        return checkpoint / f"anchor-{index:05}.safetensors"

    def whole(self, name: str) -> torch.Tensor:
        """A whole parameter of the anchor, fp32, on the CPU; called on each process."""
        return _gathered(self.tracked[name].policy, self.shadows[name]).cpu()

    def sizes(self) -> dict[str, int]:
        """Bytes of each whole parameter in fp32."""
        return {name: 4 * _numel(each.policy) for name, each in self.tracked.items()}

    @torch.no_grad()
    def _write_reference(self) -> None:
        for name, each in self.tracked.items():
            _write(each.reference, each.policy, self.shadows[name])


def _tracked(trainer: "RLOOTrainer") -> dict[str, _Tracked]:
    """By the name in the policy, or in its adapter."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name: each for name, each in policy.named_parameters() if each.requires_grad}
    if isinstance(policy, PeftModel):
        return {
            name: _Tracked(each, policy.get_parameter(name.replace(".default.", f".{REFERENCE_ADAPTER}.")))
            for name, each in trained.items()
        }
    reference: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.ref_model)
    return {name: _Tracked(each, reference.get_parameter(name)) for name, each in trained.items()}


# --- where the fp32 weights are: in the parameter, in ZeRO-3's shard of it, or in ZeRO-2's fragment of it ---


def _local_fp32(parameter: torch.nn.Parameter) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param  # a slow import

        return safe_get_local_fp32_param(parameter)
    if hasattr(parameter, "_hp_mapping"):
        fragment = parameter._hp_mapping  # None where another process has all of it
        return torch.empty(0, device=parameter.device) if fragment is None else fragment.get_hp_fragment()
    return parameter.data


def _numel(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _gathered(policy: torch.nn.Parameter, shadow: torch.Tensor) -> torch.Tensor:
    if hasattr(policy, "ds_id"):
        shards = [torch.empty_like(shadow) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(shards, shadow.contiguous())
        return torch.cat([shard.flatten() for shard in shards])[: policy.ds_numel].view(policy.ds_shape)
    if hasattr(policy, "_hp_mapping"):
        return _sum_of_fragments(policy, shadow)
    return shadow


def _sum_of_fragments(policy: torch.nn.Parameter, shadow: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(policy.numel(), dtype=shadow.dtype, device=policy.device)
    if policy._hp_mapping is not None:
        address = policy._hp_mapping.lp_fragment_address
        whole.narrow(0, address.start, address.numel).copy_(shadow.flatten())
    torch.distributed.all_reduce(whole)
    return whole.view_as(policy)


def _write(reference: torch.nn.Parameter, policy: torch.nn.Parameter, shadow: torch.Tensor) -> None:
    if hasattr(reference, "ds_id"):
        reference.ds_tensor.data.copy_(shadow.view_as(reference.ds_tensor))
        if reference.ds_persist:  # small ones are kept whole, too, and would go on as they were
            reference.partition([reference])
            reference.all_gather([reference])
    elif hasattr(policy, "_hp_mapping"):
        # The reference is whole on each process under ZeRO-2: its rounding is exchanged, never the fp32 weights.
        reference.data.copy_(_sum_of_fragments(policy, shadow.to(reference.dtype)))
    else:
        reference.data.copy_(shadow)
