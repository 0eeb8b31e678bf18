"""A random two-layer Gemma 2, recipes that train it in seconds, and the stages' real `main` functions to run them."""

import gc
import json
import os
import weakref
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)

from gemma2_post import distill, reward, rlhf, sft
from gemma2_post.data.keys import Source
from gemma2_post.data.mixture import load_rows
from gemma2_post.data.pairs import PAIR
from gemma2_post.data.preparation import drop_ties
from gemma2_post.data.rows import CONVERSATION, PROMPT
from gemma2_post.models import reward_model
from gemma2_post.models.loading import load_config
from gemma2_post.models.saving import save_model
from gemma2_post.models.tokenizer import load_tokenizer, save_tokenizer
from gemma2_post.models.tokens import PAD
from gemma2_post.stage.command import Command
from gemma2_post.tiny.data import preferences, prompts

BASE, TEACHER = "gemma2_post/tiny/models/base", "gemma2_post/tiny/models/teacher"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: otherwise one worker ends with a slow test while the other one waits."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the tests of Gemma's own tokenizer without it; here, and not in its fixture, so that one line says so."""
    if "real_tokenizer" in getattr(item, "fixturenames", []) and "GEMMA2_POST_TOKENIZER" not in os.environ:
        pytest.skip("set GEMMA2_POST_TOKENIZER to the folder of the real Gemma tokenizer to run these")


@pytest.fixture(autouse=True, scope="session")
def in_the_project() -> None:
    """Runs the tests in the project's folder."""
    os.chdir(Path(__file__).parents[1])
    gc.freeze()  # imported objects stay; traversing them in every collection takes a seventh of the time


@cache
def rows_of(make: Callable[[str], list[dict[str, object]]], split: str) -> list[dict[str, object]]:
    """The tiny world's rows, made once; do not change them."""
    return make(split)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the tests from reading and writing the user's cache of data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # of the processes that it starts


def load_conversations(sources: list[Source], *settings: object, **more: object) -> datasets.Dataset:
    """As `load_rows` reads them, without tokens."""
    return load_rows(sources, *settings, row_format=CONVERSATION, **more).dataset()


def load_prompts(sources: list[Source], *settings: object, **more: object) -> datasets.Dataset:
    """As `load_rows` reads them, without tokens."""
    return load_rows(sources, *settings, row_format=PROMPT, **more).dataset()


def load_preferences(
    sources: list[Source], *settings: object, score_margin: float = 0.0, **more: object
) -> datasets.Dataset:
    """As `load_rows` reads them, without ties and tokens."""
    row_format = PAIR.with_settings({"score_margin": score_margin})
    return drop_ties(load_rows(sources, *settings, row_format=row_format, **more)).dataset()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The tiny world's tokenizer."""
    return load_tokenizer(BASE, load_config(BASE))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real data; skips the test without one."""
    if "GEMMA2_POST_DATA" not in os.environ:
        pytest.skip("set GEMMA2_POST_DATA to the folder with real data to run this")
    return Path(os.environ["GEMMA2_POST_DATA"])


@pytest.fixture(scope="session")
def real_tokenizer() -> PreTrainedTokenizerBase:
    """Gemma's own tokenizer."""
    return load_tokenizer(os.environ["GEMMA2_POST_TOKENIZER"], Gemma2Config())


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A small random model, in bf16 like Gemma 2's releases."""
    directory = tmp_path_factory.mktemp("model")
    random_model(len(tokenizer), dtype=torch.bfloat16).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory


def random_model(
    vocab_size: int, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> Gemma2ForCausalLM:
    """A small random model with every Gemma 2 feature."""
    set_seed(seed)
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    config = Gemma2Config(vocab_size=vocab_size, **values | changes)
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager", dtype=dtype)


def write_rows(path: Path, num_rows: int, first: int = 0) -> Path:
    """Writes conversations of very different lengths, single- and multi-turn."""
    rows = []
    for i in range(first, first + num_rows):
        messages = []
        for turn in range(1 + i % 3):
            messages.append({"role": "user", "content": f"What is {i} plus {turn}?" + " Please add." * (i % 5)})
            messages.append({"role": "assistant", "content": f"It is {i + turn}." + " Gladly!" * (i % 4)})
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, model_dir: Path) -> dict[str, object]:
    """Full fine-tuning in fp32 for two steps of eight rows; each test changes the keys it is about."""
    return {
        "model_name_or_path": str(model_dir),
        "dtype": "float32",
        "save_dtype": "float32",
        "datasets": [{"path": str(write_rows(tmp_path / "train.jsonl", 32))}],
        "held_out_datasets": [{"path": str(write_rows(tmp_path / "held_out.jsonl", 4, first=60))}],
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
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "num_samples": 4,
        "max_new_tokens": 4,
    }


@pytest.fixture
def distill_recipe(recipe: dict[str, object], tmp_path: Path) -> dict[str, object]:
    """A student that ends its turns, and the base model, without any SFT, as its teacher: far apart, both small."""
    return {key: value for key, value in recipe.items() if key not in ("max_length", "max_new_tokens")} | {
        "model_name_or_path": TEACHER,
        "teacher_model_name_or_path": BASE,
        "teacher_dtype": "float32",
        "datasets": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", "train", 24))}],
        "held_out_datasets": [{"path": str(write_prompts(tmp_path / "held_out_prompts.jsonl", "selection", 5))}],
        "columns": ["skill", "answer"],
        "max_completion_length": 16,
        "num_samples": 5,
        "learning_rate": 1e-4,
    }


def write_prompts(path: Path, split: str, num_rows: int) -> Path:
    """Writes the tiny world's first prompts."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(prompts, split)[:num_rows]))
    return path


@pytest.fixture
def reward_recipe(recipe: dict[str, object], tmp_path: Path) -> dict[str, object]:
    """Pairs with one to three user turns, every third with a margin; rewards are centered."""
    return recipe | {
        "datasets": [{"path": str(write_pairs(tmp_path / "pairs.jsonl", "train", 16))}],
        "held_out_datasets": [{"path": str(write_pairs(tmp_path / "held_out_pairs.jsonl", "selection", 12))}],
        "columns": ["answer", "log_odds"],
        "center_rewards_coefficient": 0.01,
    }


def write_pairs(path: Path, split: str, num_rows: int) -> Path:
    """Writes the tiny world's first pairs, every third with a margin."""
    rows = [row | {"margin": 0.5 * (i % 3 == 0)} for i, row in enumerate(rows_of(preferences, split)[:num_rows])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def reward_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A sealed reward model with a random head, so its rewards mean nothing."""
    directory = tmp_path_factory.mktemp("reward_model")
    set_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(
        TEACHER, num_labels=1, dtype=torch.float32, pad_token_id=PAD
    )
    torch.nn.init.normal_(model.score.weight, std=0.1)
    save_model(model, model.state_dict(), directory, torch.float32)
    save_tokenizer(tokenizer, directory)
    canary = [[{"role": "user", "content": "What is 3 plus 5?"}, {"role": "assistant", "content": "It is 8."}]]
    reward_model.seal(directory, tokenizer, canary, 0.5, 2.0, max_length=192, device=torch.device("cpu"))
    return directory


@pytest.fixture
def rlhf_recipe(recipe: dict[str, object], tmp_path: Path, reward_model_dir: Path) -> dict[str, object]:
    """A policy that ends its turns and a random reward model; four groups of two answers per step."""
    others = ("max_length", "max_new_tokens", "save_strategy")
    return {key: value for key, value in recipe.items() if key not in others} | {
        "model_name_or_path": TEACHER,
        "reward_model": str(reward_model_dir),
        "datasets": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", "train", 24))}],
        "held_out_datasets": [{"path": str(write_prompts(tmp_path / "held_out_prompts.jsonl", "selection", 5))}],
        "columns": ["skill", "answer"],
        "max_completion_length": 16,
        "num_generations": 2,
        "num_samples": 5,
        "watch_steps": 100,
        "beta": 0.1,
        "anchor_mu": 0.3,
        "learning_rate": 1e-4,
    }


@pytest.fixture
def run_sft(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """Runs the stage `sft` on a recipe; returns its output directory."""
    return partial(run_stage, tmp_path / "recipe.yaml", sft.COMMAND)


@pytest.fixture
def run_distill(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """Runs the stage `distill` on a recipe; returns its output directory."""
    return partial(run_stage, tmp_path / "recipe.yaml", distill.COMMAND)


@pytest.fixture
def run_reward(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """Runs the stage `reward` on a recipe; returns its output directory."""
    return partial(run_stage, tmp_path / "recipe.yaml", reward.COMMAND)


@pytest.fixture
def run_rlhf(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """Runs the stage `rlhf` on a recipe; returns its output directory."""
    return partial(run_stage, tmp_path / "recipe.yaml", rlhf.COMMAND)


def run_stage(file: Path, command: Command, values: dict[str, object]) -> Path:
    """Writes the recipe to a file and runs the stage on it, in this process; returns its output directory.

    Asserts that the stage measured only the metrics that it declares.
    """
    file.write_text(yaml.safe_dump(values))
    stage, recipe = command.parse(["--config", str(file)])
    command.run(stage, recipe)
    metrics = json.loads((stage.output_dir / "stage.json").read_text())["metrics"]
    assert {name for name in metrics if "/" not in name} <= command.metrics(recipe)
    return stage.output_dir


def only_one_at_a_time(load: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """Loads models, of which the last one must be gone when the next one is loaded."""
    loaded: list[weakref.ref] = []

    def load_one(*arguments: object, **keys: object) -> torch.nn.Module:
        assert not any(each() is not None for each in loaded), "another model is still in memory"
        model = load(*arguments, **keys)
        loaded.append(weakref.ref(model))
        return model

    return load_one


def losses(output_dir: Path) -> list[float]:
    """The logged training losses."""
    entries = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]
