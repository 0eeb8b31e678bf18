"""What each process of an accelerate config sees: its device, and whether it can talk to the others.

Started by `selftest` as `accelerate launch --config_file CONFIG -m gemma2_post.selftest.launched --folder FOLDER`.
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from gemma2_post.stage import contract

NUM_VALUES = 2**22
"""fp32 values that the processes add up, as for a gradient: 17 MB."""


def main(folder: Path) -> None:
    """Writes `process-N.json`: the device of process N, the sum over all processes, and how fast it was made."""
    accelerator = Accelerator()
    rank, device = accelerator.process_index, accelerator.device
    is_cuda = device.type == "cuda"
    values = torch.full((NUM_VALUES,), rank + 1.0, device=device)
    _add_up(values.clone())  # the first exchange also connects the processes
    began = time.perf_counter()
    _add_up(values)
    found = {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if is_cuda else "CPU",
        "num_processes": accelerator.num_processes,
        "sum": values.mean().item(),  # waits for the device
        "gb_per_second": 4 * NUM_VALUES / (time.perf_counter() - began) / 1e9,
    }
    contract.write_json(folder / f"process-{rank}.json", found)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _add_up(values: torch.Tensor) -> None:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    main(parser.parse_args().folder)
