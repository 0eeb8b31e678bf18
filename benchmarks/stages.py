"""Each stage at a real Gemma 2 shape with random weights, for a few steps: speed, and peak memory beside the plan.

    python benchmarks/stages.py 2b                                   # on this machine's GPU, or its CPU
    python benchmarks/stages.py 2b --only sft sft-lora --length 128
    python benchmarks/stages.py 9b --json benchmarks/results/9b.json

The recipes are those of recipes/gemma-2-SHAPE, with other models, rows, and numbers of steps; all rows are as long as
--length allows. A case is skipped if its result is in the file already. Memory of the host is PSS, sampled; memory
of the GPU is what torch has allocated at most.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from process_memory import Sampler
from random_model import config_of, write_model, write_pairs, write_rows

from gemma2_post.pipeline.check import check
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.planning import plan
from gemma2_post.stage.recipe_file import load_recipe

ON_GPU = torch.cuda.is_available()
NUM_ROWS, NUM_HELD_OUT = 64, 4
FULL: dict[str, Any] = {"use_peft": False, "load_in_4bit": False, "dtype": "float32"}
LORA: dict[str, Any] = {"use_peft": True, "load_in_4bit": False, "lora_r": 16, "lora_alpha": 32, "dtype": "bfloat16"}
LORA["lora_target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
QLORA = LORA | {"load_in_4bit": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", QLORA),
    "sft-lora": ("sft", LORA),
    "sft-full": ("sft", FULL),
    "distill": ("distill", QLORA | {"teacher_load_in_4bit": True}),
    "distill-lora": ("distill", LORA | {"teacher_load_in_4bit": False}),
    "reward": ("reward", QLORA),
    "reward-lora": ("reward", LORA),
    "rlhf": ("rlhf", LORA),
    "rlhf-4bit": ("rlhf", QLORA),
    "rlhf-full": ("rlhf", FULL),
    "warp": ("warp", {}),
    "evaluate": ("evaluate", {"judge": None, "judge_max_tokens": None, "judge_load_in": None, "corpus": None}),
}
"""The stage of each case, and what its recipe says there instead."""


@dataclass
class Sizes:
    """How much a case computes."""

    length: int
    """Longest conversation in tokens; prompts get all but the answer."""
    answer: int
    """Longest sampled answer in tokens."""
    steps: int
    batch: int | None
    """Rows at once, in place of the recipe's."""
    accumulate: int
    """Batches of a step."""
    attention: str | None
    """In place of the recipe's."""


def recipe_of(name: str, shape: str, models: Path, work: Path, sizes: Sizes) -> Path:
    """Writes the recipe of a case."""
    stage, changes = CASES[name]
    values = load_recipe(f"recipes/gemma-2-{shape}/{stage}.yaml")
    batch, answer = sizes.batch, sizes.answer
    prompt = sizes.length - answer
    policy, reward_model = models / "policy", models / "reward"
    values |= {"output_dir": str(work / "out"), "num_samples": NUM_HELD_OUT}
    rows = {"datasets": write_rows(work / "rows.jsonl", NUM_ROWS, prompt - 10, answer - 10)}
    if stage == "reward":
        rows = {"datasets": write_pairs(work / "rows.jsonl", NUM_ROWS, prompt - 10, answer - 10)}
    if stage not in ("warp", "evaluate"):
        held_out = write_pairs if stage == "reward" else write_rows
        rows["held_out_datasets"] = held_out(work / "held_out.jsonl", NUM_HELD_OUT, prompt - 10, answer - 10, 1000)
        per_device = batch or int(str(values["per_device_train_batch_size"]))
        if stage == "rlhf":
            per_device = max(per_device, int(str(values["num_generations"])))
        values |= {
            "model_name_or_path": str(policy),
            "max_steps": sizes.steps,
            "per_device_train_batch_size": per_device,
            "global_batch_size": per_device * sizes.accumulate,
            "per_device_eval_batch_size": batch or values["per_device_eval_batch_size"],
            "warmup_steps": 0,
            "logging_steps": 1,
            "disable_tqdm": True,
            "max_too_long_share": 0,
        }
        if stage != "rlhf":
            values["save_strategy"] = "no"
        if sizes.attention:
            values["attn_implementation"] = sizes.attention
        if not ON_GPU:
            values["use_cpu"] = True
    for key in ("held_out_share", "columns", "group_by", "graders"):
        values.pop(key, None)
    values |= {key: [{"path": str(file)}] for key, file in rows.items()}
    values |= {
        "sft": {"max_length": sizes.length, "max_new_tokens": answer},
        "distill": {
            "teacher_model_name_or_path": str(policy),
            "max_prompt_length": prompt,
            "max_completion_length": answer,
        },
        "reward": {"max_length": sizes.length, "max_new_tokens": answer, "policies": [str(policy)]},
        "rlhf": {
            "reward_model": str(reward_model),
            "max_prompt_length": prompt,
            "max_completion_length": answer,
            "watch_steps": sizes.steps,
        },
        "warp": {
            "init": str(policy),
            "policies": [str(models / "policy-1"), str(models / "policy-2")],
            "reward_model": str(reward_model),
            "runs": [],
            "eta": [0, 0.5],
            "force": True,
            "max_prompt_length": prompt,
            "max_completion_length": answer,
            "batch_size": batch or values.get("batch_size"),
        },
        "evaluate": {
            "init": str(policy),
            "base": None,
            "models": [str(policy), str(models / "policy-1")],
            "baseline": str(policy),
            "reward_model": str(reward_model),
            "max_prompt_length": prompt,
            "max_completion_length": answer,
            "batch_size": batch or values.get("batch_size"),
        },
    }[stage]
    if stage in ("warp", "evaluate") and batch:
        values["reward_batch_size"] = batch
    values = {key: value for key, value in (values | changes).items() if value is not None}
    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def planned(stage: str, recipe: Path) -> dict[str, float]:
    """The plan in GB: of a process on its device, its parts, and the host's if that is a GPU."""
    config = "single_gpu" if ON_GPU else "cpu"
    text = {"run_dir": str(recipe.parent), "launch": f"accelerate_configs/{config}.yaml"}
    pipeline = recipe.with_name("pipeline.yaml")
    pipeline.write_text(yaml.safe_dump(text | {"stages": {"out": {"stage": stage, "recipe": recipe.name}}}))
    (row,) = plan.plan(check(load_pipeline(pipeline)))
    assert row.parts is not None
    parts = {part: round(size / 1e9, 2) for part, size in row.parts.items()}
    return {"total": round(row.total / 1e9, 2), "host": round(row.host / 1e9, 2)} | parts


def measure(name: str, recipe: Path) -> dict[str, Any]:
    """Runs a case in its own process."""
    stage, output = CASES[name][0], recipe.parent / "out"
    result: dict[str, Any] = {"planned_gb": planned(stage, recipe)}
    folder = output / "policy-0" if stage == "rlhf" else output

    def phase() -> str:
        if (folder / "stage.json").exists() or (folder / ".weights").exists() or any(folder.glob("*.safetensors")):
            return "saving"
        if not (folder / "begun.json").exists():
            return "loading"
        return "training" if (folder / "before.json").exists() else "measuring"

    command = [sys.executable, "-m", f"gemma2_post.{stage}", "--config", str(recipe)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(recipe.parent / "cache")}
    began = time.monotonic()
    with open(recipe.parent / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        sampler = Sampler(process.pid, phase)
        status = process.wait()
        sampler.join()
    result["seconds"] = round(time.monotonic() - began)
    result["host_peak_gb"] = {
        phase: {"all": round(total / 1e9, 2), "without_mapped_files": round(rest / 1e9, 2)}
        for phase, (total, rest) in sampler.peaks.items()
    }
    if status:
        lines = (recipe.parent / "log").read_text().splitlines()
        return result | {"failed": [line for line in lines if line.strip()][-3:]}
    metrics = json.loads((folder / "stage.json").read_text())["metrics"]
    for key in ("tokens_per_second", "peak_memory_gb"):
        if key in metrics:
            result[key] = round(metrics[key], 2)
    if (folder / "log.jsonl").is_file():
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        result["losses"] = [round(entry["loss"], 4) for entry in entries if "loss" in entry]
    return result


def write(*arguments: Any, **more: Any) -> None:
    """Writes a model in a process of its own, whose memory the plan would else take for that of the libraries."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(write_model, *arguments, **more).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["2b", "9b", "27b"])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--small", action="store_true", help="a million parameters, to try this script")
    parser.add_argument("--length", type=int, default=1024, help="longest conversation in tokens")
    parser.add_argument("--answer", type=int, default=256, help="longest sampled answer in tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, help="rows at once, in place of the recipe's")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--attention", help="eager, flex_attention, flash_attention_2, in place of the recipe's")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="folder for models and outputs")
    parser.add_argument("--json", type=Path, help="file of the results; default: WORK/SHAPE.json")
    arguments = parser.parse_args()
    sizes = Sizes(
        arguments.length, arguments.answer, arguments.steps, arguments.batch, arguments.accumulate, arguments.attention
    )
    config = config_of(arguments.shape, arguments.layers, arguments.small)
    size = arguments.shape + (f"-{arguments.layers}-layers" if arguments.layers else "") + "-small" * arguments.small
    models, file = arguments.work / "models" / size, arguments.json or arguments.work / f"{size}.json"
    write(models / "policy", config, mean_answer=arguments.answer / 2)
    results = json.loads(file.read_text()) if file.is_file() else {}
    for name in arguments.only:
        if name in results and "failed" not in results[name]:
            continue
        stage = CASES[name][0]
        if stage in ("rlhf", "warp", "evaluate"):
            write(models / "reward", config, is_reward_model=True)
        if stage in ("warp", "evaluate"):
            for other in ("policy-1", "policy-2"):
                if not (models / other).exists():
                    shutil.copytree(models / "policy", models / other, copy_function=os.link)
        work = arguments.work / f"{size}-{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        recipe = recipe_of(name, arguments.shape, models, work, sizes)
        results[name] = measure(name, recipe)
        shutil.rmtree(work / "out", ignore_errors=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name]), flush=True)


if __name__ == "__main__":
    main()
