"""What a run does with what is there: kept, measured, gone on with, or made again; and what it does with the old."""

import contextlib
import json
import os
import re
from pathlib import Path

import pytest

from gemma2_post import cli, evaluate, sft, synthesize
from gemma2_post.pipeline import processes, run
from gemma2_post.pipeline.steps import Step
from gemma2_post.stage import contract, digests, fingerprint
from gemma2_post.stage.command import Command
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.fingerprint import Differences, differences
from tests.test_pipeline import stand_in_stages, write_pipeline

STAGES = {"sft": {"recipe": "sft.yaml"}, "distill": {"recipe": "distill.yaml", "model": "sft"}}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the stages that ran; each writes its keys as its weights."""
    ran = stand_in_stages(monkeypatch)
    finish = processes.launch

    def launch(step: Step, *_: object) -> int:
        step.folder.mkdir(parents=True, exist_ok=True)
        made = {key: value for key, value in step.keys.items() if key not in ("graders", "output_dir")}
        (step.folder / "model.safetensors").write_text(json.dumps(made, sort_keys=True))
        return finish(step)

    monkeypatch.setattr(processes, "launch", launch)
    return ran


@pytest.fixture
def path(tmp_path: Path, ran: list[str]) -> Path:
    """A pipeline whose two stages are finished."""
    path = write_pipeline(tmp_path, STAGES)
    start(path)
    ran.clear()
    return path


def start(path: Path, **how: object) -> None:
    cli.run(path, None, how.pop("overrides", {}), path.parent / "run", **how)


def replaced(path: Path) -> list[str]:
    return sorted(re.split(r"-\d{4}-", each.name)[0] for each in replaced_folders(path))


def replaced_folders(path: Path) -> list[Path]:
    return sorted((path.parent / "run" / "replaced").glob("*"))


def update(monkeypatch: pytest.MonkeyPatch, transformers: str) -> None:
    version = fingerprint._version
    monkeypatch.setattr(
        fingerprint, "_version", lambda name: transformers if name == "transformers" else version(name)
    )


def test_new_versions_keep_what_is_finished_and_say_so(
    path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = fingerprint._version("transformers")
    update(monkeypatch, "9.9.9")
    capsys.readouterr()
    start(path)
    assert ran == []
    line = f"sft: kept, made by transformers {installed}; --rerun sft makes it again"
    assert line in capsys.readouterr().out
    start(path, rerun=["sft"])
    assert ran == ["sft"] and replaced(path) == ["sft"]  # what it makes is the same, so distill stays
    capsys.readouterr()
    start(path, explain=True)
    assert "sft: up to date\n" in capsys.readouterr().out


def test_a_changed_module_counts_where_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is no part of sft; what reads conversations is. Neither makes anything run again."""
    digest = digests._of_file

    def changed(stage: Command, name: str) -> Differences:
        before = stage.fingerprint({})
        monkeypatch.setattr(digests, "_of_file", lambda file: digest(file) + ("edited" if file.name == name else ""))
        after = stage.fingerprint({})
        monkeypatch.setattr(digests, "_of_file", digest)
        return differences(before, after)

    assert changed(sft.COMMAND, "judge.py") == Differences([], [], [])
    for stage, name in ((sft.COMMAND, "turns.py"), (evaluate.COMMAND, "judge.py")):
        found = changed(stage, name)
        assert len(found.updates) == 1 and found == Differences([], [], found.updates)


def test_only_what_will_run_needs_devices_and_space(
    path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on eight GPUs, evaluated on one."""
    asked = []
    monkeypatch.setattr(run, "_check", lambda pipeline, until, to_run, replaced: asked.append((to_run, replaced)))
    start(path, overrides={"distill": {"learning_rate": 0.5}})
    start(path, overrides={"distill": {"learning_rate": 0.5, "num_samples": 3}})
    start(path)
    assert asked == [({"distill"}, {"distill"}), ({"distill"}, set())]


def test_a_changed_grader_measures_again_and_trains_nothing(
    path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    start(path, overrides={"sft": {"graders": ["gemma2_post.tiny.gold:gold"]}})
    assert ran == ["sft"] and not replaced(path)
    assert "sft: measures again, because content of gemma2_post.tiny.gold:gold" in capsys.readouterr().out


def test_a_changed_rate_trains_again_and_the_old_output_can_come_back(
    path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = path.parent / "run" / "sft" / "model.safetensors"
    before = weights.read_bytes()
    start(path, overrides={"sft": {"learning_rate": 0.5}})
    assert ran == ["sft", "distill"] and replaced(path) == ["distill", "sft"]
    assert weights.read_bytes() != before
    ran.clear()
    capsys.readouterr()
    start(path)
    assert ran == [] and weights.read_bytes() == before and replaced(path) == ["distill", "sft"]
    assert capsys.readouterr().out.count("what was replaced comes back") == 2


def test_what_was_replaced_comes_back_although_it_is_to_be_measured_in_another_way(
    path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = path.parent / "run" / "sft" / "model.safetensors"
    before = weights.read_bytes()
    start(path, overrides={"sft": {"learning_rate": 0.5}})
    ran.clear()
    capsys.readouterr()
    start(path, overrides={"sft": {"graders": ["gemma2_post.tiny.gold:accuracy"]}})
    said = capsys.readouterr().out
    assert ran == ["sft"] and weights.read_bytes() == before
    assert "sft: what was replaced comes back" in said and "sft: measures again, because " in said


def test_a_run_that_was_moved_or_is_named_by_another_path_is_the_same_one(
    path: Path, ran: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").rename(tmp_path / "moved")
    cli.run(path, None, {}, tmp_path / "moved")
    cli.run(path, None, {}, Path(os.path.relpath(tmp_path / "moved")))
    assert ran == []
    (tmp_path / "moved" / "sft" / "model.safetensors").write_text("another")
    cli.run(path, None, {}, tmp_path / "moved")
    assert ran == ["sft"]  # a changed file counts there, too


def test_a_summary_says_what_another_recipe_has_made(path: Path, ran: list[str]) -> None:
    cli.run(path, "sft", {"sft": {"learning_rate": 0.5}}, path.parent / "run")
    stages = json.loads((path.parent / "run" / "summary.json").read_text())["stages"]
    assert ran == ["sft"] and [stages[name]["status"] for name in ("sft", "distill")] == ["done", "out of date"]


def test_a_recipe_that_is_edited_during_a_run_stops_it_before_the_stage(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, launch = write_pipeline(tmp_path, STAGES), processes.launch

    def edit_and_launch(step: Step, *arguments: object) -> int:
        (tmp_path / "sft.yaml").write_text((tmp_path / "sft.yaml").read_text() + "\n# a comment\n")
        (tmp_path / "distill.yaml").write_text("{learning_rate: 0.5}")
        return launch(step, *arguments)

    with monkeypatch.context() as during:
        during.setattr(processes, "launch", edit_and_launch)
        with pytest.raises(
            UserError, match=r"distill.yaml was edited since this run began, so distill was not begun; run"
        ):
            start(path)
    assert ran == ["sft"]
    start(path)
    assert ran == ["sft", "distill"]


def test_a_requeued_job_does_not_make_again_what_it_has_made(
    path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(path, rerun=["sft"])
    assert ran == ["sft"]
    ran.clear()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start(path, rerun=["sft"])
    assert ran == [] and "Slurm has requeued this job, so it goes on" in capsys.readouterr().out


def test_what_the_user_says_comes_first(path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    changed = {"sft": {"learning_rate": 0.5}}
    start(path, overrides=changed, keep=["sft"])
    assert ran == [] and "although learning_rate unset -> 0.5" in capsys.readouterr().out
    start(path, fresh=["distill"])
    assert ran == ["distill"] and replaced(path) == ["distill"]
    for how, message in [
        ({"keep": ["sft"], "rerun": ["sft"]}, "--keep sft: it is named with --rerun, too; decide"),
        ({"rerun": ["stf"]}, "there is no stage stf; it has sft, distill"),
    ]:
        with pytest.raises(UserError, match=message):
            start(path, **how)


def test_only_what_is_finished_can_be_kept(tmp_path: Path, ran: list[str]) -> None:
    path = write_pipeline(tmp_path, STAGES)
    with pytest.raises(UserError, match="--keep distill: it is not finished, so there is nothing to keep"):
        start(path, keep=["distill"])
    assert ran == []


def test_a_server_that_has_moved_answers_the_same() -> None:
    """A half of a teacher's answers is worth keeping."""
    here, there, local = (
        synthesize.COMMAND.fingerprint({"endpoint": url} if url else {}) for url in ("http://a/v1", "http://b/v1", "")
    )
    assert differences(here, there) == Differences([], [], []) and differences(here, local).output


def unfinished(path: Path, **values: object) -> Path:
    """The run folder, with an sft that was interrupted after its first checkpoint."""
    output = path.parent / "run" / "sft"
    contract.begin(output, sft.COMMAND.fingerprint({"output_dir": str(output)} | values))
    (output / "checkpoint-1").mkdir()
    return output


def test_an_unfinished_run_goes_on_after_an_update_and_starts_over_when_asked(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_pipeline(tmp_path, STAGES)
    output = unfinished(path)
    installed = fingerprint._version("transformers")
    update(monkeypatch, "9.9.9")
    start(path, explain=True)
    assert f"sft: resumes, which transformers {installed} has begun\n" in capsys.readouterr().out
    start(path, fresh=["sft"])
    assert replaced(path) == ["sft"] and not (output / "checkpoint-1").exists()
    (old,) = replaced_folders(path)
    assert (old / "checkpoint-1").is_dir()


def test_an_unfinished_run_of_another_recipe_is_replaced_not_deleted(tmp_path: Path, ran: list[str]) -> None:
    path = write_pipeline(tmp_path, STAGES)
    unfinished(path, learning_rate=5.0)
    start(path)
    (old,) = replaced_folders(path)
    assert (old / "checkpoint-1").is_dir() and ran == ["sft", "distill"]


def test_clean_lists_and_deletes_only_when_asked(
    path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start(path, overrides={"sft": {"learning_rate": 0.5}})
    capsys.readouterr()
    cli.clean(path.parent / "run")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1] == "--yes deletes them" and "GB, 0 days old" in lines[0]
    assert len(replaced_folders(path)) == 2
    cli.clean(path.parent / "run", yes=True)
    assert not replaced_folders(path) and (path.parent / "run" / "sft" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="there is no such folder"):
        cli.clean(path.parent / "nowhere")


@pytest.mark.parametrize("when", range(1, 8))
def test_a_kill_while_an_output_is_replaced_loses_neither(
    when: int, path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain dies at the n-th call that changes a folder; then the same command is given again."""

    class Killed(BaseException):
        pass

    calls = 0
    originals = {name: getattr(os, name) for name in ("mkdir", "rename", "replace", "rmdir")}

    def dies(name: str) -> object:
        def counted(*args: object, **more: object) -> object:
            nonlocal calls
            calls += 1
            if calls == when:
                raise Killed
            return originals[name](*args, **more)

        return counted

    before = (path.parent / "run" / "sft" / "model.safetensors").read_bytes()
    for name in originals:
        monkeypatch.setattr(os, name, dies(name))
    with contextlib.suppress(Killed):
        start(path, overrides={"sft": {"learning_rate": 0.5}})
    for name, original in originals.items():
        monkeypatch.setattr(os, name, original)
    start(path, overrides={"sft": {"learning_rate": 0.5}})
    made = [each.read_bytes() for each in sorted((path.parent / "run").glob("**/sft*/model.safetensors"))]
    assert before in made and len(set(made)) == 2
