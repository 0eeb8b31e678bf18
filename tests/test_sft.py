"""The whole SFT stage on a small random model: what must be equal is equal, what must be refused is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gemma2_post.models.templates import INFERENCE_TEMPLATE
from gemma2_post.models.tokenizer import load_tokenizer, render
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from tests.conftest import losses

Run = Callable[[dict[str, object]], Path]
Recipe = dict[str, object]

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
FILES = ["fastchat/dummy_conversation.json", "tinker/conversations.jsonl"]
QLORA = {**LORA, "load_in_4bit": True, "dtype": "bfloat16"}


def logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    ids = tokenizer("What is 3 plus 5? Please add the words, and then some more words.", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**ids).logits


def test_full_fine_tuning_moves_nearly_every_weight_and_writes_the_contract(
    run_sft: Run, recipe: Recipe, model_dir: Path
) -> None:
    output = run_sft(recipe)
    before, after = load_file(model_dir / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    changed = sum((after[name] != before[name].float()).sum().item() for name in after if "embed" not in name)
    assert changed > 0.9 * sum(after[name].numel() for name in after if "embed" not in name)

    stage = json.loads((output / "stage.json").read_text())
    assert stage["dtype"] == "float32" and stage["adapter"] is None and stage["base_model"] == str(model_dir)
    assert stage["metrics"] == json.loads((output / "metrics.json").read_text())
    assert {"held_out_nll", "held_out_nll_before", "stop_rate", "tokens_per_second", "peak_memory_gb"} <= stage[
        "metrics"
    ].keys()
    assert stage["metrics"]["held_out_nll"] < stage["metrics"]["held_out_nll_before"]
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [1, 107]
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_bf16_output_is_the_fp32_one_rounded_once(run_sft: Run, recipe: Recipe, tmp_path: Path) -> None:
    exact = load_file(run_sft(recipe) / "model.safetensors")
    rounded = load_file(
        run_sft(recipe | {"save_dtype": "bfloat16", "output_dir": str(tmp_path / "bf16")}) / "model.safetensors"
    )
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_a_merged_adapter_is_the_adapter_on_the_unquantised_base(
    run_sft: Run, recipe: Recipe, model_dir: Path, tokenizer: PreTrainedTokenizerBase, method: Recipe
) -> None:
    output = run_sft(recipe | method)
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, output / "adapter"), tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged, tokenizer), expected, atol=1e-5, rtol=1e-5)
    untouched = load_file(output / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(
        untouched, load_file(model_dir / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    )


def test_what_is_saved_loads_without_us_and_answers_in_the_chat_format(
    run_sft: Run, recipe: Recipe, model_dir: Path
) -> None:
    output = run_sft(recipe)
    assert (output / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(output)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.slow
def test_eight_rows_at_once_are_one_row_eight_times(run_sft: Run, recipe: Recipe, tmp_path: Path) -> None:
    together = run_sft(recipe)
    apart = run_sft(recipe | {"per_device_train_batch_size": 1, "output_dir": str(tmp_path / "apart")})
    assert losses(apart) == pytest.approx(losses(together), rel=1e-4)
    first, second = (load_file(output / "model.safetensors") for output in (together, apart))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-4, rtol=0)  # a fifth of one Adam step of 1e-3


def test_prepared_rows_are_not_copied_by_the_trainer(
    run_sft: Run, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL would map over all rows in each process, to truncate none of them."""
    mapped = []
    map_rows = Dataset.map
    monkeypatch.setattr(Dataset, "map", lambda *rows, **options: mapped.append(options) or map_rows(*rows, **options))
    run_sft(recipe | {"max_steps": 1})
    assert not mapped


def test_held_out_nll_is_the_mean_over_tokens_at_any_batch(
    run_sft: Run, recipe: Recipe, model_dir: Path, tmp_path: Path
) -> None:
    """Also with packing, whose collator would make one row of a batch."""
    alone, together, packed = (
        json.loads((run_sft(recipe | {"output_dir": str(tmp_path / name)} | values) / "metrics.json").read_text())
        for name, values in {
            "alone": {"per_device_eval_batch_size": 1},
            "together": {"per_device_eval_batch_size": 4},
            "packed": {"packing": True, "per_device_train_batch_size": 1, "global_batch_size": 1},
        }.items()
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    tokenizer = load_tokenizer(str(model_dir), model.config)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    rendered = render(tokenizer, rows)
    sum_nll = num_tokens = 0
    for input_ids, labels in zip(rendered["input_ids"], rendered["labels"], strict=True):
        targets = torch.tensor(labels)[1:].long()
        with torch.no_grad():
            scores = model(torch.tensor(input_ids)[None].long()).logits[0, :-1]
        sum_nll += torch.nn.functional.cross_entropy(scores, targets, reduction="sum").item()
        num_tokens += (targets != -100).sum().item()
    for metrics in (alone, together, packed):
        assert metrics["held_out_nll_before"] == pytest.approx(sum_nll / num_tokens, rel=1e-5)
    assert alone["held_out_nll"] == pytest.approx(together["held_out_nll"], rel=1e-5)


@pytest.mark.slow
def test_packed_equals_unpacked(run_sft: Run, recipe: Recipe, tmp_path: Path) -> None:
    """All rows fit into one packed row, so both runs take the same single step on the same tokens."""
    from tests.conftest import write_rows

    one_step = recipe | {
        "datasets": [{"path": str(write_rows(tmp_path / "three.jsonl", 3))}],
        "max_steps": 1,
        "global_batch_size": 1,
        "per_device_train_batch_size": 1,
    }
    packed = run_sft(one_step | {"packing": True, "output_dir": str(tmp_path / "packed")})
    unpacked = run_sft(one_step | {"global_batch_size": 3, "per_device_train_batch_size": 3})
    assert losses(packed) == pytest.approx(losses(unpacked), rel=1e-5)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(run_sft: Run, recipe: Recipe, tmp_path: Path) -> None:
    values = recipe | {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "linear",
        **QLORA,
    }
    whole = run_sft(values)
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    # What a killed run leaves behind: its claim, what it measured before the first step, and a checkpoint.
    (whole / "checkpoint-2").rename(interrupted / "checkpoint-2")
    (whole / "before.json").rename(interrupted / "before.json")
    (interrupted / "checkpoint-3").mkdir()  # killed while writing this one
    stage = json.loads((whole / "stage.json").read_text())
    contract.begin(interrupted, stage["fingerprint"])

    resumed = run_sft(values | {"output_dir": str(interrupted)})
    assert losses(resumed) == losses(whole)
    first, second = (load_file(output / "model.safetensors") for output in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((resumed / "stage.json").read_text())["output"] == stage["output"]


@pytest.mark.slow
def test_a_run_that_died_after_its_last_step_ends_with_the_same_weights(
    run_sft: Run, recipe: Recipe, tmp_path: Path
) -> None:
    """Three steps of four an epoch: from a checkpoint after the third, the Trainer would take the fourth."""
    values = recipe | {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole = run_sft(values | {"output_dir": str(tmp_path / "whole")})
    assert not (whole / "checkpoint-3").exists()
    died = run_sft(values)
    (died / "stage.json").unlink()
    (died / "model.safetensors").unlink()
    contract.begin(died, json.loads((whole / "stage.json").read_text())["fingerprint"])
    again = run_sft(values)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert losses(again) == losses(whole)


def test_a_folder_of_another_recipe_is_refused_and_left_as_it_is(run_sft: Run, recipe: Recipe) -> None:
    output = run_sft(recipe)
    before = {path: path.read_bytes() for path in output.glob("*.json")}
    with pytest.raises(UserError, match=r"made by a different recipe \(learning_rate 0.001 -> 0.002\)"):
        run_sft(recipe | {"learning_rate": 2e-3})
    assert {path: path.read_bytes() for path in output.glob("*.json")} == before


def test_checkpoints_of_another_recipe_are_not_resumed(run_sft: Run, recipe: Recipe) -> None:
    output = Path(recipe["output_dir"])
    (output / "checkpoint-1").mkdir(parents=True)
    contract.begin(output, {"recipe": {"learning_rate": 5.0}, "inputs": {}, "code": {}, "versions": {}})
    with pytest.raises(UserError, match="made by a different recipe"):
        run_sft(recipe)


@pytest.mark.slow
def test_real_conversations_train_with_the_stand_in_gemma_tokenizer(
    run_sft: Run, recipe: Recipe, model_dir: Path, real_data: Path, tmp_path: Path
) -> None:
    """ShareGPT rows of several turns, and rows with a system message, on a vocabulary of 2,048 pieces."""
    config = AutoConfig.from_pretrained(model_dir, vocab_size=2048)
    directory = tmp_path / "standin"
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in (real_data / "tokenizer" / "standin-gemma2").glob("tokenizer*.json"):
        shutil.copy(file, directory)
    sources = [{"path": str(real_data / "sft" / name)} for name in FILES]
    output = run_sft(
        recipe
        | QLORA
        | {"model_name_or_path": str(directory), "datasets": sources, "held_out_datasets": None, "learning_rate": 1e-2}
        | {"max_steps": 8, "max_too_long_share": 0.3, "lora_target_modules": ["q_proj", "v_proj"]}
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["held_out_nll"] < metrics["held_out_nll_before"]
    assert AutoTokenizer.from_pretrained(output).chat_template == INFERENCE_TEMPLATE
