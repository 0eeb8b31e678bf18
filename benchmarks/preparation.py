"""Time and memory of preparing conversations for SFT: the stage's own preparation, and that of a bare `SFTTrainer`.

    python benchmarks/preparation.py TOKENIZER                     # 200,000 conversations, about 300 tokens each
    python benchmarks/preparation.py TOKENIZER --num_rows 20000

TOKENIZER is a folder with a Gemma tokenizer. Both read the same file of JSON lines, in a fresh process, and end when
their rows can be trained on. The stage's preparation runs three times: alone; again, with what the first one left; and
twice side by side on an empty cache, where one process prepares and the other one waits. The conversations are pieces
of the sources of Python's standard library.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from process_memory import Sampler

MAX_LENGTH = 4096
MEAN_WORDS = 24
"""Words of a turn, such that a conversation has about 300 tokens."""


def write_rows(file: Path, num_rows: int) -> None:
    """Conversations of two to eight turns."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    words = " ".join(source.read_text(encoding="utf-8", errors="replace") for source in sources).split()
    draw = random.Random(0)
    with open(file, "w", encoding="utf-8") as stream:
        for _ in range(num_rows):
            messages = []
            for turn in range(2 * draw.randint(1, 4)):
                num_words = 1 + int(draw.expovariate(1 / MEAN_WORDS))
                start = draw.randrange(len(words) - num_words)
                content = " ".join(words[start : start + num_words])
                messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
            stream.write(json.dumps({"messages": messages}) + "\n")


def write_model(folder: Path, tokenizer: str) -> None:
    """A Gemma 2 of a few parameters beside the tokenizer; nothing is trained."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shutil.copytree(tokenizer, folder)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma2Config(vocab_size=256_000, num_key_value_heads=1, head_dim=8, **shape)
    Gemma2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def stage(model: str, data: str) -> int:
    """The preparation of `gemma2_post.sft`."""
    from trl import ModelConfig

    from gemma2_post.data.keys import DataArguments, Source
    from gemma2_post.data.preparation import drop_too_long, split_held_out
    from gemma2_post.data.rows import CONVERSATION
    from gemma2_post.models.tokenizer import load_config_and_tokenizer

    _, tokenizer = load_config_and_tokenizer(ModelConfig(model_name_or_path=model))
    train, held_out = (
        drop_too_long(rows, "max_length", MAX_LENGTH, max_too_long_share=0.0).dataset()
        for rows in split_held_out(DataArguments([Source(data)]), 0, CONVERSATION, tokenizer)
    )
    return len(train) + len(held_out)


def bare(model: str, data: str) -> int:
    """What `SFTTrainer` does with the same rows, with two processes."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import gemma_chat_template

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = gemma_chat_template
    rows = load_dataset("json", data_files=data, split="train").train_test_split(test_size=0.02, seed=0)
    args = SFTConfig(
        tempfile.mkdtemp(), max_length=MAX_LENGTH, assistant_only_loss=True, dataset_num_proc=2, report_to="none",
        use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args, train_dataset=rows["train"], eval_dataset=rows["test"], processing_class=tokenizer
    )
    return len(trainer.train_dataset) + len(trainer.eval_dataset)


# --- measuring ---


class Measured:
    """A run of this script's `--run` in its own process: seconds and peak memory."""

    def __init__(self, what: str, model: Path, data: Path, cache: Path):
        self.began = time.monotonic()
        command = [sys.executable, __file__, str(model), "--run", what, "--data", str(data)]
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        self.sampler = Sampler(self.process.pid)

    def result(self) -> dict[str, float]:
        """Waits for its end."""
        printed, _ = self.process.communicate()
        seconds_with_imports = time.monotonic() - self.began
        peak, peak_without_files = self.sampler.peaks["all"]
        if self.process.returncode:
            raise SystemExit(f"{self.process.args} failed")
        num_rows, seconds = printed.split()[-2:]
        return {
            "num_rows": int(num_rows),
            "seconds": round(float(seconds), 1),
            "seconds_with_imports": round(seconds_with_imports, 1),
            "peak_gb": round(peak / 1e9, 2),
            "peak_gb_without_mapped_files": round(peak_without_files / 1e9, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--num_rows", type=int, default=200_000)
    parser.add_argument("--run", choices=["stage", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        import trl.trainer.sft_trainer  # noqa: F401  # what both import is not a part of the preparation

        began = time.monotonic()
        num_rows = {"stage": stage, "bare": bare}[args.run](args.tokenizer, args.data)
        print(num_rows, time.monotonic() - began)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = folder / "model", folder / "rows.jsonl"
        write_model(model, args.tokenizer)
        write_rows(data, args.num_rows)
        results = {"megabytes": data.stat().st_size / 1e6}

        def measured(what: str, cache: str) -> Measured:
            return Measured(what, model, data, folder / cache)

        for what, cache in [("stage", "ours"), ("stage", "ours"), ("bare", "bare")]:
            label = "again" if "stage" in results and what == "stage" else what
            results[label] = measured(what, cache).result()
            print(label, json.dumps(results[label]), flush=True)
        pair = [measured("stage", "shared"), measured("stage", "shared")]
        results["side by side"] = [each.result() for each in pair]
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
