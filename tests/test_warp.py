"""Merges of real directories against float64, what is written beside the weights, and what is refused."""

import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl.chat_template_utils import gemma_chat_template

from gemma2_post import cli, rlhf, warp
from gemma2_post.evaluation import measure, release
from gemma2_post.models import streaming
from gemma2_post.models.saving import save_model
from gemma2_post.models.streaming import ShardWriter, open_weights
from gemma2_post.models.tokenizer import save_tokenizer
from gemma2_post.pipeline import processes
from gemma2_post.pipeline.steps import Step
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from gemma2_post.tiny.data import prompts
from gemma2_post.tiny.gold import gold
from gemma2_post.weights import interpolation, points
from tests.conftest import TEACHER, random_model, run_stage
from tests.test_synthesize import completion, serve

__all__ = ["serve"]  # a fixture
Recipe = dict[str, object]
Warp = Callable[..., Path]


@pytest.fixture
def run_warp(tmp_path: Path) -> Warp:
    """The stage's own `main`, with keys as on the command line; returns its output directory."""

    def run(name: str = "merged", **keys: object) -> Path:
        values = {"output_dir": str(tmp_path / name), "force": True} | keys
        arguments = [f"--{key}={json.dumps(value)}" for key, value in values.items()]
        stage, recipe = warp.COMMAND.parse(arguments)
        warp.COMMAND.run(stage, recipe)
        return stage.output_dir

    return run


def save(model: torch.nn.Module, directory: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    save_model(model, model.state_dict(), directory, model.dtype)
    save_tokenizer(tokenizer, directory)
    return str(directory)


def write_models(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    num_policies: int,
    dtype: torch.dtype = torch.float32,
    **shape: object,
) -> tuple[str, list[str]]:
    """A random start and policies that have moved a little way from it, some of it in common."""
    init = random_model(len(tokenizer), dtype=dtype, **shape)
    paths = [save(init, folder / "init", tokenizer)]
    for m in range(num_policies):
        policy = random_model(len(tokenizer), dtype=dtype, **shape)
        for i, parameter in enumerate(policy.parameters()):
            common, own = (torch.Generator().manual_seed(1000 * seed + i) for seed in (7, m))
            step = torch.randn(parameter.shape, generator=common) + torch.randn(parameter.shape, generator=own)
            parameter.data += (0.01 * (m + 1) * step).to(dtype)
        paths.append(save(policy, folder / f"policy-{m}", tokenizer))
    return paths[0], paths[1:]


def weights_of(directory: str | Path) -> dict[str, torch.Tensor]:
    return open_weights(Path(directory))


def reference(init: str, policies: list[str], rule: str, angles: str, eta: float) -> dict[str, torch.Tensor]:
    """The merge in float64, each group's task vectors whole."""
    start, others = weights_of(init), [weights_of(path) for path in policies]
    groups = defaultdict(list)
    for name in start:
        groups[interpolation.group_of(name, angles)].append(name)
    found = {}
    for names in groups.values():
        vectors = torch.stack(
            [torch.cat([(each[name].double() - start[name].double()).flatten() for name in names]) for each in others]
        )
        weights = interpolation.coefficients(interpolation.gram_matrix(vectors), rule)
        for name in names:
            direction = sum(
                w * (each[name].double() - start[name].double()) for w, each in zip(weights, others, strict=True)
            )
            found[name] = start[name].double() + eta * direction
    return found


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest over the tensors, in the Frobenius norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - each.double()).norm() / each.double().norm()) for name, each in expected.items()
    )


GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 1}
DEEP = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("num_policies", "rule", "angles", "dtype", "shape"),
    [
        (2, "slerp", "layer", torch.float32, {}),
        (2, "slerp", "tensor", torch.bfloat16, GROUPED),
        (2, "linear", "layer", torch.float32, GROUPED),
        (3, "slerp", "layer", torch.bfloat16, DEEP),
        (3, "spherical_mean", "model", torch.float32, DEEP),
        (5, "slerp", "layer", torch.float32, GROUPED),
        (5, "spherical_mean", "layer", torch.bfloat16, {}),
    ],
    ids=str,
)
def test_a_merge_equals_float64(
    num_policies: int,
    rule: str,
    angles: str,
    dtype: torch.dtype,
    shape: dict[str, int],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    run_warp: Warp,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also far outside of [0, 1], and with slices of which a tensor has many."""
    monkeypatch.setattr(streaming, "CHUNK", 3000)
    init, policies = write_models(tmp_path, tokenizer, num_policies, dtype, **shape)
    etas = [-0.5, 0.0, 0.3, 1.0, 1.5]
    output = run_warp(init=init, policies=policies, eta=etas, interpolation=rule, angles=angles, save_dtype="float32")
    for eta in etas:
        found = weights_of(output / f"eta-{eta:g}")
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert relative_error(found, reference(init, policies, rule, angles, eta)) < 1e-6


def test_the_end_points_are_their_models_bit_for_bit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp
) -> None:
    """Also the sign of zeros."""
    init, (policy,) = write_models(tmp_path, tokenizer, 1)
    tensors = load_file(Path(init) / "model.safetensors")
    tensors["model.norm.weight"][:2] = torch.tensor([-0.0, 0.0])
    save_file(tensors, Path(init) / "model.safetensors", {"format": "pt"})
    output = run_warp(init=init, policies=policy, eta=[0, 1], save_dtype="float32")
    for eta, model in ((0, init), (1, policy)):
        found, expected = weights_of(output / f"eta-{eta}"), weights_of(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n].view(torch.int32), expected[n].view(torch.int32)) for n in expected)


def test_the_result_is_rounded_once_to_bf16(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp
) -> None:
    """Steps of 0.3 of a small task vector are far below what bf16 arithmetic keeps."""
    init, policies = write_models(tmp_path, tokenizer, 2)
    exact = weights_of(run_warp("fp32", init=init, policies=policies, save_dtype="float32"))
    rounded = weights_of(run_warp("bf16", init=init, policies=policies))
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(rounded[name], each.bfloat16()) for name, each in exact.items())


def test_the_sweep_can_go_back_to_an_earlier_start(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp
) -> None:
    """(1 - eta) towards + eta (init + merged): the output of WARP's last iteration."""
    init, (first, *policies) = write_models(tmp_path, tokenizer, 3)
    output = run_warp(init=init, policies=policies, towards=first, eta=[0, 0.3, 1], save_dtype="float32")
    merged, towards = reference(init, policies, "slerp", "layer", 1.0), weights_of(first)
    for eta in (0.0, 0.3, 1.0):
        expected = {name: (1 - eta) * towards[name].double() + eta * each for name, each in merged.items()}
        assert relative_error(weights_of(output / f"eta-{eta:g}"), expected) < 1e-6


def test_what_is_written_loads_and_stops_and_chats(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp
) -> None:
    init, policies = write_models(tmp_path, tokenizer, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    output = run_warp(init=init, policies=policies, eta=0.5, save_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto", attn_implementation="eager")
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings and model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == [1, 107]
    loaded = AutoTokenizer.from_pretrained(output)
    assert loaded.chat_template == tokenizer.chat_template and loaded.get_vocab() == tokenizer.get_vocab()
    ids = torch.arange(20).view(1, -1)
    expected = random_model(len(tokenizer))
    expected.load_state_dict(
        {n: t.float() for n, t in reference(init, policies, "slerp", "layer", 0.5).items()}, strict=False
    )
    expected.tie_weights()
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    with safe_open(output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert "slerp" in (output / "README.md").read_text()
    done = json.loads((output / "stage.json").read_text())
    assert (done["stage"], done["base_model"], done["dtype"]) == ("warp", init, "float32")
    assert done["base_digest"] == contract.input_digest(init) == done["lineage"][-1]
    assert {path: path.stat().st_mtime_ns for path in before} == before  # inputs are never touched
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_the_report_says_what_happened_to_each_group(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp
) -> None:
    init, policies = write_models(tmp_path, tokenizer, 2)
    output = run_warp(init=init, policies=policies)
    groups = json.loads((output / "merge.json").read_text())["groups"]
    assert {group["group"] for group in groups} == {
        *("model.layers.0", "model.layers.1", "model.embed_tokens.weight", "model.norm.weight")
    }
    assert sum(group["num_parameters"] for group in groups) == sum(t.numel() for t in weights_of(init).values())
    (layer,) = (group for group in groups if group["group"] == "model.layers.1")
    start, first, second = (
        torch.cat([each[n].double().flatten() for n in sorted(each) if n.startswith("model.layers.1.")])
        for each in (weights_of(path) for path in (init, *policies))
    )
    first, second = first - start, second - start
    cosine = float(first @ second / first.norm() / second.norm())
    assert layer["norms"] == pytest.approx([float(first.norm()), float(second.norm())], rel=1e-6)
    assert layer["cosines"] == pytest.approx([cosine], rel=1e-6) and 0.3 < cosine < 0.7
    assert layer["coefficients"] == pytest.approx([1 / (2 * ((1 + cosine) / 2) ** 0.5)] * 2, rel=1e-6)
    half = [c * d for c, d in zip(layer["coefficients"], (first, second), strict=True)]
    assert layer["norm"] == pytest.approx(float(sum(half).norm()), rel=1e-6)
    assert layer["norm_kept"] == pytest.approx(layer["norm"] / (sum(layer["norms"]) / 2))
    assert all((output / name).stat().st_size > 1000 for name in ("angles.png", "norms.png"))


# --- on disk ---


def test_shards_and_a_copied_head_are_read_and_shards_are_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-1 and 2 save the tied head twice, big models come in shards: the result is the same."""
    init, policies = write_models(tmp_path, tokenizer, 2)
    plain = weights_of(run_warp("plain", init=init, policies=policies, save_dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(policies[0], dtype="auto")
    shutil.rmtree(policies[0])
    model.save_pretrained(policies[0], max_shard_size="100KB")
    save_tokenizer(tokenizer, Path(policies[0]))
    (Path(policies[0]) / "model-99999-of-99999.safetensors").write_bytes(b"of an earlier save")
    tensors = load_file(Path(policies[1]) / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, Path(policies[1]) / "model.safetensors", {"format": "pt"})

    class SmallShards(ShardWriter):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, shard_bytes=100_000)

    monkeypatch.setattr(points, "ShardWriter", SmallShards)
    output = run_warp("other", init=init, policies=policies, save_dtype="float32")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in plain.values())
    found = weights_of(output)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], each) for name, each in plain.items())
    assert AutoModelForCausalLM.from_pretrained(output).config.tie_word_embeddings


def test_layer_2_comes_before_layer_10(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    assert list(weights_of(tmp_path)) == names


def test_slices_written_in_any_order_are_one_tensor(tmp_path: Path) -> None:
    """The file is one that safetensors reads, whatever the parts are."""
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(3)}
    with ShardWriter(tmp_path, {name: each.shape for name, each in tensors.items()}, torch.float32) as writer:
        writer.write("b", 0, tensors["b"])
        for row in (6, 0, 3, 1, 5, 2, 4):
            writer.write("a", 5 * row, tensors["a"][row])
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], each) for name, each in tensors.items())


def test_what_a_kill_leaves_is_made_again_and_the_result_is_the_same(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, policies = write_models(tmp_path, tokenizer, 2)
    keys = {"init": init, "policies": policies, "eta": [0.3, 1]}
    expected = weights_of(run_warp("undisturbed", **keys) / "eta-0.3")
    write_beside = points.write_beside
    monkeypatch.setattr(points, "write_beside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_warp(**keys)
    output = tmp_path / "merged"
    assert not (output / "eta-0.3").exists() and not (output / "stage.json").exists()
    monkeypatch.setattr(points, "write_beside", write_beside)
    run_warp(**keys)
    found = weights_of(output / "eta-0.3")
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["eta-0.3", "eta-1"]


# --- adapters ---


@pytest.fixture
def adapters(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """A start, and adapters on it of different ranks and scales whose B is not zero."""
    init = save(random_model(len(tokenizer)), tmp_path / "init", tokenizer)
    paths = []
    for m, (rank, alpha) in enumerate([(4, 8), (2, 3)]):
        set_seed(m)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(init), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(tmp_path / f"adapter-{m}")
        paths.append(str(tmp_path / f"adapter-{m}"))
    return init, paths


def merged_into(init: str, adapter: str | Path) -> dict[str, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32)
    state = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    return {name: each for name, each in state.items() if name != "lm_head.weight"}


def test_adapters_merge_as_the_models_that_they_make(
    adapters: tuple[str, list[str]], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp
) -> None:
    """Both as an adapter of summed rank, loaded by PEFT, and as a model."""
    init, paths = adapters
    wholes = []
    for m, path in enumerate(paths):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(init), path).merge_and_unload()
        wholes.append(save(model, tmp_path / f"whole-{m}", tokenizer))
    expected = weights_of(run_warp("whole", init=init, policies=wholes, eta=0.7, save_dtype="float32"))
    output = run_warp(init=init, policies=paths, eta=0.7, save_dtype="float32")
    assert relative_error(weights_of(output), expected) < 1e-6
    assert relative_error(merged_into(init, output / "adapter"), expected) < 1e-6
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (6, 6, init)
    by_group = {each["group"]: each for each in json.loads((output / "merge.json").read_text())["groups"]}
    whole = {each["group"]: each for each in json.loads((tmp_path / "whole" / "merge.json").read_text())["groups"]}
    for group, each in by_group.items():
        assert each["cosines"] == pytest.approx(whole[group]["cosines"], abs=1e-5)
    assert json.loads((output / "stage.json").read_text())["adapter"] == "adapter"


def test_a_compressed_adapter_says_what_it_loses(
    adapters: tuple[str, list[str]], tmp_path: Path, run_warp: Warp
) -> None:
    init, paths = adapters
    full = merged_into(init, run_warp("full", init=init, policies=paths, eta=1, adapter_only=True) / "adapter")
    output = run_warp("small", init=init, policies=paths, eta=1, adapter_only=True, rank=3)
    assert not (output / "model.safetensors").exists()
    small, start = merged_into(init, output / "adapter"), weights_of(init)
    lost = sum((small[name] - full[name]).square().sum() for name in full)
    moved = sum((full[name] - start[name]).square().sum() for name in full)
    stated = json.loads((output / "stage.json").read_text())["metrics"]["compression_error"]
    assert 0.05 < stated == pytest.approx(float((lost / moved).sqrt()), rel=1e-3)
    same = run_warp("same", init=init, policies=paths, eta=1, adapter_only=True, rank=6)
    assert json.loads((same / "stage.json").read_text())["metrics"]["compression_error"] < 1e-6


def test_adapters_of_different_modules_are_refused(
    adapters: tuple[str, list[str]], tmp_path: Path, run_warp: Warp
) -> None:
    """Nothing of the second one may be lost because the first has no place for it."""
    init, paths = adapters
    file = Path(paths[0]) / "adapter_model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if "o_proj" not in name}, file)
    with pytest.raises(UserError, match=r"adapter-1 adapts .*o_proj\.weight, which .*adapter-0 does not"):
        run_warp(init=init, policies=paths)
    assert not (tmp_path / "merged").exists()


# --- outputs of our own stages ---


@pytest.mark.slow
def test_policies_of_rlhf_merge_without_a_word(
    run_rlhf: Callable[[Recipe], Path],
    rlhf_recipe: Recipe,
    tmp_path: Path,
    run_warp: Warp,
    capfd: pytest.CaptureFixture,
) -> None:
    """Two policies, of which the second is not merged with what it did not start from; adapters are found by it."""
    lora = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 1e-3}
    recipe = rlhf_recipe | lora | {"max_steps": 1, "num_samples": 2}
    policies = [str(run_rlhf(recipe | {"policy": policy})) for policy in range(2)]
    output = run_warp(init=TEACHER, policies=policies, force=False, save_dtype="float32")
    assert "warning" not in capfd.readouterr().out
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    found, start = weights_of(output), weights_of(TEACHER)
    moved = {name for name in found if not torch.equal(found[name], start[name].float())}
    assert moved and all("self_attn" in name for name in moved)
    again = run_warp("again", init=str(output), policies=policies, force=True)
    assert "was trained from" in capfd.readouterr().out and again
    with pytest.raises(UserError, match=r"was trained from .*; name the model that it began as, or add --force true"):
        run_warp("refused", init=str(output), policies=policies, force=False)
    back = run_warp("back", init=str(output), policies=[str(output)], towards=TEACHER, eta=0.5, force=True)
    assert json.loads((back / "stage.json").read_text())["lineage"][0] == contract.input_digest(TEACHER)


# --- the front ---


@pytest.fixture
def measured(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """A sweep from the small teacher to what noise makes of it, rewarded by gold; 6 prompts."""
    start = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    paths = []
    for m in range(2):
        policy = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
        set_seed(m)
        for parameter in policy.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)
        paths.append(save(policy, tmp_path / f"policy-{m}", tokenizer))
    return {
        "init": save(start, tmp_path / "init", tokenizer),
        "policies": paths,
        "output_dir": str(tmp_path / "front"),
        "eta": [0, 0.5, 1],
        "save_dtype": "float32",
        "force": True,
        "datasets": [{"path": "gemma2_post.tiny.data:prompts", "split": "selection"}],
        "columns": ["skill", "answer"],
        "reward_functions": ["gemma2_post.tiny.gold:gold"],
        "graders": ["gemma2_post.tiny.gold:gold"],
        "max_completion_length": 16,
        "num_samples": 6,
        "compare_with": ["linear"],
    }


def run_front(recipe: Recipe, file: Path) -> Path:
    return run_stage(file, warp.COMMAND, recipe)


def test_the_front_is_measured_and_the_best_point_under_the_budget_is_released(
    measured: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise makes the teacher worse, so that without a KL budget the start is released, too."""
    output = run_front(measured, tmp_path / "warp.yaml")
    result = json.loads((output / "front.json").read_text())
    points = {(point["series"], point["position"]): point for point in result["points"]}
    assert points.keys() == {(rule, eta) for rule in ("slerp", "linear") for eta in (0.0, 0.5, 1.0)} - {
        ("linear", 0.0)
    }
    assert points["slerp", 0.0]["kl_to_init"] == pytest.approx(0, abs=1e-5)
    assert points["slerp", 1.0]["kl_to_init"] > points["slerp", 0.5]["kl_to_init"] > 1e-3
    assert points["linear", 1.0]["kl_to_init"] < points["slerp", 1.0]["kl_to_init"]  # lemma 2: a smaller norm
    assert all(point["reward"] <= point["gold"] for point in points.values())  # cut answers are penalised
    best = max((p for (rule, _), p in points.items() if rule == "slerp"), key=lambda point: point["reward"])
    assert result["released"] == best
    released = weights_of(output)
    assert all(torch.equal(released[n], each) for n, each in weights_of(best["path"]).items())
    done = json.loads((output / "stage.json").read_text())
    assert done["metrics"]["eta"] == best["position"] and done["metrics"]["reward"] == best["reward"]
    assert all((output / name).stat().st_size > 1000 for name in ("front-reward.png", "front-gold.png"))

    monkeypatch.setattr(measure, "sample_answers", lambda *_, **__: pytest.fail("answered again"))
    run_front(measured | {"kl_budget": 0.0}, tmp_path / "warp.yaml")
    assert json.loads((output / "front.json").read_text()) == result | {
        "kl_budget": 0.0,
        "released": points["slerp", 0.0],
    }


def test_a_grader_or_a_judge_can_choose_the_point_and_the_report_says_where_the_reward_disagrees(
    measured: Recipe, tmp_path: Path, serve: Callable
) -> None:
    """The reward likes what is wrong; gold likes what is right, and so does the judge."""
    rows = {row["prompt"][-1]["content"]: row["answer"] for row in prompts("selection")[:6]}

    def reply(request: dict) -> tuple[int, str]:
        text = request["messages"][0]["content"]
        word = next(word for prompt, word in rows.items() if f"User: {prompt}\n\n--- answer" in text)
        both = text.split("--- answer A\n")[1].split("--- answer B\n")
        right = [word.lower() in each.split("\n---")[0].lower() for each in both]
        return completion("[[tie]]" if right[0] == right[1] else "[[A]]" if right[0] else "[[B]]")

    measured = {key: value for key, value in measured.items() if key != "compare_with"}
    measured |= {"reward_functions": ["tests.test_warp:wrongness"], "missing_end_penalty": 0.0}
    run = tmp_path / "run"
    for by, more in {
        "gold": {},
        "judge": {"judge": "j", "judge_endpoint": serve(reply).url, "concurrency": 1},
    }.items():
        output = run_front(measured | more | {"release_by": by, "output_dir": str(run / by)}, tmp_path / "warp.yaml")
        front = json.loads((output / "front.json").read_text())
        points, released = {point["position"]: point for point in front["points"]}, front["released"]
        assert points[0.0]["win_rate"] == points[0.0]["reward_win_rate"] == 0.5 and points[0.0]["disagreement"] == 0
        assert released["win_rate"] == max(point["win_rate"] for point in points.values())
        by_reward = max(points.values(), key=lambda point: point["reward"])
        assert released["position"] == 0 < by_reward["position"] and by_reward["disagreement"] > 0
        metrics = json.loads((output / "metrics.json").read_text())
        assert (metrics["eta"], metrics["win_rate"]) == (0, 0.5)
        assert f"against the start's by {by}; the reward would release eta {by_reward['position']:g}" in front["why"]
        assert (output / "front-wins.png").stat().st_size > 1000


def wrongness(completions: list[list[dict[str, str]]], answer: list[str], **_: object) -> list[float]:
    return [-grade for grade in gold([messages[0]["content"] for messages in completions], answer)]


def test_the_best_point_is_that_with_the_least_kl_among_equals() -> None:
    points = [{"win_rate": rate, "kl_to_init": kl} for rate, kl in ((0.5, 0.0), (0.7, 2.0), (0.7, 1.0))]
    assert release.best(points, "win_rate") is points[2]


def test_wins_and_disagreement_leave_out_what_has_no_verdict() -> None:
    found = release.rates([1, 0, None, 0.5], [0, 0, 1, 1])
    assert (found["win_rate"], found["reward_win_rate"], found["disagreement"]) == (0.5, 0.5, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"release_by": "silver"}, "release_by is silver; write reward, judge or gold, or name it in graders"),
        ({"release_by": "judge"}, "release_by is judge, and there is none; name a judge"),
        ({"judge": TEACHER}, "judge does nothing with release_by: reward; write release_by: judge, or remove it"),
        (
            {"release_by": "gold", "eta": [0.5]},
            "release_by gold counts wins against the start, and eta lacks it; add 0",
        ),
        ({"safety_datasets": [{"path": "x"}]}, "points are compared, not checked for safety"),
    ],
)
def test_a_release_that_cannot_be_decided_is_refused(change: Recipe, message: str, measured: Recipe) -> None:
    with pytest.raises(UserError, match=message):
        warp.COMMAND.build(measured | change)


def trained_with(policy: str, **recipe: object) -> None:
    """Records that our own stage has trained the policy with these keys."""
    keys = {"reward_functions": ["gemma2_post.tiny.gold:gold"]} | recipe
    wanted: dict[str, dict] = {"recipe": keys, "inputs": {}, "code": {}, "versions": {}}
    contract.finish(Path(policy), "rlhf", wanted, 1.0, {}, {})


def test_a_front_is_rewarded_as_its_policies_were(measured: Recipe, tmp_path: Path) -> None:
    for policy in measured["policies"]:
        trained_with(policy, missing_end_penalty=0.5, reward_weights=[2.0, 1.0])
    short = {"compare_with": [], "max_completion_length": 5}  # some answers are cut
    output = run_front(measured | short, tmp_path / "warp.yaml")
    points = json.loads((output / "front.json").read_text())["points"]
    assert any(point["stop_rate"] < 1 for point in points)
    for point in points:
        assert point["reward"] == pytest.approx(2 * point["gold"] - 0.5 * (1 - point["stop_rate"]))


@pytest.mark.parametrize(
    ("trained", "change", "message"),
    [
        ([{}, {}], {"length_penalty": 0.1}, "length_penalty is 0.1, but .*policy-0 was trained with 0.0; remove it"),
        ([{"length_penalty": 0.2}] * 2, {"length_penalty": 0.1}, "length_penalty is 0.1, but .* was trained with 0.2"),
        ([{"missing_end_penalty": 2.0}] * 2, {"missing_end_penalty": 0.0}, "missing_end_penalty is 0.0, but .* 2.0"),
        (
            [{"reward_functions": ["gemma2_post.tiny.gold:accuracy"]}] * 2,
            {},
            r"reward_functions is \['gemma2_post.tiny.gold:gold'\], but .* was trained with .*accuracy",
        ),
        (
            [{"reward_model": "runs/reward"}] * 2,
            {},
            "reward_model is not set, but .*policy-0 was trained with runs/reward, or that has changed; name the one",
        ),
        ([{}, {"length_penalty": 0.1}], {}, "policy-1 was rewarded in another way than .*policy-0, so no front"),
        ([{}, {"reward_weights": [1.0, 2.0]}], {}, "policy-1 was rewarded in another way"),
    ],
)
def test_another_reward_than_in_training_is_refused_before_the_merge(
    trained: list[Recipe],
    change: Recipe,
    message: str,
    measured: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(points, "merge_models", lambda *_: pytest.fail("merged"))
    for policy, keys in zip(measured["policies"], trained, strict=True):
        trained_with(policy, **keys)
    with pytest.raises(UserError, match=message):
        run_front(measured | change, tmp_path / "warp.yaml")


@pytest.mark.slow
def test_an_interrupted_front_samples_no_answer_twice(
    measured: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, sample_answers = [], measure.sample_answers

    def sample(*arguments: object, **further: object) -> object:
        sampled.append(1)
        if len(sampled) == 3:
            raise KeyboardInterrupt
        return sample_answers(*arguments, **further)

    monkeypatch.setattr(measure, "sample_answers", sample)
    with pytest.raises(KeyboardInterrupt):
        run_front(measured, tmp_path / "warp.yaml")
    answers = Path(measured["output_dir"]) / "progress" / "answers.jsonl"
    with open(answers, "a") as file:
        file.write('{"point": "half a li')
    merged = points.merge_models
    monkeypatch.setattr(points, "merge_models", lambda *_: pytest.fail("merged again"))
    output = run_front(measured, tmp_path / "warp.yaml")
    assert len(sampled) == 3 + 3 and len(json.loads((output / "front.json").read_text())["points"]) == 5
    monkeypatch.setattr(points, "merge_models", merged)
    undisturbed = run_front(measured | {"output_dir": str(tmp_path / "once")}, tmp_path / "warp.yaml")
    one, other = (json.loads((each / "front.json").read_text())["points"] for each in (output, undisturbed))
    for each, expected in zip(one, other, strict=True):
        assert each | {"path": ""} == expected | {"path": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_budget": -1.0}, "kl_budget is -1; write 0 or more"),
        ({"kl_budget": 1.0, "eta": [0.5, 1]}, "with a kl_budget, eta needs 0"),
        ({"num_samples": 1}, "num_samples is 1; write 2 or more"),
        ({"runs": ["nowhere"]}, "runs names nowhere, which is no finished policy"),
        ({"reward_functions": None}, "nothing rewards the answers"),
        ({"compare_with": ["cubic"]}, "compare_with[0] is 'cubic' (str); write one of slerp, spherical_mean, linear"),
        ({"compare_with": ["slerp"]}, "compare_with names slerp, which is the interpolation itself"),
        ({"max_completion_length": 600}, "leaves 0 of the model's 512 positions"),
        ({"held_out_datasets": [{"path": "x.jsonl"}]}, "held_out_datasets must not be set: nothing is trained here"),
        ({"held_out_share": 0.5}, "held_out_share must not be set: nothing is trained here"),
        ({"group_by": "skill"}, "group_by must not be set: the numbers are not broken down"),
    ],
)
def test_a_front_that_cannot_be_measured_is_refused_before_the_merge(
    change: Recipe, message: str, measured: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "merge_models", lambda *_: pytest.fail("merged"))
    recipe = {key: value for key, value in (measured | change).items() if value is not None}
    with pytest.raises(UserError) as error:
        run_front(recipe, tmp_path / "warp.yaml")
    assert message in str(error.value) and not Path(measured["output_dir"]).exists()


# --- the loop ---


@pytest.mark.slow
def test_the_loop_is_one_entry_of_a_pipeline_and_each_run_a_folder(
    rlhf_recipe: Recipe,
    measured: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Two iterations of two policies; the stages' own `main`, in this process rather than in one each."""
    own = {"reward_model": None, "reward_functions": ["gemma2_post.tiny.gold:gold"], "max_steps": 1, "num_samples": 2}
    rlhf_values = {key: value for key, value in (rlhf_recipe | own).items() if value is not None}
    warp_values = measured | {"init": "none", "policies": ["none"], "num_samples": 2, "force": False}
    (tmp_path / "rlhf.yaml").write_text(json.dumps(rlhf_values))
    (tmp_path / "warp.yaml").write_text(json.dumps({k: v for k, v in warp_values.items() if k != "compare_with"}))
    stages = {
        "rlhf": {"recipe": "rlhf.yaml", "num_policies": 2},
        "warp": {"recipe": "warp.yaml", "merges": "rlhf", "iterations": 2},
    }
    path = tmp_path / "pipeline.yaml"
    content = {"run_dir": str(tmp_path / "run"), "launch": "accelerate_configs/cpu.yaml", "stages": stages}
    path.write_text(json.dumps(content))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})  # one after the other, in one process

    def launch(step: Step, *_: object) -> int:
        arguments = [*(["--config", str(step.config)] if step.config else [])]
        arguments += [f"--{key}={json.dumps(value)}" for key, value in step.values.items()]
        if step.stage == "rlhf":
            rlhf.main(*rlhf.COMMAND.parse(arguments))
        else:
            warp.main(*warp.COMMAND.parse(arguments))
        return 0

    monkeypatch.setattr(processes, "launch", launch)
    cli.run(path, None, {})
    folder = tmp_path / "run"
    done = {str(each.parent.relative_to(folder)) for each in folder.rglob("stage.json")}
    assert done == {*("rlhf/policy-0", "rlhf/policy-1", "warp-1", "rlhf-2/policy-2", "rlhf-2/policy-3", "warp")}
    second = json.loads((folder / "rlhf-2" / "policy-2" / "stage.json").read_text())
    assert second["base_digest"] == json.loads((folder / "warp-1" / "stage.json").read_text())["output"]
    policies = [str(folder / "rlhf" / f"policy-{m}") for m in range(2)]
    assert relative_error(weights_of(folder / "warp-1"), reference(TEACHER, policies, "slerp", "layer", 0.3)) < 1e-6
    later = [str(folder / "rlhf-2" / f"policy-{m}") for m in (2, 3)]
    merged = reference(str(folder / "warp-1"), later, "slerp", "layer", 1.0)
    start = weights_of(TEACHER)
    half = {name: 0.5 * start[name].double() + 0.5 * each for name, each in merged.items()}
    assert relative_error(weights_of(folder / "warp" / "eta-0.5"), half) < 1e-6
    series = {point["series"] for point in json.loads((folder / "warp" / "front.json").read_text())["points"]}
    names = ["rlhf/policy-0", "rlhf/policy-1", "rlhf-2/policy-2", "rlhf-2/policy-3"]
    assert series == {"slerp", *names, *(f"{name} anchor" for name in names)}

    capsys.readouterr()
    monkeypatch.setattr(processes, "launch", lambda *_: pytest.fail("ran again"))
    cli.run(path, None, {})
    assert capsys.readouterr().out.count("up to date") == 6


# --- mistakes ---


def other_config(folder: Path) -> None:
    config = json.loads((folder / "policy-1" / "config.json").read_text())
    (folder / "policy-1" / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "policy-1" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return apply


def set_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


def truncate(folder: Path) -> None:
    file = folder / "policy-1" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def lose_a_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "policy-1" / "model.safetensors.index.json").write_text(json.dumps(index))


def swap_two_words(folder: Path) -> None:
    file = folder / "policy-1" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))


def other_template(folder: Path) -> None:
    (folder / "policy-1" / "chat_template.jinja").write_text("{{ messages }}")


def test_policies_with_the_template_of_version_010_merge_with_newer_ones(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp
) -> None:
    """It differs only where there is a system message."""
    init, policies = write_models(tmp_path, tokenizer, 2)
    template = Path(policies[0]) / "chat_template.jinja"
    assert template.read_text() != gemma_chat_template
    template.write_text(gemma_chat_template)
    assert (run_warp(init=init, policies=policies, eta=0.5) / "model.safetensors").is_file()


def unfinished(folder: Path) -> None:
    (folder / "policy-1" / "begun.json").write_text("{}")


def make_adapter(folder: Path) -> None:
    (folder / "policy-1" / "adapter_config.json").write_text("{}")


def nothing(folder: Path) -> None:
    pass


def occupied(folder: Path) -> None:
    (folder / "merged").mkdir()
    (folder / "merged" / "notes.txt").write_text("mine")


BAD: dict[str, tuple[Callable[[Path], None], Recipe, str]] = {
    "architecture": (other_config, {}, "are different architectures: sliding_window is 8 and 16"),
    "keys": (
        change_tensors(lambda tensors: tensors.pop("model.norm.weight", None) is None),
        {},
        "policy-1 lacks the tensor model.norm.weight, which its config needs",
    ),
    "shape": (change_tensors(narrow), {}, "model.norm.weight has the shape [63], and its config.json says [64]"),
    "NaN": (change_tensors(set_nan), {}, "policy-1 has NaN or infinite values in model.layers.1.mlp.up_proj.weight"),
    "untied head": (change_tensors(other_head), {}, "policy-1 has a head that differs from its embeddings"),
    "quantised": (change_tensors(quantise), {}, "model.norm.weight is I8, not a floating-point tensor"),
    "truncated": (truncate, {}, "model.safetensors cannot be read"),
    "missing shard": (lose_a_shard, {}, "policy-1 has no model-00002-of-00002.safetensors"),
    "tokenizer": (swap_two_words, {}, "merge models with one tokenizer"),
    "template": (other_template, {}, "have different chat templates"),
    "unfinished": (unfinished, {}, "policy-1 is not finished"),
    "adapter beside a model": (make_adapter, {}, "policy-1 is an adapter and"),
    "unknown start": (nothing, {"force": False}, "policy-0 records no start"),
    "no folder": (nothing, {"init": "./nowhere"}, "there is no folder ./nowhere"),
    "Hub model": (
        nothing,
        {"init": "google/gemma-2-2b"},
        "google/gemma-2-2b is no local folder, and the Hub does not",
    ),
    "eta is text": (nothing, {"eta": "half"}, "eta is 'half' (str); write a list, each item a number or a number"),
    "eta is NaN": (nothing, {"eta": float("nan")}, "eta is nan; write a finite number"),
    "eta twice": (nothing, {"eta": [0.3, 0.3]}, "eta has 0.3 more than once"),
    "unknown rule": (nothing, {"interpolation": "cubic"}, "write one of slerp, spherical_mean, linear"),
    "unknown key": (nothing, {"etta": 0.3}, "unknown key etta (value 0.3); did you mean eta?"),
    "rank of models": (nothing, {"rank": 4}, "rank and adapter_only are for adapters"),
    "no policies": (nothing, {"policies": []}, "policies is empty"),
    "occupied": (occupied, {}, "holds files that no stage has made; choose another output_dir"),
}


@pytest.mark.parametrize(("spoil", "keys", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence_and_nothing_is_left_or_touched(
    spoil: Callable[[Path], None],
    keys: Recipe,
    message: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    init, policies = write_models(tmp_path, tokenizer, 2)
    spoil(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    values = {"init": init, "policies": policies, "output_dir": str(tmp_path / "merged"), "force": True} | keys
    arguments = [f"--{key}={json.dumps(value).replace('NaN', '.nan')}" for key, value in values.items()]
    monkeypatch.setattr(sys, "argv", ["warp", *arguments])
    with pytest.raises(SystemExit) as exit:
        warp.COMMAND.launch()
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert {path: path.stat().st_mtime_ns for path in before} == before
    left = [path.name for path in (tmp_path / "merged").iterdir()] if (tmp_path / "merged").exists() else []
    assert set(left) <= {"begun.json", "notes.txt"}


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, run_warp: Warp, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, policies = write_models(tmp_path, tokenizer, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="no space left on the device for the output"):
        run_warp(init=init, policies=policies)
    assert not (tmp_path / "merged").exists()
