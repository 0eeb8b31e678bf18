"""Model folders, adapters and merges that are damaged or do not fit: one sentence each, from one place."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from trl import ModelConfig

from gemma2_post.chat import chat
from gemma2_post.models.arguments import check_lora_modules, complete_model_arguments
from gemma2_post.models.folder import REWARD_MODEL
from gemma2_post.models.loading import load_config
from gemma2_post.models.saving import save_model
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.stage.errors import UserError
from gemma2_post.weights.inputs import open_adapter, open_model
from tests.conftest import random_model
from tests.test_warp import Warp, run_warp, write_models  # noqa: F401  # a fixture

JSON_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def open_all(folder: Path) -> None:
    """As a stage opens a model, then as the merge tool does."""
    config = load_config(str(folder))
    load_tokenizer(str(folder), config)
    open_model(str(folder), {})


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def change_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty weights": (write("model.safetensors", b""), "cannot be read: it is cut off or damaged"),
    "garbage as weights": (write("model.safetensors", b"\xff" * 100), "cannot be read: it is cut off or damaged"),
    "a page as weights": (write("model.safetensors", b"<html></html>"), "cannot be read: it is cut off or damaged"),
    "config is a list": (
        write("config.json", "[]"),
        "config.json: the file is damaged (it holds list, not an object)",
    ),
    "config is cut": (
        write("config.json", '{"model_type": "gem'),
        "config.json: the file is damaged (it is not JSON)",
    ),
    "config is not UTF-8": (
        write("config.json", b'{"a": "\xff"}'),
        "config.json: the file is damaged (it is not UTF-8)",
    ),
    "another model": (change_config(model_type="llama"), "is a llama model; this pipeline is for gemma2"),
    "no layers": (change_config(num_hidden_layers=0), "says num_hidden_layers 0; it must be a whole number"),
    "layers in words": (change_config(num_hidden_layers="two"), "says num_hidden_layers 'two'"),
    "a billion layers": (change_config(num_hidden_layers=10**9), "no Gemma 2 has more than 1000"),
    "another width": (change_config(hidden_size=32), "and its config.json says"),
    "another vocabulary": (
        change_config(vocab_size=999),
        "has the shape [1024, 64], and its config.json says [999, 64]",
    ),
    "more layers": (change_config(num_hidden_layers=9), "lacks the tensor model.layers.2"),
    "a window in words": (change_config(sliding_window="wide"), "config.json"),
    "a missing tensor": (change_tensors(lambda each: each.pop(NORM)), f"lacks the tensor {NORM}"),
    "an unknown tensor": (
        change_tensors(lambda each: each.update(extra=torch.zeros(2))),
        "has the tensor extra, which no Gemma 2 has",
    ),
    "a quantized tensor": (
        change_tensors(lambda each: each.update({NORM: torch.zeros(64, dtype=torch.int8)})),
        f"{NORM} is I8, not a floating-point tensor",
    ),
    "a damaged index": (write("model.safetensors.index.json", '{"weight_map": 5}'), "has no weight_map"),
    "an index of nothing": (
        write("model.safetensors.index.json", '{"weight_map": {"x": "model.safetensors"}}'),
        "names x, which is in no shard",
    ),
    "an unfinished stage": (write("begun.json", "{}"), "is not finished"),
    "a score head": (
        change_tensors(lambda each: each.update({"score.weight": torch.zeros(1, 64)})),
        "is a reward model, not a language model; name a language model",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "a tokenizer that is a list": (write("tokenizer.json", "[]"), "the tokenizer of"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_one_sentence(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError) as refused:
        open_all(folder)
    assert message in str(refused.value) and str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("seed", range(60))
def test_a_folder_that_is_cut_or_changed_anywhere_is_opened_or_refused(seed: int, folder: Path) -> None:
    random = Random(seed)
    name = random.choice([*JSON_FILES, "model.safetensors"])
    content = (folder / name).read_bytes()
    place = random.randrange(len(content) if name.endswith("json") else 3000)
    changed = random.choice(
        [content[:place], content[:place] + b"\xff" + content[place:], b"", b"null", b"[]", b"{}", b'"x"', b"5"]
    )
    (folder / name).write_bytes(changed)
    try:
        open_all(folder)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no folder ./nowhere; name a model's folder or a Hub model"),
        ("a/b/c", "there is no folder a/b/c"),
        ("nowhere", "there is no folder nowhere"),
        ("", "the name of a model is empty"),
        ("README.md", "README.md is a file; name the folder of a model"),
        ("https://huggingface.co/google/gemma-2-2b", "is a URL; name the model itself (google/gemma-2-2b)"),
        ("hf://google/gemma-2-2b", "is a URL; name the model itself (a Hub model)"),
    ],
)
def test_what_is_no_folder_and_no_hub_name_is_not_told_about_licenses(name: str, message: str) -> None:
    for load in (load_config, lambda name: open_model(name, {})):
        with pytest.raises(UserError) as refused:
            load(name)
        assert message in str(refused.value) and "license" not in str(refused.value)


def test_a_reward_model_is_none_to_talk_with_and_a_policy_none_that_rewards(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    reward.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    for refused in (
        lambda: load_config(str(tmp_path / "reward")),
        lambda: chat(str(tmp_path / "reward"), "Hi", None, 0, 4),
    ):
        with pytest.raises(UserError, match="is a reward model, not a language model"):
            refused()
    assert load_config(str(tmp_path / "reward"), wanted=REWARD_MODEL).num_labels == 1
    with pytest.raises(
        UserError, match="is a language model, not a reward model; name the output of the reward stage"
    ):
        load_config(str(folder), wanted=REWARD_MODEL)


# --- LoRA ---


@pytest.mark.parametrize(
    ("targets", "refused"),
    [
        (["q_proj", "v_proj"], None),
        (["q_proj"], None),
        (["self_attn.q_proj", "model.layers.0.mlp.up_proj"], None),
        ("all-linear", None),
        (r".*\.(q|v)_proj", None),
        (["q_proj", "w_proj"], "lora_target_modules has w_proj, which matches no module"),
        (["q_proj", "model.layers.7.mlp.up_proj"], "lora_target_modules has model.layers.7.mlp.up_proj"),
        (["q_proj", "self_attn"], "lora_target_modules has self_attn"),
        (["query"], "lora_target_modules has query"),
        (r".*\.query", "which matches no matrix of the model"),
        ("(", "which matches no matrix of the model"),
    ],
)
def test_every_lora_target_matches_a_module(targets: list[str] | str, refused: str | None, model_dir: Path) -> None:
    arguments = ModelConfig(model_name_or_path=str(model_dir), use_peft=True, lora_target_modules=targets)
    complete_model_arguments(arguments)
    if refused is None:
        check_lora_modules(arguments, load_config(str(model_dir)))
        return
    with pytest.raises(UserError) as error:
        check_lora_modules(arguments, load_config(str(model_dir)))
    assert refused in str(error.value)


A, B = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
)
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "megatron_core": "megatron.core"}
ADAPTERS: dict[str, tuple[dict, Callable[[dict], object], str]] = {
    "embeddings": (
        {},
        lambda each: each.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 1024)}),
        "has base_model.model.model.embed_tokens.lora_embedding_A, which is no part of a product B A",
    ),
    "a magnitude": (
        {},
        lambda each: each.update({"x.lora_magnitude_vector": torch.ones(2)}),
        "has x.lora_magnitude_vec",
    ),
    "A without B": ({}, lambda each: each.pop(B), "lora_A.weight without its lora_B"),
    "B without A": ({}, lambda each: each.pop(A), "q_proj.lora_B.weight, which is no part"),
    "another rank": ({"r": 3}, lambda each: None, "and its adapter_config.json says r 3"),
    "A and B that do not fit": ({}, lambda each: each.update({B: torch.ones(64, 3)}), "says r 2"),
    "another width": ({}, lambda each: each.update({A: torch.ones(2, 63)}), "which"),
    "NaN": ({}, lambda each: each.update({B: torch.full((64, 2), torch.nan)}), "has NaN or infinite values in"),
    "nothing": ({}, lambda each: (each.pop(A), each.pop(B)), "adapts nothing"),
    "alpha 0": ({"lora_alpha": 0}, lambda each: None, "says lora_alpha 0; it must be a number above 0"),
    "no rank": ({"r": None}, lambda each: None, "says r None"),
    "DoRA": ({"use_dora": True}, lambda each: None, "is not a plain LoRA adapter (use_dora)"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, lambda each: None, "(layer_replication)"),
    "patterns": ({"alpha_pattern": {"q_proj": 3}}, lambda each: None, "(alpha_pattern)"),
    "PiSSA": ({"init_lora_weights": "pissa"}, lambda each: None, "(init_lora_weights pissa, which changes the base)"),
    "tokens": ({"trainable_token_indices": [1]}, lambda each: None, "(trainable_token_indices)"),
    "IA3": ({"peft_type": "IA3"}, lambda each: None, "is not a plain LoRA adapter (IA3)"),
}


@pytest.mark.parametrize(("config", "change", "message"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_an_adapter_is_merged_wholly_or_refused(
    config: dict, change: Callable[[dict], object], message: str, model_dir: Path, tmp_path: Path
) -> None:
    init = open_model(str(model_dir), {})
    shape = init.weights["model.layers.0.self_attn.q_proj.weight"].shape
    tensors = {A: torch.ones(2, shape[1]), B: torch.ones(shape[0], 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert set(open_adapter("adapter", tmp_path, init).updates) == {"model.layers.0.self_attn.q_proj.weight"}
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    with pytest.raises(UserError) as refused:
        open_adapter("adapter", tmp_path, init)
    assert message in str(refused.value)


# --- merges ---


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"device": "foo"}, "device is foo, which torch does not find here"),
        ({"device": "cuda:7"}, "device is cuda:7, which torch does not find here"),
        ({"eta": 1e38}, "is not finite at eta 1e"),
        ({"output_dir": "{folder}/policy-0/merged"}, "policy-0, which is merged; write elsewhere"),
        ({"policies": ["{folder}/policy-0", "{folder}/init/../policy-0"]}, "policy-0 twice; name each policy once"),
        ({"policies": ["{folder}/init", "{folder}/policy-0"]}, "policies names init"),
    ],
)
def test_a_merge_that_cannot_be_is_refused(
    keys: dict,
    message: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    run_warp: Warp,  # noqa: F811
) -> None:
    init, policies = write_models(tmp_path, tokenizer, 2)
    filled = json.loads(json.dumps(keys).replace("{folder}", str(tmp_path)))
    with pytest.raises(UserError) as refused:
        run_warp(**({"init": init, "policies": policies} | filled))
    assert message in str(refused.value)
    assert not list(tmp_path.glob("merged/**/*.safetensors"))


def test_weights_beyond_the_range_of_the_saved_type_are_refused(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    run_warp: Warp,  # noqa: F811
) -> None:
    """The largest fp32 number is finite, and infinite once it is rounded to bf16."""
    init, policies = write_models(tmp_path, tokenizer, 2)
    for name in (init, *policies):
        change_tensors(lambda each: each[NORM].__setitem__(0, torch.finfo(torch.float32).max))(Path(name))
    with pytest.raises(UserError, match=f"{NORM} is not finite at eta 0"):
        run_warp(init=init, policies=policies, eta=0.0, save_dtype="bfloat16")


def test_a_model_with_nan_is_not_saved(tmp_path: Path) -> None:
    model = random_model(1024)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match=f"{NORM} has NaN or infinite values, so the model is not saved"):
        save_model(model, dict(model.state_dict()), tmp_path / "out", torch.bfloat16)
    assert not list((tmp_path / "out").iterdir())


# --- chat ---


def test_a_chat_goes_on_after_what_it_cannot_ask(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = b"Hi\nHi \xff there\n<end_of_turn>\n" + b"plus " * 300 + b"\n\nHi\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    chat(str(model_dir), None, None, 0.0, 4)
    printed = capsys.readouterr().out
    assert "(not asked: the message holds the control token <end_of_turn>" in printed
    assert "(not asked: the conversation has" in printed and "(new conversation)" in printed
    assert printed.count("> ") == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Hi", None, -1.0, 4), "--temperature is -1; write 0 or more"),
        (("Hi", None, float("nan"), 4), "--temperature is nan"),
        (("Hi", None, 0.0, 0), "--max_new_tokens is 0; write 1 or more"),
        (("Hi", None, 0.0, 10_000), "--max_new_tokens 10000 leaves 0 of the model's 256 positions"),
        (("<bos>", None, 0.0, 4), "--prompt: the message holds the control token <bos>"),
        ((" ", None, 0.0, 4), "--prompt: the content of the message is empty"),
        (("\udcff", None, 0.0, 4), "--prompt: the message holds half a character"),
    ],
)
def test_a_chat_that_cannot_be_is_refused(arguments: tuple, message: str, model_dir: Path) -> None:
    with pytest.raises(UserError) as refused:
        chat(str(model_dir), *arguments)
    assert message in str(refused.value)
