"""Our streaming merge compared with mergekit's, a plain loop and plain copying: seconds, memory, and equality.

    python benchmarks/warp.py --mergekit VENV/bin/mergekit-yaml --work DIR --repeats 3

Install mergekit (`pip install mergekit==0.1.5`) in its own virtual environment; without it, its rows are left out. DIR
holds three random models with the size of Gemma 2 2B in bf16 (5.2 GB each, made once) and one output at a time.

The script times whole processes, in turn, on the CPU. It reads the inputs before each run, so they come from the page
cache if memory allows (mergekit's own memory may evict them). Memory is the peak of a process's and its children's
anonymous and shared pages, sampled every 50 ms; mapped file pages, which the system can reclaim, do not count.

The candidates differ. Ours hashes its inputs, computes in fp32 with one angle per layer, and moves back to the start
by eta. The loop does the same without hashes, with one angle per tensor and one shard at a time in memory. mergekit's
nuslerp has one angle per tensor, computes in bf16, and has no eta.
"""

import argparse
import datetime
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import Gemma2Config

MODELS = ["init", "policy-0", "policy-1"]
ETA = 0.3
TOKENIZER = Path("gemma2_post/tiny/models/base")
BUFFER = 1 << 24
"""Bytes copied at once."""
CHUNK = 1 << 22
"""Elements that the loop processes at once."""
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


# --- the models ---


def make_models(work: Path, config: "Gemma2Config", dtype: "torch.dtype") -> None:
    """Makes a random start and two policies, each with its own noise: their task vectors are nearly orthogonal."""
    import torch
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file
    from transformers import Gemma2ForCausalLM

    with torch.device("meta"):
        shapes = {name: each.shape for name, each in Gemma2ForCausalLM(config).named_parameters()}
    config.architectures, config.dtype = ["Gemma2ForCausalLM"], dtype
    for seed, name in enumerate(MODELS):
        if (work / name).is_dir():
            continue
        random = torch.Generator().manual_seed(seed)
        std = 0.002 if seed else 0.02
        weights = {
            name: torch.empty(shape, dtype=dtype).normal_(0, std, generator=random) for name, shape in shapes.items()
        }
        if seed:
            for file in weights_of(work / "init"):
                for tensor, values in load_file(file).items():
                    weights[tensor] += values
        partial = work / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_torch_state_dict(weights, partial, max_shard_size="5GB")
        config.save_pretrained(partial)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / file, partial / file)
        partial.rename(work / name)


def weights_of(directory: Path) -> list[Path]:
    """The model's safetensors files."""
    return sorted(directory.glob("*.safetensors"))


# --- the four ---


def ours(work: Path, output: Path, eta: float = ETA, dtype: str = "bfloat16", angles: str = "layer") -> list[str]:
    """The command for our merge."""
    init, *policies = (str(work / name) for name in MODELS)
    command = [sys.executable, "-m", "gemma2_post.warp", "--init", init, "--policies", *policies]
    command += ["--eta", str(eta), "--output_dir", str(output), "--force", "true"]
    return [*command, "--angles", angles, "--save_dtype", dtype]


def mergekit(program: str, work: Path, output: Path, dtype: str = "bfloat16") -> list[str]:
    """The command for mergekit's merge; as documented, with a `base_model` it merges task vectors, like ours.

    Equal weights meet halfway.
    """
    init, *policies = (work / name for name in MODELS)
    models = "".join(f"  - {{model: {policy}, parameters: {{weight: 1.0}}}}\n" for policy in policies)
    parameters = "parameters: {nuslerp_flatten: true, nuslerp_row_wise: false}\n"
    config = work / "mergekit.yaml"
    config.write_text(f"merge_method: nuslerp\nbase_model: {init}\nmodels:\n{models}{parameters}dtype: {dtype}\n")
    return [program, str(config), str(output)]


def worker(function: Callable[[Path, Path], None], work: Path, output: Path) -> list[str]:
    """The command that runs `copy` or `loop` in its own process."""
    return [sys.executable, __file__, "--work", str(work), "--worker", function.__name__, str(output)]


def copy(work: Path, output: Path) -> None:
    """Reads all inputs and writes the start; computes nothing."""
    output.mkdir()
    block = memoryview(bytearray(BUFFER))
    for name in MODELS:
        for file in weights_of(work / name):
            copied = output / file.name if name == "init" else os.devnull
            with open(file, "rb", buffering=0) as source, open(copied, "wb", buffering=0) as target:
                while size := source.readinto(block):
                    target.write(block[:size])


def loop(work: Path, output: Path) -> None:
    """The obvious implementation: two passes over each tensor, in fp32, in chunks; saves whole shards."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    output.mkdir()
    for file in weights_of(work / "init"):
        merged = {}
        models = [safe_open(work / name / file.name, "pt") for name in MODELS]
        for name in models[0].keys():  # noqa: SIM118
            tensors = [model.get_tensor(name) for model in models]
            chunks = list(zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True))
            gram = torch.zeros(2, 2, dtype=torch.float64)
            for init, *policies in chunks:
                vectors = torch.stack([policy.float() - init.float() for policy in policies])
                gram += vectors @ vectors.T
            angle = math.acos(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
            weight = math.sin(angle / 2) / math.sin(angle)
            result = torch.empty_like(tensors[0])
            for out, (init, *policies) in zip(result.view(-1).split(CHUNK), chunks, strict=True):
                base = init.float()
                direction = sum(policy.float() - base for policy in policies)
                out.copy_(base + ETA * weight * direction)
            merged[name] = result
        save_file(merged, output / file.name, {"format": "pt"})


# --- time and memory ---


def own_memory(process: int) -> int:
    """Bytes in anonymous and shared pages of a process and its children."""
    total = 0
    with suppress(OSError):  # it has just ended
        status = Path(f"/proc/{process}/status").read_text()
        total += 1024 * sum(map(int, re.findall(r"^(?:RssAnon|RssShmem):\s*(\d+) kB$", status, re.MULTILINE)))
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(own_memory(int(child)) for child in (task / "children").read_text().split())
    return total


def run(command: list[str]) -> tuple[float, int]:
    """Runs a command; returns its seconds and its peak of `own_memory` in bytes."""
    with tempfile.TemporaryFile("w+") as log:
        began, peak = time.monotonic(), 0
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        while True:
            peak = max(peak, own_memory(process.pid))
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                break
        seconds = time.monotonic() - began
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read()[-5000:]}")
    return seconds, peak


def read(files: list[Path]) -> int:
    """Reads files into the page cache; returns their size in bytes."""
    block = bytearray(BUFFER)
    num_bytes = 0
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while size := source.readinto(block):
                num_bytes += size
    return num_bytes


def measure(commands: dict[str, list[str]], work: Path, output: Path, repeats: int) -> None:
    """Runs all commands `repeats` times, in alternating order, and prints the table."""
    files = [file for name in MODELS for file in weights_of(work / name)]
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    shutil.rmtree(output, ignore_errors=True)  # of a benchmark that was interrupted
    for i in range(repeats):
        for name, command in list(commands.items())[:: -1 if i % 2 else 1]:
            num_bytes = read(files)
            runs[name].append(run(command))
            shutil.rmtree(output)
            print(f"{name}: {runs[name][-1][0]:.1f} s, {runs[name][-1][1] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    medians = {name: statistics.median(seconds for seconds, _ in each) for name, each in runs.items()}
    print(f"\nInputs of {num_bytes / 1e9:.1f} GB, read into the page cache before each run.\n")
    print("| | seconds, median (all) | x copying | own memory, peak, GB | GB/s of inputs |\n|---|---|---|---|---|")
    for name, each in runs.items():
        median, memory = medians[name], max(peak for _, peak in each) / 1e9
        everything = ", ".join(f"{seconds:.1f}" for seconds, _ in each)
        speeds = f"{median / medians['copying']:.2f} | {memory:.2f} | {num_bytes / median / 1e9:.2f}"
        print(f"| {name} | {median:.1f} ({everything}) | {speeds} |")


# --- equality ---


def compare(program: str) -> None:
    """Prints the largest differences between our merge and mergekit's, in fp32 with eta 1 and one angle per tensor."""
    import torch
    from safetensors.torch import load_file
    from transformers import Gemma2Config

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        config = Gemma2Config(
            vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
            max_position_embeddings=256,
        )  # fmt: skip
        make_models(work, config, torch.float32)
        run(ours(work, work / "ours", eta=1, dtype="float32", angles="tensor"))
        run(mergekit(program, work, work / "mergekit", dtype="float32"))
        init, mine, theirs = (
            {name: tensor.double() for file in weights_of(work / each) for name, tensor in load_file(file).items()}
            for each in ("init", "ours", "mergekit")
        )
    assert init.keys() == mine.keys() == theirs.keys(), init.keys() ^ theirs.keys()
    of_weights, of_vector = (
        max(float((mine[name] - theirs[name]).norm() / (mine[name] - origin[name]).norm()) for name in init)
        for origin in (dict.fromkeys(init, 0), init)
    )
    print(
        f"\nThe same merge in fp32 (eta 1, one angle for each tensor) of a small random Gemma 2 by ours and by "
        f"mergekit: largest difference of {len(init)} tensors {of_vector:.1e} of the norm of the merged task vector, "
        f"{of_weights:.1e} of that of the weights."
    )


def versions(program: str | None) -> str:
    """The date, the processor and the libraries' versions; nothing else about the machine."""
    (model, *_) = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = f"{datetime.date.today()}, {os.cpu_count()} cores of {model}, no GPU used; torch {version('torch')}"
    if program:
        show = (
            "from importlib.metadata import version as v; print('mergekit', v('mergekit'), 'with torch', v('torch'))"
        )
        found += ", " + subprocess.check_output([Path(program).parent / "python", "-c", show], text=True).strip()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with 21 GB of space")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="mergekit-yaml in its own virtual environment")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, program = arguments.work.resolve(), arguments.mergekit
    if arguments.worker:
        name, output = arguments.worker
        {"copy": copy, "loop": loop}[name](work, Path(output))
        return
    print(versions(program), flush=True)

    import torch
    from transformers import Gemma2Config

    make_models(work, Gemma2Config(), torch.bfloat16)  # the defaults are the 2B model's
    output = work / "benchmark-output"
    commands = {
        "copying": worker(copy, work, output),
        "ours, in fp32": ours(work, output),
        "a plain loop, in fp32": worker(loop, work, output),
    }
    if program:
        commands["mergekit's nuslerp, in bf16"] = mergekit(program, work, output)
    measure(commands, work, output, arguments.repeats)
    if program:
        compare(program)
    else:
        print("\nmergekit is left out, and so is the comparison with it: --mergekit is not given.")


if __name__ == "__main__":
    main()
