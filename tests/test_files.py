"""Local data files: every kind that users have is read, and a damaged one is refused with its line."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from gemma2_post.data import sources
from gemma2_post.data.keys import DataArguments, Source
from gemma2_post.data.mixture import load_documents
from gemma2_post.data.preparation import split_held_out
from gemma2_post.data.rows import CONVERSATION, DOCUMENT
from gemma2_post.data.sources import check_sources
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from tests.conftest import load_conversations

ROWS = [{"prompt": f"What is {i}, really?", "completion": f'It is "{i}".\nYes.'} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f'"What is {i}, really?","It is ""{i}"".\nYes."\n' for i in range(4))


def load(path: Path | str, columns: list[str] | None = None, **source: object) -> Dataset:
    return load_conversations([Source(str(path), **source)], 0.0, 0, columns)


def questions(path: Path | str, **source: object) -> list[str]:
    return [messages[0]["content"] for messages in load(path, **source)["messages"]]


ALL = [row["prompt"] for row in ROWS]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


FILES = {
    "rows.jsonl": LINES.encode(),
    "rows.ndjson": LINES.encode(),
    "blank.jsonl": LINES.replace("\n", "\n\n  \n").encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "rows.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "lines.json": LINES.encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.gz": gzip.compress(CSV.encode()),
    "rows.jsonl.zst": zstd(LINES.encode()),
    "rows.csv": CSV.encode(),
}


@pytest.mark.parametrize(("name", "content"), FILES.items(), ids=FILES.keys())
def test_every_kind_of_file_gives_the_same_rows(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    found = load(tmp_path / name)["messages"]
    assert [[turn["content"] for turn in messages] for messages in found] == [[*row.values()] for row in ROWS]


def test_shards_are_a_folder_or_a_glob(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        split = "train" if i < 3 else "test"
        Dataset.from_list([row]).to_parquet(tmp_path / f"{split}-{i:05}-of-00004.parquet")
    (tmp_path / "README.md").write_text("not data")
    assert questions(tmp_path) == questions(tmp_path / "train-*.parquet") == ALL[:3]
    assert questions(tmp_path, split="test") == questions(tmp_path / "*.parquet", split="test") == ALL[3:]
    with pytest.raises(UserError, match=r"there is no split validation, only test, train; correct the split"):
        load(tmp_path, split="validation")
    with pytest.raises(UserError, match="there are no data files"):
        load(tmp_path / "*.jsonl")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a[1].jsonl").write_text(LINES)
    assert questions(tmp_path / "more" / "a[1].jsonl") == questions(tmp_path / "more") == ALL


@pytest.mark.parametrize(
    ("named", "unnamed", "split"),
    [("chats-train.jsonl", "alpaca.jsonl", "train"), ("my-test-chats.jsonl", "b.jsonl", "test")],
)
def test_files_of_which_only_some_are_named_by_a_split_are_refused(
    named: str, unnamed: str, split: str, tmp_path: Path
) -> None:
    for name in (named, unnamed):
        (tmp_path / name).write_text(LINES)
    for path in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=f"{named} is named by the split {split}, and {unnamed} by none; name the"):
            load(path)


def test_what_describes_data_is_no_data(tmp_path: Path) -> None:
    """As in folders from the Hub, and in the output of `curate`."""
    (tmp_path / "train-00000-of-00001.jsonl").write_text(LINES)
    for name in ("README.md", "dataset_info.json", "dataset_infos.json", contract.DONE, "removed.parquet"):
        (tmp_path / name).write_text("{}")
    assert questions(tmp_path) == questions(tmp_path / "*") == ALL


def test_a_slice_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES)
    assert questions(tmp_path / "rows.jsonl", split="train[1:3]") == ALL[1:3]
    assert questions(tmp_path / "rows.jsonl", split="train[:50%]") == ALL[:2]
    with pytest.raises(UserError, match=r"split train\[x\] is not readable"):
        load(tmp_path / "rows.jsonl", split="train[x]")


BROKEN: dict[str, tuple[bytes, str]] = {
    "cut.jsonl": (LINES.encode()[:-20], r"line 4 is not JSON \(Unterminated string"),
    "blank.jsonl": (b"\n \n\n", "there are no rows"),
    "null.jsonl": (LINES.encode() + b"null\n", "line 5 is null, not an object"),
    "number.jsonl": (b"5\n", "line 1 is a number, not an object"),
    "inner.json": (b'[{"prompt": "a", "completion": "b"}, "x"]', "row 1 is a text, not an object"),
    "object.json": (b'{\n"data": []}', "is an object; write a list of objects"),
    "empty.jsonl": (b"", "the file is empty"),
    "rowless.jsonl": (b"{}\n", r"row 0: the columns \(none\) are of no known format"),
    "page.jsonl": (b"<!DOCTYPE html><html></html>", "begins like a web page"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
    "zipped.jsonl": (gzip.compress(LINES.encode()), "is compressed with gzip; rename it"),
    "table.jsonl": (b"PAR1xx", "is a Parquet file"),
    "utf16.jsonl": (LINES.encode("utf-16"), "is encoded as UTF-16; convert it: iconv"),
    "utf16le.jsonl": (LINES.encode("utf-16-le"), "UTF-16 without a mark"),
    "latin1.jsonl": (b'{"prompt": "Caf\xe9", "completion": "x"}\n', r"is not UTF-8 \(byte 0xe9\)"),
    "twice.jsonl": (b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', "prompt is given twice"),
    "deep.jsonl": (b'{"a": ' + b"[" * 100_000, "line 1 cannot be read|line 1 is not JSON"),
    "digits.jsonl": (b'{"a": ' + b"1" * 5000 + b"}", "line 1 cannot be read"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 100)[:-30], "cannot be read"),
    "no.jsonl.gz": (LINES.encode(), "cannot be read"),
    "fields.csv": (b"prompt,completion\na,b,c\n", "line 2 has 3 fields, and the header 2"),
    "header.csv": (b"prompt,prompt\na,b\n", "'prompt' heads two columns"),
    "quote.csv": (b'prompt,completion\n"a,b\n', "is not CSV"),
    "cut.parquet": (b"PAR1" + b"\0" * 50, "not readable as parquet"),
    "text.txt": (b"\xff\xfea", "is encoded as UTF-16"),
}


@pytest.mark.parametrize(("name", "case"), BROKEN.items(), ids=BROKEN.keys())
def test_a_broken_file_is_refused_by_the_check_and_by_the_stage(
    name: str, case: tuple[bytes, str], tmp_path: Path
) -> None:
    content, message = case
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        load(tmp_path / name)
    assert str(refused.value).startswith(str(tmp_path / name)) and "\n" not in str(refused.value)
    if name not in ("null.jsonl", "cut.jsonl", "cut.jsonl.gz"):  # the check reads the first rows
        with pytest.raises(UserError, match=message):
            check_sources([Source(str(tmp_path / name))], [], CONVERSATION, 0.0)


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="there are no rows"):
        check_sources([Source(str(tmp_path / "rows.parquet"))], [], CONVERSATION, 0.0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://example.com/rows.jsonl", "is a URL; download the file"),
        ("hf://datasets/a/b/rows.jsonl", "is a URL"),
        ("./nowhere", "there is no such file"),
        ("a/b/c", "there is no such file"),
        ("nowhere.jsonl", "there is no such file"),
        ("nowhere/*.jsonl", "there are no data files"),
        ("", "a path of datasets is empty"),
    ],
)
def test_a_path_that_is_no_source_is_refused(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(path)
    with pytest.raises(UserError, match=message):
        check_sources([Source(path)], [], CONVERSATION, 0.0)


def test_the_rows_are_those_of_the_file_even_if_its_size_and_time_are_the_old_ones(tmp_path: Path) -> None:
    """As after `tar` or `rsync -t`; datasets' own cache would return the old rows."""
    file = tmp_path / "rows.jsonl"
    file.write_text(LINES)
    before, status = questions(file), file.stat()
    file.write_text(LINES.replace("really", "surely"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size and file.stat().st_mtime_ns == status.st_mtime_ns
    assert questions(file) == [text.replace("really", "surely") for text in before]


def test_the_fingerprint_covers_every_file_of_a_folder_and_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "b.csv").write_text(CSV)
    paths = [str(tmp_path), str(tmp_path / "*")]
    before = [contract.input_digest(path) for path in paths]
    (tmp_path / "b.csv").write_text(CSV.replace("Yes", "No!"))
    after = [contract.input_digest(path) for path in paths]
    assert None not in before and all(old != new for old, new in zip(before, after, strict=True))


# --- columns ---


def test_a_kept_column_of_two_types_is_refused_with_its_rows(tmp_path: Path) -> None:
    """A column that no one reads may be of any type, even where it changes after 60,000 rows."""
    rows = [ROWS[0] | {"level": None, "note": None}] * 60_000 + [
        ROWS[0] | {"level": 1, "note": "x"},
        ROWS[0] | {"level": "a"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(tmp_path / "rows.jsonl", ["note"])["note"][60_000] == "x"
    with pytest.raises(UserError, match="column level is int in row 60000 and str in row 60001; write values of one"):
        load(tmp_path / "rows.jsonl", ["level"])


def test_a_column_is_found_in_whichever_row_has_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES + json.dumps(ROWS[0] | {"level": 5}) + "\n")
    assert load(tmp_path / "rows.jsonl", ["level"])["level"] == [None] * 4 + [5]
    check_sources([Source(str(tmp_path / "rows.jsonl"))], ["level"], CONVERSATION, 0.0)
    with pytest.raises(UserError, match="columns: no source has depth"):
        check_sources([Source(str(tmp_path / "rows.jsonl"))], ["depth"], CONVERSATION, 0.0)


# --- the Hub ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a data set, which is read as if `someone/chats` were it on the Hub."""

    def load_from_folder(path: str, name: str | None, split: str, revision: str | None) -> Dataset:
        return load_dataset(str(tmp_path / "data"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(sources, "load_dataset", load_from_folder)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_a_data_set_whose_files_have_different_columns_is_one_sentence(hub: Path) -> None:
    (hub / "a.jsonl").write_text(LINES)
    (hub / "b.jsonl").write_text(json.dumps({"note": "x"}) + "\n")
    with pytest.raises(
        UserError, match=r"^someone/chats: its files cannot be read as one table .*note.*; download"
    ) as refused:
        load("someone/chats")
    assert "\n" not in str(refused.value)
    (hub / "a.jsonl").write_text('{"prompt": "a", "comp')
    (hub / "b.jsonl").unlink()
    with pytest.raises(UserError, match=r"^someone/chats: its files cannot be read as one table"):
        load("someone/chats")


def test_a_data_set_without_a_known_column_is_refused_with_its_columns(hub: Path) -> None:
    (hub / "a.jsonl").write_text(LINES.replace("prompt", "ask").replace("completion", "say"))
    with pytest.raises(UserError, match="row 0: the columns ask, say are of no known format"):
        load("someone/chats")
    (hub / "a.jsonl").write_text(LINES.replace("prompt", "ask"))
    with pytest.raises(UserError, match=r"row 0: the columns .*ask.* are of no known format"):
        load("someone/chats")
    (hub / "a.jsonl").write_text(LINES)
    assert questions("someone/chats") == ALL


# --- functions ---


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "returned NoneType; return a list of rows"),
        ("return 'x'", "returned str; return a list"),
        ("return {'prompt': 'a'}", "returned dict; return a list"),
        ("return [None]", "row 0 is NoneType; return a list of rows, each a dictionary"),
        ("raise ValueError('no data')", "making rows raised ValueError: no data"),
        ("yield {'prompt': 'a', 'completion': 'b'}; yield 5", "row 1 is int"),
        ("yield {'prompt': 'a', 'completion': 'b'}; raise OSError('gone')", "making rows raised OSError: gone"),
    ],
)
def test_a_function_that_gives_no_rows_is_refused(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"source_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def rows(split):\n    {body}\n\ndef none():\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"^{name}:rows: {message}"):
        load(f"{name}:rows")
    with pytest.raises(UserError, match=f"^{name}:none: making rows raised TypeError: too many positional"):
        load(f"{name}:none")


def test_a_function_may_generate_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "generated.py").write_text(f"def rows(split):\n    yield from {ROWS!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert questions("generated:rows") == ALL


# --- documents and held-out rows ---


def test_plain_text_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time.\n\nThe end.\n")
    (tmp_path / "chat.jsonl").write_text(LINES.splitlines()[0])
    both = [Source(str(tmp_path / name)) for name in ("story.txt", "chat.jsonl")]
    story, chat = load_documents(both, 0.0, 0)
    assert story == "Once upon a time.\n\nThe end.\n" and chat[0]["content"] == ALL[0]
    check_sources(both, [], DOCUMENT, 0.0)


def test_what_is_held_out_is_not_trained_on(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "held_out.jsonl").write_text(LINES.splitlines()[1])
    arguments = DataArguments([Source(str(tmp_path / "train.jsonl"))], [Source(str(tmp_path / "held_out.jsonl"))])
    train, held_out = (rows.dataset() for rows in split_held_out(arguments, 0, CONVERSATION, tokenizer))
    assert [messages[0]["content"] for messages in train["messages"]] == [ALL[0], *ALL[2:]] and len(held_out) == 1
    assert "dropped 1 of 4 training rows, because they are held out, too" in caplog.text
    arguments.held_out_datasets = arguments.datasets
    with pytest.raises(UserError, match="every training row is held out, too"):
        split_held_out(arguments, 0, CONVERSATION, tokenizer)
