"""Members of an entry, which differ in the keys that they override: a stage that trains is run once for each."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gemma2_post.pipeline import check, processes, summary
from gemma2_post.pipeline.decisions import forecast
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.pipeline.steps import DEFAULT_SEED, Step
from gemma2_post.report import report as reports
from gemma2_post.stage.errors import UserError
from tests.conftest import TEACHER

CPU_CONFIG = "accelerate_configs/cpu.yaml"


def write(folder: Path, stages: dict[str, object], **recipes: dict[str, object]) -> Path:
    """A pipeline with the recipes of its entries, empty if not given."""
    for name, entry in stages.items():
        (folder / entry["recipe"]).write_text(yaml.safe_dump(recipes.get(name, {})))
    path = folder / "pipeline.yaml"
    content = {"run_dir": str(folder / "run"), "launch": CPU_CONFIG, "stages": stages}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def members(path: Path, entry: str, **how: object) -> list[Step]:
    return next(steps for _, steps in load_pipeline(path, **how).steps() if steps[0].entry == entry)


@pytest.mark.parametrize("key", ["policies", "members"])
def test_policies_state_what_differs(key: str, tmp_path: Path) -> None:
    """A seed that is named is the one that is trained with; others are as far apart as those of a count."""
    overrides = [{"seed": 0}, {"seed": 1, "learning_rate": 3e-4}, {"beta": 0.02, "anchor_mu": 0.05}]
    stages = {"rlhf": {"recipe": "rlhf.yaml", key: overrides}}
    steps = members(write(tmp_path, stages, rlhf={"seed": 7, "beta": 0.1}), "rlhf")
    run = tmp_path / "run" / "rlhf"
    assert [step.label for step in steps] == [f"rlhf policy {i}" for i in range(3)]
    assert [step.folder for step in steps] == [run / f"policy-{i}" for i in range(3)]
    assert [step.values for step in steps] == [
        {"training_seed": 0, "policy": 0, "output_dir": str(run)},
        {"training_seed": 1, "learning_rate": 3e-4, "policy": 1, "output_dir": str(run)},
        {"beta": 0.02, "anchor_mu": 0.05, "policy": 2, "output_dir": str(run)},
    ]
    assert all(step.keys["seed"] == 7 for step in steps)  # all hold out the same rows


@pytest.mark.parametrize("stage", ["sft", "distill", "reward"])
def test_members_of_the_other_stages_have_folders_and_seeds_of_their_own(stage: str, tmp_path: Path) -> None:
    overrides = [{}, {"learning_rate": 1e-4}, {"seed": 0}]
    path = write(tmp_path, {stage: {"recipe": "x.yaml", "members": overrides}}, **{stage: {"seed": 3}})
    run = tmp_path / "run" / stage
    steps = members(path, stage)
    assert [(step.label, step.folder) for step in steps] == [
        (f"{stage} member {i}", run / f"member-{i}") for i in range(3)
    ]
    assert [step.values for step in steps] == [
        {"training_seed": 3, "output_dir": str(run / "member-0")},
        {"training_seed": 1003, "learning_rate": 1e-4, "output_dir": str(run / "member-1")},
        {"training_seed": 0, "output_dir": str(run / "member-2")},
    ]
    assert [step.values["training_seed"] for step in members(path, stage, seed=9)] == [9, 1009, 0]
    overrides = {stage: {"learning_rate": 5.0}}
    assert [step.keys["learning_rate"] for step in members(path, stage, overrides=overrides)] == [5.0, 1e-4, 5.0]


def test_a_count_is_as_many_members_that_override_nothing(tmp_path: Path) -> None:
    steps = {
        key: members(write(tmp_path, {"rlhf": {"recipe": "rlhf.yaml", key: 2}}), "rlhf")
        for key in ("num_policies", "policies", "members")
    }
    assert steps["num_policies"] == steps["policies"] == steps["members"]
    run = str(tmp_path / "run" / "rlhf")
    assert [step.values for step in steps["policies"]] == [{"policy": i, "output_dir": run} for i in range(2)]
    sft = members(write(tmp_path, {"sft": {"recipe": "sft.yaml", "members": 2}}), "sft")
    assert [step.values["training_seed"] for step in sft] == [DEFAULT_SEED, DEFAULT_SEED + 1000]


def test_the_default_seed_is_that_of_transformers(recipe: dict[str, object]) -> None:
    from gemma2_post import sft

    assert sft.COMMAND.build(recipe)[1].training.seed == DEFAULT_SEED


def test_members_begin_from_checkpoints_of_their_own(tmp_path: Path) -> None:
    """A stage, a member of one, or a path as in the recipes, which moves with the run."""
    run = str(tmp_path / "run")
    starts = [
        {"model": "sft-1"},
        {"model": "sft/member-1"},
        {"model_name_or_path": f"{run}/sft/member-0"},
        {"model": "sft-1", "reward_model": "reward/member-1"},
        {"model_name_or_path": TEACHER},
    ]
    stages = {
        "sft-1": {"recipe": "sft.yaml", "stage": "sft"},
        "sft": {"recipe": "sft.yaml", "members": 2},
        "reward": {"recipe": "reward.yaml", "members": 2},
        "rlhf": {"recipe": "rlhf.yaml", "policies": starts},
        "evaluate": {"recipe": "evaluate.yaml", "models": ["sft/member-1", "rlhf"]},
    }
    path = write(tmp_path, stages)
    pipeline = load_pipeline(path, run_dir=Path("elsewhere"))
    steps = next(steps for _, steps in pipeline.steps() if steps[0].entry == "rlhf")
    found = ["elsewhere/sft-1", "elsewhere/sft/member-1", "elsewhere/sft/member-0", "elsewhere/sft-1", TEACHER]
    assert [step.values["model_name_or_path"] for step in steps] == found
    assert steps[3].values["reward_model"] == "elsewhere/reward/member-1"
    assert ("policy 1: model", "sft") in list(pipeline.reads_of("rlhf"))
    models = pipeline.references_of("evaluate")["models"]
    assert models == ["elsewhere/sft/member-1", *(f"elsewhere/rlhf/policy-{i}" for i in range(5))]


def test_members_read_data_of_their_own(tmp_path: Path) -> None:
    """A stage, or its folder as in the recipes, which moves with the run; and what is null is left out."""
    run = str(tmp_path / "run")
    sources = [{"path": f"{run}/curate"}, {"path": "other.jsonl", "weight": 2}]
    overrides = [{"datasets": sources}, {"datasets": "curate"}, {"score_head": None}]
    stages = {
        "curate": {"recipe": "curate.yaml"},
        "head": {"recipe": "head.yaml", "stage": "reward"},
        "reward": {"recipe": "reward.yaml", "members": overrides, "score_head": "head"},
    }
    pipeline = load_pipeline(write(tmp_path, stages), run_dir=Path("elsewhere"))
    steps = next(steps for _, steps in pipeline.steps() if steps[0].entry == "reward")
    assert steps[0].values["datasets"] == [{"path": "elsewhere/curate"}, {"path": "other.jsonl", "weight": 2}]
    assert steps[1].values["datasets"] == [{"path": "elsewhere/curate"}]
    assert [step.keys["score_head"] for step in steps] == ["elsewhere/head", "elsewhere/head", None]
    assert list(pipeline.reads_of("reward")) == [
        ("score_head", "head"), ("member 0: datasets", "curate"), ("member 1: datasets", "curate"),
    ]  # fmt: skip
    late = {"reward": {"recipe": "reward.yaml", "members": [{"datasets": sources}, {}]}, "curate": stages["curate"]}
    with pytest.raises(UserError, match="reward: member 0: datasets names curate, which comes later"):
        load_pipeline(write(tmp_path, late))


def test_a_plan_knows_what_is_read_of_a_stage_below_its_folder(tmp_path: Path) -> None:
    stages = {
        "synthesize": {"recipe": "synthesize.yaml"},
        "warp": {"recipe": "warp.yaml"},
        "reward": {"recipe": "reward.yaml", "datasets": "synthesize/pairs"},
        "sft": {"recipe": "sft.yaml", "members": [{"model": "warp/eta-0.3"}, {}]},
    }
    reads = {step.label: labels for step, _, labels in forecast(load_pipeline(write(tmp_path, stages)), None, {})}
    assert (reads["reward"], reads["sft member 0"], reads["sft member 1"]) == (["synthesize"], ["warp"], [])


def test_a_folder_of_members_outside_of_the_run_is_its_members(tmp_path: Path) -> None:
    """As the stage reads it, so that what it has made is what the pipeline wants."""
    for number in range(2):
        (tmp_path / f"other/rlhf/policy-{number}").mkdir(parents=True)
    stages = {"evaluate": {"recipe": "evaluate.yaml"}}
    path = write(tmp_path, stages, evaluate={"models": [str(tmp_path / "other/rlhf")]})
    (((_, (step,)),)) = load_pipeline(path).steps()
    assert step.keys["models"] == [str(tmp_path / f"other/rlhf/policy-{number}") for number in range(2)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"policies": [{"seed": 1}, {"seed": 1}]}, r"rlhf policy 0 and rlhf policy 1 are the same \(seed 1\); change"),
        ({"policies": [{}, {"seed": 5}, {"seed": 1005}]}, r"policy 1\b.*|policy 0 and rlhf policy 1 are the same"),
        ({"policies": [{"beta": 0.5, "seed": 1}, {"seed": 1}]}, r"policy 0 and rlhf policy 1 are the same"),
        ({"members": []}, "rlhf: members is empty; write one or more"),
        ({"policies": 0}, "rlhf: members is 0; write 1 or more"),
        ({"policies": [{}, 3]}, "rlhf: policy 1 is 3; write a mapping of keys"),
        ({"policies": ["sft", {"seed": 1}]}, "rlhf: policy 0 is 'sft'; write a mapping of keys"),
        ({"policies": 2, "num_policies": 2}, "rlhf: policies and num_policies say the same; keep one"),
        ({"members": [{}, {}], "policies": 2}, "rlhf: members and policies say the same; keep one"),
        ({"policies": [{}, {"output_dir": "x"}]}, "rlhf: policy 1: output_dir is set by the pipeline; remove it"),
        ({"policies": [{"policy": 3}]}, "rlhf: policy 0: policy is set by the pipeline; remove it"),
        ({"policies": [{"training_seed": 3}]}, "rlhf: policy 0: training_seed is set by the pipeline; write seed"),
        ({"policies": [{"seed": "x"}]}, "rlhf: policy 0: seed is 'x'; write a whole number, 0 or more"),
        ({"policies": [{"seed": -1}]}, "rlhf: policy 0: seed is -1; write a whole number"),
        ({"policies": [{}, {"model": "sft-9"}]}, "rlhf: policy 1: model names sft-9, which is no stage of it"),
        ({"policies": [{"reward_model": "reward"}]}, "rlhf: policy 0: reward_model names reward, which comes later"),
        (
            {"policies": [{"model": "sft", "model_name_or_path": "x"}]},
            "policy 0: model and model_name_or_path say the",
        ),
        (
            {"policies": [{"gradient_checkpointing": True, "activation_checkpointing": True}]},
            "policy 0: gradient_checkpointing is the old name of activation_checkpointing, and both are given",
        ),
    ],
)
def test_members_that_cannot_be_right_are_refused(entry: dict[str, object], message: str, tmp_path: Path) -> None:
    stages = {"sft": {"recipe": "sft.yaml"}, "rlhf": {"recipe": "rlhf.yaml"} | entry, "reward": {"recipe": "r.yaml"}}
    path = write(tmp_path, stages, rlhf={"seed": 5, "beta": 0.5})
    with pytest.raises(UserError, match=message):
        load_pipeline(path)


@pytest.mark.parametrize("stage", ["evaluate", "warp", "synthesize"])
def test_only_stages_that_train_have_members(stage: str, tmp_path: Path) -> None:
    path = write(tmp_path, {stage: {"recipe": "x.yaml", "members": 2}})
    with pytest.raises(UserError, match=f"{stage}: members is for a stage that trains, and {stage} does not; remove"):
        load_pipeline(path)


def test_a_bad_key_or_value_is_said_with_its_member(recipe: dict[str, object], tmp_path: Path) -> None:
    for overrides, message in (
        ({"lerning_rate": 1e-3}, r"unknown key lerning_rate \(value 0\.001\); did you mean learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"per_device_train_batch_size": 3}, "global_batch_size 8 does not divide"),
        (
            {"model_name_or_path": "no/such/folder"},
            "model_name_or_path is no/such/folder, which no earlier stage makes",
        ),
    ):
        path = write(tmp_path, {"sft": {"recipe": "sft.yaml", "members": [{}, overrides]}}, sft=recipe)
        with pytest.raises(UserError, match=rf"sft\.yaml: sft member 1: {message}"):
            check.check(load_pipeline(path))


def test_a_warp_loop_trains_its_members_with_their_keys_in_each_iteration(tmp_path: Path) -> None:
    stages = {
        "rlhf": {"recipe": "rlhf.yaml", "policies": [{"seed": 3}, {"beta": 0.5}]},
        "warp": {"recipe": "warp.yaml", "merges": "rlhf", "iterations": 2},
    }
    rlhf = {"save_dtype": "float32", "model_name_or_path": TEACHER}
    steps = [steps for _, steps in load_pipeline(write(tmp_path, stages, rlhf=rlhf)).steps()]
    first, _, second, _ = steps
    assert [step.values.get("training_seed") for step in (*first, *second)] == [3, None, 2003, None]
    assert [step.values.get("beta") for step in (*first, *second)] == [None, 0.5, None, 0.5]
    assert [step.values["policy"] for step in second] == [2, 3]

    stages["rlhf"]["policies"][1] = {"model_name_or_path": TEACHER}
    with pytest.raises(UserError, match="warp: rlhf policy 1 begins from a model of its own, and a merge with merges"):
        load_pipeline(write(tmp_path, stages, rlhf=rlhf))
    stages["rlhf"]["policies"][1] = {"save_dtype": "bfloat16"}
    with pytest.raises(UserError, match="whose recipe saves all weights in bfloat16"):
        load_pipeline(write(tmp_path, stages, rlhf=rlhf))


def test_a_merge_in_a_loop_reads_what_its_entry_and_its_recipe_name(tmp_path: Path) -> None:
    """Its judge and its data are in the folder of this run, as those of any other entry."""
    stages = {
        "curate": {"recipe": "curate.yaml"},
        "sft": {"recipe": "sft.yaml"},
        "reward": {"recipe": "reward.yaml"},
        "rlhf": {"recipe": "rlhf.yaml", "policies": 2, "reward_model": "reward"},
        "warp": {"recipe": "warp.yaml", "merges": "rlhf", "iterations": 1, "judge": "sft"},
    }
    rlhf = {"save_dtype": "float32", "model_name_or_path": TEACHER}
    named = tmp_path / "run"
    warp = {"datasets": [{"path": str(named / "curate")}], "reward_model": str(named / "other")}
    path, moved = write(tmp_path, stages, rlhf=rlhf, warp=warp), tmp_path / "moved"
    (merge,) = members(path, "warp", run_dir=moved)
    assert merge.values["judge"] == str(moved / "sft")
    assert merge.values["datasets"] == [{"path": str(moved / "curate")}]
    assert merge.values["reward_model"] == str(moved / "reward")  # that of the policies

    stages["warp"]["reward_model"] = "sft"
    (merge,) = members(write(tmp_path, stages, rlhf=rlhf, warp=warp), "warp")
    assert merge.values["reward_model"] == str(named / "sft")  # the check says that it is not that of the policies
    stages["warp"]["policies"] = ["sft"]
    with pytest.raises(UserError, match="warp: policies is set by merges or iterations; remove it"):
        load_pipeline(write(tmp_path, stages, rlhf=rlhf, warp=warp))


def run(step: Step) -> None:
    """Runs a step in this process, as the pipeline would start it."""
    given = ["--config", str(step.config), *processes.assignments(step.values)]
    stage, built = step.command.parse(given)
    step.command.run(stage, built)


@pytest.mark.slow
def test_members_of_every_training_stage_and_their_soup(
    recipe: dict[str, object],
    distill_recipe: dict[str, object],
    reward_recipe: dict[str, object],
    rlhf_recipe: dict[str, object],
    tmp_path: Path,
) -> None:
    """A changed or added member is to be trained, the others are kept; a soup is the mean of its members' weights."""
    base = recipe["model_name_or_path"]
    one_step = {"max_steps": 1, "num_samples": 2}
    stages = {
        "sft": {"recipe": "sft.yaml", "members": [{"seed": 0}, {"seed": 0, "learning_rate": 1e-2}]},
        "soup": {"recipe": "soup.yaml", "stage": "warp", "policies": ["sft"]},
        "distill": {"recipe": "distill.yaml", "members": [{}, {"beta": 0.5}]},
        "reward": {"recipe": "reward.yaml", "members": [{"model": "sft/member-0"}, {"model": "sft/member-1"}]},
        "rlhf": {"recipe": "rlhf.yaml", "policies": [{"anchor_mu": 0.5}, {"seed": 9, "beta": 0.2}]},
    }
    path = write(
        tmp_path,
        stages,
        sft=recipe | {"max_steps": 1},
        soup={"init": base, "interpolation": "linear", "eta": 1.0, "save_dtype": "float32"},
        distill=distill_recipe | one_step,
        reward=reward_recipe | one_step,
        rlhf=rlhf_recipe | one_step,
    )
    pipeline = load_pipeline(path)
    check.check(pipeline)
    for _, steps in pipeline.steps():
        for step in steps:
            run(step)
    folder = tmp_path / "run"
    weights = [load_file(folder / "sft" / f"member-{i}" / "model.safetensors") for i in range(2)]
    soup = load_file(folder / "soup" / "model.safetensors")
    assert any((weights[0][name] != weights[1][name]).any() for name in soup)
    for name in soup:
        torch.testing.assert_close(soup[name], (weights[0][name] + weights[1][name]) / 2, rtol=1e-6, atol=1e-7)
    done = {str(file.parent.relative_to(folder)): json.loads(file.read_text()) for file in folder.rglob("stage.json")}
    recipes = {name: each["fingerprint"]["recipe"] for name, each in done.items()}
    assert recipes["distill/member-1"]["beta"] == 0.5 and "beta" not in recipes["distill/member-0"]
    assert recipes["distill/member-1"]["training_seed"] == recipes["distill/member-0"]["training_seed"] + 1000
    assert recipes["rlhf/policy-1"]["training_seed"] == 9 and recipes["rlhf/policy-0"]["anchor_mu"] == 0.5
    for i in range(2):
        assert done[f"reward/member-{i}"]["base_digest"] == done[f"sft/member-{i}"]["output"]
    summary.write(pipeline, "done", 1.0)
    assert summary.read(folder)["stages"]["rlhf/policy-1"]["overrides"] == {"seed": 9, "beta": 0.2}
    reports.write(folder)
    assert "rlhf/policy-1 (seed 9, beta 0.2)" in (folder / "report.md").read_text()

    stages["rlhf"]["policies"][0]["anchor_mu"] = 0.4
    stages["rlhf"]["policies"].append({"seed": 3})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"stages": stages}, sort_keys=False))
    found = {step.label: decision for step, decision, _ in forecast(load_pipeline(path), None, {})}
    made = {label: decision.why for label, decision in found.items() if decision.action.makes}
    assert made == {"rlhf policy 0": "runs again, because anchor_mu 0.5 -> 0.4", "rlhf policy 2": ""}


@pytest.mark.slow
def test_members_share_the_held_out_rows_and_not_the_order_of_the_others(
    recipe: dict[str, object], run_sft: Callable[[dict[str, object]], Path], tmp_path: Path
) -> None:
    """Without held_out_datasets, the recipe's seed says which rows are held out, whatever the member's seed."""
    recipe = {key: value for key, value in recipe.items() if key != "held_out_datasets"} | {"num_samples": 0}
    measured = []
    for seed in (None, 1, 2):
        more = {} if seed is None else {"training_seed": seed}
        output = run_sft(recipe | {"output_dir": str(tmp_path / f"out-{seed}"), "seed": 0} | more)
        measured.append(json.loads((output / "metrics.json").read_text()))
    assert len({each["held_out_nll_before"] for each in measured}) == 1
    assert len({each["held_out_nll"] for each in measured}) == 3
