"""What a GPU shows and a CPU cannot: one command for one 80 GB card, resumable.

    python benchmarks/gpu.py benchmarks/results/2026-11-30-h100      # run it again to go on where it stopped
    python benchmarks/gpu.py /tmp/small --small      # a million parameters, short rows; also on a CPU

1. The selftest.
2. QLoRA of the 27b shape (nf4, r 16, length 1024, batch 1 x 4) through the stage `sft`, and the same with a bare
   `SFTTrainer`: tokens per second, peak memory, losses of the first steps.
3. The 2b and the 9b shape through each stage, and the 2b with eager, flex, and flash attention: the same figures, and
   the plan beside them.

Weights are random; nothing is downloaded. Each part writes a file of its own into the folder and is skipped if that is
there; no part begins after --minutes, 9 by default. At the end summary.md has the tables.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "deepspeed", "flash-attn")
SMALL = ["--small", "--length", "96", "--answer", "16", "--batch", "1"]


def parts(work: Path, is_small: bool) -> Iterator[tuple[str, list[str]]]:
    """The name of each part's file, and its command; the most telling come first."""
    python, stages = sys.executable, [sys.executable, "benchmarks/stages.py"]
    common = ["--work", str(work), *(SMALL if is_small else ["--batch", "1"])]
    seed = ["27b", "--only", "sft", "--accumulate", "4", "--steps", "6"]
    yield "selftest", [python, "-m", "gemma2_post.cli", "selftest", "--json", "{json}"]
    yield "27b", [*stages, *seed, *common, "--json", "{json}"]
    yield "27b-bare", [python, __file__, "{json}", "--bare", str(work / f"27b{'-small' * is_small}-sft")]
    for shape in ("2b", "9b"):
        cases = ["sft", "sft-lora", "distill", "reward", "rlhf", "warp", "evaluate"]
        yield shape, [*stages, shape, "--only", *cases, *common, "--json", "{json}"]
    for attention in ("eager", *(["flex_attention", "flash_attention_2"] if torch.cuda.is_available() else [])):
        cases = ["--only", "sft-lora", "--attention", attention]
        yield f"2b-{attention}", [*stages, "2b", *cases, *common, "--json", "{json}"]


def bare(work: Path) -> dict[str, Any]:
    """What a user of TRL would write: the recipe that the stage has just run, without the stage."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from gemma2_post.models.tokenizer import render

    values = yaml.safe_load((work / "recipe.yaml").read_text())
    on_gpu = torch.cuda.is_available()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    path, batch = values["model_name_or_path"], values["per_device_train_batch_size"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [json.loads(line)["messages"] for line in (work / "rows.jsonl").read_text().splitlines()]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16,
            attn_implementation=values["attn_implementation"],
            quantization_config=quantization,
            device_map={"": "cuda" if on_gpu else "cpu"},
        ),
        args=SFTConfig(
            str(work / "bare"),
            use_cpu=not on_gpu,
            bf16=True,
            max_steps=values["max_steps"],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=values["global_batch_size"] // batch,
            learning_rate=values["learning_rate"],
            lr_scheduler_type=values["lr_scheduler_type"],
            activation_checkpointing=values["activation_checkpointing"],
            max_length=values["max_length"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=values["seed"],
        ),
        train_dataset=Dataset.from_dict(render(tokenizer, rows)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=values["lora_r"],
            lora_alpha=values["lora_alpha"],
            target_modules=values["lora_target_modules"],
            lora_dropout=0.05,
            task_type="CAUSAL_LM",
        ),
    )
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "tokens_per_second": round(entries[-1]["num_tokens"] / seconds, 2),
        "losses": [round(entry["loss"], 4) for entry in entries],
    }
    if on_gpu:
        found["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return {"sft": found}


def hardware() -> str:
    """The device, the date and the versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except ImportError:
            continue
    return f"{date.today()}, {device}; {', '.join(found)}."


def summary(folder: Path) -> str:
    """The tables of all parts that are done."""
    lines = [f"# {folder.name}", "", hardware(), ""]
    lines += ["| part | case | tokens/s | peak GB | planned GB | host GB | planned | first losses |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for file in sorted(folder.glob("*.json")):
        results = json.loads(file.read_text())
        if file.stem == "selftest":
            states = [result["state"] for result in results["results"]]
            lines.insert(
                4, f"Selftest: {', '.join(f'{states.count(state)} {state}' for state in sorted(set(states)))}.\n"
            )
            continue
        for case, result in results.items():
            if "failed" in result:
                lines.append(f"| {file.stem} | {case} | failed: {' '.join(result['failed'])[-200:]} | | | | | |")
                continue
            planned, host = result.get("planned_gb", {}), result.get("host_peak_gb", {})
            peak = max((phase["without_mapped_files"] for phase in host.values()), default="")
            losses = ", ".join(map(str, result.get("losses", [])[:3]))
            cells = [result.get("tokens_per_second", ""), result.get("peak_memory_gb", ""), planned.get("total", "")]
            cells += [peak, planned.get("host", ""), losses]
            lines.append(f"| {file.stem} | {case} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9, help="begin no part after that")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="folder for models; 70 GB")
    parser.add_argument("--small", action="store_true", help="models of a million parameters, short rows")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        arguments.folder.write_text(json.dumps(bare(arguments.bare), indent=1) + "\n")
        return
    began = time.monotonic()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shape = ""
    for name, command in parts(arguments.work, arguments.small):
        file = arguments.folder / f"{name}.json"
        if file.is_file():
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            print(f"{name} and what follows is for the next run of the same command")
            break
        if shape and not name.startswith(shape):
            shutil.rmtree(arguments.work / "models" / shape, ignore_errors=True)  # the disk may not hold all of them
        shape = name.partition("-")[0] if name[0].isdigit() else ""
        unfinished = file.with_suffix(".unfinished")
        print(f"{name} ...", flush=True)
        finished = subprocess.run([part.replace("{json}", str(unfinished)) for part in command])
        if unfinished.is_file():
            unfinished.rename(file)
        print(f"{name}: {time.monotonic() - began:.0f} s, exit status {finished.returncode}", flush=True)
        (arguments.folder / "summary.md").write_text(summary(arguments.folder))


if __name__ == "__main__":
    main()
