"""Hundreds of bad inputs, made by varying good ones with fixed seeds: refused in one sentence, or nothing is lost."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import yaml

from gemma2_post.data import pairs, rows
from gemma2_post.data.keys import Source
from gemma2_post.data.mixture import load_rows
from gemma2_post.data.sources import check_sources
from gemma2_post.pipeline import check
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.recipe import keys_of
from gemma2_post.stage.recipe_file import load_recipe
from gemma2_post.stage.stages import STAGES, command_of

FORMATS = {"sft": rows.CONVERSATION, "rlhf": rows.PROMPT, "evaluate": rows.QUESTION, "reward": pairs.PAIR}
ANSWERS = {*rows.ANSWERS, "chosen", "rejected", "response_1", "response_2"}
VALUES = [
    *(
        None,
        -1,
        0,
        1,
        2,
        0.5,
        1e-9,
        1e9,
        10**30,
        math.nan,
        math.inf,
        True,
        False,
        "",
        " ",
        "x",
        "none",
        "\0",
        "é" * 300,
    ),
    *([], {}, [None], [[]], [1, "a"], {"a": 1}, {"path": None}, [{"path": "x"}], [{"weight": 0}]),
    *("nowhere.jsonl", "../x", "a:b", "http://x/y"),
]


def is_one_sentence(error: UserError) -> bool:
    text = str(error)
    return "\n" not in text and 20 < len(text) < 900 and "Traceback" not in text


# --- data ---


def good_rows(random: Random) -> list[dict]:
    """Rows of all kinds; each text has a word of its own."""

    def text() -> str:
        return f"word{random.getrandbits(40)} and more."

    def chat(turns: int) -> list[dict]:
        return [{"role": ("user", "assistant")[i % 2], "content": text()} for i in range(turns)]

    def sharegpt(turns: int) -> list[dict]:
        return [{"from": ("human", "gpt")[i % 2], "value": text()} for i in range(turns)]

    question = chat(3)
    return [
        {"messages": chat(2)},
        {"messages": [{"role": "system", "content": text()}, *chat(4)], "source": text()},
        {"conversations": sharegpt(2), "id": 7},
        {"prompt": text(), "completion": text()},
        {"instruction": text(), "input": text(), "output": text()},
        {"instruction": text(), "context": text(), "response": text(), "category": "qa"},
        {"system_prompt": text(), "question": text(), "answer": text()},
        {"text": f"<|im_start|>user\n{text()}<|im_end|>\n<|im_start|>assistant\n{text()}<|im_end|>\n"},
        {
            "prompt": f"\n\nHuman: {text()}\n\nAssistant: {text()}\n\nHuman: {text()}\n\nAssistant:",
            "completion": text(),
        },
        {"prompt": text(), "chosen": text(), "rejected": text(), "score_chosen": 3, "score_rejected": 1},
        {
            "chosen": [*question, {"role": "assistant", "content": text()}],
            "rejected": [*question, {"role": "assistant", "content": text()}],
        },
        {"prompt": text(), "response_1": text(), "response_2": text(), "preference_strength": -1},
        {"turns": [text(), text()]},
    ]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values in a nested one."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(row: dict, random: Random) -> dict:
    """The row with a value replaced, removed, renamed, or added somewhere."""
    row = json.loads(json.dumps(row))
    path = random.choice([path for path in places(row) if path])
    holder = row
    for key in path[:-1]:
        holder = holder[key]
    how = random.choice(["replace", "remove", "rename", "add"])
    if how == "remove":
        del holder[path[-1]]
    elif how == "replace" or isinstance(holder, list):
        holder[path[-1]] = random.choice(VALUES)
    elif how == "rename":
        holder[f"{path[-1]}_2"] = holder.pop(path[-1])
    else:
        added = random.choice(
            ["context", "tools", "weight", "tool_calls", "system", "name", "history", "prompt", "label"]
        )
        holder.setdefault(added, random.choice([*VALUES, "word7 and more."]))
    return row


def damaged(content: bytes, random: Random) -> bytes:
    """The file cut, encoded otherwise, or with other bytes somewhere."""
    place = random.randrange(len(content))
    return random.choice(
        [
            content[:place],
            content[:place] + bytes([random.randrange(256)]) + content[place:],
            content[:place] + b"\0\0" + content[place:],
            content.decode().encode("utf-16"),
            content.replace(b"word", "wörd".encode("latin-1")),
            content + random.choice([b"null\n", b"[]\n", b"5\n", b"{}\n", b'"x"\n', b"<html>\n", b"\xff\n"]),
            b"\n \n" + content.replace(b"\n", b"\r\n"),
        ]
    )


def words(value: object, is_prompt: bool) -> set[str]:
    """The words of their own in the columns that belong to a conversation."""
    known = (rows.CONVERSATION.columns | pairs.PAIR.columns) - {"label"}
    known -= {"text"} if value.keys() & {*rows.QUESTIONS, *rows.CONVERSATIONS} else set()  # Alpaca has both
    kept = {name: each for name, each in value.items() if name in known and not (is_prompt and name in ANSWERS)}
    return {word for word in json.dumps(kept).replace("\\n", " ").replace('"', " ").split() if word.startswith("word")}


@pytest.mark.parametrize("seed", range(240))
def test_a_data_file_is_read_wholly_or_refused(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    name, row_format = random.choice(list(FORMATS.items()))
    row = random.choice(good_rows(random))
    if seed % 3:
        row = changed(row, random)
    content = "".join(json.dumps(each) + "\n" for each in [row] * 3).encode()
    if seed % 3 == 0:
        content = damaged(content, random)
    file = tmp_path / random.choice(["rows.jsonl", "rows.json", "rows.ndjson"])
    file.write_bytes(content)
    try:
        check_sources([Source(str(file))], [], row_format, 0.0)
        found = load_rows([Source(str(file))], 0.0, 0, row_format=row_format).dataset().to_list()
    except UserError as error:
        assert str(error).startswith(str(file)) and ";" in str(error) and is_one_sentence(error)
        return
    if seed % 3:  # the model's answers are no part of a prompt; the last turn of a conversation is one
        said = json.dumps(found[0])
        lost = {word for word in words(row, is_prompt=name in ("rlhf", "evaluate")) if word not in said}
        assert not lost or (name in ("rlhf", "evaluate") and len(lost) == 1 and lost.pop() in answer_of(row))


def answer_of(row: dict) -> str:
    """The model's last turn of a conversation."""
    turns = next((row[name] for name in rows.CONVERSATIONS if isinstance(row.get(name), list)), [row.get("text")])
    return json.dumps(turns[-1])


# --- recipes ---


@pytest.mark.parametrize("seed", range(120))
def test_a_value_of_a_recipe_is_taken_or_refused(seed: int) -> None:
    random = Random(seed)
    stage = random.choice(list(STAGES))
    command = command_of(stage)
    values = load_recipe(f"recipes/tiny/{stage}.yaml") | {"output_dir": "out"}
    name = random.choice([name for name in keys_of(command.recipe) if name not in command.refused])
    values[name] = random.choice(VALUES)
    try:
        command.build(values, Launcher(use_cpu=True))
    except UserError as error:
        assert is_one_sentence(error)


# --- pipelines ---


@pytest.mark.parametrize("seed", range(60))
def test_a_pipeline_is_taken_or_refused(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(seed)
    for recipe in Path("recipes/tiny").glob("*.yaml"):
        (tmp_path / recipe.name).write_text(recipe.read_text())
    content = yaml.safe_load((tmp_path / "pipeline.yaml").read_text())
    content["run_dir"] = str(tmp_path / "run")
    if seed % 4:
        text = yaml.safe_dump(changed(content, random), sort_keys=False)
    else:
        good = yaml.safe_dump(content, sort_keys=False)
        place = random.randrange(len(good))
        text = good[:place] + random.choice(["\t", ":", "- ", "\0", "&a *a", "!!python/none", "{", "é"]) + good[place:]
    (tmp_path / "pipeline.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["gemma2-post"])
    try:
        check.check(load_pipeline(tmp_path / "pipeline.yaml"))
    except UserError as error:
        assert is_one_sentence(error)
