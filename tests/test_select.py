"""Selection: candidates of one stage are trained, answer the same prompts, and the best one goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gemma2_post import select
from gemma2_post.evaluation.choice import choose
from gemma2_post.pipeline import check, processes, summary
from gemma2_post.pipeline.decisions import Action, forecast
from gemma2_post.pipeline.loading import load_pipeline, load_selection
from gemma2_post.pipeline.steps import Pipeline, Step
from gemma2_post.report import report as reports
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from tests.conftest import TEACHER, write_prompts

CPU_CONFIG = "accelerate_configs/cpu.yaml"
NUM_PROMPTS = 24


def test_the_highest_win_rate_is_chosen_if_the_interval_allows_to_say_so() -> None:
    baseline, worse, better = [0.5] * 40, [0.0] * 30 + [1.0] * 10, [1.0] * 30 + [0.0] * 10
    assert choose([baseline, worse, better], [1, 1, 1]).chosen == 2
    assert choose([baseline, worse, better], [1, 1, 100]).chosen == 2  # however much it cost
    assert choose([baseline, worse], [1, 0.1]).chosen == 0


def test_a_tie_within_the_interval_goes_to_the_cheaper_one_and_then_to_the_higher_rate() -> None:
    baseline, a_little = [0.5] * 40, [1.0] * 22 + [0.0] * 18
    found = choose([baseline, a_little], [1, 2])
    assert (found.chosen, found.best, found.tied) == (0, 1, [0, 1])
    assert choose([baseline, a_little], [2, 1]).chosen == 1
    assert choose([baseline, a_little], [1, 1]).chosen == 1
    assert choose([baseline, a_little, [None] * 20 + a_little[:20]], [1, 1, 3]).best == 2  # without some verdicts


def test_ties_are_of_paired_differences() -> None:
    """Two candidates that win nearly the same prompts can be told apart, although their own intervals overlap."""
    half = [1.0] * 40 + [0.0] * 40
    found = choose([[0.5] * 80, half, [1.0] * 48 + [0.0] * 32], [1, 1, 2])
    assert (found.chosen, found.tied) == (2, [2]) or found.tied == [0, 2]
    assert 1 not in found.tied


@pytest.fixture
def select_recipe(tmp_path: Path) -> dict[str, object]:
    """Two candidates, of which the first one is broken by its learning rate, compared by gold."""
    return {
        "select": "sft",
        "candidates": [{"learning_rate": 0.5}, {}],
        "by": "gold",
        "datasets": [{"path": str(write_prompts(tmp_path / "asked.jsonl", "test", NUM_PROMPTS))}],
        "columns": ["skill", "answer"],
        "max_completion_length": 12,
        "output_dir": str(tmp_path / "run" / "select"),
        "graders": ["gemma2_post.tiny.gold:gold"],
        "num_samples": NUM_PROMPTS,
        "batch_size": NUM_PROMPTS,
    }


def write(folder: Path, sft: dict[str, object], select: dict[str, object]) -> Path:
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft | {"model_name_or_path": TEACHER}))
    (folder / "select.yaml").write_text(yaml.safe_dump(select))
    return folder / "select.yaml"


def loaded(path: Path, **keys: object) -> Pipeline:
    return load_selection(path, None, path.parent / "run", None, keys)


def all_steps(pipeline: Pipeline) -> list[Step]:
    return [step for _, steps in pipeline.steps() for step in steps]


def test_a_selection_is_its_candidates_and_then_the_choice(
    recipe: dict[str, object], select_recipe: dict[str, object], tmp_path: Path
) -> None:
    """Candidates have the recipe's seed, so that only what they override differs."""
    path = write(tmp_path, recipe | {"seed": 4}, select_recipe)
    pipeline = loaded(path, grid={"learning_rate": [1e-3, 2e-3], "weight_decay": [0, 0.1]}, candidates=None)
    *members, choice = all_steps(pipeline)
    assert [step.overrides for step in members] == [
        {"learning_rate": rate, "weight_decay": decay} for rate in (1e-3, 2e-3) for decay in (0, 0.1)
    ]
    run_dir = tmp_path / "run"
    assert [step.folder for step in members] == [run_dir / "select-candidates" / f"member-{i}" for i in range(4)]
    assert all("training_seed" not in step.values and step.keys["seed"] == 4 for step in members)
    assert choice.folder == run_dir / "select" and choice.values["models"] == [str(step.folder) for step in members]
    assert pipeline.launch == CPU_CONFIG and load_selection(path, None, None, 5, {}).run_dir == tmp_path / "run-select"
    assert all_steps(load_selection(path, "other.yaml", None, 5, {}))[0].values["seed"] == 5
    check.check(pipeline)


def test_with_a_share_of_the_steps_what_is_chosen_is_trained_anew(
    recipe: dict[str, object], select_recipe: dict[str, object], tmp_path: Path
) -> None:
    steps = {"max_steps": 10, "warmup_steps": 4, "lr_scheduler_type": "cosine"}
    candidates = [{"learning_rate": 0.5}, {"max_steps": 20, "seed": 7}]
    path = write(tmp_path, recipe | steps, select_recipe | {"share": 0.25, "candidates": candidates})
    pipeline = loaded(path)
    first, second, choice, chosen = all_steps(pipeline)
    assert [(step.values["max_steps"], step.values["warmup_steps"]) for step in (first, second)] == [(2, 1), (5, 1)]
    assert (choice.folder.name, choice.stage) == ("select-choice", "select")
    assert (chosen.folder.name, chosen.stage, chosen.after) == ("select", "sft", [choice.folder])
    assert chosen.overrides == candidates[0] and "max_steps" not in chosen.values  # so far, the baseline
    check.check(pipeline)
    choice.folder.mkdir(parents=True)
    contract.write_json(choice.folder / contract.CHOICE, {"overrides": candidates[1]})
    chosen = all_steps(pipeline)[-1]
    assert (chosen.values["max_steps"], chosen.values["training_seed"]) == (20, 7) and "seed" not in chosen.values
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"num_train_epochs": 2, "warmup_steps": 0.1, "use_cpu": True}))
    assert all_steps(loaded(path))[0].values.items() >= {"num_train_epochs": 0.5}.items()
    assert "warmup_steps" not in all_steps(loaded(path))[0].values


def test_a_selection_is_an_entry_whose_folder_later_stages_read(tmp_path: Path) -> None:
    """Its candidates read what their recipe and the entry name; both have policies if rlhf is selected."""
    for name in ("sft", "reward", "rlhf", "distill"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"seed": 3}))
    values = {"select": "rlhf", "grid": {"beta": [0.1, 0.2]}, "reward_model": "runs/x/reward", "output_dir": "y"}
    (tmp_path / "choose.yaml").write_text(yaml.safe_dump(values))
    stages = {
        "sft": {"recipe": "sft.yaml"},
        "reward": {"recipe": "reward.yaml"},
        "best": {
            "recipe": "choose.yaml", "stage": "select", "model": "sft", "reward_model": "reward", "launch": "one.yaml"
        },
        "distill": {"recipe": "distill.yaml", "model": "best"},
    }  # fmt: skip
    path = tmp_path / "pipeline.yaml"
    content = {"run_dir": "runs/x", "launch": CPU_CONFIG, "stages": stages}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    pipeline = load_pipeline(path, run_dir=Path("runs/z"))
    assert list(pipeline.entries) == ["sft", "reward", "best-candidates", "best", "distill"]
    launches = {step.label: launch for launch, steps in pipeline.steps() for step in steps}
    assert launches["best"] == "one.yaml" and launches["best-candidates policy 1"] == CPU_CONFIG
    policies, (best,), (distill,) = [steps for _, steps in pipeline.steps()][2:]
    for number, step in enumerate(policies):
        assert step.values == {
            "model_name_or_path": "runs/z/sft", "reward_model": "runs/z/reward", "beta": [0.1, 0.2][number],
            "training_seed": 3, "policy": number, "output_dir": "runs/z/best-candidates",
        }  # fmt: skip
    assert best.values == {
        "reward_model": "runs/z/reward", "models": [str(step.folder) for step in policies], "output_dir": "runs/z/best"
    }  # fmt: skip
    assert distill.values["model_name_or_path"] == "runs/z/best"

    stages["best-candidates"] = {"recipe": "sft.yaml", "stage": "sft"}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="best: the entry best-candidates would have the folder of what best selects"):
        load_pipeline(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": None}, "there are neither candidates nor a grid; write one of them"),
        ({"grid": {"learning_rate": [1, 2]}}, "there are both candidates and a grid; write one of them"),
        ({"candidates": None, "grid": {"learning_rate": 1e-4}}, r"grid is .*: 0\.0001\}; write a list of"),
        ({"candidates": None, "grid": {"learning_rate": []}}, r"grid is .*: \[\]\}; write a list of values"),
        ({"candidates": None, "grid": {"learning_rate": [1e-4]}}, "there is 1 candidate, and nothing to select from"),
        ({"candidates": [{}]}, "there is 1 candidate, and nothing to select from"),
        ({"candidates": {}}, r"candidates is \{\}; write a list of mappings"),
        ({"candidates": [{}, {}]}, "member 0 and select-candidates member 1 are the same .as the recipe.; change a"),
        ({"candidates": [{}, {"learning_rate": 1e-3}]}, "member 0 and select-candidates member 1 are the same"),
        ({"candidates": [{}, {"output_dir": "x"}]}, "candidate 1: output_dir is set by the pipeline; remove it"),
        ({"candidates": [{}, {"lerning_rate": 1}]}, "select-candidates member 1: unknown key lerning_rate"),
        ({"select": "reward"}, "select is reward; write one of sft, distill, rlhf"),
        ({"recipe": "no.yaml"}, r"there is no recipe no\.yaml beside it; write the file that is overridden"),
        ({"by": "silver"}, "by is silver; write reward, judge or gold, or name it in graders"),
        ({"by": "judge"}, "by is judge, and there is none; name a judge"),
        ({"judge": TEACHER}, "judge does nothing with by: gold; write by: judge, or remove it"),
        ({"by": "reward"}, "nothing rewards the answers; name a reward_model, or reward_functions"),
        ({"share": 1.5}, "share is 1.5; write a number above 0, below 1"),
        ({"share": "half"}, "share is 'half'; write a number above 0, below 1"),
        ({"share": 0.5, "candidates": [{}, {"max_steps": "x"}]}, r"member 1: max_steps is 'x' \(str\)"),
        ({"safety_datasets": []}, "safety_datasets must not be set"),
        ({"num_samples": 1}, "num_samples is 1; write 2 or more"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"bye": "gold"}, r"unknown key bye \(value 'gold'\); did you mean by"),
    ],
)
def test_a_selection_that_cannot_be_right_is_refused(
    change: dict[str, object],
    message: str,
    recipe: dict[str, object],
    select_recipe: dict[str, object],
    tmp_path: Path,
) -> None:
    changed = {key: value for key, value in (select_recipe | change).items() if value is not None}
    path = write(tmp_path, recipe, changed)
    with pytest.raises(UserError, match=message):
        check.check(loaded(path))


def test_candidates_of_one_name_are_refused(select_recipe: dict[str, object]) -> None:
    """What they answer and win is told apart by it."""
    with pytest.raises(UserError, match="models: two folders have the same name, sft; rename one"):
        select.COMMAND.build(select_recipe | {"models": ["a/sft", "b/sft"]})


def test_rlhf_is_not_selected_on_a_share_of_its_steps(
    rlhf_recipe: dict[str, object], select_recipe: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "rlhf.yaml").write_text(yaml.safe_dump(rlhf_recipe))
    keys = {"select": "rlhf", "share": 0.5, "candidates": [{}, {"beta": 0.3}]}
    path = write(tmp_path, {}, select_recipe | keys)
    with pytest.raises(UserError, match="share is for sft and distill; what rlhf has trained is chosen as it is"):
        check.check(loaded(path))


def test_prompts_that_candidates_are_trained_on_are_refused(
    recipe: dict[str, object], select_recipe: dict[str, object], tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "trained.jsonl", "train", 40)
    rows = [
        {"messages": [*json.loads(line)["prompt"], {"role": "assistant", "content": "Yes."}]}
        for line in prompts.read_text().splitlines()
    ]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write(
        tmp_path,
        recipe | {"datasets": [{"path": str(tmp_path / "told.jsonl")}]},
        select_recipe | {"datasets": [{"path": str(prompts)}]},
    )
    with pytest.raises(UserError, match=r"which select-candidates member 0 trains on; 40 of 40 prompts overlap"):
        check.check(loaded(path))


def run_here(step: Step) -> None:
    """Runs a step in this process, as the pipeline would start it."""
    stage, built = step.command.parse(["--config", str(step.config), *processes.assignments(step.values)])
    step.command.run(stage, built)


@pytest.fixture
def candidates(recipe: dict[str, object], select_recipe: dict[str, object], tmp_path: Path) -> Pipeline:
    """A selection whose candidates are trained."""
    pipeline = loaded(write(tmp_path, recipe | {"learning_rate": 1e-6, "num_samples": 0}, select_recipe))
    for step in all_steps(pipeline)[:-1]:
        run_here(step)
    return pipeline


@pytest.mark.slow
def test_the_chosen_candidate_is_what_later_stages_read(
    candidates: Pipeline, select_recipe: dict[str, object], tmp_path: Path
) -> None:
    """And another way to choose asks nothing anew; the candidates are kept."""
    _, kept, choice = all_steps(candidates)
    run_here(choice)
    output = tmp_path / "run" / "select"
    found = json.loads((output / "select.json").read_text())
    assert found["chosen"] == "member-1" and found["overrides"] == {} and found["by"] == "gold"
    assert found["why"].startswith("as the recipe, whose answers win ") and "against the baseline's" in found["why"]
    first, second = found["candidates"]
    assert first["win_rate"] == 0.5 and first["relative_work"] == 1 and first["overrides"] == {"learning_rate": 0.5}
    assert second["win_rate"] > 0.8 and second["low"] > 0.5 and second["gold"] > first["gold"] + 0.5
    assert "reward" not in first and first["kl_to_baseline"] == pytest.approx(0, abs=1e-5)
    for name, tensor in load_file(output / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(kept.folder / "model.safetensors")[name], rtol=0, atol=0)
    done, trained = (contract.read_done(folder) for folder in (output, kept.folder))
    assert done["base_digest"] == trained["base_digest"] and done["template_digest"] == trained["template_digest"]
    assert done["metrics"]["gold"] == second["gold"] and done["stage"] == "select"
    assert not (output / "log.jsonl").exists() and (output / "tokenizer.json").is_file()
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == NUM_PROMPTS and list(rows[0]["answers"]) == ["member-0", "member-1"]

    summary.write(candidates, "done", 1.0)
    assert summary.read(tmp_path / "run")["selections"]["select"]["chosen"] == "member-1"
    reports.write(tmp_path / "run")
    page = (tmp_path / "run" / "report.md").read_text()
    assert "## What select was selected from" in page and "| **as the recipe** | **" in page
    assert "| learning_rate 0.5 | 50.0% | the baseline | 1.00 |" in page

    answers = (tmp_path / "run" / "measured" / "answers.jsonl").read_bytes()
    again = loaded(tmp_path / "select.yaml", candidates=[{"learning_rate": 0.5}, {}, {"max_steps": 1}])
    decided = {step.label: decision.action for step, decision, _ in forecast(again, None, {})}
    assert list(decided.values()) == [Action.KEEP, Action.KEEP, Action.RUN, Action.RUN]
    by_reward = loaded(tmp_path / "select.yaml", by="reward", reward_functions=["gemma2_post.tiny.gold:gold"])
    step = all_steps(by_reward)[-1]
    step.values["output_dir"] = str(tmp_path / "run" / "other")
    run_here(step)
    assert (tmp_path / "run" / "measured" / "answers.jsonl").read_bytes() == answers
    assert json.loads((tmp_path / "run" / "other" / "select.json").read_text())["chosen"] == "member-1"


@pytest.mark.slow
def test_a_judge_that_fails_in_the_middle_loses_nothing(
    candidates: Pipeline, select_recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command asks only what is missing."""
    step = all_steps(candidates)[-1]
    for key, value in {"by": "judge", "judge": TEACHER, "judge_max_tokens": 4}.items():
        step.values[key] = value
    with pytest.raises(UserError, match="verdict"):  # the tiny teacher is no judge
        run_here(step)
    output = tmp_path / "run" / "select"
    assert (output / "answers.jsonl").is_file() and not (output / contract.DONE).is_file()
    asked = (tmp_path / "run" / "judgments.jsonl").read_text()
    assert asked and (tmp_path / "run" / "measured" / "answers.jsonl").is_file()


@pytest.mark.slow
def test_an_unfinished_candidate_is_named(candidates: Pipeline, tmp_path: Path) -> None:
    *_, second, choice = all_steps(candidates)
    (second.folder / contract.DONE).unlink()
    with pytest.raises(UserError, match=r"the candidate with as the recipe is not finished .*; train the candidates"):
        run_here(choice)


@pytest.mark.slow
def test_a_killed_selection_goes_on_and_trains_what_it_chose(
    recipe: dict[str, object], select_recipe: dict[str, object], tmp_path: Path
) -> None:
    """Candidates on half of the steps; killed while they train; in the end the chosen one has all steps."""
    steps = {"max_steps": 4, "learning_rate": 1e-6, "num_samples": 0, "save_strategy": "steps", "save_steps": 1}
    path = write(tmp_path, recipe | steps, select_recipe | {"share": 0.5})
    command = [sys.executable, "-m", "gemma2_post.cli", "select", str(path), "--run_dir", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as killed:
        while not list((tmp_path / "run" / "select-candidates").glob("member-*/begun.json")):
            time.sleep(0.2)
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "run"
    trained = {name: contract.read_done(run_dir / name) for name in ("select-candidates/member-1", "select")}
    steps_of = {
        name: [json.loads(line)["step"] for line in (run_dir / name / "log.jsonl").read_text().splitlines()][-1]
        for name in trained
    }
    assert steps_of == {"select-candidates/member-1": 2, "select": 4}
    assert json.loads((run_dir / "select-choice" / "select.json").read_text())["chosen"] == "member-1"
    assert "learning_rate 0.5" in done.stdout and "select: as the recipe, whose answers win" in done.stdout
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "nothing to do" in again.stdout
