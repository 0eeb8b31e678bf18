"""Everything in recipes/ and accelerate_configs/ is valid, and none of it is overlooked here."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from gemma2_post import sft
from gemma2_post.data.functions import load_function
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.stage import launcher
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.recipe_file import load_recipe
from gemma2_post.stage.stages import command_of
from gemma2_post.tiny.data import noise_ceiling, preferences

PIPELINES = sorted(Path("recipes").glob("*/pipeline.yaml"))
CURATION, FULL = Path("recipes/tiny/curation.yaml"), Path("recipes/tiny/pipeline-full.yaml")
RECIPES = sorted({*Path("recipes").glob("*/*.yaml")} - {*PIPELINES, CURATION, FULL})
SHARED = sorted(Path("recipes").glob("*/data/*.yaml"))


def test_every_recipe_is_tested_here() -> None:
    assert len(RECIPES) == 47 and len(PIPELINES) == 5
    assert sorted(Path("recipes").rglob("*.yaml")) == sorted([*RECIPES, *PIPELINES, CURATION, FULL, *SHARED])


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_shipped_recipe_passes_its_own_stage(path: Path) -> None:
    """Also as a launcher would start it that no pipeline names: 27b with all weights is for two machines."""
    values = load_recipe(path)
    stage = path.stem.partition("-")[0]
    assert values["output_dir"] == f"runs/{path.parent.name}/{path.stem}"
    command = command_of(stage)
    trains = stage in ("sft", "distill", "reward", "rlhf")
    on_cpu = {"use_cpu": True} if trains else {}
    if trains and not values.get("use_peft") and values["dtype"] == "bfloat16":
        with pytest.raises(UserError, match="full fine-tuning without DeepSpeed"):
            command.build(values | on_cpu)
        command.build(values | on_cpu, launcher.read("accelerate_configs/deepspeed_zero3.yaml"))
    else:
        command.build(values | on_cpu)


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem == "rlhf"], ids=str)
def test_a_reward_model_has_read_conversations_as_long_as_it_will_score(path: Path) -> None:
    values, reward_values = load_recipe(path), load_recipe(path.with_name("reward.yaml"))
    assert values["reward_model"] == reward_values["output_dir"]
    assert values["max_prompt_length"] + values["max_completion_length"] <= reward_values["max_length"]


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem == "distill"], ids=str)
def test_a_student_is_distilled_on_the_prompts_that_it_was_fine_tuned_on(path: Path) -> None:
    values, sft_values = load_recipe(path), load_recipe(path.with_name("sft.yaml"))
    assert values["datasets"] == sft_values["datasets"]
    assert values["held_out_datasets"] == sft_values["held_out_datasets"]
    assert values["model_name_or_path"] == sft_values["output_dir"]


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem == "reward"], ids=str)
def test_what_a_reward_recipe_names_is_there_and_its_policies_are_made_before_it(path: Path) -> None:
    """And of the tiny world all columns are kept that its functions read."""
    values = load_recipe(path)
    for function in [*values.get("graders", []), *filter(None, [values.get("noise_ceiling")])]:
        assert load_function(function)
    for policy in values.get("policies", []):
        assert Path(policy).parent == Path(values["output_dir"]).parent
        made_by = load_recipe(path.with_name(f"{Path(policy).name}.yaml"))
        assert made_by["output_dir"] == policy
    if path.parent.name == "tiny":
        rows = preferences("selection")[:20]
        assert {*values["columns"]} <= rows[0].keys()
        assert 0.8 < noise_ceiling([{name: row[name] for name in values["columns"]} for row in rows]) < 1


def test_the_27b_recipe_is_the_well_known_one() -> None:
    arguments = ["--config", "recipes/gemma-2-27b/sft.yaml", "--use_cpu", "true"]
    _, recipe = sft.COMMAND.parse(arguments)
    training_args, model_args, data_args = recipe.training, recipe.model, recipe.data
    assert (model_args.lora_r, model_args.lora_alpha, model_args.load_in_4bit) == (16, 32, True)
    assert model_args.lora_target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (model_args.attn_implementation, model_args.dtype) == ("eager", "bfloat16")
    assert (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps) == (1, 4)
    assert (training_args.learning_rate, training_args.max_length, training_args.logging_steps) == (2e-4, 1024, 10)
    assert training_args.activation_checkpointing and training_args.bf16
    assert data_args.datasets[0].path == "OpenAssistant/oasst_top1_2023-08-25"


@pytest.mark.parametrize("path", PIPELINES, ids=str)
def test_a_shipped_pipeline_names_recipes_stages_and_launchers_that_exist(path: Path) -> None:
    pipeline = load_pipeline(path)
    assert pipeline.run_dir == Path(f"runs/{path.parent.name}")
    for name, entry in pipeline.entries.items():
        assert (path.parent / entry.recipe).is_file() and Path(f"gemma2_post/{pipeline.stage_of(name)}.py").is_file()
        assert Path(entry.launch or pipeline.launch).is_file()
    read = {name: {other for _, other in pipeline.reads_of(name)} for name in pipeline.entries}
    if "curate" in pipeline.entries:
        assert all("curate" in read[name] for name in ("sft", "distill", "rlhf"))
        assert "curate-preferences" in read["reward"]
    read = {name: names - {"curate", "curate-preferences"} for name, names in read.items()}
    assert read["distill"] == {"sft"} and read["reward"] == {"sft", "distill"}
    assert read["rlhf"] == {"distill", "reward"} and read["warp"] == {"distill", "rlhf", "reward"}
    assert read["evaluate"] == {"sft", "distill", "reward", "rlhf", "warp"}
    assert pipeline.merged_by("warp") == "rlhf"


def test_the_worth_of_curation_is_the_only_difference_of_two_trainings() -> None:
    pipeline = load_pipeline(CURATION)
    assert list(pipeline.reads_of("sft-curated")) == [("datasets", "curate")]
    raw, curated = (load_recipe(CURATION.with_name(f"sft-{name}.yaml")) for name in ("raw", "curated"))
    assert {name for name in raw if raw[name] != curated[name]} == {"datasets", "output_dir"}
    assert raw["datasets"] == load_recipe(CURATION.with_name("curate.yaml"))["datasets"]


def test_the_full_pipeline_is_wired_as_the_reports_tell_it() -> None:
    """By names alone, because its folder is not the one that the recipes name."""
    pipeline = load_pipeline(FULL)
    read = {name: {other for _, other in pipeline.reads_of(name)} for name in pipeline.entries}
    assert read == {
        "curate": set(),
        "sft": {"curate"},
        "distill": {"sft", "curate"},
        "reward-head": set(),
        "reward-members": {"reward-head"},
        "warm": {"reward-members", "sft", "distill"},
        "rlhf": {"distill", "warm"},
        "warp": {"rlhf"},
        "evaluate": {"sft", "distill", "warm", "rlhf", "warp"},
    }
    assert pipeline.values_of("rlhf")["algorithm"] == "jbond" and pipeline.values_of("warp")["release_by"] == "gold"
    for name in pipeline.entries:
        for step in (step for _, steps in pipeline.steps() for step in steps if step.entry == name):
            models = [step.keys.get(key) for key in ("model_name_or_path", "reward_model", "init", "policies", "runs")]
            assert "runs/tiny/" not in json.dumps(models), f"{step.label} reads from another run"


def test_every_accelerate_config_is_read_by_accelerate_and_saves_what_it_shards() -> None:
    files = sorted(Path("accelerate_configs").glob("*.yaml"))
    assert [file.stem for file in files] == [
        "cpu",
        "deepspeed_zero2",
        "deepspeed_zero3",
        "deepspeed_zero3_cpu",
        "deepspeed_zero3_multi_node",
        "multi_gpu",
        "single_gpu",
    ]
    for file in files:
        config = load_config_from_file(str(file))
        deepspeed = getattr(config, "deepspeed_config", None) or {}
        assert (deepspeed.get("zero_stage") == 3) == bool(deepspeed.get("zero3_save_16bit_model"))
        assert config.mixed_precision in ("no", "bf16")
