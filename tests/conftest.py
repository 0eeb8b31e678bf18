"""A random two-layer Gemma 2, a recipe that trains it in seconds, and the stage's real `main` to run it with."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerBase, set_seed

from gemma2_post import sft
from gemma2_post.core import gemma, training

BASE = "gemma2_post/tiny/models/base"
SFT_CLASSES = [
    sft.SFTConfig,
    sft.ModelConfig,
    sft.DataArguments,
    sft.StageArguments,
    sft.SampleArguments,
    sft.SFTArguments,
]


@pytest.fixture(autouse=True, scope="session")
def in_the_project() -> None:
    os.chdir(Path(__file__).parents[1])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left in the user's cache of data sets, and nothing is read from it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return gemma.load_tokenizer("test", BASE, gemma.load_config("test", BASE))


@pytest.fixture(scope="session")
def real_data() -> Path:
    if "GEMMA2_POST_DATA" not in os.environ:
        pytest.skip("set GEMMA2_POST_DATA to the folder with real data to run this")
    return Path(os.environ["GEMMA2_POST_DATA"])


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A small random model with every Gemma 2 feature, in bf16 as Gemma 2 is shipped."""
    set_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    directory = tmp_path_factory.mktemp("model")
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
    model.save_pretrained(directory)
    gemma.save_tokenizer(tokenizer, directory)
    return directory


def write_rows(path: Path, num_rows: int) -> Path:
    """Conversations of very uneven length, single- and multi-turn."""
    rows = []
    for i in range(num_rows):
        messages = []
        for turn in range(1 + i % 3):
            messages.append({"role": "user", "content": f"What is {i} plus {turn}?" + " Please add." * (i % 5)})
            messages.append({"role": "assistant", "content": f"It is {i + turn}." + " Gladly!" * (i % 4)})
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, model_dir: Path) -> dict[str, object]:
    """Full fine-tuning in fp32 for two steps of eight rows; tests change what they are about."""
    return {
        "model_name_or_path": str(model_dir),
        "dtype": "float32",
        "save_dtype": "float32",
        "datasets": [{"path": str(write_rows(tmp_path / "train.jsonl", 32))}],
        "held_out_datasets": [{"path": str(write_rows(tmp_path / "held_out.jsonl", 4))}],
        "max_length": 256,
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "global_batch_size": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "num_samples": 4,
        "max_new_tokens": 4,
    }


@pytest.fixture
def run_sft(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """Writes the recipe to a file and runs the SFT stage on it, in this process; returns its output directory."""

    def run(values: dict[str, object]) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        stage, arguments = training.parse("sft", ["--config", str(file)], SFT_CLASSES, sft.REFUSED_KEYS)
        training.refuse_foreign_output(stage)
        sft.main(stage, *arguments)
        return stage.output_dir

    return run


def losses(output_dir: Path) -> list[float]:
    entries = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]
