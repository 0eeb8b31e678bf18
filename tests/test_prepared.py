"""Rows are read, checked and tokenized once: on all cores, whatever stops in between, for all who ask for the same."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post import cli
from gemma2_post.data import prepared, reading
from gemma2_post.data.keys import Source
from gemma2_post.data.mixture import Rows, load_rows
from gemma2_post.data.pairs import PAIR
from gemma2_post.data.rows import CONVERSATION, PROMPT, RowFormat
from gemma2_post.models.tokenizer import render
from gemma2_post.stage.errors import UserError
from tests.conftest import BASE

Row = dict[str, object]


def conversations(num_rows: int) -> list[Row]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i}?" * (1 + i % 7)},
                {"role": "assistant", "content": f"It is {i}."},
            ]
        }
        for i in range(num_rows)
    ]


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(
    path: str, tokenizer: PreTrainedTokenizerBase | None, columns: list[str] | None = None, **more: object
) -> Rows:
    return load_rows([Source(path)], 0.5, 0, columns, **{"row_format": CONVERSATION, "tokenizer": tokenizer} | more)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 20 rows, so that a hundred rows are read by all cores."""
    monkeypatch.setattr(reading, "_BATCH_ROWS", 20)
    monkeypatch.setattr(reading, "_ENCODED_ROWS", 7)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The sources that are read, not mapped."""
    found: list[str] = []
    monkeypatch.setattr(prepared, "read", lambda task: found.append(task.source.path) or reading.read(task))
    yield found


# --- the same rows ---


def test_rows_of_all_cores_are_those_of_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, small_batches: None
) -> None:
    rows = conversations(130)
    rows[30]["messages"] = rows[31]["messages"][:1]
    found = load(write(tmp_path / "rows.jsonl", rows), tokenizer)
    del rows[30]
    rendered = render(tokenizer, [row["messages"] for row in rows])
    expected = {name: [values.tolist() for values in each] for name, each in rendered.items()}
    assert len(os.listdir(next((tmp_path / "cache" / "gemma2_post").glob("*[!k]")))) > 5
    dataset = found.dataset()
    assert dataset["messages"] == [row["messages"] for row in rows]
    assert dataset["input_ids"] == expected["input_ids"] and dataset["labels"] == expected["labels"]
    assert found.column("_length").tolist() == list(map(len, expected["input_ids"]))


def test_the_invalid_row_that_is_named_is_the_first_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, small_batches: None
) -> None:
    rows = conversations(100)
    for number in (47, 48, 99):
        rows[number] = {"messages": []}
    path = write(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        with pytest.raises(UserError, match=r"row 47: column messages is empty.* \(3 of 100 rows are invalid\)"):
            load_rows([Source(path)], 0.0, 0, row_format=CONVERSATION, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        (None, "a", [None, "a"]),
        ("a", None, ["a", None]),
        (1, 2.5, [1.0, 2.5]),
        ({"a": 1}, {"b": "x"}, [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
        ([], ["a"], [[], ["a"]]),
    ],
)
def test_types_of_a_kept_column_may_be_known_only_later(
    first: object, then: object, expected: list[object], tmp_path: Path, small_batches: None
) -> None:
    rows = conversations(100)
    for number, row in enumerate(rows):
        row["note"] = first if number < 70 else then
    found = load(write(tmp_path / "rows.jsonl", rows), None, ["note"]).dataset()["note"]
    assert [found[0], found[99]] == expected and len(found) == 100


def test_a_kept_column_may_be_missing_in_many_rows(tmp_path: Path, small_batches: None) -> None:
    rows = conversations(100)
    rows[70]["note"] = "here"
    found = load(write(tmp_path / "rows.jsonl", rows), None, ["note"]).dataset()["note"]
    assert [number for number, note in enumerate(found) if note] == [70]


@pytest.mark.parametrize(("last_int", "first_int"), [(80, 3), (90, 80)], ids=["in two batches", "in one batch"])
def test_a_kept_column_of_two_types_in_distant_rows_is_refused(
    last_int: int, first_int: int, tmp_path: Path, small_batches: None
) -> None:
    rows = conversations(100)
    for number, row in enumerate(rows):
        row["note"] = None if number < 3 else 5 if number < last_int else "five"
    found = f"column note is int in row {first_int} and str in row {last_int}; write values of one type"
    with pytest.raises(UserError, match=found):
        load(write(tmp_path / "rows.jsonl", rows), None, ["note"])


# --- once ---


def test_the_same_rows_are_read_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, read: list[str]) -> None:
    path = write(tmp_path / "rows.jsonl", conversations(5))
    before = load(path, tokenizer).dataset()
    moved = (
        write(tmp_path / "elsewhere" / "rows.jsonl", conversations(5)) if (tmp_path / "elsewhere").mkdir() else None
    )
    del moved
    again = load_rows([Source(path, weight=1.0)], 0.1, seed=7, row_format=CONVERSATION, tokenizer=tokenizer)
    assert read == [path] and sorted(again.dataset()["input_ids"]) == sorted(before["input_ids"])


@pytest.mark.parametrize("what", ["content", "columns", "format", "setting", "tokenizer", "template", "library"])
def test_what_rows_depend_on_prepares_them_again(
    what: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "a", "rejected": f"b{i}", "score_chosen": 2, "score_rejected": 1} for i in "012"
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    row_format: RowFormat = PAIR
    load(path, tokenizer, row_format=PAIR)
    load(path, tokenizer, row_format=PAIR)
    assert len(read) == 1
    columns = None
    if what == "content":
        stamp = os.stat(path)
        write(Path(path), [rows[0] | {"chosen": "c"}, *rows[1:]])
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a copy with the same time and size has
    elif what == "columns":
        columns = ["prompt"]
    elif what == "format":
        row_format = PROMPT
    elif what == "setting":
        row_format = PAIR.with_settings({"score_margin": 0.5})
    elif what == "template":
        monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
    elif what == "library":
        monkeypatch.setattr(prepared.metadata, "version", lambda name: "0")
    else:
        monkeypatch.setattr(type(tokenizer.backend_tokenizer), "to_str", lambda self: "another", raising=False)
    found = load(path, tokenizer, columns, row_format=row_format).dataset()
    assert len(read) == 2
    if what == "content":
        assert found["chosen"][0][0]["content"] == "c"
    if what == "setting":
        assert found["margin"] == [0.5] * 3


def test_a_function_counts_by_its_rows(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read what no hash of its code would see."""
    write(tmp_path / "rows.jsonl", conversations(3))
    (tmp_path / "of_a_file.py").write_text(
        "import json, pathlib\n\ndef rows(split):\n"
        f"    return [json.loads(line) for line in pathlib.Path({str(tmp_path / 'rows.jsonl')!r}).open()]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert [len(load("of_a_file:rows", None)) for _ in range(2)] == [3, 3] and len(read) == 1
    write(tmp_path / "rows.jsonl", conversations(4))
    assert len(load("of_a_file:rows", None)) == 4 and len(read) == 2


def test_prepared_rows_are_listed_with_their_source_and_deleted_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", conversations(3))
    cli.clean()
    assert capsys.readouterr().out == "there is no prepared data\n"
    load(path, None)
    for yes, ending in ((False, "--yes deletes them"), (True, "deleted")):
        cli.clean(yes=yes)
        printed = capsys.readouterr().out.splitlines()
        assert f" ({path}): " in printed[0] and printed[1:] == [ending]
    assert len(load(path, None)) == 3


# --- interrupted, and side by side ---

SCRIPT = """
import sys, time
from gemma2_post.data import reading
from gemma2_post.data.keys import Source
from gemma2_post.data.mixture import load_rows
from gemma2_post.data.rows import CONVERSATION
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer

reading._BATCH_ROWS = 20
read_batch = reading._read_batch

def slowly(*arguments):
    time.sleep(float(sys.argv[2]))
    return read_batch(*arguments)

reading._read_batch = slowly
tokenizer = load_tokenizer(sys.argv[3], load_config(sys.argv[3]))
rows = load_rows([Source(sys.argv[1])], 0.0, 0, row_format=CONVERSATION, tokenizer=tokenizer)
print(len(rows), sum(rows.column("_length")))
"""


def start(path: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, path, str(seconds), BASE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_a_file(process: subprocess.Popen[str], tmp_path: Path) -> None:
    while not list((tmp_path / "cache").rglob("*.tmp/*.arrow")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_second_process_waits_and_maps(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", conversations(200))
    first = start(path, 0.2)
    wait_for_a_file(first, tmp_path)
    rows = load(path, tokenizer)
    assert not read and "waiting for another process that prepares the same rows" in caplog.text
    printed, _ = first.communicate(timeout=60)
    assert printed == f"200 {sum(rows.column('_length'))}\n"


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_that_counts_and_no_process(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", conversations(400))
    killed = start(path, 0.2)
    wait_for_a_file(killed, tmp_path)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    assert children
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert all(name.endswith((".tmp", ".lock")) for name in os.listdir(tmp_path / "cache" / "gemma2_post"))
    printed, _ = start(path, 0).communicate(timeout=60)
    assert printed.startswith("400 ")
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def _is_killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_the_system_kills_is_said(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_read_batch", _is_killed)
    with pytest.raises(UserError, match=r"the system killed a process while reading and tokenizing .*rows.jsonl"):
        load(write(tmp_path / "rows.jsonl", conversations(100)), tokenizer)
    assert not multiprocessing.active_children()


# --- as data sets draw ---


def test_draws_are_those_of_the_library(tmp_path: Path) -> None:
    """A recipe's rows and split stay what they were when `datasets` drew them."""
    path = write(tmp_path / "rows.jsonl", conversations(40))
    expected = Dataset.from_dict({"row": range(40)}).shuffle(seed=3).select(range(15))["row"]
    sources = [Source(path, weight=15.0), Source(write(tmp_path / "one.jsonl", conversations(1)), weight=1.0)]
    assert load_rows(sources, 0.0, 3, row_format=CONVERSATION).numbers[:15].tolist() == list(expected)
