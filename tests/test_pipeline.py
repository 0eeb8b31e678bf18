"""`gemma2-post run` as a user runs it: a stage is made once, and again when its recipe changes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier

import pytest
import yaml

from gemma2_post import cli
from gemma2_post.pipeline import check, devices, gates, lock, processes, run
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.pipeline.steps import Step
from gemma2_post.stage import contract, launcher
from gemma2_post.stage.errors import UserError, reported
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.recipe_file import parse_value
from tests.conftest import TEACHER

CPU_CONFIG = "accelerate_configs/cpu.yaml"


def gemma2_post(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma2_post.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_run_makes_a_stage_once_and_again_when_its_recipe_changes(recipe: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(tmp_path / "run"),
                "launch": "accelerate_configs/cpu.yaml",
                "stages": {"sft": {"recipe": "sft.yaml", "gates": {"held_out_nll": "<= 99"}}},
            }
        )
    )
    output = tmp_path / "run" / "sft"
    assert "error: " not in (first := gemma2_post("run", str(pipeline))).stderr and first.returncode == 0, first.stderr
    weights = (output / "model.safetensors").read_bytes()
    (log,) = (output.parent / "logs").iterdir()
    _, started, announced, *_ = lines = log.read_text().splitlines()
    assert started.startswith("--- ")
    assert announced == f"{output}: sft begins, from {tmp_path / 'sft.yaml'}, with 1 process on cpu"
    assert not [line for line in lines if "deprecated" in line or "Warning" in line or "WARNING" in line]
    assert "| <= 99 |" in (output / "README.md").read_text()

    summary = (output.parent / "summary.json").read_bytes()
    again = gemma2_post("run", str(pipeline))
    assert again.stdout.startswith("sft: up to date; held_out_nll ") and "nothing to do" in again.stdout
    assert (output.parent / "summary.json").read_bytes() == summary

    bad = gemma2_post("run", str(pipeline), "--set", "sft.learning_rate=fast")
    assert bad.returncode == 2
    assert "learning_rate is 'fast' (str); write a number" in bad.stderr
    assert (output / "model.safetensors").read_bytes() == weights

    again = gemma2_post("run", str(pipeline), "--set", "sft.learning_rate=2e-3")
    assert again.returncode == 0 and "sft: runs again, because learning_rate 0.001 -> 0.002" in again.stdout
    assert (output / "model.safetensors").read_bytes() != weights
    (replaced,) = (output.parent / "replaced").iterdir()
    assert (replaced / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_stage_gets_the_output_of_the_one_that_it_names(
    recipe: dict[str, object], distill_recipe: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe | {"model_name_or_path": TEACHER, "max_steps": 1}))
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(distill_recipe | {"model_name_or_path": "nowhere"}))
    stages = {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml", "model": "sft"}}
    pipeline = tmp_path / "pipeline.yaml"
    run_dir = tmp_path / "run"
    content = {"run_dir": str(run_dir), "launch": CPU_CONFIG, "stages": stages}
    pipeline.write_text(yaml.safe_dump(content, sort_keys=False))

    ahead = gemma2_post("prepare", str(pipeline))
    assert ahead.returncode == 0 and "sft: datasets: " in ahead.stdout and "distill: datasets: " in ahead.stdout
    prepared = sorted((tmp_path / "cache" / "gemma2_post").glob("*/"))
    first = gemma2_post("run", str(pipeline))
    assert first.returncode == 0, first.stderr
    assert sorted((tmp_path / "cache" / "gemma2_post").glob("*/")) == prepared  # the stages have mapped them
    done = json.loads((run_dir / "distill" / "stage.json").read_text())
    assert done["base_model"] == str(run_dir / "sft")
    assert done["base_digest"] == json.loads((run_dir / "sft" / "stage.json").read_text())["output"]

    backwards = {"distill": stages["distill"], "sft": stages["sft"]}
    pipeline.write_text(yaml.safe_dump(content | {"stages": backwards}, sort_keys=False))
    wrong = gemma2_post("run", str(pipeline))
    assert wrong.returncode == 2 and "distill: model names sft, which comes later; put it before" in wrong.stderr


def write_pipeline(folder: Path, stages: dict[str, dict[str, object]], **recipes: dict[str, object]) -> Path:
    """A pipeline with its stages' recipes, as far as they matter; those not given are as good as empty."""
    for entry in stages.values():
        (folder / entry["recipe"]).write_text("{}")
    for name, values in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "runs/x", "launch": CPU_CONFIG, "stages": stages}, sort_keys=False))
    return path


def steps_of(path: Path, overrides: dict[str, dict[str, object]]) -> list[tuple[str, list[Step]]]:
    return load_pipeline(path, overrides=overrides).steps()


def test_an_entry_names_the_stages_it_reads_and_how_many_policies_it_trains(tmp_path: Path) -> None:
    stages = {
        "sft": {"recipe": "sft.yaml"},
        "reward": {"recipe": "reward.yaml", "policies": ["sft"], "launch": "other.yaml"},
        "rlhf": {"recipe": "rlhf.yaml", "model": "sft", "reward_model": "reward", "num_policies": 2},
    }
    path = write_pipeline(tmp_path, stages)
    rlhf = {"model_name_or_path": "runs/x/sft", "reward_model": "runs/x/reward"}
    rlhf |= {"beta": 0.2, "output_dir": "runs/x/rlhf"}
    reward = {"policies": ["runs/x/sft"], "output_dir": "runs/x/reward"}
    x = Path("runs/x")
    assert steps_of(path, {"rlhf": {"beta": 0.2}}) == [
        (CPU_CONFIG, [Step("sft", "sft", "sft", x / "sft", tmp_path / "sft.yaml", {"output_dir": "runs/x/sft"})]),
        ("other.yaml", [Step("reward", "reward", "reward", x / "reward", tmp_path / "reward.yaml", reward)]),
        (
            CPU_CONFIG,
            [
                Step(
                    f"rlhf policy {m}",
                    "rlhf",
                    "rlhf",
                    x / "rlhf" / f"policy-{m}",
                    tmp_path / "rlhf.yaml",
                    rlhf | {"policy": m},
                )
                for m in range(2)
            ],
        ),
    ]


WARP_STAGES = {
    "sft": {"recipe": "sft.yaml"},
    "rlhf": {"recipe": "rlhf.yaml", "model": "sft", "num_policies": 2},
    "warp": {"recipe": "warp.yaml", "merges": "rlhf", "iterations": 3, "next_eta": 0.4},
}


def test_warp_trains_again_from_a_point_on_the_way_to_each_merge_and_sweeps_to_the_first_start(tmp_path: Path) -> None:
    """Three iterations of two policies, no two of which have the same seed."""
    warp = {"angles": "tensor", "eta": [0, 1], "kl_budget": 2.0}
    path = write_pipeline(tmp_path, WARP_STAGES, rlhf={"save_dtype": "float32"}, warp=warp)
    (_, (first, second)), *loop, (launch, (last,)) = steps_of(path, {"rlhf": {"beta": 1.0}})[1:]
    runs = [str(first.folder), str(second.folder)]
    start = "runs/x/sft"
    assert len(loop) == 4
    for i in (1, 2):
        (_, (merge,)), (_, policies) = loop[2 * i - 2 : 2 * i]
        assert (merge.stage, merge.config, merge.folder) == ("warp", None, Path(f"runs/x/warp-{i}"))
        assert merge.values == {
            "init": start, "policies": runs[-2:], "eta": 0.4, "save_dtype": "float32", "angles": "tensor",
            "output_dir": f"runs/x/warp-{i}",
        }  # fmt: skip
        start = str(merge.folder)
        for number, policy in enumerate(policies, start=2 * i):
            assert policy.folder == Path(f"runs/x/rlhf-{i + 1}/policy-{number}")
            assert policy.values == {
                "model_name_or_path": start, "beta": 1.0, "policy": number, "output_dir": f"runs/x/rlhf-{i + 1}",
            }  # fmt: skip
            runs.append(str(policy.folder))
    assert last.config == tmp_path / "warp.yaml" and launch == CPU_CONFIG
    assert last.values == {
        "init": "runs/x/warp-2", "towards": "runs/x/sft", "policies": runs[-2:], "runs": runs,
        "output_dir": "runs/x/warp",
    }  # fmt: skip


def test_one_iteration_sweeps_towards_its_own_start(tmp_path: Path) -> None:
    stages = WARP_STAGES | {"warp": WARP_STAGES["warp"] | {"iterations": 1}}
    path = write_pipeline(tmp_path, stages, rlhf={"save_dtype": "float32"}, warp={"eta": [0, 1]})
    ((_, (last,)),) = steps_of(path, {})[2:]
    policies = ["runs/x/rlhf/policy-0", "runs/x/rlhf/policy-1"]
    assert last.values == {
        "init": "runs/x/sft", "policies": policies, "runs": policies, "output_dir": "runs/x/warp"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rlhf", "message"),
    [
        ({"iterations": 0}, {"save_dtype": "float32"}, "iterations is 0; write 1 or more"),
        ({"merges": "sft"}, {"save_dtype": "float32"}, "merges sft, which trains no policies"),
        ({}, {}, "saves all weights in bfloat16, which rounds most of what RLHF changes away"),
    ],
)
def test_a_merge_that_cannot_be_right_is_refused(
    change: dict[str, object], rlhf: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_pipeline(tmp_path, WARP_STAGES | {"warp": WARP_STAGES["warp"] | change}, rlhf=rlhf, warp={}, sft={})
    with pytest.raises(UserError, match=message):
        load_pipeline(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("policies", ["rlhf"], "rlhf, which waits for rlhf itself"),
        ("reward_model", "reward", "reward, which comes later; put it before rlhf"),
        ("model", "sft", "sft, which is no stage of it; it has rlhf, reward"),
    ],
)
def test_an_entry_cannot_name_a_stage_that_comes_later_or_not_at_all(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    stages = {"rlhf": {"recipe": "rlhf.yaml", key: value}, "reward": {"recipe": "reward.yaml"}}
    with pytest.raises(UserError, match=f"rlhf: {key} names {message}"):
        load_pipeline(write_pipeline(tmp_path, stages))


def test_stages_that_wait_for_each_other_are_a_circle(tmp_path: Path) -> None:
    stages = {
        "sft": {"recipe": "sft.yaml", "model": "rlhf"},
        "reward": {"recipe": "reward.yaml", "policies": ["sft"]},
        "rlhf": {"recipe": "rlhf.yaml", "reward_model": "reward"},
    }
    with pytest.raises(UserError, match="sft: model names rlhf, which waits for sft itself; break the circle"):
        load_pipeline(write_pipeline(tmp_path, stages))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"sftt": {"recipe": "sft.yaml"}}, "sftt: there is no stage sftt; write stage: and one of synthesize, curate"),
        (
            WARP_STAGES | {"rlhf-2": {"recipe": "rlhf.yaml", "stage": "rlhf", "num_policies": 3}},
            "runs/x/rlhf-2/policy-2 would be the output of 2 stages",
        ),
        ({}, "stages is empty"),
        ({"sft": "sft.yaml"}, r"sft: the entry is 'sft\.yaml'; write a mapping"),
        ({"sft": None}, "sft: the entry is None; write a mapping"),
        ({"sft": 3}, "sft: the entry is 3; write a mapping"),
        ({"sft": ["sft.yaml"]}, r"sft: the entry is \['sft\.yaml'\]; write a mapping"),
        ([], "stages is empty; write a mapping"),
        (None, "stages is None; write a mapping"),
        ("sft", "stages is 'sft'; write a mapping"),
        ([{"sft": {"recipe": "sft.yaml"}}], r"stages is \[\{.*; write a mapping"),
        *(
            ({name: {"recipe": "sft.yaml", "stage": "sft"}}, "a stage cannot be called .*; use letters, digits")
            for name in (
                *("../x", "a/b", ".", "..", "", " ", "a b", "a\0b", ".hidden", "dot.", "ä", "a:b", "-x", "a\n"),
                *("logs", "replaced", "measured", "summary.json", "report.html"),
            )
        ),
        *(
            ({"rlhf": {"recipe": "rlhf.yaml", "num_policies": number}}, f"rlhf: num_policies is {number}")
            for number in (0, -1, 1.5, True)
        ),
        *(
            (
                WARP_STAGES | {"warp": {"recipe": "warp.yaml", "merges": "rlhf", "iterations": number}},
                f"warp: iterations is {number}",
            )
            for number in (0, -3, 0.5)
        ),
        ({"sft": {"recipe": "sft.yaml", "gates": ">= 1"}}, "sft: gates is '>= 1'"),
        (
            {"sft": {"recipe": "sft.yaml", "gates": {"held_out_nll": 1.5}}},
            "the gate held_out_nll is 1.5; write a comp",
        ),
        ({"sft": {"recipe": "sft.yaml", "gates": {"held_out_nll": ["< 1"]}}}, "the gate held_out_nll is .*; write a"),
        ({"sft": {"recipe": "sft.yaml", "gates": {"held_out_nll": None}}}, "the gate held_out_nll is None; write a"),
        ({"sft": {"recipe": "sft.yaml", "launch": 4}}, "sft: launch is 4"),
        ({"sft": {"recipe": ""}}, "sft: there is no recipe"),
        ({"sft": {}}, "sft: recipe is missing"),
    ],
)
def test_a_pipeline_that_makes_no_sense_is_refused(stages: object, message: str, tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, WARP_STAGES, rlhf={"save_dtype": "float32"})
    for name in ("reward", "distill"):
        (tmp_path / f"{name}.yaml").write_text("{}")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"stages": stages}, sort_keys=False))
    with pytest.raises(UserError, match=message):
        load_pipeline(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"run_dir": ""}, "run_dir is empty"),
        ({"run_dir": 5}, "run_dir is 5"),
        ({"run_dir": "README.md"}, r"run_dir: README\.md cannot be written to \(not a directory\)"),
        ({"run_dir": "README.md/run"}, r"run_dir: README\.md/run cannot be written to \(not a directory\)"),
        ({"launch": "nowhere.yaml"}, r"there is no accelerate config nowhere\.yaml"),
        ({"launch": "recipes"}, "there is no accelerate config recipes"),
        ({"launch": None}, "launch is None"),
    ],
)
def test_folders_and_launchers_that_cannot_be_used_are_refused(
    keys: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))
    with pytest.raises(UserError, match=message):
        check.check(load_pipeline(path))


@pytest.mark.parametrize("content", [b"", b'{"recipe": "pipel', b"[]", b"{}", b'{"recipe": 3}', b"\xff"])
@pytest.mark.parametrize("file", ["summary.json", "sft/stage.json", "distill/begun.json"])
def test_a_run_with_a_damaged_file_is_one_sentence_and_touches_nothing(
    file: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = stand_in_stages(monkeypatch)
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml"}})
    (tmp_path / "run" / file).parent.mkdir(parents=True)
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/run/{file}: the file is damaged"):
        cli.run(path, None, {}, tmp_path / "run")
    assert ran == [] and (tmp_path / "run" / file).read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ([broken], "expected STAGE.KEY=VALUE")
            for broken in ("", "=", "sft", "sft=1", ".x=1", "sft.=1", "sft.x", "a.b=")
        ),
        (["sft.seed=[1,"], "is not valid YAML"),
        (["sft.seed=1", "sft.seed=2"], "sft.seed is set twice"),
        (["nowhere.seed=1"], "there is no stage nowhere"),
        (["sft..seed=1"], r"unknown key \.seed"),
        (["sft.learning_rate.x=1"], r"unknown key learning_rate\.x"),
    ],
)
def test_a_broken_setting_is_one_sentence(settings: list[str], message: str, tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}})
    with pytest.raises(UserError, match=message):
        check.check(load_pipeline(path, tmp_path / "run", None, cli.parse_overrides(settings)))


def test_a_recipe_that_is_missing_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}, "reward": {"recipe": "reward.yaml"}})
    (tmp_path / "reward.yaml").unlink()
    with pytest.raises(UserError, match=r"reward: there is no recipe .*/reward\.yaml"):
        load_pipeline(path)


def test_a_recipe_that_is_not_valid_yaml_is_named_once(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}})
    (tmp_path / "sft.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/sft.yaml: seed is given twice"):
        load_pipeline(path)
    path.write_text("- sft\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: expected `key: value` lines"):
        load_pipeline(path)


def test_an_entry_may_be_a_stage_of_another_name(tmp_path: Path) -> None:
    stages = {"sft": {"recipe": "sft.yaml"}, "longer": {"recipe": "sft.yaml", "stage": "sft", "model": "sft"}}
    (_, (step,)) = load_pipeline(write_pipeline(tmp_path, stages)).steps()[1]
    assert (step.label, step.stage, step.folder) == ("longer", "sft", Path("runs/x/longer"))
    assert step.values == {"model_name_or_path": "runs/x/sft", "output_dir": "runs/x/longer"}


def test_the_folder_of_an_output_cannot_be_overridden(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}})
    with pytest.raises(UserError, match=r"--set sft\.output_dir: a stage writes to its own folder in the run's"):
        load_pipeline(path, overrides={"sft": {"output_dir": "elsewhere"}})


def test_a_seed_and_a_folder_on_the_command_line_are_those_of_every_stage(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "d.yaml", "model": "sft"}})
    elsewhere = tmp_path / "elsewhere"
    steps = load_pipeline(path, elsewhere, 3, {"distill": {"seed": 5}}).steps()
    assert [step.values for _, (step,) in steps] == [
        {"seed": 3, "output_dir": f"{elsewhere}/sft"},
        {"model_name_or_path": f"{elsewhere}/sft", "seed": 5, "output_dir": f"{elsewhere}/distill"},
    ]


# --- gates ---


def finished(folder: Path, **metrics: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"metrics": metrics}))
    return folder


@pytest.mark.parametrize(
    ("bound", "passes"),
    [(">= 0.8", True), (">0.8", False), ("<= 8e-1", True), ("< 0.8", False), (">= -1", True), ("< +.9e1", None)],
)
def test_a_gate_compares(bound: str, passes: bool | None, tmp_path: Path) -> None:
    folder = finished(tmp_path / "sft", accuracy=0.8)
    if passes is None:
        with pytest.raises(UserError, match="write a comparison in quotes"):
            gates.check_bounds({"accuracy": bound})
        return
    gates.check_bounds({"accuracy": bound})
    if passes:
        gates.check("sft", "sft", folder, {"accuracy": bound})
    else:
        with pytest.raises(gates.GateError, match=f"sft: accuracy is 0.8, and its gate wants {bound}"):
            gates.check("sft", "sft", folder, {"accuracy": bound})


def test_a_gate_on_what_is_not_measured_says_what_is(tmp_path: Path) -> None:
    folder = finished(tmp_path / "sft", accuracy=0.8, stop_rate=1.0)
    with pytest.raises(UserError, match="on acuracy, which it does not measure; it measures accuracy, stop_rate"):
        gates.check("sft", "sft", folder, {"acuracy": "> 0"})


def test_a_failed_gate_stops_before_the_next_stage_with_a_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stages = {"sft": {"recipe": "sft.yaml", "gates": {"accuracy": ">= 0.9"}}, "distill": {"recipe": "distill.yaml"}}
    path = write_pipeline(tmp_path, stages)
    ran = stand_in_stages(monkeypatch, accuracy=0.8)
    for is_again in (False, True):
        with pytest.raises(SystemExit) as exit, reported():
            cli.run(path, None, {}, tmp_path / "run")
        assert exit.value.code == 3 and ran == ["sft"]
        captured = capsys.readouterr()
        assert "error: sft: accuracy is 0.8, and its gate wants >= 0.9" in captured.err
        assert "learning_rate" in captured.err and "sft: below its gate" in captured.out
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["status"] == "below its gate" and summary["stages"]["distill"]["status"] == "not done"
        assert ("up to date" in captured.out) == is_again


def stand_in_stages(monkeypatch: pytest.MonkeyPatch, **metrics: float) -> list[str]:
    """Stages that are done at once with these metrics, and no check of recipes, for what is about the chain alone.

    Returns:
        The labels of those that ran.
    """
    ran = []

    def launch(step: Step, *_: object) -> int:
        ran.append(step.label)
        wanted = run.wanted_of(step)
        contract.begin(step.folder, wanted)
        contract.finish(step.folder, step.stage, wanted, 1.0, {}, metrics)
        return 0

    monkeypatch.setattr(processes, "launch", launch)
    monkeypatch.setattr(run, "_check", lambda *_: None)
    return ran


# --- what changed, and what that touches ---


CHAIN = {
    "sft": {"recipe": "sft.yaml"},
    "distill": {"recipe": "distill.yaml", "model": "sft"},
    "reward": {"recipe": "reward.yaml"},
    "rlhf": {"recipe": "rlhf.yaml", "model": "distill", "reward_model": "reward", "num_policies": 2},
}


def test_a_change_makes_what_follows_from_it_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = stand_in_stages(monkeypatch)
    path = write_pipeline(tmp_path, CHAIN)
    policies = ["rlhf policy 0", "rlhf policy 1"]

    def explained() -> dict[str, str]:
        capsys.readouterr()
        cli.run(path, None, {}, tmp_path / "run", explain=True)
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    assert explained() == {
        "sft": "runs for the first time",
        "distill": "runs after sft",
        "reward": "runs for the first time",
        "rlhf policy 0": "runs after distill, reward",
        "rlhf policy 1": "runs after distill, reward",
    }
    assert not (tmp_path / "run").exists()
    cli.run(path, None, {}, tmp_path / "run")
    assert [*ran[:3], *sorted(ran[3:])] == ["sft", "distill", "reward", *policies]  # the policies at the same time
    assert set(explained().values()) == {"up to date"}

    ran.clear()
    (tmp_path / "rlhf.yaml").write_text("beta: 0.2")
    assert explained()["rlhf policy 1"] == "runs again, because beta unset -> 0.2"
    cli.run(path, None, {}, tmp_path / "run")
    assert sorted(ran) == policies

    ran.clear()
    (tmp_path / "reward.yaml").write_text("max_steps: 2")
    found = explained()
    assert found["distill"] == "up to date" and found["rlhf policy 0"] == "runs after reward"
    cli.run(path, "reward", {}, tmp_path / "run")
    assert ran == ["reward"]


def test_a_summary_says_what_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stage, by model and by eta; of policies, each and the mean."""
    stages = CHAIN | {
        "warp": {"recipe": "warp.yaml", "merges": "rlhf"},
        "evaluate": {"recipe": "evaluate.yaml", "models": ["sft", "rlhf"]},
    }
    path = write_pipeline(tmp_path, stages, rlhf={"save_dtype": "float32"})
    stand_in_stages(monkeypatch, reward=0.5)
    folder = tmp_path / "run"
    points = [
        {"series": rule, "position": eta, "reward": eta, "kl_to_init": 2 * eta} for rule in "ab" for eta in (0, 1)
    ]
    written = {
        "warp": ("front.json", {"released": points[0], "points": points}),
        "evaluate": (
            "models.json",
            {
                name: {"gold": gold, "kl_to_init": 0.0, "stop_rate": 1.0}
                for name, gold in {"sft": 1.0, "rlhf/policy-0": 1.2, "rlhf/policy-1": 1.4}.items()
            },
        ),
    }
    finish = processes.launch

    def launch(step: Step, *_: object) -> int:
        status = finish(step)
        if step.stage in written:
            name, content = written[step.stage]
            (step.folder / name).write_text(json.dumps(content))
        return status

    monkeypatch.setattr(processes, "launch", launch)
    cli.run(path, None, {}, folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["run"] == "run" and summary["status"] == "done" and summary["wall_seconds"] >= 0
    done = {"status": "done", "wall_seconds": 1.0, "metrics": {"reward": 0.5}}
    assert summary["stages"]["sft"] == done | {"output_dir": str(folder / "sft")}
    assert summary["stages"]["rlhf/policy-1"] == done | {"output_dir": str(folder / "rlhf" / "policy-1")}
    assert summary["stages"]["rlhf"] == done | {"output_dir": str(folder / "rlhf")}
    assert summary["models"]["sft"]["gold"] == 1.0 and summary["models"]["rlhf"]["gold"] == pytest.approx(1.3)
    assert list(summary["models"]) == ["sft", "rlhf/policy-0", "rlhf/policy-1", "rlhf"]
    assert summary["liti"] == [{"eta": 0, "kl_to_init": 0, "reward": 0}, {"eta": 1, "kl_to_init": 2, "reward": 1}]


def test_a_summary_has_no_measures_of_models_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `--until sft` with another recipe, what was measured of the old one is not shown beside the new."""
    stages = {"sft": {"recipe": "sft.yaml"}, "evaluate": {"recipe": "evaluate.yaml", "models": ["sft"]}}
    path = write_pipeline(tmp_path, stages)
    measured = {"sft": {"gold": 1.0, "kl_to_init": 0.0, "stop_rate": 1.0}}
    stand_in_stages(monkeypatch)
    finish = processes.launch

    def launch(step: Step, *_: object) -> int:
        (step.folder).mkdir(parents=True, exist_ok=True)
        if step.stage == "sft":
            (step.folder / "model.safetensors").write_text(str(step.values))
        else:
            (step.folder / "models.json").write_text(json.dumps(measured))
        return finish(step)

    monkeypatch.setattr(processes, "launch", launch)
    for steps, until, expected in [(1, None, measured), (2, "sft", {}), (2, None, measured)]:
        cli.run(path, until, {"sft": {"max_steps": steps}}, tmp_path / "run")
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["models"] == expected


# --- failing, and being interrupted ---


@pytest.mark.slow
def test_a_stage_that_fails_says_how_it_ended_and_where_more_is(recipe: dict[str, object], tmp_path: Path) -> None:
    """A mistake that only the stage can find is its own sentence, with status 2; anything else the end of its log."""
    (tmp_path / "grader.py").write_text(
        "class Crash(BaseException): ...\n\ndef crash(completions, **_):\n    raise Crash('the grader has crashed')\n"
    )
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe | {"graders": ["grader:crash"]}))
    (tmp_path / "pipeline.yaml").write_text(
        yaml.safe_dump(
            {"run_dir": str(tmp_path / "run"), "launch": CPU_CONFIG, "stages": {"sft": {"recipe": "sft.yaml"}}}
        )
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    command = [sys.executable, "-m", "gemma2_post.cli", "run", str(tmp_path / "pipeline.yaml")]
    crashed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert crashed.returncode == 4 and "the grader has crashed" in crashed.stderr
    assert f"error: sft failed with status 1; {tmp_path}/run/logs/sft.log ends with" in crashed.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    grader = tmp_path / "grader.py"
    grader.write_text(grader.read_text().replace("BaseException", "Exception"))
    mistaken = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert mistaken.returncode == 2
    (line,) = [line for line in mistaken.stderr.splitlines() if line.startswith("error: ")]
    assert f"grader:crash: calling it raised Crash: the grader has crashed ({grader}, line 4)" in line
    assert f"(log: {tmp_path}/run/logs/sft.log)" in line


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_an_interrupted_run_ends_its_stages_and_goes_on_later(which: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import subprocess, sys; from pathlib import Path; from gemma2_post import cli\n"
        "from gemma2_post.stage.errors import reported\n"
        "from gemma2_post.pipeline import processes, run\n"
        "run._check = lambda *_: None\n"
        "def launch(step, config, launcher, environment, run_dir, log):\n"
        "    step.folder.mkdir(parents=True)\n"
        "    (step.folder / 'begun.json').write_text('{}')\n"
        "    variables = {processes.RUN_DIR: str(run_dir.resolve())}\n"
        "    return subprocess.run(['sleep', '60'], env=variables, start_new_session=True).returncode\n"
        "processes.launch = launch\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "with reported(): cli.run(folder / 'pipeline.yaml', None, {}, folder / 'run')"
    )
    write_pipeline(tmp_path, {"rlhf": {"recipe": "rlhf.yaml", "num_policies": 3}})
    chain = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    while not processes.of_run(tmp_path / "run"):
        time.sleep(0.05)
    chain.send_signal(which)
    printed, _ = chain.communicate(timeout=90)
    assert chain.returncode == 130 and "interrupted; the same command resumes" in printed
    assert not processes.of_run(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "run" / "rlhf" / "policy-2").exists()  # on two cores, it had not begun, and does not now


def test_progress_is_what_the_newest_bar_says(tmp_path: Path) -> None:
    log = tmp_path / "sft.log"
    assert processes.progress(log) is None
    old = "\n--- 2026-01-01 earlier\r 50%|#####     | 5/10 [00:01<00:01,  4.0it/s]"
    log.write_text(f"{old}\n--- 2026-01-02 now\nsomething\n")
    assert processes.progress(log) is None
    with open(log, "a") as file:
        file.write("\r  0%|          | 0/188 [00:00<?, ?it/s]")
        assert file.flush() is None and processes.progress(log) == "0/188"
        file.write("\r 37%|███▋      | 70/188 [00:20<00:27,  4.37it/s]")
        assert file.flush() is None and processes.progress(log) == "70/188, 00:27 left"
        file.write("\nanswers:  25%|██▌       | 1/4 [00:02<00:06,  2.1s/model]")
        assert file.flush() is None and processes.progress(log) == "answers 1/4, 00:06 left"
        file.write("\rreading and tokenizing my.data:rows:  25%|██▌       | 5/20 [00:02<00:06,  2.1 rows/s]")
        assert file.flush() is None
        assert processes.progress(log) == "reading and tokenizing my.data:rows 5/20, 00:06 left"


# --- one at a time ---


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """Also when it was killed."""
    program = (
        "import time; from pathlib import Path; from gemma2_post.pipeline import lock\n"
        f"with lock.held(Path({str(tmp_path)!r})):\n"
        "    print(flush=True)\n"
        "    time.sleep(60)"
    )
    first = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    first.stdout.readline()
    with pytest.raises(UserError, match=f"is in use by process {first.pid} on .*; wait for it"), lock.held(tmp_path):
        pytest.fail("the folder was taken")
    first.kill()
    first.wait()
    with lock.held(tmp_path):
        pass


def test_what_a_killed_run_has_left_running_is_ended(tmp_path: Path) -> None:
    """Also a process that the stage itself has started, in a session of its own; and no one else's."""
    program = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    ours = os.environ | {processes.RUN_DIR: str(tmp_path)}
    stage = subprocess.Popen([sys.executable, "-c", program], env=ours)
    other = subprocess.Popen(["sleep", "60"], env=os.environ | {processes.RUN_DIR: f"{tmp_path}-2"})
    while len(processes.of_run(tmp_path)) < 2:
        time.sleep(0.01)
    assert processes.end_all(tmp_path) and stage.wait() == -signal.SIGTERM
    assert not processes.of_run(tmp_path) and not processes.end_all(tmp_path)
    assert other.poll() is None
    other.kill()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    match = r"file/run cannot be written to \(not a directory\)"
    with pytest.raises(UserError, match=match), lock.held(tmp_path / "file" / "run"):
        pytest.fail("the folder was taken")


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"process 1 on"])
def test_a_lock_file_that_a_crash_has_damaged_locks_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / lock.FILE).write_bytes(content)
    with lock.held(tmp_path):
        assert (tmp_path / lock.FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_the_folder_of_another_pipeline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_stages(monkeypatch)
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}})
    cli.run(path, None, {}, tmp_path / "run")
    (tmp_path / "other").mkdir()
    other = write_pipeline(tmp_path / "other", {"sft": {"recipe": "sft.yaml"}})
    with pytest.raises(UserError, match=f"{tmp_path}/run is the folder of {path}; give another --run_dir"):
        cli.run(other, None, {}, tmp_path / "run")


def test_files_that_no_stage_has_made_are_found_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = stand_in_stages(monkeypatch)
    path = write_pipeline(tmp_path, {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml"}})
    (tmp_path / "run" / "distill").mkdir(parents=True)
    (tmp_path / "run" / "distill" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="distill: holds files that no stage has made"):
        cli.run(path, None, {}, tmp_path / "run")
    assert ran == []


# --- devices ---


CPU = {"use_cpu": True, "num_processes": 1}


@pytest.mark.parametrize(
    ("config", "gpus", "cores", "num_runs", "expected"),
    [
        (CPU, "", 2, 2, [{"OMP_NUM_THREADS": "1"}] * 2),
        (CPU, "", 8, 3, [{"OMP_NUM_THREADS": "2"}] * 3),
        (CPU, "", 2, 1, [{}]),
        (CPU, "", 1, 2, [{}]),
        (CPU | {"num_processes": 2}, "", 4, 2, [{}]),
        ({"num_processes": 1}, "0,1", 2, 2, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        ({"num_processes": 1}, "6", 2, 2, [{}]),
        ({"num_processes": 8}, "0,1,2,3,4,5,6,7", 2, 2, [{}]),
        ({"num_processes": 1, "num_machines": 2}, "0,1", 2, 2, [{}]),
        ({"num_processes": 1}, "", 2, 2, [{}]),
    ],
)
def test_runs_go_side_by_side_on_devices_of_their_own(
    config: dict[str, object],
    gpus: str,
    cores: int,
    num_runs: int,
    expected: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert devices.places(Launcher(**config), num_runs) == expected


def test_runs_whose_launcher_names_its_gpus_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would set CUDA_VISIBLE_DEVICES to these in each of them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    (tmp_path / "gpus.yaml").write_text("{num_processes: 1, gpu_ids: '2'}")
    (tmp_path / "all.yaml").write_text("{num_processes: 1, gpu_ids: all, deepspeed_config: null}")
    assert devices.places(launcher.read(tmp_path / "gpus.yaml"), 4) == [{}]
    (tmp_path / "null.yaml").write_text("{num_processes: 1, gpu_ids: null}")
    for name in ("all.yaml", "null.yaml"):
        assert len(devices.places(launcher.read(tmp_path / name), 4)) == 4
    (tmp_path / "text.yaml").write_text("{num_processes: '2'}")
    with pytest.raises(UserError, match=r"text.yaml: num_processes is '2'; write a whole number"):
        launcher.read(tmp_path / "text.yaml")


@pytest.mark.parametrize(
    "text", ["runs/\U0001f680/x", "a \\\\ud83d\\ude80 as text", "\U0001d518\U0001f680", "\x85 \x7f é"]
)
def test_a_stage_gets_every_character(text: str) -> None:
    (argument,) = processes.assignments({"key": [text]})
    assert parse_value(argument.removeprefix("--key=")) == [text]


def test_a_run_dir_that_no_recipe_knows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new sft would be read by nobody, and distill would begin from the old one."""
    monkeypatch.chdir(tmp_path)
    stages = {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml"}}
    path = write_pipeline(tmp_path, stages, distill={"model_name_or_path": "runs/old/sft"})
    load_pipeline(path)
    Path("runs/old/sft").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run_dir is runs/x, and .*distill.yaml reads runs/old/sft; leave run_dir as"):
        load_pipeline(path)


def test_a_model_that_the_command_line_sets_moves_with_the_run_and_comes_first(tmp_path: Path) -> None:
    stages = {
        "sft": {"recipe": "sft.yaml"}, "other": {"recipe": "sft.yaml", "stage": "sft"},
        "distill": {"recipe": "distill.yaml", "model": "sft"},
    }  # fmt: skip
    overrides = {"distill": {"model_name_or_path": "runs/x/other"}}
    pipeline = load_pipeline(write_pipeline(tmp_path, stages), run_dir=Path("runs/y"), overrides=overrides)
    *_, (_, (step,)) = pipeline.steps()
    assert step.keys["model_name_or_path"] == "runs/y/other"


def test_runs_of_several_processes_side_by_side_meet_at_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    first, second = devices.places(Launcher(num_processes=2), 5)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in (first, second)] == ["4,5", "6,7"]
    assert first[devices.PORT] != second[devices.PORT]


def test_steps_of_a_round_run_at_the_same_time_each_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other before it ends, so one after the other would never end."""
    both = Barrier(2, timeout=20)
    seen = []
    stand_in_stages(monkeypatch)
    finish = processes.launch

    def launch(step: Step, config: str, launcher: Launcher, environment: dict[str, str], *further: object) -> int:
        both.wait()
        seen.append(environment["OMP_NUM_THREADS"])
        return finish(step)

    monkeypatch.setattr(processes, "launch", launch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    path = write_pipeline(tmp_path, {"rlhf": {"recipe": "rlhf.yaml", "num_policies": 2}})
    cli.run(path, None, {}, tmp_path / "run")
    assert seen == ["1", "1"]


@pytest.mark.parametrize("load", [[], ["--load", "8bit"], ["--load", "4bit"]], ids=["fp32", "8bit", "4bit"])
def test_chat_answers_a_prompt(
    load: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", "gemma2_post/tiny/models/teacher", "--prompt", "What is 3 plus 5?", *load]
    monkeypatch.setattr(sys, "argv", ["gemma2-post", *arguments])
    cli.main()
    assert "8" in capsys.readouterr().out


@pytest.mark.slow
def test_chat_remembers_the_conversation_and_ends_with_the_input() -> None:
    lines = "My name is Anna.\nWhat is my name?\n\nWhat is the capital of Japan?\n"
    command = [sys.executable, "-m", "gemma2_post.cli", "chat", "gemma2_post/tiny/models/teacher"]
    finished = subprocess.run(command, input=lines, capture_output=True, text=True)
    assert finished.returncode == 0
    assert (
        finished.stdout.count("Anna") == 2 and "(new conversation)" in finished.stdout and "Tokyo" in finished.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere.yaml"), "error: nowhere.yaml: there is no such recipe"),
        (("run", "recipes/tiny/pipeline.yaml", "--until", "rlfh"), "there is no stage rlfh; it has sft"),
        (("run", "recipes/tiny/pipeline.yaml", "--set", "sft=1"), "expected STAGE.KEY=VALUE"),
        (("chat", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gemma2-post", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
