"""The stage that removes what models should not learn from: each rule on planted rows, and the stage as a whole."""

import json
import re
import string
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow import parquet

from gemma2_post import curate
from gemma2_post.curation import duplicates, manners
from gemma2_post.curation.decontamination import Asked, Outside
from gemma2_post.data.keys import Source
from gemma2_post.data.mixture import load_rows
from gemma2_post.data.near_duplicates import Sketches, candidates, near, similarity, sketch
from gemma2_post.data.pairs import PAIR
from gemma2_post.pipeline import check, decisions, summary
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.report import report
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError
from tests.conftest import TEACHER, load_conversations, load_prompts, run_stage
from tests.test_reward import make_reward_model
from tests.test_synthesize import Server, completion

Recipe = dict[str, object]
Run = Callable[..., Path]


@cache
def texts(num: int, num_words: int) -> list[str]:
    """Different pieces of Python's documentation, which has 36,000 words of prose."""
    paragraphs = dict.fromkeys(each for topic in topics.values() for each in re.split(r"\n\s*\n", topic))
    prose = [each for each in paragraphs if sum(c.isalpha() or c.isspace() for c in each) > 0.9 * len(each)]
    every = " ".join(prose).split()
    return [" ".join(every[i * num_words : (i + 1) * num_words]) for i in range(num)]


def edited(text: str, share: float, random: Random) -> str:
    """The text with this share of its words replaced, left out, or put behind a new one."""
    spans = [match.span() for match in re.finditer(r"\w+", text)]
    for start, end in sorted(random.sample(spans, int(share * len(spans))), reverse=True):
        new = "".join(random.choices(string.ascii_lowercase, k=7))
        text = text[:start] + random.choice([new, "", f"{new} {text[start:end]}"]) + text[end:]
    return text


def near_of(several: list[str], max_edits: float = 0.1) -> dict[int, int]:
    """The texts that are near duplicates of an earlier one, with that one."""
    return _near_in(sketch([[text] for text in several]), max_edits)


def _near_in(sketches: Sketches, max_edits: float) -> dict[int, int]:
    compare = partial(sketches.similarity_if_near, max_edits=max_edits)
    found = near(*candidates(sketches.bands), np.arange(len(sketches)), compare)
    return {each[0]: each[1] for each in found if each}


# --- duplicates ---


@pytest.mark.parametrize(("num_words", "num"), [(20, 400), (60, 400), (220, 120)])
def test_texts_with_a_tenth_of_their_words_edited_are_found_and_other_texts_are_not(num_words: int, num: int) -> None:
    """Recall and precision of 0.98 at least; the other texts include those of which a quarter differs."""
    random = Random(num_words)
    originals = texts(num, num_words)
    near_ones = [edited(text, random.choice([0.02, 0.05, 0.1]), random) for text in originals]
    others = [edited(text, 0.25, random) for text in originals]
    found = near_of([*originals, *near_ones, *others])
    right = sum(found.get(num + i) == i for i in range(num))
    assert right >= 0.98 * num
    wrong = sum(i >= 2 * num or i < num for i in found)
    assert wrong <= 0.02 * len(found)


def test_short_texts_must_have_the_same_words() -> None:
    """A tenth of seven words is none: the capital of another country is another question."""
    asked = ["What is the capital of France?", "What is the capital of Italy?", "what is the capital of FRANCE ?"]
    assert near_of(asked) == {2: 0}
    assert near_of(["x < y", "x > y", "", "", "!!"]) == {}


def test_chosen_and_rejected_the_other_way_round_are_no_duplicate() -> None:
    first, second = texts(2, 60)
    sketches = sketch([["Who?", first, second], ["Who?", second, first], ["Who?", first, second]])
    assert sketches.bands[0].tolist() == sketches.bands[2].tolist() != sketches.bands[1].tolist()
    assert similarity(sketches.pairs_of(0), sketches.pairs_of(1)) < 0.2


def test_different_short_answers_to_a_long_prompt_are_no_duplicates() -> None:
    (prompt,) = texts(1, 100)
    talks = [[prompt, "It is offensive."], [prompt, "It is not offensive at all."], [prompt, "it is offensive"]]
    assert _near_in(sketch(talks), 0.1) == {2: 0}


def test_near_duplicates_are_found_among_many_texts_with_the_same_long_introduction() -> None:
    """Two thirds of the words of 1,200 texts are the same, so they share bands with more texts than are compared."""
    random, (introduction,) = Random(0), texts(1, 40)
    originals = [f"{introduction} {each}" for each in texts(1202, 20)[2:]]
    copies = [f"{introduction} {edited(each[len(introduction) :], 0.1, random)}" for each in originals[-100:]]
    _, groups = candidates(sketch([[each] for each in originals]).bands)
    assert np.bincount(groups).max() > 200
    found = near_of([*originals, *copies])
    right = sum(found.get(1200 + i) == 1100 + i for i in range(100))
    assert right >= 98 and sum(i < 1200 for i in found) <= 0.02 * 1200


def test_which_row_stays_is_by_rank() -> None:
    keys = np.array([7, 8, 7, 7, 8], np.uint64)
    lengths, rewards = np.array([3, 1, 5, 4, 2]), np.array([0.5, np.nan, 0.1, 0.9, -1.0])
    stays = {
        keep: {other for _, other in duplicates.exact(keys, duplicates.ranks(keep, lengths, rewards))}
        for keep in ("first", "longest", "shortest", "highest_reward")
    }
    assert stays == {"first": {0, 1}, "longest": {2, 4}, "shortest": {0, 1}, "highest_reward": {3, 4}}
    order = duplicates.ranks("longest", lengths, None)
    assert dict(duplicates.too_many(np.array([0, 1, 0, 0, 1]), order, 2)) == {0: 2}


def test_a_text_is_compared_with_the_kept_ones_only() -> None:
    """Of a chain of texts, each near the one before, the third is not near the first, which alone stays beside it."""
    first = texts(1, 200)[0].split()
    second, third = list(first), list(first)
    second[:25] = third[:25] = [f"new{i}" for i in range(25)]
    third[100:130] = [f"other{i}" for i in range(30)]
    assert near_of([" ".join(each) for each in (first, second, third)], 0.08) == {1: 0}


# --- evaluation sets ---


@pytest.mark.parametrize("num_words", [6, 12, 40, 150])
def test_leaked_prompts_are_found_in_other_letters_and_behind_other_words(num_words: int) -> None:
    """With changed case and punctuation, behind a prefix, with some words edited: recall 0.98 at least."""
    random, num = Random(0), min(150, 18_000 // num_words)
    prompts, others = texts(2 * num, num_words)[:num], texts(2 * num, num_words)[num:]
    outside = Outside([Asked("set", i, text) for i, text in enumerate(prompts)], 8, 0.5, 0.1)
    outside.add_sketches(sketch([[text] for text in prompts]))

    def leaks(several: list[str]) -> list[int | None]:
        sketches: Sketches = sketch([[text] for text in several])
        found = [outside.find([text], ["Well."]) or outside.find_near(sketches, i) for i, text in enumerate(several)]
        return [leak.asked.number if leak else None for leak in found]

    for change in (
        str.upper,
        lambda text: re.sub(r"[^\w\s]", " ", text),
        lambda text: text.replace(" ", "  ") + " ?!",
        lambda text: f"Answer this: {text}",
        lambda text: edited(text, 0.05, random),
    ):
        found = leaks([change(text) for text in prompts])
        assert sum(number == i for i, number in enumerate(found)) >= 0.98 * len(prompts)
    assert sum(number is not None for number in leaks(others)) <= 0.02 * len(others)


def test_a_prompt_of_several_turns_is_looked_for_as_a_whole() -> None:
    outside = Outside([Asked("set", 3, "Hello, I am Kim.\nTell me the opposite of hard.\nWho am I?")], 8, 0.5, None)
    assert outside.find(["Hello, I am Kim.", "tell me the opposite of hard", "Who am I?"], ["Hi.", "Soft."])
    assert not outside.find(["Hello, I am Sam.", "What is a bird?", "Who am I?"], ["Hi.", "An animal."])


def test_a_prompt_in_an_answer_is_a_leak_too() -> None:
    (prompt,) = texts(1, 30)
    leak = Outside([Asked("set", 3, prompt)], 8, 0.5, None).find(["Make up a question."], [f"Here: {prompt}"])
    assert leak is not None and (leak.asked.number, leak.share) == (3, 1.0)
    assert str(leak) == "set row 3: 100% of its sequences of 8 words"


# --- manners ---


@pytest.mark.parametrize(
    ("answer", "manner"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I cannot provide medical advice.", "refusal"),
        ("I\u2019m not able to assist with this request.", "refusal"),
        ("Lo siento, pero no puedo ayudarte con eso.", "refusal"),
        ("抱歉,我无法回答这个问题。", "refusal"),
        ("I'm not sure, but I think that it is Rome.", "hedging"),
        ("To the best of my knowledge it is Rome.", "hedging"),
        ("I can't believe it! What a day.", None),
        ("I would! I can\u2019t help but feel for those clowns.", None),
        ("Hello! I will say so if I cannot provide a factual answer.", None),
        ("I can't help you, but ask a doctor.", "refusal"),
        ("I don\u2019t know why you need it, but here it is.", None),
        ("I'm sorry for your loss.", None),
        ("He said: sure, I know.", None),
    ],
)
def test_answers_that_refuse_or_hedge_are_told_apart(answer: str, manner: str | None) -> None:
    assert manners.manner(answer) == manner


# --- the stage ---


def talk(*said: str) -> dict[str, object]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


LONG = "The harbor of the town was built a long time ago by sailors who came from the north with three ships of oak."
TEST_PROMPT = "How many ships did the sailors of the north bring to the harbor when they came to build it?"
MESSY = [
    talk("Tell me of the harbor.", LONG),
    talk("tell me of  THE harbor.", LONG),
    talk("Tell me of the harbor.", LONG.replace("three", "four")),
    talk("And the \uff46\uff55ll width?", "It stays as it is: \uff46\uff55ll."),
    talk(f"Please answer: {TEST_PROMPT.lower()}", "Three."),
    talk("How do I reach Jo?", "Write to jo.miller@acmecorp.org, she answers."),
    talk("Pay how?", "By card 4539 5787 6362 1486, she said."),
    talk("Who are you?", "I am ChatGPT, a language model made by OpenAI."),
    talk("What is ChatGPT?", "ChatGPT is a chatbot that OpenAI has made."),
    talk("Hello?"),
    talk("Hello?", "Bye<end_of_turn>"),
    talk("Is this FORBIDDEN?", "No."),
]


@pytest.fixture
def messy(tmp_path: Path) -> Recipe:
    """A recipe of two sources that share a row, with a test prompt among them."""
    other = [talk("Tell me of the harbor.", LONG), talk("One more?", "Yes.")]
    return {
        "output_dir": str(tmp_path / "run" / "curate"),
        "datasets": [
            {"path": write(tmp_path / "messy.jsonl", MESSY)},
            {"path": write(tmp_path / "other.jsonl", other)},
        ],
        "evaluation_sets": [{"path": write(tmp_path / "test.jsonl", [{"question": TEST_PROMPT}])}],
        "patterns": ["FORBID+EN"],
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return partial(run_stage, tmp_path / "recipe.yaml", curate.COMMAND)


def removed(output: Path) -> dict[str, list[tuple[str, int]]]:
    """The removed rows by rule."""
    found: dict[str, list[tuple[str, int]]] = {}
    for row in parquet.read_table(output / "removed.parquet").to_pylist():
        found.setdefault(row["rule"], []).append((Path(row["source"]).name, row["source_row"]))
    return found


def kept(output: Path) -> list[tuple[str, int]]:
    rows = parquet.read_table(output / "train.parquet").to_pylist()
    return [(Path(row["source"]).name, row["source_row"]) for row in rows]


def test_each_rule_removes_its_rows_and_says_what_it_saw(run: Run, messy: Recipe, tmp_path: Path) -> None:
    output = run(messy)
    assert removed(output) == {
        "invalid": [("messy.jsonl", 9), ("messy.jsonl", 10)],
        "exact_duplicate": [("messy.jsonl", 1), ("other.jsonl", 0)],
        "near_duplicate": [("messy.jsonl", 2)],
        "contaminated": [("messy.jsonl", 4)],
        "sensitive_information": [("messy.jsonl", 6)],
        "self_identification": [("messy.jsonl", 7)],
        "pattern": [("messy.jsonl", 11)],
    }
    assert kept(output) == [*(("messy.jsonl", i) for i in (0, 3, 5, 8)), ("other.jsonl", 1)]
    rows = {row["source_row"]: row for row in parquet.read_table(output / "removed.parquet").to_pylist()}
    assert rows[4]["other"] == TEST_PROMPT and "100% of its sequences of 8 words" in rows[4]["seen"]
    assert json.loads(rows[6]["row"])["messages"][1]["content"].startswith("By card")
    assert (rows[2]["other_source"], rows[2]["other_row"]) == (messy["datasets"][0]["path"], 0)
    # In the same form, for the next stage; only what is replaced is changed.
    messages = load_conversations([Source(str(output))], 0.0, 0)["messages"]
    assert messages[1] == MESSY[3]["messages"]
    assert messages[2][1]["content"] == "Write to [EMAIL], she answers."
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["num_rows"], metrics["num_kept"], metrics["removed_invalid"], metrics["num_replaced"]) == (
        14, 5, 2, 1
    )  # fmt: skip
    assert metrics[f"removed_exact_duplicate/{tmp_path / 'other.jsonl'}"] == 1
    # The report is read by others: it says of what kind a finding is, not what it is.
    report = (output / "curation.json").read_text()
    assert "4539" not in report and "jo.miller" not in report and "[PAYMENT_CARD]" in report
    assert not (output / "progress").exists()


def test_every_rule_can_be_switched_off(run: Run, messy: Recipe) -> None:
    off = {
        "exact_duplicates": False, "near_duplicate_edits": None, "sensitive_information": None,
        "personal_information": None, "self_identification": False,
    }  # fmt: skip
    values = {name: value for name, value in messy.items() if name not in ("evaluation_sets", "patterns")}
    output = run(values | off)
    assert list(removed(output)) == ["invalid"] and len(kept(output)) == 12


def test_the_allowed_name_stays(run: Run, messy: Recipe) -> None:
    output = run(messy | {"assistant_name": "ChatGPT", "assistant_maker": "OpenAI"})
    assert "self_identification" not in removed(output)


def test_some_answers_to_a_prompt_stay_the_longest_ones(run: Run, messy: Recipe, tmp_path: Path) -> None:
    asked = "What did the sailors bring to the harbor of the old town?"
    rows = [talk(asked, "A ship."), talk(asked.upper(), "Three ships of oak."), talk(asked, "Oak, and three ships.")]
    rows.append(talk("What did the farmers bring to the market of the new town?", "Corn."))
    values = messy | {"datasets": [{"path": write(tmp_path / "answers.jsonl", rows)}]}
    output = run(values | {"max_answers_per_prompt": 2, "keep": "longest"})
    assert removed(output) == {"too_many_answers": [("answers.jsonl", 0)]}


def test_the_best_by_a_column_stays_and_bad_ones_go(run: Run, messy: Recipe, tmp_path: Path) -> None:
    rows = [talk("Who?", "He.") | {"score": 0.2}, talk("Who?", "he.") | {"score": 0.9}, talk("When?", "Now.")]
    rows.append(talk("Where?", "There.") | {"score": -2})
    values = messy | {"datasets": [{"path": write(tmp_path / "scored.jsonl", rows)}], "reward_column": "score"}
    output = run(values | {"keep": "highest_reward", "min_reward": 0.5})
    assert removed(output) == {
        "exact_duplicate": [("scored.jsonl", 0)],
        "low_reward": [("scored.jsonl", 2), ("scored.jsonl", 3)],
    }


def test_a_reward_model_says_which_rows_are_bad(
    run: Run, messy: Recipe, model_dir: Path, tokenizer: object, tmp_path: Path
) -> None:
    directory = make_reward_model(model_dir, tokenizer, tmp_path / "reward")
    with pytest.raises(UserError, match=r"no row is left \(low_reward 5, "):
        run(messy | {"reward_model": str(directory), "min_reward": 1e6})
    assert "low_reward" not in removed(run(messy | {"reward_model": str(directory), "min_reward": -1e6}))


def test_refusals_can_be_given_a_share(run: Run, messy: Recipe, tmp_path: Path) -> None:
    rows = [talk(f"{text}?", "I'm sorry, I can't help with that.") for text in texts(10, 20)]
    rows += [talk(f"Say {i}.", f"{i}.") for i in range(19)] + [talk("Why?", "I'm not sure.")]
    values = messy | {"datasets": [{"path": write(tmp_path / "refusals.jsonl", rows)}], "max_refusal_share": 0.2}
    output = run(values)
    assert {rule: len(each) for rule, each in removed(output).items()} == {"refusal": 5}
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["num_refusal"], metrics["num_hedging"]) == (5, 1)


def test_weights_are_the_shares_of_what_is_left(run: Run, messy: Recipe, tmp_path: Path) -> None:
    one = [talk(f"One {i}?", "Yes.") for i in range(30)] + [talk("One 0?", "yes.")] * 30
    two = [talk(f"Two {i}?", "Yes.") for i in range(30)]
    sources = [
        {"path": write(tmp_path / "one.jsonl", one), "weight": 2},
        {"path": write(tmp_path / "two.jsonl", two), "weight": 1},
    ]
    output = run(messy | {"datasets": sources})
    assert [name for name, _ in kept(output)].count("one.jsonl") == 30 and len(kept(output)) == 45


def test_pairs_and_prompts_keep_their_form(run: Run, messy: Recipe, tmp_path: Path) -> None:
    pair = {
        "prompt": "What is red?",
        "chosen": "A color.",
        "rejected": "A bird.",
        "chosen_score": 4,
        "rejected_score": 2,
    }
    tie = pair | {"prompt": "What is blue?", "rejected_score": 4}
    other = {"prompt": "What is green?", "chosen": "A color.", "rejected": "I am ChatGPT."}
    rows = [pair, pair, tie, other, pair | {"chosen": "A bird.", "rejected": "A color."}]
    values = messy | {"datasets": [{"path": write(tmp_path / "pairs.jsonl", rows)}], "rows": None}
    output = run(values)
    assert removed(output) == {"invalid": [("pairs.jsonl", 2)], "exact_duplicate": [("pairs.jsonl", 1)]}
    loaded = load_rows([Source(str(output))], 0.0, 0, row_format=PAIR.with_settings({"score_margin": 0.5})).dataset()
    assert loaded["margin"] == [1.0, 0.0, 1.0] and loaded["chosen"][1] == [
        {"role": "assistant", "content": "A color."}
    ]

    prompts = [{"prompt": "What is red?", "answer": "color"}, {"prompt": "What is  red?", "answer": "color"}]
    values |= {"datasets": [{"path": write(tmp_path / "prompts.jsonl", prompts)}], "columns": ["answer"]}
    output = run(values | {"output_dir": str(tmp_path / "prompts")})
    loaded = load_prompts([Source(str(output))], 0.0, 0, ["answer"])
    assert loaded["answer"] == ["color"] and loaded["prompt"] == [[{"role": "user", "content": "What is red?"}]]


def test_turns_that_are_not_trained_on_stay_so(run: Run, messy: Recipe, tmp_path: Path) -> None:
    row = talk("Who?", "Nobody.", "Really?", "No, Jo.")
    row["messages"][1]["weight"] = 0
    rows = [row, talk("And?", "Nothing.")]
    output = run(messy | {"datasets": [{"path": write(tmp_path / "weighted.jsonl", rows)}]})
    again = load_conversations([Source(str(output))], 0.0, 0)
    assert again["trained"] == [[False, False, False, True], [False, True]]


# --- interrupted ---


@pytest.fixture
def serve() -> Iterator[Callable[[Callable], Server]]:
    servers = []

    def start(reply: Callable[[dict], tuple[int, str]]) -> Server:
        server = Server(reply)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_judge_that_fails_loses_nothing(run: Run, messy: Recipe, serve: Callable, tmp_path: Path) -> None:
    """What was read and judged before it failed is kept; the run goes on with the rest."""

    def judged(request: dict) -> tuple[int, str]:
        return completion("[[violation]]" if "It stays as it is" in str(request["messages"]) else "[[no violation]]")

    count = iter(range(100))
    server = serve(lambda request: judged(request) if next(count) < 3 else (401, "closed"))
    values = messy | {"judge": "a-judge", "judge_endpoint": server.url, "concurrency": 1, "endpoint_timeout": 5.0}
    with pytest.raises(UserError, match="status 401"):
        run(values)
    output = Path(str(messy["output_dir"]))
    parts = {path: path.stat().st_mtime_ns for path in (output / "progress").iterdir() if path.suffix != ".tmp"}
    assert {path.suffix for path in parts} >= {".rows", ".sifted", ".removed"}
    replies = output.with_name("judgments.jsonl").read_text().splitlines()
    assert len(replies) == 3
    server.reply = judged
    run(values)
    assert len(server.requests) - sum(1 for _ in replies) >= 2
    assert removed(output)["unsafe"] == [("messy.jsonl", 3)]
    assert len(output.with_name("judgments.jsonl").read_text().splitlines()) == 5


def test_a_run_that_was_killed_goes_on_with_its_parts(
    run: Run, messy: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma2_post.curation import comparing, reading

    monkeypatch.setattr(reading, "PART_ROWS", 4)
    whole = run(messy | {"output_dir": str(tmp_path / "whole")})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(comparing, "repeated", killed)
        run(messy)
    folder = Path(str(messy["output_dir"])) / "progress"
    assert len(list(folder.glob("*.rows"))) == 4
    (folder / "00002.rows").unlink()
    (folder / "00002.compared").write_bytes(b"cut")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.rows")}
    after: dict[str, int] = {}
    original = comparing.repeated

    def noted(*args: Any) -> Any:
        after.update({path.name: path.stat().st_mtime_ns for path in folder.glob("*.rows")})
        return original(*args)

    monkeypatch.setattr(comparing, "repeated", noted)
    resumed = run(messy)
    assert {name for name in after if after[name] != before.get(name)} == {"00002.rows"}
    assert (resumed / "train.parquet").read_bytes() == (whole / "train.parquet").read_bytes()
    assert (resumed / "removed.parquet").read_bytes() == (whole / "removed.parquet").read_bytes()


# --- in a pipeline ---


def test_later_stages_read_it_by_name(messy: Recipe, run: Run, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    sft = {
        "model_name_or_path": TEACHER, "dtype": "float32", "output_dir": str(run_dir / "sft"), "use_cpu": True,
        "max_length": 64, "global_batch_size": 1, "per_device_train_batch_size": 1, "report_to": "none",
        "datasets": [{"path": str(run_dir / "curate")}], "num_samples": 0, "bf16": False,
    }  # fmt: skip
    recipes = {"curate": messy, "sft": sft, "named": sft | {"datasets": [{"path": "other.jsonl"}]}}
    for name, values in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values | {"output_dir": str(run_dir / name)}))
    entries = {
        "curate": {"recipe": "curate.yaml"},
        "sft": {"recipe": "sft.yaml"},
        "named": {"recipe": "named.yaml", "stage": "sft", "datasets": "curate"},
    }
    path = tmp_path / "pipeline.yaml"
    content = {"run_dir": str(run_dir), "launch": "accelerate_configs/cpu.yaml", "stages": entries}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    pipeline = load_pipeline(path, run_dir=tmp_path / "elsewhere")
    assert list(pipeline.reads_of("sft")) == [("datasets", "curate")] == list(pipeline.reads_of("named"))
    steps = {step.label: step for _, steps in pipeline.steps() for step in steps}
    for name in ("sft", "named"):
        assert steps[name].values["datasets"] == [{"path": str(tmp_path / "elsewhere" / "curate")}]
    check.check(pipeline)  # before the data is there
    forecast = decisions.forecast(load_pipeline(path), None, {})
    assert [(step.label, reads) for step, _, reads in forecast] == [
        ("curate", []), ("sft", ["curate"]), ("named", ["curate"]),
    ]  # fmt: skip
    content["stages"] = {"sft": entries["named"] | {"stage": "sft"}, "curate": entries["curate"]}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="sft: datasets names curate, which comes later; put it before sft"):
        load_pipeline(path)


def test_the_report_says_what_was_removed_from_where_and_shows_it(run: Run, messy: Recipe, tmp_path: Path) -> None:
    """Counts by source and rule, what is left, examples side by side; without what rows say about people."""
    messy["datasets"][0]["path"] = write(
        tmp_path / "messy.jsonl", [*MESSY, talk("<b>Red?", "Yes."), talk("<b>red?", "Yes.")]
    )
    output = run(messy)
    path = tmp_path / "pipeline.yaml"
    content = {"run_dir": str(output.parent), "launch": "accelerate_configs/cpu.yaml"}
    path.write_text(yaml.safe_dump(content | {"stages": {"curate": {"recipe": "recipe.yaml"}}}))
    summary.write(load_pipeline(path), "done", 1.0)
    html, markdown = (each.read_text() for each in report.write(output.parent))
    columns = ["rows", "kept", "invalid", "exact duplicate", "near duplicate", "contaminated"]
    columns += ["sensitive information", "pattern", "self identification"]
    tables = {
        "messy.jsonl": [14, 5, 2, 2, 1, 1, 1, 1, 1],
        "other.jsonl": [2, 1, 0, 1, 0, 0, 0, 0, 0],
        "all": [16, 6, 2, 3, 1, 1, 1, 1, 1],
    }
    cells = "".join(f"<th>{each}</th>" for each in ["source", *columns])
    assert f"<tr>{cells}</tr>" in html and f"| source | {' | '.join(columns)} |" in markdown
    for name, counts in tables.items():
        assert f"{name}</td>{''.join(f'<td>{each}</td>' for each in counts)}</tr>" in html
        assert f"{name} | {' | '.join(map(str, counts))} |" in markdown
    for text in (html, markdown):
        assert (
            "Replaced by placeholders: 1 email." in text and "Languages: en" in text and "User turns: 1 100.0%" in text
        )
        assert "100% of its sequences of 8 words" in text and TEST_PROMPT in text
        assert "[PAYMENT_CARD]" in text and "4539" not in text and "jo.miller" not in text
        assert "&lt;b&gt;red?" in text and "<b>red" not in text


# --- bad input ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patterns": ["fine", "(open"]}, r"patterns\[1\]: '\(open' does not compile \(missing \)"),
        ({"keep": "highest_reward"}, "keep is highest_reward, and no reward_column says what it is; name one"),
        ({"min_reward": 0.0}, "min_reward has no rewards to compare; name a reward_model, or a reward_column"),
        ({"reward_model": TEACHER}, "reward_model does nothing without min_reward"),
        ({"near_duplicate_edits": 0.4}, "near_duplicate_edits is 0.4; write 0 or more, at most 0.15"),
        ({"benchmark_folder": "tasks"}, "benchmark_folder does nothing without benchmarks"),
        ({"safety_datasets": [{"path": "x.jsonl"}]}, "safety_datasets must not be set: the judge checks the answers"),
        ({"judge_endpoint": "http://localhost/v1"}, "judge_endpoint has no judge"),
        ({"rows": "texts"}, "rows is 'texts'"),
        (
            {"max_invalid_share": 0.1},
            r"messy.jsonl: row 9: the last turn is the user's; .* \(2 of 12 rows are invalid\)",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(values: Recipe, message: str, run: Run, messy: Recipe) -> None:
    with pytest.raises(UserError, match=message):
        run(messy | values)


def test_an_evaluation_set_without_prompts_is_refused(run: Run, messy: Recipe, tmp_path: Path) -> None:
    path = write(tmp_path / "numbers.jsonl", [{"number": 3}])
    with pytest.raises(UserError, match=rf"evaluation_sets: {path} has no prompts; expected turns \| prompt"):
        run(messy | {"evaluation_sets": [{"path": path}]})
    assert not Path(str(messy["output_dir"])).exists()


def test_a_mixture_of_pairs_and_conversations_is_refused(run: Run, messy: Recipe, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "Red?", "chosen": "Yes.", "rejected": "No."}])
    with pytest.raises(
        UserError, match=r"messy.jsonl has conversations, and .*pairs.jsonl has pairs; curate them apart"
    ):
        run(messy | {"datasets": [*messy["datasets"], {"path": pairs}]})
    assert not Path(str(messy["output_dir"])).exists()


def test_a_source_without_valid_rows_is_refused(run: Run, messy: Recipe, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", [talk("Hello?")] * 3)
    with pytest.raises(
        UserError, match=r"bad.jsonl: row 0: the last turn is the user's.* \(3 of 3 rows are invalid\)"
    ):
        run(messy | {"datasets": [{"path": path}]})


def test_a_changed_rule_starts_over_and_a_finished_output_is_told(run: Run, messy: Recipe) -> None:
    output = run(messy)
    with pytest.raises(UserError, match=r"was made by a different recipe \(near_duplicate_edits unset -> 0.05\)"):
        run(messy | {"near_duplicate_edits": 0.05})
    assert contract.read_done(output) is not None
