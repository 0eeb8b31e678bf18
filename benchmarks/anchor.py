"""Accuracy, speed and memory of our EMA anchor and of TRL's SyncRefModelCallback under ZeRO-3.

    python benchmarks/anchor.py     # two CPU processes, a random Gemma 2 with about 35M parameters, mu 0.01

Each trains the same policy for a few steps at RLHF's learning rate of 1e-6, with noise as the reward. The error is the
relative error of the anchor's movement, compared with a float64 average of the fp32 masters. Time and memory cover
only the update; memory is everything that one process allocates in it, in units of the bf16 model's size.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MU = 0.01
LAUNCH = ["--config_file", "accelerate_configs/deepspeed_zero3_cpu.yaml", "--main_process_port", "0"]


def make_policy(directory: Path) -> None:
    """Saves a random model in bf16, with the tiny world's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=1024, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, query_pre_attn_scalar=64, sliding_window=32, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.bfloat16).save_pretrained(
        directory
    )
    AutoTokenizer.from_pretrained("gemma2_post/tiny/models/teacher").save_pretrained(directory)


def noise(completions: list, **_: object) -> list[float]:
    """A reward function that returns random values."""
    return [random.random() for _ in completions]


def worker(which: str, policy: str, num_steps: int, report: str) -> None:
    """Trains and measures on one of the two ranks.

    Args:
        which: "ours" or "trl".
        policy: Folder of the model.
        report: File for the results, as JSON.
    """
    import torch
    from datasets import Dataset
    from deepspeed.utils import safe_get_full_fp32_param
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer
    from trl.trainer.callbacks import SyncRefModelCallback

    from gemma2_post.tiny.data import prompts
    from gemma2_post.weights.anchor import EmaAnchor

    args = RLOOConfig(
        tempfile.mkdtemp(),
        use_cpu=True,
        bf16=True,
        max_steps=num_steps,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.1,
        ref_model_mixup_alpha=MU,
        ref_model_sync_steps=1,
        activation_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16, attn_implementation="eager"),
        reward_funcs=noise,
        args=args,
        train_dataset=Dataset.from_list(prompts("train")).select_columns("prompt"),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    ours = EmaAnchor(trainer, MU)
    update = ours if which == "ours" else SyncRefModelCallback(trainer.ref_model, trainer.accelerator)

    class Allocated(TorchDispatchMode):
        """Counts the bytes of all new tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.num_bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            given = {
                each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)
            }
            for each in tree_leaves(made):
                if torch.is_tensor(each) and each.untyped_storage().data_ptr() not in given:
                    self.num_bytes += each.untyped_storage().nbytes()
            return made

    def masters() -> dict[str, torch.Tensor]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        return {name: safe_get_full_fp32_param(each).double() for name, each in model.named_parameters()}

    class Measured(TrainerCallback):
        """Runs the update, times it, and keeps the average in float64."""

        def on_train_begin(self, args, state, control, **further) -> None:
            self.start = masters()
            self.exact = {name: each.clone() for name, each in self.start.items()}
            self.seconds = []
            update.on_train_begin(args, state, control, **further)

        def on_step_end(self, args, state, control, **further) -> None:
            for name, each in masters().items():
                self.exact[name].lerp_(each, MU)
            if state.global_step == 1:
                with Allocated() as allocated:
                    update.on_step_end(args, state, control, **further)
                self.allocated = allocated.num_bytes
                return
            torch.distributed.barrier()
            began = time.monotonic()
            update.on_step_end(args, state, control, **further)
            torch.distributed.barrier()
            self.seconds.append(time.monotonic() - began)

        def on_train_end(self, args, state, control, **further) -> None:
            import deepspeed

            reference = dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
            with deepspeed.zero.GatheredParameters(list(reference.values())):
                self.reference = {name: each.detach().double() for name, each in reference.items()}
            if which == "ours":
                self.shadow = {name: ours.whole(name).double() for name in reference}

    measured: TrainerCallback = Measured()
    trainer.add_callback(measured)
    trainer.train()
    if trainer.is_world_process_zero():
        moved = sum((measured.exact[name] - measured.start[name]).square().sum() for name in measured.exact).sqrt()

        def error(found: dict[str, torch.Tensor]) -> float:
            return float(sum((found[name] - measured.exact[name]).square().sum() for name in found).sqrt() / moved)

        result = {
            "milliseconds": 1000 * statistics.median(measured.seconds),
            "models_allocated": measured.allocated / (2 * sum(each.numel() for each in measured.exact.values())),
            "reference_error": error(measured.reference),
        }
        if which == "ours":
            result["anchor_error"] = error(measured.shadow)
        Path(report).write_text(json.dumps(result))
    trainer.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=3, metavar=("WHICH", "POLICY", "REPORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        which, policy, report = arguments.worker
        worker(which, policy, arguments.steps, report)
        return
    with tempfile.TemporaryDirectory() as directory:
        policy, report = Path(directory) / "policy", Path(directory) / "report.json"
        make_policy(policy)
        for i in range(arguments.repeats):
            for which in ("ours", "trl")[:: 1 if i % 2 else -1]:
                command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *LAUNCH, __file__]
                command += ["--steps", str(arguments.steps), "--worker", which, str(policy), str(report)]
                subprocess.run(command, check=True, capture_output=True)
                print(which, report.read_text(), flush=True)


if __name__ == "__main__":
    main()
