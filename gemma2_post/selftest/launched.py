"""What each process of an accelerate config sees: its device, and whether it can talk to the others.

Started by `selftest` with `accelerate launch --config_file CONFIG -m gemma2_post.selftest.launched FOLDER`.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import TrainingArguments

from gemma2_post.stage import contract, launcher

NUM_VALUES = 2**22
"""fp32 values that the processes add up, as for a gradient: 17 MB."""


def main(folder: Path, use_cpu: bool) -> None:
    """Writes `process-N.json`: the device of process N, the sum over all processes, and how fast it was made."""
    args = TrainingArguments(output_dir=str(folder), use_cpu=use_cpu, bf16=True)  # as a stage's trainer begins
    rank, device = args.process_index, args.device
    values = torch.full((NUM_VALUES,), rank + 1.0, device=device)
    _add_up(values.clone())  # the first exchange also connects the processes
    began = time.perf_counter()
    _add_up(values)
    found = {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "num_processes": args.world_size,
        "sum": values.mean().item(),  # waits for the device
        "gb_per_second": 4 * NUM_VALUES / (time.perf_counter() - began) / 1e9,
    }
    contract.write_json(folder / f"process-{rank}.json", found)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    launcher.leave()


def _add_up(values: torch.Tensor) -> None:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--use_cpu", action="store_true")
    main(**vars(parser.parse_args()))
