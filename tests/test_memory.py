"""The planner's arithmetic, against real models: on torch's meta device, and small ones whose tensors are counted."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainingArguments

from gemma2_post import rlhf
from gemma2_post.models import cost
from gemma2_post.models.cost import Adapted, Compute
from gemma2_post.models.shapes import SHAPES, known_config, linear_shapes, num_parameters
from gemma2_post.pipeline import check, loading
from gemma2_post.planning import memory, plan
from gemma2_post.planning.memory import Job
from gemma2_post.planning.plan import Change
from gemma2_post.stage.command import Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.training import checks
from gemma2_post.training import memory as held
from tests.conftest import random_model

GB = 1e9
ROWS, LENGTH = 3, 64
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def checked(size: str, stage: str, **values: object) -> Job:
    """A stage of a shipped pipeline, with other keys."""
    path = Path(f"recipes/gemma-2-{size}/pipeline.yaml")
    pipeline = loading.load_pipeline(path, overrides={stage: values} if values else {})
    return next(each for each in check.check(pipeline, until=stage) if each.command.name == stage)


def total(each: Job) -> float:
    return sum(memory.parts(each).values())


def phases(each: Job) -> dict[str, dict[str, float]]:
    return each.command.memory(each.checked)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = known_config(name)
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config)
    assert num_parameters(config) == model.num_parameters()
    assert cost.weights(config, cost.BF16) == 2 * model.num_parameters()
    shapes = {
        key: tuple(reversed(module.weight.shape))
        for key, module in [
            *model.model.layers[0].self_attn.named_children(),
            *model.model.layers[0].mlp.named_children(),
        ]
        if key.endswith("_proj")
    }
    assert linear_shapes(config) == shapes
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=list(TARGETS)))
    trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    assert cost.adapter_parameters(config, 16, list(TARGETS)) == trained


def test_27b_in_4_bits() -> None:
    """Matrices at 4 + 32 / 64 bits a weight, embedding and norms in bf16: 17.0 GB."""
    config = known_config("google/gemma-2-27b")
    linear = 46 * (2 * 4608 * 128 * (32 + 16) + 3 * 4608 * 36864)
    others = num_parameters(config) - linear
    assert cost.weights(config, 2, "4bit") == linear * 4.5 / 8 + 2 * others == pytest.approx(17.0 * GB, rel=0.01)
    assert cost.weights(config, 2, "4bit", nested=True) == pytest.approx(linear * 4.127 / 8 + 2 * others, rel=1e-3)


def saved_bytes(model: torch.nn.Module) -> int:
    """Of the tensors that a forward pass keeps for its backward pass, parameters and buffers left out."""
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    input_ids = torch.randint(4, 300, (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
        del output
    return sum(each.nbytes() for each in storages.values())


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapts", [False, True])
def test_saved_activations_are_those_of_a_forward_pass(checkpoints: bool, dtype: torch.dtype, adapts: bool) -> None:
    model = random_model(300, dtype=dtype, hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32)
    config, adapted = model.config, None
    model = model.model.train()
    if adapts:
        peft_config = LoraConfig(r=8, target_modules=list(TARGETS))
        model = get_peft_model(model, peft_config)
        model.enable_input_require_grads()  # as TRL does for gradient checkpointing
        adapted = Adapted(8, TARGETS, cost.FP32)
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False})
    compute = Compute(dtype.itemsize)
    expected = cost.saved(config, ROWS, LENGTH, compute, checkpoints, adapted)
    assert saved_bytes(model) == pytest.approx(expected, rel=0.05)


def test_cache_is_that_of_the_model() -> None:
    model = random_model(300, num_hidden_layers=4, sliding_window=1000)
    cache = model(torch.randint(4, 300, (3, 20)), use_cache=True).past_key_values
    held = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
    assert cost.kv_cache(model.config, 3, 20, cost.FP32) == held
    sliding = Gemma2Config(num_hidden_layers=2, sliding_window=10)
    assert cost.kv_cache(sliding, 1, 20, 2) == 2 * (10 + 20) * sliding.num_key_value_heads * sliding.head_dim * 2


def test_zero_divides_what_it_shards() -> None:
    """Of 9.24 billion parameters in bf16: 12 bytes each of optimizer over all processes from stage 1, gradients from
    stage 2, weights from stage 3."""
    parameters = num_parameters(known_config("google/gemma-2-9b"))
    zero_3 = checked("9b", "sft")
    found = {
        (stage, n): phases(Change({}, {"zero_stage": stage, "num_processes": n}).apply(zero_3))["training step"]
        for stage in (2, 3)
        for n in (8, 16)
    }
    for (stage, n), parts in found.items():
        assert parts["optimizer"] == 12 * parameters / n
        assert parts["weights"] == (2 * parameters / n if stage == 3 else 2 * parameters)
    assert found[3, 8]["gradients"] - found[3, 16]["gradients"] == pytest.approx(2 * parameters / 16)
    assert found[3, 8]["activations"] == found[3, 16]["activations"]
    assert not found[2, 8]["gathered"] and found[3, 8]["gathered"]
    sampling = phases(zero_3)["sampling"]
    assert sampling["gathered"] == 2 * parameters  # whole, on each process
    offloaded = phases(Change({}, {"offloads_optimizer": True}).apply(zero_3))["training step"]
    assert not offloaded["optimizer"]


def test_the_held_out_loss_of_sft_is_counted() -> None:
    """Also where no answers are sampled."""
    one, many = (total(checked("2b", "sft", num_samples=0, per_device_eval_batch_size=n)) for n in (1, 64))
    assert many > 2 * one


def test_frozen_models_of_rlhf() -> None:
    """All weights: reference, start and fp32 shadow beside the policy; with LoRA only the adapter once more."""
    parameters = num_parameters(known_config("google/gemma-2-9b"))
    held = rlhf.frozen(checked("9b", "rlhf").checked)
    assert held["anchor"] == pytest.approx((4 + 2) * parameters / 8)
    assert held["start"] == pytest.approx(2 * parameters / 8)
    small = rlhf.frozen(checked("2b", "rlhf").checked)
    assert small["anchor"] < 0.1 * GB and "start" not in small


@pytest.mark.parametrize(
    ("size", "stage", "values", "gigabytes"),
    [
        ("2b", "rlhf", {}, 40),
        ("2b", "sft", {"per_device_train_batch_size": 16, "activation_checkpointing": False}, 24),
        ("2b", "distill", {"teacher_load_in_4bit": False}, 40),
        ("9b", "reward", {}, 48),
        ("9b", "distill", {}, 40),
    ],
)
def test_a_remedy_fits(size: str, stage: str, values: dict[str, object], gigabytes: float) -> None:
    step = checked(size, stage, **values)
    (row,) = plan.plan([step], memory_gb=gigabytes)
    assert row.total > gigabytes * GB
    words, changed = plan.remedy(step, 0, gigabytes)
    assert changed is not None and words in row.remedy
    (again,) = plan.plan([changed], memory_gb=gigabytes)
    assert not again.remedy and again.total <= gigabytes * GB


def test_a_recipe_key_of_a_remedy_has_the_effect_that_was_promised() -> None:
    step = checked("2b", "distill", teacher_load_in_4bit=False)
    words, changed = plan.remedy(step, 0, 40)
    assert words.startswith("teacher_load_in_4bit: true makes it")
    assert total(checked("2b", "distill", teacher_load_in_4bit=True)) == total(changed)


def test_more_gpus_and_what_is_not_known() -> None:
    step = checked("9b", "sft")
    (eight,), (sixteen,) = (plan.plan([step], num_gpus=n) for n in (8, 16))
    assert sixteen.job.checked.launcher.num_processes == 16 and sixteen.total < eight.total
    step = checked("2b", "sft", model_name_or_path="someone/else")
    (row,) = plan.plan([step], memory_gb=80)
    assert row.parts is None and step.unknown == ["model_name_or_path"]
    plan.show([step], Console(), memory_gb=80)


def test_a_cpu_run_counts_its_libraries() -> None:
    for row in plan.plan(check.check(loading.load_pipeline(Path("recipes/tiny/pipeline.yaml")))):
        assert row.parts["Python and libraries"] > 0.3 * GB
    plan.show([row.job], Console())


def test_the_recipe_for_24_gb_fits_with_room() -> None:
    path = Path("recipes/gemma-2-2b-24gb/pipeline.yaml")
    rows = plan.plan(check.check(loading.load_pipeline(path)), memory_gb=24)
    assert [row.job.label for row in rows if row.remedy or row.total > 0.9 * 24 * GB] == []
    assert {row.job.command.name for row in rows} == {"sft", "distill", "reward", "rlhf", "warp", "evaluate"}


def test_quantized_frozen_models_are_planned_and_proposed() -> None:
    chain = check.check(loading.load_pipeline(Path("recipes/gemma-2-2b-24gb/pipeline.yaml")))
    jobs = {job.command.name: job for job in chain}
    changes = {"rlhf": {"reward_model_load_in": None}, "evaluate": {"judge_load_in": None}}
    nine = known_config("google/gemma-2-9b")
    for name, change in changes.items():
        larger = Change(change).apply(jobs[name])
        phase = {"rlhf": "rewards", "evaluate": "judge"}[name]
        before, after = (sum(job.command.memory(job.checked)[phase].values()) for job in (larger, jobs[name]))
        saved = cost.weights(nine, cost.BF16) - cost.weights(nine, cost.BF16, "4bit")
        assert before - after == pytest.approx(saved - cost.dequantized(nine, "4bit"))
    words, changed = plan.remedy(Change(changes["rlhf"]).apply(jobs["rlhf"]), 0, 24)
    assert changed and words.startswith("reward_model_load_in: 4bit makes it")


def test_a_chain_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its outputs and checkpoints together, but for those that are there."""
    run_dir = tmp_path / "run"
    chain = check.check(loading.load_pipeline(Path("recipes/gemma-2-2b/pipeline.yaml"), run_dir))
    needed = int(sum(sum(each.command.disk(each.checked)) for each in chain))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    memory.check_disk(run_dir, chain)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1000))
    with pytest.raises(UserError, match=rf"no space left .* about {needed / 1e6:,.0f} MB needed"):
        memory.check_disk(run_dir, chain)
    (run_dir / "sft").mkdir(parents=True)
    (run_dir / "sft" / "model.safetensors").write_bytes(b"0" * 1000)
    memory.check_disk(run_dir, chain)
    (run_dir / "replaced").mkdir()
    with pytest.raises(UserError, match=f"free some, for example what gemma2-post clean {run_dir} lists, or"):
        memory.check_disk(run_dir, chain, replaced={"sft"})  # what is set aside still takes its space


def test_a_stage_that_resumes_needs_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints are there already; the stage counts as the chain does."""
    chain = check.check(loading.load_pipeline(Path("recipes/gemma-2-2b/pipeline.yaml"), tmp_path / "run"))
    job = next(each for each in chain if each.command.name == "rlhf")
    recipe, config = job.checked.recipe, job.checked.models["model_name_or_path"]
    needed = int(sum(job.command.disk(job.checked)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1000))
    stage = Stage("rlhf", "rlhf.yaml", tmp_path / "policy-0", {})
    more = {"has_anchor": recipe.anchor == "ema", "saves_every": recipe.watch.watch_steps}
    with pytest.raises(UserError, match=rf"about {needed / 1e6:,.0f} MB needed"):
        checks.check_disk(stage, recipe, config, **more)
    (stage.output_dir / "checkpoint-20").mkdir(parents=True)
    (stage.output_dir / "checkpoint-20" / "model.safetensors").write_bytes(b"0" * 1001)
    checks.check_disk(stage, recipe, config, **more)


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({"save_total_limit": 2}, 3),
        ({"max_steps": 100, "save_steps": 10}, 10),
        ({"max_steps": 100, "save_steps": 0.25}, 4),
        ({"save_strategy": "epoch", "num_train_epochs": 5}, 5),
        ({"save_steps": 10}, 3),
    ],
)
def test_without_a_limit_every_checkpoint_stays(values: dict[str, object], number: int) -> None:
    training = TrainingArguments(use_cpu=True, **values)
    assert held._checkpoints(training, None) == number
