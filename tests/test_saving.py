"""What is saved one tensor at a time are the files that transformers and PEFT would write from whole models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gemma2_post.models.folder import copy_tokenizer
from gemma2_post.models.loading import load_config
from gemma2_post.models.saving import save_model, save_sum
from gemma2_post.models.shapes import SCORE_HEAD
from gemma2_post.models.streaming import places_of, write_tensors
from gemma2_post.models.templates import INFERENCE_TEMPLATE
from gemma2_post.models.tokenizer import load_tokenizer, save_tokenizer, tokenizer_digest
from gemma2_post.stage.errors import UserError
from tests.conftest import BASE, random_model

ADAPTERS = {
    "LoRA": {},
    "all matrices": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "rank-stabilized": {"use_rslora": True, "r": 6},
    "DoRA": {"use_dora": True},
    "a norm, too": {"modules_to_save": ["post_attention_layernorm"]},
    "a reward model": {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
}


def perturbed(model: PeftModel) -> PeftModel:
    """As if it had been trained."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def merged_by_peft(
    auto_class: type, base_dir: Path, adapter_dir: Path, dtype: torch.dtype, **config: object
) -> PreTrainedModel:
    """The sum from whole models, in fp32, rounded once."""
    base = auto_class.from_pretrained(base_dir, dtype=torch.float32, **config)
    model = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if name == SCORE_HEAD else parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("changes", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_the_sum_with_an_adapter_has_the_bytes_of_whole_models(
    changes: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    random_model(300, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    is_reward_model = changes.get("task_type") == "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    labels = {"num_labels": 1} if is_reward_model else {}
    model = auto_class.from_pretrained(tmp_path / "base", **labels)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]} | changes
    adapted = perturbed(get_peft_model(model, LoraConfig(**settings)))
    adapted.save_pretrained(tmp_path / "adapter")
    merged_by_peft(auto_class, tmp_path / "base", tmp_path / "adapter", dtype, **labels).save_pretrained(
        tmp_path / "whole"
    )

    config = Gemma2Config.from_pretrained(tmp_path / "base", **labels)
    base = places_of(tmp_path / "base")
    save_sum(type(model), config, base, tmp_path / "adapter", tmp_path / "sum", dtype)
    written, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("sum", "whole"))
    assert written == expected
    loaded, info = auto_class.from_pretrained(tmp_path / "sum", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_labels == (1 if is_reward_model else 2) and loaded.dtype == dtype


def test_a_whole_model_has_the_bytes_of_transformers(tmp_path: Path) -> None:
    model = random_model(300)
    save_model(model, model.state_dict(), tmp_path / "ours", torch.bfloat16)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs


def test_a_tensor_that_is_not_finite_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"earlier")
    tensors = {"a": torch.zeros(3), "b": torch.tensor([0.0, torch.inf])}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with pytest.raises(UserError, match="b has NaN or infinite values, so the model is not saved"):
        write_tensors(tmp_path, shapes, torch.float32, tensors.__getitem__)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.safetensors", b"earlier")]


def test_a_tokenizer_is_saved_with_the_bytes_of_its_files(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Also those that transformers 5 would lose, and whatever a batch has set in it."""
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"SentencePiece")
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    loaded = load_tokenizer(str(tmp_path / "base"), load_config(BASE))
    loaded(["a", "b c"], padding=True, truncation=True, max_length=2)
    save_tokenizer(loaded, tmp_path / "out")
    names = ["added_tokens.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "chat_template.jinja"])
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes() for name in names)
    again = load_tokenizer(str(tmp_path / "out"), load_config(BASE))
    assert again.chat_template == (tmp_path / "out" / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


def test_the_template_beside_a_tokenizer_is_its_only_one(tmp_path: Path) -> None:
    """llama.cpp's converter would prefer the one that Google's checkpoints have in `tokenizer_config.json`."""
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    google = json.dumps(config | {"chat_template": "Google's"})
    (tmp_path / "base" / "tokenizer_config.json").write_text(google)
    save_tokenizer(load_tokenizer(str(tmp_path / "base"), load_config(BASE)), tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "tokenizer_config.json").read_text()) == config
    assert (tmp_path / "trained" / "chat_template.jinja").read_text() == INFERENCE_TEMPLATE

    (tmp_path / "merged").mkdir()
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    copy_tokenizer(tmp_path / "base", tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == google  # there is no other
    (tmp_path / "base" / "chat_template.jinja").write_text("ours")
    copy_tokenizer(tmp_path / "base", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text()) == config
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "ours"
