"""Every training stage for three steps through an accelerate config, on the tiny models, held against references.

The references were made with one process on a CPU; to make them again, from the project's folder:

    python -m gemma2_post.selftest.stages
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gemma2_post.data.keys import Source
from gemma2_post.data.sources import rows_of
from gemma2_post.pipeline import processes
from gemma2_post.selftest.result import Result, judged
from gemma2_post.stage import contract, launcher
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.recipe_file import load_recipe
from gemma2_post.stage.stages import command_of

RECIPES = Path("recipes/tiny")
REFERENCE = Path(__file__).parent / "reference.json"
STAGES = ("sft", "distill", "reward", "rlhf")
STEPS, BATCH, NUM_HELD_OUT = 3, 32, 64
"""Steps of each stage, rows of a step on all processes together, and rows that are held out."""
SECONDS = 300
"""The longest that a process may take; the exchange between processes would otherwise wait for half an hour."""
SHARED: dict[str, object] = {
    "max_steps": STEPS,
    "global_batch_size": BATCH,
    "bf16": True,
    "dtype": "bfloat16",
    "use_peft": True,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "train_sampling_strategy": "random",
    # Batches that do not depend on the number of processes.
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "num_samples": 8,
    "disable_tqdm": True,
}
"""What replaces keys of the tiny recipes. Everything computes in bf16, as on a GPU, so one reference serves all."""
OWN: dict[str, dict[str, object]] = {
    "sft": {"save_strategy": "no", "max_new_tokens": 16},
    # A student that ends its turns, and the base model as its teacher: far apart, and both ship with the package.
    # The likeliest answers do not depend on a device's random numbers.
    "distill": {
        "save_strategy": "no",
        "lora_r": 16,
        "lora_dropout": 0.0,
        "teacher_dtype": "bfloat16",
        "learning_rate": 1e-3,
        "max_completion_length": 24,
        "generation_kwargs": {"do_sample": False},
    },
    "reward": {"save_strategy": "no", "max_new_tokens": 16},
    # Warmer answers wander off now and then, and one of those decides the mean entropy.
    "rlhf": {
        "use_peft": False,
        "dtype": "float32",
        "learning_rate": 5e-5,
        "temperature": 0.6,
        "max_completion_length": 24,
        "watch_steps": 99,
    },
}
TOLERANCES: dict[str, dict[str, tuple[float, float]]] = {
    "sft": {"loss": (0.02, 0), "held_out_nll": (0.02, 0), "num_tokens": (0, 0)},
    "distill": {"loss": (0.06, 0)},
    "reward": {"loss": (0.04, 0), "num_tokens": (0, 0)},
    "rlhf": {"reward": (0, 0.5), "entropy": (0.3, 0), "kl": (0, 0.05)},
}
"""What is compared, with its relative and its absolute tolerance: for bf16, for another order of its sums, and in
`rlhf` for other random answers."""
REMEDY = (
    "look at the versions and numerics above; with several processes, run the selftest with one, too: if it passes, "
    "the exchange between processes is at fault"
)


def check(config: Path) -> Iterator[Result]:
    """The results of the launched processes, of each stage, and under ZeRO-3 of saving and loading again.

    Raises:
        UserError: The config or the tiny recipes are missing, or its number of processes cannot share a batch.
    """
    found = checked_launcher(config)
    references = contract.read_json(REFERENCE)
    with tempfile.TemporaryDirectory(prefix="gemma2-selftest-") as name:
        folder = Path(name)
        yield check_processes(config, found, folder)
        write_rows(folder)
        for stage in STAGES:
            yield check_stage(stage, config, found, folder, references)
        if found.zero_stage == 3:
            yield check_reload(config, found, folder)


def checked_launcher(config: Path) -> Launcher:
    """The launcher of a config that the selftest can use."""
    found = launcher.read(config)
    if not RECIPES.is_dir():
        raise UserError(f"there is no {RECIPES}; run from the project's folder")
    if found.num_machines > 1:
        raise UserError(f"{config} is for {found.num_machines} machines; test each with the config of one machine")
    if BATCH % found.num_processes:
        raise UserError(f"{config} starts {found.num_processes} processes; the selftest needs a divisor of {BATCH}")
    return found


# --- the processes that the config starts ---


def check_processes(config: Path, found: Launcher, folder: Path) -> Result:
    """Whether each process has a device of its own, every device has one, and they add up values correctly."""
    name, number = "processes", found.num_processes
    flags = ["--use_cpu"] if found.use_cpu else []
    seconds, log, status = launch(config, folder / "processes.log", "gemma2_post.selftest.launched", folder, *flags)
    if status:
        return failed(name, log, "are num_processes and distributed_type of the config right? is NCCL blocked here?")
    seen = [contract.read_json(path) for path in sorted(folder.glob("process-*.json"))]
    num_gpus = 0 if found.use_cpu else torch.cuda.device_count()
    return compared_processes(seen, number, num_gpus, seconds)


def compared_processes(seen: list[dict[str, Any]], number: int, num_gpus: int, seconds: float) -> Result:
    """The result of what the processes have written.

    Args:
        number: Processes that there should be.
        num_gpus: GPUs that are visible here; 0 to compute on the processor.
    """
    name, devices = "processes", {each["device"] for each in seen}
    text = f"{len(seen)} on {', '.join(sorted({each['name'] for each in seen}))}"
    if len(seen) != number or any(each["num_processes"] != number for each in seen):
        remedy = "correct num_processes and distributed_type of the config"
        return judged(name, False, f"{text}; they should be {number} that know of each other", remedy)
    if any(not math.isclose(each["sum"], number * (number + 1) / 2, rel_tol=1e-6) for each in seen):
        remedy = "test NCCL by nccl-tests; NCCL_P2P_DISABLE=1 may help, slowly"
        return judged(name, False, f"{text}; what they add up is wrong", remedy)
    if num_gpus and not len(devices) == number == num_gpus:
        remedy = "set num_processes to the number of GPUs, or show only those with CUDA_VISIBLE_DEVICES"
        return judged(name, False, f"{text}; {len(devices)} of {num_gpus} visible GPUs are used", remedy)
    speed = seen[0]["gb_per_second"]
    exchange = f", adding up {speed:.2g} GB/s" if number > 1 else ""
    return judged(name, True, f"{text}{exchange}, {seconds:.0f} s", "", seconds=seconds, gb_per_second=speed)


# --- stages ---


def variant(stage: str, found: Launcher) -> str:
    """The name of a reference: `sft` is QLoRA, but ZeRO-3 shards no quantized weights."""
    return f"{stage}-4bit" if stage == "sft" and found.zero_stage != 3 else stage


def keys_of(stage: str, found: Launcher, folder: Path) -> dict[str, object]:
    """The keys that replace the recipe's."""
    base, teacher = (f"gemma2_post/tiny/models/{name}" for name in ("base", "teacher"))
    models: dict[str, dict[str, object]] = {
        "sft": {"load_in_4bit": variant(stage, found) == "sft-4bit"},
        "distill": {"model_name_or_path": teacher, "teacher_model_name_or_path": base},
        "reward": {"policies": [teacher]},
        "rlhf": {"model_name_or_path": teacher, "reward_model": str(folder / "reward")},
    }
    return {
        **SHARED,
        **OWN[stage],
        **models[stage],
        **{name: [{"path": str(folder / f"{stage}-{name}.jsonl")}] for name in ("datasets", "held_out_datasets")},
        "use_cpu": found.use_cpu,
        "per_device_train_batch_size": BATCH // found.num_processes,
        "output_dir": str(folder / stage),
    }


def write_rows(folder: Path) -> None:
    """Writes the first rows of each recipe's data to files."""
    for stage in STAGES:
        recipe: dict[str, Any] = load_recipe(RECIPES / f"{stage}.yaml")
        for name, number in (("datasets", 2 * STEPS * BATCH), ("held_out_datasets", NUM_HELD_OUT)):
            rows = islice(rows_of(Source(**recipe[name][0]), set()), number)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{stage}-{name}.jsonl").write_text(text, encoding="utf-8")


def check_stage(
    stage: str, config: Path, found: Launcher, folder: Path, references: dict[str, dict[str, list[float]]]
) -> Result:
    """Runs a stage, and compares what it measured with its reference."""
    output, seconds, log, status = run(stage, config, keys_of(stage, found, folder), folder)
    if status:
        return failed(stage, log, REMEDY)
    done = contract.read_json(output / contract.DONE)
    if done["num_processes"] != found.num_processes:
        text = f"ran on {done['num_processes']} of {found.num_processes} processes"
        return judged(stage, False, text, f"correct distributed_type in {config}")
    return compared(stage, values_of(stage, output), references[variant(stage, found)], seconds)


def run(stage: str, config: Path, keys: dict[str, object], folder: Path) -> tuple[Path, float, Path, int]:
    """Runs a stage as processes; returns its output, its seconds, its log and its exit status."""
    output = Path(str(keys["output_dir"]))
    recipe = ["--config", RECIPES / f"{stage}.yaml", *processes.assignments(keys)]
    outcome = launch(config, folder / f"{output.name}.log", command_of(stage).module, *recipe)
    return output / "policy-0" if stage == "rlhf" else output, *outcome


def values_of(stage: str, output: Path) -> dict[str, list[float]]:
    """What is compared, by name: the values of all steps, their mean in `rlhf`, or before and after training."""
    entries = [each for each in contract.read_lines(output / "log.jsonl") if "grad_norm" in each]
    metrics = contract.read_json(output / contract.DONE)["metrics"]
    found: dict[str, list[float]] = {}
    for name in TOLERANCES[stage]:
        of_steps = [each[name] for each in entries if name in each]
        found[name] = of_steps or [metrics[f"{name}_before"], metrics[name]]
        if stage == "rlhf":  # the answers of one step are too few
            found[name] = [sum(of_steps) / len(of_steps)]
    return found


def compared(stage: str, values: dict[str, list[float]], reference: dict[str, list[float]], seconds: float) -> Result:
    """Whether all values are within their tolerances; the text shows the first ones, or the worst."""
    numbers = {f"{name}_{i}": value for name, each in values.items() for i, value in enumerate(each)}
    wrong = [
        f"{name} {_listed(each)}, expected {_listed(reference[name])} within {_tolerance(*TOLERANCES[stage][name])}"
        for name, each in values.items()
        if not _close(each, reference[name], *TOLERANCES[stage][name])
    ]
    name = next(iter(values))
    within = _tolerance(*TOLERANCES[stage][name])
    right = f"{name} {_listed(values[name])} ({_listed(reference[name])} within {within}), {seconds:.0f} s"
    return judged(stage, not wrong, "; ".join(wrong) or right, REMEDY, seconds=seconds, **numbers)


def _close(values: Sequence[float], expected: Sequence[float], relative: float, absolute: float) -> bool:
    return len(values) == len(expected) and all(
        math.isclose(one, two, rel_tol=relative, abs_tol=absolute) for one, two in zip(values, expected, strict=True)
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _tolerance(relative: float, absolute: float) -> str:
    return f"{relative:.0%}" if relative else f"{absolute:g}"


def check_reload(config: Path, found: Launcher, folder: Path) -> Result:
    """Trains on from the output of `sft`: before its first step it must measure what `sft` measured last."""
    name, again = "ZeRO-3 save and reload", str(folder / "again")
    keys = keys_of("sft", found, folder) | {"output_dir": again, "max_steps": 1, "num_samples": 0}
    output, _, log, status = run("sft", config, keys | {"model_name_or_path": str(folder / "sft")}, folder)
    if status:
        return failed(name, log, "zero3_save_16bit_model: true must be in the config")
    saved, loaded = values_of("sft", folder / "sft")["held_out_nll"][1], values_of("sft", output)["held_out_nll"][0]
    text = f"held_out_nll {saved:.4g} when saved, {loaded:.4g} when loaded, within 1%"
    remedy = "what is saved is not what was trained: zero3_save_16bit_model: true must be in the config"
    return judged(name, math.isclose(saved, loaded, rel_tol=0.01), text, remedy, saved=saved, loaded=loaded)


# --- launching ---


def launch(config: Path, log: Path, module: str, *arguments: object) -> tuple[float, Path, int]:
    """Runs a module through accelerate; returns its seconds, its log and its exit status (-9: it took too long)."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    command += ["--main_process_port", "0", "-m", module, *map(str, arguments)]
    began = time.monotonic()
    with processes.logged(command, log) as output:
        # A session of its own, whose processes all end if they hang.
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            started.wait(SECONDS)
        except subprocess.TimeoutExpired:
            output.write(f"error: it took longer than {SECONDS} s\n")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    return time.monotonic() - began, log, started.returncode


def failed(name: str, log: Path, remedy: str) -> Result:
    """The result of processes that failed, with the last error in their log."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception|error): ", line)]
    return Result(name, "fail", [*lines, *errors][-1].strip()[:400], remedy, log="\n".join(lines[-60:]))


def write_reference() -> None:
    """Writes the references, by runs with one process on the CPU."""
    config = Path("accelerate_configs/cpu.yaml")
    found = checked_launcher(config)
    references = {}
    folder = Path(tempfile.mkdtemp(prefix="gemma2-reference-"))
    write_rows(folder)
    for name in ("sft", "sft-4bit", "distill", "reward", "rlhf"):
        stage = name.removesuffix("-4bit")
        shutil.rmtree(folder / stage, ignore_errors=True)
        quantized = {"load_in_4bit": True} if name == "sft-4bit" else {"load_in_4bit": False}
        output, _, log, status = run(stage, config, keys_of(stage, found, folder) | quantized, folder)
        if status:
            raise SystemExit("\n".join(processes.last_words(log)))
        references[name] = {
            key: [round(each, 6) for each in values] for key, values in values_of(stage, output).items()
        }
        print(name, references[name], flush=True)
    shutil.rmtree(folder)
    REFERENCE.write_text(json.dumps(references, indent=1) + "\n")


if __name__ == "__main__":
    write_reference()
