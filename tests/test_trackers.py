"""What trackers show of a run: one run for a stage that resumes, and what we measure beside what the trainer logs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from gemma2_post.stage import contract
from gemma2_post.training.finite import StopIfNotFinite

Recipe = dict[str, object]
Run = Callable[[Recipe], Path]


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values as TensorBoard shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return [(each.step, each.value) for each in events.Scalars(name)] if name in events.Tags()["scalars"] else []


class Killed(BaseException):
    """Ends a stage as a kill would: nothing is caught or cleaned up."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills the next stage after this step has been logged."""

    def on_log(self: TrainerCallback, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(StopIfNotFinite, "on_log", on_log)


@pytest.mark.slow
def test_a_stage_that_is_killed_and_resumes_is_one_run_with_what_was_measured(
    run_sft: Run, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 3, after the checkpoint of step 2: the second step 3 takes the place of the first one."""
    values = recipe | {"report_to": "tensorboard", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    output = tmp_path / "tiny" / "sft"
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_at(3, killing)
        run_sft(values | {"output_dir": str(output)})
    begun = contract.read_begun(output)
    assert begun and len(curve(output / "tracker", "train/loss")) == 3
    run_sft(values | {"output_dir": str(output)})
    done = json.loads((output / "stage.json").read_text())
    assert done["run_id"] == begun["run_id"]
    logged = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [(entry["step"], pytest.approx(entry["loss"])) for entry in logged if "loss" in entry]
    assert curve(output / "tracker", "train/loss") == losses and len(losses) == 4
    for name in ("held_out_nll", "stop_rate"):
        before, after = done["metrics"][f"{name}_before"], done["metrics"][name]
        assert curve(output / "tracker", f"eval/{name}") == [(0, pytest.approx(before)), (4, pytest.approx(after))]
    assert curve(output / "tracker", "eval/tokens_per_second") == [
        (4, pytest.approx(done["metrics"]["tokens_per_second"]))
    ]

    untracked = run_sft(values | {"report_to": "none", "output_dir": str(tmp_path / "untracked")})
    first, second = (load_file(folder / "model.safetensors") for folder in (output, untracked))
    assert all(first[name].equal(second[name]) for name in first)
    assert not (untracked / "tracker").exists()
    assert json.loads((untracked / "stage.json").read_text())["output"] == done["output"]


@pytest.mark.slow
def test_what_the_watch_measures_is_reported_at_its_steps_and_the_trainers_own_log_stays_whole(
    run_rlhf: Run, rlhf_recipe: Recipe
) -> None:
    """Each logged mean is over two steps; reporting in between must not begin it anew."""
    values = rlhf_recipe | {"max_steps": 4, "watch_steps": 3, "logging_steps": 2}
    untracked = run_rlhf(values)
    log = (untracked / "log.jsonl").read_text()
    shutil.rmtree(untracked)
    output = run_rlhf(values | {"report_to": "tensorboard"})
    watched = [json.loads(line) for line in (output / "watch.jsonl").read_text().splitlines()]
    for name in ("kl_to_start", "kl_to_anchor", "reward"):
        expected = [(entry["step"], pytest.approx(entry[name])) for entry in watched]
        assert curve(output / "tracker", f"eval/{name}") == expected and len(expected) == 3
    assert [
        entry["kl"] for entry in map(json.loads, (output / "log.jsonl").read_text().splitlines()) if "kl" in entry
    ] == [entry["kl"] for entry in map(json.loads, log.splitlines()) if "kl" in entry]
