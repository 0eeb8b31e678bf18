"""Training speed of a stage and of a bare script with its trainer on the same rows, run in turn.

    python benchmarks/stage_step.py sft       # six pairs on recipes/tiny/sft.yaml; prints both speeds and the ratios
    python benchmarks/stage_step.py distill   # the same with recipes/tiny/distill.yaml; needs runs/tiny/sft
    python benchmarks/stage_step.py rlhf      # recipes/tiny/rlhf.yaml; needs runs/tiny/sft and runs/tiny/reward

Both train the same weights with the same batches. Neither evaluates or saves while it is timed, except for one answer
to one prompt at the end of rlhf. In rlhf the stage also updates its anchor; the bare script's does not move.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl import DistillationTrainer, RLOOTrainer, SFTTrainer

REWARD_MODEL = "runs/tiny/reward"
STUDENT, TEACHER = "runs/tiny/sft", "gemma2_post/tiny/models/teacher"


def stage(name: str, max_steps: int, directory: Path) -> float:
    """Steps per second of `python -m gemma2_post.NAME`, from the tokens per second that it reports."""
    values = {"output_dir": directory / "stage", "max_steps": max_steps, "num_samples": 1}
    if name == "rlhf":
        values |= {"watch_steps": max_steps, "normalize_rewards": False, "missing_end_penalty": 0}
    else:
        values["save_strategy"] = "no"
    command = [sys.executable, "-m", f"gemma2_post.{name}", "--config", f"recipes/tiny/{name}.yaml"]
    subprocess.run([*command, *(f"--{key}={value}" for key, value in values.items())], check=True, capture_output=True)
    output = directory / "stage" / ("policy-0" if name == "rlhf" else "")
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    num_tokens = [entry["num_tokens"] for entry in log if "num_tokens" in entry][-1]
    return max_steps * json.loads((output / "metrics.json").read_text())["tokens_per_second"] / num_tokens


def bare(name: str, max_steps: int, directory: Path) -> float:
    """Steps per second of one of the scripts below, in its own process."""
    command = [sys.executable, __file__, name, "--bare", str(max_steps), str(directory / "bare")]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(finished.stdout.splitlines()[-1])


def bare_sft(max_steps: int, output_dir: str) -> "SFTTrainer":
    """What a user of TRL would write."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from gemma2_post.models.tokenizer import render
    from gemma2_post.tiny.data import demonstrations

    base = "gemma2_post/tiny/models/base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = render(tokenizer, [row["messages"] for row in demonstrations("train")])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, attn_implementation="eager", quantization_config=quantization, device_map="cpu"
        ),
        args=SFTConfig(
            output_dir,
            use_cpu=True,
            max_steps=max_steps,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            activation_checkpointing=False,
            max_length=192,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        ),
    )


def bare_distill(max_steps: int, output_dir: str) -> "DistillationTrainer":
    """What a user of TRL would write."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    from gemma2_post.tiny.data import demonstrations

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        for path in (STUDENT, TEACHER)
    )
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir,
            use_cpu=True,
            bf16=False,
            max_steps=max_steps,
            per_device_train_batch_size=32,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            activation_checkpointing=False,
            max_completion_length=48,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["messages"][:-1]} for row in demonstrations("train")]),
        processing_class=AutoTokenizer.from_pretrained(STUDENT),
    )


def bare_rlhf(max_steps: int, output_dir: str) -> "RLOOTrainer":
    """What a user of TRL would write: no average and no penalty for cut answers."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    from gemma2_post.tiny.data import prompts

    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    return RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32, attn_implementation="eager"),
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(
            REWARD_MODEL, dtype=torch.float32, attn_implementation="eager"
        ),
        reward_processing_classes=tokenizer,
        args=RLOOConfig(
            output_dir,
            use_cpu=True,
            bf16=False,
            max_steps=max_steps,
            per_device_train_batch_size=64,
            num_generations=4,
            temperature=0.9,
            beta=0.05,
            learning_rate=2e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            activation_checkpointing=False,
            max_completion_length=48,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        train_dataset=Dataset.from_list(prompts("train")),
        processing_class=tokenizer,
    )


def steps_per_second(trainer: "SFTTrainer | DistillationTrainer | RLOOTrainer") -> float:
    """Trains, and returns the speed."""
    began = time.monotonic()
    trainer.train()
    return trainer.args.max_steps / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sft", "distill", "rlhf"])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--bare", nargs=2, metavar=("STEPS", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        make_trainer = {"sft": bare_sft, "distill": bare_distill, "rlhf": bare_rlhf}[arguments.stage]
        print(steps_per_second(make_trainer(int(arguments.bare[0]), arguments.bare[1])))
        return
    pairs = []
    for i in range(arguments.pairs):
        with tempfile.TemporaryDirectory() as directory:
            order = (stage, bare) if i % 2 else (bare, stage)
            speeds = {run.__name__: run(arguments.stage, arguments.max_steps, Path(directory)) for run in order}
        pairs.append(speeds)
        print(f"stage {speeds['stage']:.3f} steps/s, bare {speeds['bare']:.3f} steps/s", flush=True)
    ratios = [speeds["bare"] / speeds["stage"] for speeds in pairs]
    # Half of the pairs in either order, because on a shared machine the first run may be slower (or faster).
    mean, lowest, highest = statistics.geometric_mean(ratios), min(ratios), max(ratios)
    print(f"time per step, stage / bare: geometric mean {mean:.3f} ({lowest:.3f} to {highest:.3f})")


if __name__ == "__main__":
    main()
