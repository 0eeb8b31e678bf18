"""The stage contract: what counts as the same run, and that nothing half-written counts as done."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import Gemma2Config

from gemma2_post import distill, evaluate, rlhf, sft
from gemma2_post.stage import contract, digests, disk
from gemma2_post.stage.command import Stage
from gemma2_post.stage.contract import State
from gemma2_post.stage.disk import check_folder
from gemma2_post.stage.errors import UserError, reported
from gemma2_post.stage.fingerprint import Differences, Fingerprint, differences
from gemma2_post.stage.recipe import build
from gemma2_post.training.checks import check_disk

RECIPE = {"learning_rate": 1e-3, "output_dir": "a", "logging_steps": 1}


def test_output_folder_and_logging_do_not_change_the_fingerprint_and_the_rest_does() -> None:
    same = sft.COMMAND.fingerprint(RECIPE | {"output_dir": "b", "logging_steps": 5})
    assert same == sft.COMMAND.fingerprint(RECIPE)
    other = sft.COMMAND.fingerprint(RECIPE | {"learning_rate": 2e-3})
    assert differences(same, other) == Differences(["learning_rate 0.001 -> 0.002"], [], [])


def test_a_stage_that_was_made_under_the_old_name_of_a_key_is_up_to_date(tmp_path: Path) -> None:
    wanted = sft.COMMAND.fingerprint(RECIPE | {"activation_checkpointing": True})
    recipe = {key.replace("activation_", "gradient_"): value for key, value in wanted["recipe"].items()}
    old = wanted | {"recipe": recipe}
    contract.begin(tmp_path, old)
    contract.finish(tmp_path, "sft", old, 1.0, {"dtype": "float32"}, {"held_out_nll": 1.0})
    assert "gradient_checkpointing" in (tmp_path / "stage.json").read_text()
    assert contract.state_of(tmp_path, wanted) == (State.DONE, Differences([], [], []))
    other = sft.COMMAND.fingerprint(RECIPE | {"activation_checkpointing": False})
    assert contract.state_of(tmp_path, other)[1].output == ["activation_checkpointing True -> False"]


def test_the_content_of_inputs_counts(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    before = sft.COMMAND.fingerprint({"datasets": [{"path": str(file)}]})
    assert sft.COMMAND.fingerprint({"datasets": [{"path": str(file)}]}) == before
    file.write_text("{ }\n")
    (change,) = differences(before, sft.COMMAND.fingerprint({"datasets": [{"path": str(file)}]})).output
    assert change.startswith(f"{file} {before['inputs'][str(file)]} -> ")


def test_a_key_that_is_a_mapping_counts_whole_and_a_path_by_its_content(tmp_path: Path) -> None:
    """A file that was moved is the same one."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text("{}\n")

    def wanted(folder: str, **more: object) -> Fingerprint:
        source = {"path": str(tmp_path / folder / "rows.jsonl"), "weight": 2.0}
        return sft.COMMAND.fingerprint({"datasets": [source], "model_kwargs": {"top_k": 5} | more})

    assert not differences(wanted("one"), wanted("two")).output
    (change,) = differences(wanted("one"), wanted("two", top_p=0.9)).output
    assert change == "model_kwargs {'top_k': 5} -> {'top_k': 5, 'top_p': 0.9}"
    before = wanted("one")
    (tmp_path / "two" / "rows.jsonl").write_text("{ }\n")
    assert len(differences(before, wanted("two")).output) == 3  # the key, and both contents


def test_a_function_counts_with_its_whole_package() -> None:
    inputs = sft.COMMAND.fingerprint({"datasets": [{"path": "gemma2_post.tiny.data:demonstrations"}]})["inputs"]
    expected = digests.of_files(sorted(Path("gemma2_post/tiny").glob("*.py")))
    assert inputs == {"gemma2_post.tiny.data:demonstrations": expected}


def test_a_finished_stage_hands_its_recorded_hash_to_the_next(tmp_path: Path) -> None:
    wanted = sft.COMMAND.fingerprint(RECIPE)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    contract.begin(tmp_path, wanted)
    assert contract.state_of(tmp_path, wanted)[0] == State.NEW
    contract.finish(tmp_path, "sft", wanted, 1.0, {"dtype": "float32"}, {"held_out_nll": 1.0})
    assert contract.state_of(tmp_path, wanted)[0] == State.DONE and not (tmp_path / contract.BEGUN).exists()
    recorded = json.loads((tmp_path / "stage.json").read_text())["output"]
    assert sft.COMMAND.fingerprint({"model_name_or_path": str(tmp_path)})["inputs"] == {str(tmp_path): recorded}


def test_a_claim_without_a_checkpoint_holds_nothing_back_and_foreign_files_do(tmp_path: Path) -> None:
    wanted = sft.COMMAND.fingerprint(RECIPE)
    contract.begin(tmp_path / "claimed", sft.COMMAND.fingerprint({"learning_rate": 5}))
    assert contract.state_of(tmp_path / "claimed", wanted)[0] == State.NEW
    (tmp_path / "thesis.docx").write_text("do not touch")
    with pytest.raises(UserError, match="holds files that no stage has made"):
        contract.state_of(tmp_path, wanted)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    contract.write_json(tmp_path / "stage.json", {"a": 1})
    with pytest.raises(TypeError):
        contract.write_json(tmp_path / "stage.json", {"a": object()})
    assert json.loads((tmp_path / "stage.json").read_text()) == {"a": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence_and_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, reported(), open("/dev/full", "w") as full:
        full.write("x" * 100_000)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: no space left on the device")


def test_a_full_disk_is_recognised_behind_the_error_of_a_library(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), reported():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 1388864 vs 1388752")  # noqa: B904 - as torch.save does
    assert capsys.readouterr().err.startswith("error: no space left on the device")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(OSError, match="denied"), reported():
        raise OSError(errno.EACCES, "denied")


def built(recipe_class: type[sft.Recipe], **values: object) -> sft.Recipe:
    needed = {"datasets": [{"path": "a.jsonl"}], "global_batch_size": 8, "use_cpu": True}
    return build(recipe_class, needed | values)


def test_too_little_room_is_refused_before_training(tmp_path: Path) -> None:
    stage = Stage("sft", "sft.yaml", tmp_path / "not" / "there", {})
    enormous = Gemma2Config(num_hidden_layers=100_000)
    with pytest.raises(
        UserError, match=r"no space left on the device for the output \(.* MB free, about .* MB needed\)"
    ):
        check_disk(stage, built(sft.Recipe, output_dir=str(tmp_path)), enormous)


def test_up_to_date_and_help_need_no_torch(tmp_path: Path) -> None:
    """A finished stage is recognised by a process in which torch cannot be imported."""
    recipe = tmp_path / "sft.yaml"
    recipe.write_text("learning_rate: 1e-3\n")
    launch = tmp_path / "cpu.yaml"
    launch.write_text("num_processes: 1\n")
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(f"run_dir: {tmp_path}/run\nlaunch: {launch}\nstages:\n  sft: {{recipe: sft.yaml}}\n")
    output = tmp_path / "run" / "sft"
    wanted = sft.COMMAND.fingerprint({"learning_rate": 1e-3})
    contract.begin(output, wanted)
    contract.finish(output, "sft", wanted, 1.0, {}, {})
    (tmp_path / "torch.py").write_text("raise ImportError('torch must not be imported')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    for arguments in (["--help"], ["run", str(pipeline), "--until", "sft"]):
        finished = subprocess.run(
            [sys.executable, "-m", "gemma2_post.cli", *arguments], capture_output=True, text=True, env=environment
        )
        assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("sft: up to date\nnothing to do; ")


def test_a_folder_of_tasks_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its name does not look like a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text("task: sums")
    recipe = {"output_dir": "out", "benchmark_folder": "tasks"}
    before = evaluate.COMMAND.fingerprint(recipe)
    (tmp_path / "tasks" / "sums.yaml").write_text("task: sums\nnum_fewshot: 1")
    assert differences(before, evaluate.COMMAND.fingerprint(recipe)).output


def test_what_is_on_the_hub_counts_by_the_files_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was downloaded, when the Hub cannot be asked; a name whose folder is here is no name on the Hub."""

    def commit(kind: str, name: str, revision: str, number: int, **files: str) -> None:
        folder = tmp_path / f"{kind}--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / (str(number) * 40)
        snapshot.mkdir(parents=True)
        for blob, file in files.items():
            (folder / "blobs").mkdir(exist_ok=True)
            (folder / "blobs" / blob).write_text(blob)
            (snapshot / file).parent.mkdir(exist_ok=True)
            (snapshot / file).symlink_to(folder / "blobs" / blob)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(snapshot.name)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit("models", "someone/model", "v2", 1, a1="config.json", b1="model.safetensors", c1="README.md")
    commit("datasets", "someone/data", "main", 1, d1="data/train.parquet", e1=".gitattributes")
    commit("datasets", "someone/data", "v2", 2, d2="data/train.parquet")
    recipe = {
        "model_name_or_path": "someone/model",
        "model_revision": "v2",
        "teacher_model_name_or_path": "recipes/model",
        "datasets": [{"path": "someone/data"}],
        "held_out_datasets": [{"path": "someone/data", "revision": "v2"}, {"path": "someone/unknown"}],
    }
    before = distill.COMMAND.fingerprint(recipe)
    assert before["inputs"] == {
        "someone/model@v2": {"config.json": "a1", "model.safetensors": "b1"},
        "someone/data@main": {"data/train.parquet": "d1"},
    }
    assert before["measurements"]["content of someone/data@v2"] == {"data/train.parquet": "d2"}

    commit("models", "someone/model", "v2", 3, a1="config.json", b1="model.safetensors", c2="README.md")
    assert differences(before, distill.COMMAND.fingerprint(recipe)) == Differences([], [], [])
    commit("models", "someone/model", "v2", 4, a1="config.json", b2="model.safetensors", c2="README.md")
    assert differences(before, distill.COMMAND.fingerprint(recipe)).output == [
        "someone/model@v2: model.safetensors changed"
    ]


def finished(folder: Path, **values: object) -> dict:
    """A finished sft of these values; returns its fingerprint."""
    wanted = sft.COMMAND.fingerprint(RECIPE | values)
    contract.begin(folder, wanted)
    (folder / "model.safetensors").write_bytes(b"weights")
    contract.finish(folder, "sft", wanted, 1.0, {}, {})
    return wanted


def test_each_kind_of_change_has_its_own_consequence(tmp_path: Path) -> None:
    wanted = finished(tmp_path)
    held_out = [{"path": "gemma2_post.tiny.data:demonstrations"}]
    changed = {
        State.DONE: {"save_total_limit": 9, "report_to": "tensorboard", "headline": "gold", "dataset_num_proc": 4},
        State.UNMEASURED: {"num_samples": 3, "graders": ["gemma2_post.tiny.gold:gold"], "max_new_tokens": 9},
        State.OTHER: {"seed": 3, "held_out_share": 0.1, "held_out_datasets": held_out, "max_length": 8},
    }
    for state, values in changed.items():
        for key, value in values.items():
            found = contract.state_of(tmp_path, sft.COMMAND.fingerprint(RECIPE | {key: value}))
            assert found[0] == state, key
    for part in ("code", "versions"):
        name = next(iter(wanted[part]))
        state, found = contract.state_of(tmp_path, wanted | {part: wanted[part] | {name: "9.9.9"}})
        assert state == State.DONE and found == Differences([], [], [f"{name} {wanted[part][name]} -> 9.9.9"])


def test_held_out_rows_only_measure_if_they_are_not_taken_from_the_training_rows(tmp_path: Path) -> None:
    sources = [{"path": "gemma2_post.tiny.data:demonstrations"}]
    finished(tmp_path, held_out_datasets=sources)
    others = RECIPE | {"held_out_datasets": [*sources, *sources]}
    assert contract.state_of(tmp_path, sft.COMMAND.fingerprint(others))[0] == State.UNMEASURED
    assert contract.state_of(tmp_path, sft.COMMAND.fingerprint(RECIPE))[0] == State.OTHER


def test_what_is_measured_decides_where_a_kl_budget_ends_the_run() -> None:
    def differ(**values: object) -> Differences:
        return differences(rlhf.COMMAND.fingerprint(values), rlhf.COMMAND.fingerprint(values | {"num_samples": 9}))

    assert differ().measurements == ["num_samples unset -> 9"]
    assert differ(kl_budget=2.0).output == ["num_samples 64 -> 9"]


def test_edited_weights_are_noticed_and_touched_ones_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    wanted = finished(folder)
    weights = folder / "model.safetensors"
    recorded = contract.input_digest(str(folder))
    os.utime(weights, (1, 1))
    assert contract.state_of(folder, wanted)[0] == State.DONE
    weights.write_bytes(b"WEIGHTS")
    state, found = contract.state_of(folder, wanted)
    assert state == State.OTHER and found.output == ["files of the output were changed after it was finished"]
    assert contract.input_digest(str(folder)) != recorded


def test_weights_of_every_format_count(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"old")
        before = digests.of_input(str(tmp_path))
        (tmp_path / name).write_bytes(b"new")
        assert digests.of_input(str(tmp_path)) != before, name


def test_a_run_that_resumes_after_an_update_names_all_who_made_it(tmp_path: Path) -> None:
    wanted = sft.COMMAND.fingerprint(RECIPE)
    for version in ("5.0", "5.1", "5.1", wanted["versions"]["transformers"]):
        now = wanted | {"versions": wanted["versions"] | {"transformers": version}}
        contract.begin(tmp_path, now)
        (tmp_path / "checkpoint-1").mkdir(exist_ok=True)
        assert contract.state_of(tmp_path, wanted)[0] == State.INTERRUPTED
    contract.finish(tmp_path, "sft", wanted, 1.0, {}, {})
    done = contract.read_done(tmp_path)
    assert [each["versions"]["transformers"] for each in done["earlier"]] == ["5.0", "5.1"]
    newer = wanted | {"versions": wanted["versions"] | {"transformers": "9.9"}}
    contract.begin(tmp_path, newer)  # to measure it again
    contract.finish(tmp_path, "sft", newer, 1.0, {}, {})
    versions = [each["versions"]["transformers"] for each in contract.read_done(tmp_path)["earlier"]]
    assert versions == ["5.0", "5.1", wanted["versions"]["transformers"]]


@pytest.mark.parametrize("when", range(12))
def test_a_kill_at_any_system_call_of_the_contract_leaves_what_the_next_start_can_use(
    when: int, tmp_path: Path
) -> None:
    """A process claims a folder, claims it afresh for another recipe and finishes it; it dies at one of its calls."""
    program = f"""
import os, shutil, sys
from pathlib import Path
from gemma2_post import sft
from gemma2_post.stage import contract
calls = 0
def dies(call):
    def counted(*args, **more):
        global calls
        calls += 1
        if calls == {when}:
            os._exit(9)
        return call(*args, **more)
    return counted
folder = Path({str(tmp_path / "sft")!r})
first, second = (sft.COMMAND.fingerprint({{"learning_rate": rate}}) for rate in (1, 2))
for module, name in ((os, "mkdir"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"),
                     (Path, "write_text"), (Path, "mkdir"), (Path, "rename"), (Path, "unlink")):
    setattr(module, name, dies(getattr(module, name)))
contract.begin(folder, first)
(folder / "progress").mkdir()
(folder / "progress" / "answers.jsonl").write_text("1")
contract.begin_afresh(folder, second)
contract.finish(folder, "sft", second, 1.0, {{}}, {{}})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == (9 if when else 0), ended.stderr
    wanted = sft.COMMAND.fingerprint({"learning_rate": 2})
    state, _ = contract.state_of(tmp_path / "sft", wanted)
    assert (state == State.DONE) or when
    if state != State.DONE:
        contract.begin_afresh(tmp_path / "sft", wanted)
        contract.finish(tmp_path / "sft", "sft", wanted, 1.0, {}, {})
    assert contract.state_of(tmp_path / "sft", wanted)[0] == State.DONE


DAMAGED = {
    "empty": b"",
    "cut": b'{"stage": "sft", "finger',
    "zeros": b"\0" * 40,
    "no UTF-8": b'{"stage": "\xff\xfe"}',
    "a list": b"[]",
    "null": b"null",
    "no keys": b"{}",
    "no fingerprint": b'{"stage": "sft", "output": "0", "metrics": {}, "wall_seconds": 1}',
    "a fingerprint of the wrong shape": b'{"fingerprint": {"recipe": []}}',
    "a fingerprint that is text": b'{"fingerprint": "abc"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("file", [contract.DONE, contract.BEGUN])
def test_a_damaged_stage_file_is_one_sentence_that_names_it(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / file).write_bytes(content)
    wanted = sft.COMMAND.fingerprint(RECIPE)
    readers = [
        lambda: contract.state_of(tmp_path, wanted),
        lambda: contract.refuse_strange_files(tmp_path),
        lambda: contract.begin_afresh(tmp_path, wanted) if file == contract.BEGUN else contract.read_done(tmp_path),
    ]
    for read in readers:
        with pytest.raises(UserError, match=rf"{tmp_path}/{file}: the file is damaged \(.*\); move {tmp_path} away"):
            read()
    assert (tmp_path / file).read_bytes() == content and (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.parametrize("content", [b"", b'{"output": ', b"[]", b"{}", b'{"output": 5}', b"\xff"])
def test_a_damaged_stage_file_of_an_input_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_bytes(content)
    with pytest.raises(UserError, match=r"stage\.json: the file is damaged"):
        sft.COMMAND.fingerprint({"model_name_or_path": str(tmp_path)})


LINE = b'{"key": "a", "reply": "[[A]]"}\n'


@pytest.mark.parametrize(
    "middle", [b"\n", b'{"key": "a", "rep\n', b"\xff\n", b"[]\n", b"{}\n", b'{"key": 1, "reply": ""}\n']
)
def test_a_damaged_line_is_named_and_the_file_is_left_as_it_is(middle: bytes, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(LINE + middle + LINE + b'{"key": "cut')
    with pytest.raises(UserError, match=rf"{file}: line 2 is damaged \(.*\); remove that line, then run the same"):
        contract.read_lines(file, {"key": str, "reply": str})
    assert file.read_bytes() == LINE + middle + LINE + b'{"key": "cut'


def test_only_a_file_that_is_appended_to_may_have_a_last_line_that_is_cut(tmp_path: Path) -> None:
    """A reader leaves it: another process may be writing it. The next writer removes it."""
    file = tmp_path / "watch.jsonl"
    file.write_bytes(LINE + LINE[:-5])
    with pytest.raises(UserError, match=rf"{file}: line 2 is damaged \(it is not JSON\); move {tmp_path} away"):
        contract.read_lines(file, is_appended_to=False)
    assert contract.read_lines(file) == [{"key": "a", "reply": "[[A]]"}]
    assert file.read_bytes() == LINE + LINE[:-5]
    contract.append_lines(file, [{"key": "a", "reply": "[[A]]"}])
    assert file.read_bytes() == LINE + LINE
    file.write_bytes(LINE[:-5])
    contract.append_lines(file, [{"key": "a", "reply": "[[A]]"}])
    contract.append_lines(tmp_path / "new.jsonl", [{"key": "a", "reply": "[[A]]"}])
    assert file.read_bytes() == LINE == (tmp_path / "new.jsonl").read_bytes()


def test_a_folder_for_an_output_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    refused = {
        "file": "not a directory",
        "file/below": "not a directory",
        "loop/below": "not a directory",
        "nowhere": "not a directory",
        "n" * 300: "file name too long",
        "not/there/" + "n" * 300: "file name too long",
        "/".join(["n" * 200] * 30): "file name too long",
        "/proc/not/there": "no such file or directory",
    }
    values = {"datasets": [{"path": "a.jsonl"}], "global_batch_size": 8, "use_cpu": True, "bf16": False}
    for name, why in refused.items():
        match = rf"^output_dir: .* cannot be written to \({why}\); fix that, or name"
        with pytest.raises(UserError, match=match):
            check_folder(tmp_path / name, "output_dir")
        with pytest.raises(UserError, match=rf"{match}|^output_dir has a name of 300 bytes"):
            sft.COMMAND.build(values | {"output_dir": str(tmp_path / name)})
    for folder in (tmp_path, tmp_path / "not" / "there", Path("runs/not/there"), Path("ä" * 100)):
        check_folder(folder, "output_dir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop", "nowhere"]


def test_a_folder_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom nothing stops."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=rf"run_dir: {tmp_path}/run cannot be written to \(permission denied\)"):
        check_folder(tmp_path / "run", "run_dir")


ERRNOS = "EACCES EPERM EROFS EDQUOT EIO ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP".split()


@pytest.mark.parametrize("name", ERRNOS)
def test_a_path_that_the_system_refuses_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = getattr(errno, name)
    with pytest.raises(SystemExit) as stopped, reported():
        raise OSError(code, os.strerror(code), "runs/x/sft")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: runs/x/sft: {os.strerror(code).lower()}; correct the path")


@pytest.mark.parametrize("config", [".", "recipes", "n" * 300, "README.md/sft.yaml"])
def test_a_config_that_is_no_file_is_one_sentence(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sft", "--config", config])
    with pytest.raises(SystemExit) as stopped:
        sft.COMMAND.launch()
    assert stopped.value.code == 2 and config in capsys.readouterr().err
