"""`gemma2-post run` as a user runs it: a stage is made once, and again when its recipe changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gemma2_post.core.errors import UserError
from gemma2_post.pipeline import run
from tests.conftest import TEACHER


def gemma2_post(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma2_post.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_run_makes_a_stage_once_and_again_when_its_recipe_changes(recipe: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(tmp_path / "run"),
                "launch": "accelerate_configs/cpu.yaml",
                "stages": {"sft": {"recipe": "sft.yaml"}},
            }
        )
    )
    output = tmp_path / "run" / "sft"
    assert "error: " not in (first := gemma2_post("run", str(pipeline))).stderr and first.returncode == 0, first.stderr
    weights = (output / "model.safetensors").read_bytes()

    assert gemma2_post("run", str(pipeline)).stdout == f"sft: up to date ({output})\n"

    bad = gemma2_post("run", str(pipeline), "--set", "sft.learning_rate=fast")
    assert bad.returncode == 2
    assert "learning_rate is 'fast' (str); write a number" in bad.stderr
    assert (output / "model.safetensors").read_bytes() == weights

    again = gemma2_post("run", str(pipeline), "--set", "sft.learning_rate=2e-3")
    assert again.returncode == 0 and "sft: runs again, because learning_rate 0.001 -> 0.002" in again.stdout
    assert (output / "model.safetensors").read_bytes() != weights
    assert not output.with_name("sft.previous").exists()


def test_a_stage_gets_the_output_of_the_one_that_it_names(
    recipe: dict[str, object], distill_recipe: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe | {"model_name_or_path": TEACHER, "max_steps": 1}))
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(distill_recipe | {"model_name_or_path": "nowhere"}))
    stages = {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml", "model": "sft"}}
    pipeline = tmp_path / "pipeline.yaml"
    run_dir = tmp_path / "run"
    content = {"run_dir": str(run_dir), "launch": "accelerate_configs/cpu.yaml", "stages": stages}
    pipeline.write_text(yaml.safe_dump(content, sort_keys=False))

    first = gemma2_post("run", str(pipeline))
    assert first.returncode == 0, first.stderr
    done = json.loads((run_dir / "distill" / "stage.json").read_text())
    assert done["base_model"] == str(run_dir / "sft")
    assert done["base_digest"] == json.loads((run_dir / "sft" / "stage.json").read_text())["output"]

    backwards = {"distill": stages["distill"], "sft": stages["sft"]}
    pipeline.write_text(yaml.safe_dump(content | {"stages": backwards}, sort_keys=False))
    wrong = gemma2_post("run", str(pipeline))
    assert wrong.returncode == 2 and "distill: model names sft, which is no earlier stage (none)" in wrong.stderr


def test_an_entry_names_the_stages_it_reads_and_how_many_policies_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {
        "sft": {"recipe": "sft.yaml"},
        "reward": {"recipe": "reward.yaml", "policies": ["sft"], "launch": "other.yaml"},
        "rlhf": {"recipe": "rlhf.yaml", "model": "sft", "reward_model": "reward", "num_policies": 2},
    }
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump({"run_dir": "runs/x", "launch": "l.yaml", "stages": stages}, sort_keys=False))
    calls = []
    monkeypatch.setattr(run, "_run_stage", lambda name, folder, config, *further: calls.append((folder, *further)))
    run.run(pipeline, None, {"rlhf": {"beta": 0.2}})
    rlhf = {"model_name_or_path": "runs/x/sft", "reward_model": "runs/x/reward"}
    rlhf |= {"beta": 0.2, "output_dir": "runs/x/rlhf"}
    assert calls == [
        (Path("runs/x/sft"), "l.yaml", {"output_dir": "runs/x/sft"}),
        (Path("runs/x/reward"), "other.yaml", {"policies": ["runs/x/sft"], "output_dir": "runs/x/reward"}),
        (Path("runs/x/rlhf/policy-0"), "l.yaml", rlhf | {"policy": 0}),
        (Path("runs/x/rlhf/policy-1"), "l.yaml", rlhf | {"policy": 1}),
    ]


@pytest.mark.parametrize(("key", "value"), [("policies", ["rlhf"]), ("reward_model", "reward"), ("model", "sft")])
def test_an_entry_cannot_name_a_stage_that_comes_later_or_not_at_all(key: str, value: object, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline.yaml"
    stages = {"rlhf": {"recipe": "rlhf.yaml", key: value}, "reward": {"recipe": "reward.yaml"}}
    pipeline.write_text(yaml.safe_dump({"run_dir": "runs/x", "launch": "l.yaml", "stages": stages}, sort_keys=False))
    with pytest.raises(UserError, match=rf"rlhf: {key} names (rlhf|reward|sft), which is no earlier stage \(none\)"):
        run.load_pipeline(pipeline)


@pytest.mark.parametrize("load", [[], ["--load", "8bit"]], ids=["fp32", "8bit"])
def test_chat_answers_a_prompt(load: list[str]) -> None:
    answer = gemma2_post("chat", "gemma2_post/tiny/models/teacher", "--prompt", "What is 3 plus 5?", *load)
    assert answer.returncode == 0 and "8" in answer.stdout


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
        (("run", "nowhere.yaml"), "nowhere.yaml: there is no such recipe"),
        (("run", "recipes/tiny/pipeline.yaml", "--until", "rlfh"), "there is no stage rlfh; it has sft"),
        (("run", "recipes/tiny/pipeline.yaml", "--set", "sft=1"), "expected STAGE.KEY=VALUE"),
        (("chat", "nowhere"), "cannot get nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    finished = gemma2_post(*arguments)
    assert finished.returncode == 2
    assert message in next(line for line in finished.stderr.splitlines() if line.startswith("error: "))
