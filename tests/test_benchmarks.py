"""Academic benchmarks through lm-eval, on tasks whose data is a local file."""

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from pyarrow import parquet
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from gemma2_post import curate
from gemma2_post.evaluation import benchmarks
from gemma2_post.evaluation.keys import BenchmarkArguments
from gemma2_post.evaluation.published import published as published_scores
from gemma2_post.models.loading import load_config
from gemma2_post.models.shapes import known_config
from gemma2_post.models.tokens import BOS, END_OF_TURN
from gemma2_post.stage.errors import UserError, located
from tests.conftest import TEACHER, run_stage

lm_eval = pytest.importorskip("lm_eval")

MMLU = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
PROJECT = Path(__file__).parents[1]
SPLITS = ["train", "validation", "test"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sums to choose the answer of, and to answer."""
    rows = [{"question": f"What is {a} plus {b}?", "sum": str(a + b)} for a, b in [(1, 3), (2, 5), (4, 4), (3, 6)]]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choosing = shared | {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "target_delimiter": "",
        "doc_to_choice": ["It is 4.", "It is 7.", "It is 8.", "It is 9."],
        "doc_to_target": "It is {{sum}}.",
        "metric_list": [{"metric": "acc"}],
    }
    answering = shared | {
        "task": "tiny_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{sum}}",
        "generation_kwargs": {"until": ["<end_of_turn>"], "max_gen_toks": 16, "do_sample": False},
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choosing, answering):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


@pytest.mark.slow
def test_the_teacher_passes_and_is_asked_with_one_bos(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32, attn_implementation="eager").eval()
    seen: list[list[int]] = []
    forward = model.forward

    def record(*arguments: object, **further: object) -> object:
        ids = further.get("input_ids", arguments[0] if arguments else None)
        seen.extend(ids.tolist() if ids.shape[1] > 1 else [])
        return forward(*arguments, **further)

    monkeypatch.setattr(model, "forward", record)
    tasks = ["tiny_choice", "tiny_answer"]
    found = benchmarks.run(model, tokenizer, tasks, str(folder), None, batch_size=2, chats=True)
    assert found["benchmarks/tiny_answer"] == 1.0 and found["benchmarks/tiny_choice"] >= 0.75
    assert seen and all(ids.count(BOS) == 1 for ids in seen)
    assert all("<start_of_turn>user" in tokenizer.decode(ids) for ids in seen)
    seen.clear()
    benchmarks.run(model, tokenizer, ["tiny_choice"], str(folder), 2, batch_size=2, chats=False)
    assert seen and all(ids.count(BOS) == 1 for ids in seen)
    assert not any("<start_of_turn>" in tokenizer.decode(ids) for ids in seen)


@pytest.mark.slow
def test_what_cannot_be_run_is_said_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="benchmark_folder nowhere is no folder"):
        benchmarks.check(BenchmarkArguments(["preset"], "nowhere"))
    with pytest.raises(UserError, match="names preset and more"):
        benchmarks.check(BenchmarkArguments(["preset", "mmlu"]))
    with pytest.raises(UserError, match="benchmarks names tiny_chioce, which lm-eval does not know"):
        benchmarks.check(BenchmarkArguments(["tiny_chioce"], str(folder)))
    with pytest.raises(UserError, match="benchmarks names ai2_arc, which lm-eval does not know"):
        benchmarks.check(BenchmarkArguments(["ai2_arc"], str(folder)))  # a tag: its tasks have no number in common
    benchmarks.check(BenchmarkArguments(["tiny_choice"], str(folder)))
    (folder / "sums.jsonl").unlink()
    with pytest.raises(UserError, match="here: benchmarks: the data of tiny_choice cannot be read"), located("here"):
        benchmarks.load_data(BenchmarkArguments(["tiny_choice"], str(folder)))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(benchmarks, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'gemma2_post\[eval\]'"):
        benchmarks.check(BenchmarkArguments(["preset"]))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["alias", "acc,none", "acc_stderr,none", "acc_norm,none"], "acc_norm,none"),
        (["alias", "exact_match,strict-match", "exact_match,flexible-extract"], "exact_match,flexible-extract"),
        (["prompt_level_strict_acc,none", "prompt_level_strict_acc_stderr,none"], "prompt_level_strict_acc,none"),
        (["word_perplexity_stderr,none", "word_perplexity,none"], "word_perplexity,none"),
    ],
)
def test_a_task_has_one_score_and_all_its_metrics(names: list[str], expected: str) -> None:
    found = benchmarks.metrics_of(dict.fromkeys(names, 0.0))
    assert found[0] == expected and sorted(found) == sorted(
        each for each in names if "_stderr" not in each and "," in each
    )


def test_a_task_that_needs_more_packages_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = benchmarks.find_spec
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None if name == "langdetect" else found(name))
    with pytest.raises(UserError, match=r"ifeval needs langdetect.*; pip install 'lm-eval\[ifeval\]'"):
        benchmarks.check(BenchmarkArguments(["ifeval"]))


def numbered(row: dict[str, object], number: int) -> list[dict[str, object]]:
    """Rows that differ: an example that is the question itself would be left out."""
    return [row | {"ind": i} for i in range(number)]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders in the layouts of the five data sets, under the names by which lm-eval's own tasks look for them.

    In MMLU the right answer is always B, elsewhere it is a sum, a capital, or the first one.
    """
    subjects = [
        name.removeprefix("mmlu_")
        for name in benchmarks.task_manager(None).all_tasks
        if (MMLU / f"{name}.yaml").exists()
    ]
    sums = [(a, 9 - a) for a in range(1, 7)]
    mmlu = [{"question": f"What is {a} plus {b}?", "choices": ["7", "9", "12", "3"], "answer": 1} for a, b in sums]
    gsm8k = [{"question": f"What is {a} plus {b}?", "answer": f"That makes 9.\n#### {a + b}"} for a, b in sums]
    choices = {"text": ["It is Rome.", "It is Tokyo."], "label": ["A", "B"]}
    arc = {"question": "What is the capital of Japan?", "choices": choices, "answerKey": "B"}
    hellaswag = {"activity_label": "Sums", "ctx_a": "Ann is asked for 3 plus 5.", "ctx_b": "she", "label": "1"}
    hellaswag |= {"ctx": "Ann is asked for 3 plus 5. she", "endings": ["says 7.", "says 8.", "sings.", "goes."]}
    winogrande = {
        "sentence": "The owl is small because _ is young.",
        "option1": "the owl",
        "option2": "the hill",
        "answer": "1",
    }
    layouts = {
        "cais/mmlu": {subject: {"dev": mmlu[:5], "test": mmlu[5:]} for subject in subjects},
        "openai/gsm8k": {"main": {"train": gsm8k[:5], "test": gsm8k[5:]}},
        "allenai/ai2_arc": {"ARC-Challenge": {split: numbered(arc, 30) for split in SPLITS}},
        "Rowan/hellaswag": {"default": {split: numbered(hellaswag, 20) for split in SPLITS[:2]}},
        "allenai/winogrande": {"winogrande_xl": {split: numbered(winogrande, 10) for split in SPLITS}},
    }
    for name, configs in layouts.items():
        folder = tmp_path / name
        listed = []
        for config, splits in configs.items():
            (folder / config).mkdir(parents=True)
            for split, rows in splits.items():
                (folder / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits]
            listed.append({"config_name": config, "data_files": files})
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_preset_is_what_the_tables_say(
    published: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own five tasks, with so many examples of each; MMLU says in the first turn what it is about."""
    config = load_config(str(PROJECT / TEACHER))
    config.max_position_embeddings, config.num_hidden_layers, config.layer_types = 4096, 1, config.layer_types[:1]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    seen: list[str] = []
    forward = model.forward

    def record(*arguments: object, **further: object) -> object:
        ids = further.get("input_ids", arguments[0] if arguments else None)
        seen.extend(tokenizer.batch_decode(ids) if ids.shape[1] > 1 else [])
        return forward(*arguments, **further)

    monkeypatch.setattr(model, "forward", record)
    found = benchmarks.run(model, tokenizer, ["preset"], None, limit=1, batch_size=4, chats=True)
    assert [name for name in found if name.count("/") == 1] == [f"benchmarks/{name}" for name in benchmarks.PRESET]
    marks = {
        "mmlu": "The following are multiple choice questions",
        "gsm8k": "What is 6 plus 3?",
        "arc_challenge": "capital of Japan",
        "hellaswag": "Ann is asked",
        "winogrande": "The owl is small",
    }
    for name, num_examples in {"mmlu": 5, "gsm8k": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5}.items():
        asked = [text for text in seen if marks[name] in text and (name != "gsm8k" or "####" in text)]
        assert {text.count("<start_of_turn>user") for text in asked} == {num_examples + 1}, name


@pytest.mark.slow
def test_questions_of_benchmarks_stay_out_of_a_curated_mixture(published: Path, tmp_path: Path) -> None:
    """Those of lm-eval's own tasks, in lower case, some too short for a sequence of eight words."""
    asked = {
        "mmlu_virology": "what is 6 plus 3?",
        "gsm8k": "tell me: what is 6 plus 3?",
        "arc_challenge": "what is the capital of japan",
        "hellaswag": "sums: ann is asked for 3 plus 5. she ...",
        "winogrande": "the owl is small because _ is young. who?",
    }
    others = ["Who has asked Ann for 3 plus 5?", "What is the capital of France?", "What is 7 plus 3?"]
    rows = [{"prompt": prompt, "completion": "It is so."} for prompt in [*asked.values(), *others]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"output_dir": "curate", "datasets": [{"path": "rows.jsonl"}], "benchmarks": list(asked)}
    values["near_duplicate_edits"] = 0.0
    output = run_stage(tmp_path / "recipe.yaml", curate.COMMAND, values)
    removed = parquet.read_table(output / "removed.parquet").to_pylist()
    assert {row["rule"] for row in removed} == {"contaminated"}
    found = [row["other_source"] for row in removed]
    # MMLU's and GSM8K's are the same question here, so the first of them is named.
    assert found == ["mmlu_virology", "mmlu_virology", "arc_challenge", "hellaswag", "winogrande"]
    assert parquet.read_table(output / "train.parquet").num_rows == len(others)


# --- constant answers, on the layouts of the real files ---


def saying(tokenizer: PreTrainedTokenizerBase, answer: str, after: str) -> PreTrainedModel:
    """A model that says the same to every prompt: its layer adds nothing, and its head maps a token to the next one.

    Args:
        answer: What it says; no token may occur twice.
        after: The end of all prompts, with the last token of which the answer begins.
    """
    config = load_config(str(PROJECT / TEACHER))
    config.num_hidden_layers, config.layer_types, config.max_position_embeddings = 1, config.layer_types[:1], 2048
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    [layer] = model.model.layers
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    start = tokenizer(after, add_special_tokens=False)["input_ids"]
    tokens = tokenizer(after + answer, add_special_tokens=False)["input_ids"]
    chain = [*tokens[len(start) - 1 :], END_OF_TURN]
    assert tokens[: len(start)] == start and len(set(chain)) == len(chain)
    embeddings, head = model.get_input_embeddings().weight.data, model.lm_head.weight.data.zero_()
    for token, following in pairwise(chain):
        head[following] = embeddings[token] / embeddings[token].norm()
    model.generation_config.eos_token_id = END_OF_TURN
    return model


@pytest.fixture
def uniform() -> PreTrainedModel:
    """A model to which every token is as likely as any other."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32, attn_implementation="eager").eval()
    model.get_input_embeddings().weight.data.zero_()
    return model


def task_in(folder: Path, name: str, included: Path, rows: list[dict[str, object]], **further: object) -> None:
    """A task of lm-eval on rows of a local file."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task: dict[str, object] = {"include": str(included), "task": name, "dataset_path": "json", "dataset_name": None}
    task |= {"dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | further))


@pytest.mark.slow
@pytest.mark.parametrize(("letter", "chats"), [("A", True), ("B", True), ("C", True), ("C", False)])
def test_constant_answers_to_mmlu_are_right_as_often_as_the_letter(
    letter: str, chats: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [
        {
            "question": f"Which is {i}?",
            "subject": "law",
            "choices": ["a", "b", "c", "d"],
            "answer": [0, 3, 1, 0, 2, 2, 2][i % 7],
        }
        for i in range(23)
    ]
    further = {"fewshot_split": None, "training_split": None, "num_fewshot": 0}
    task_in(tmp_path, "mmlu_local", MMLU / "_default_template_yaml", rows, **further)
    after = "<start_of_turn>model\n" if chats else "Answer:"
    model = saying(tokenizer, letter if chats else f" {letter}", after)
    found = benchmarks.run(model, tokenizer, ["mmlu_local"], str(tmp_path), None, batch_size=4, chats=chats)
    rate = sum(row["answer"] == "ABCD".index(letter) for row in rows) / 23
    assert found["benchmarks/mmlu_local"] == rate and found["benchmarks/mmlu_local/acc"] == rate
    error = (rate * (1 - rate) / 22) ** 0.5
    assert found["benchmarks/mmlu_local/standard_error"] == pytest.approx(error)
    assert found["benchmarks/mmlu_local/shots"] == 0


@pytest.mark.slow
def test_arc_with_letters_or_numbers_and_three_to_five_choices(
    uniform: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """All tokens are as likely, so `acc` takes the fewest tokens, and `acc_norm` the fewest for each letter."""
    texts = ["It is 1.", "It is Tokyo.", "It is the capital of Japan.", "It", "No, it is not."]
    rows = []
    for i in range(12):
        number = 3 + i % 3
        labels = [str(1 + j) if i % 2 else "ABCDE"[j] for j in range(number)]
        choices = {"text": [texts[(i + j) % 5] for j in range(number)], "label": labels}
        rows.append({"id": str(i), "question": f"Which is {i}?", "choices": choices, "answerKey": labels[i % number]})
    arc = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_challenge.yaml"  # which includes arc_easy.yaml
    task_in(tmp_path, "arc_local", arc, rows, training_split=None, validation_split=None, num_fewshot=0)
    found = benchmarks.run(uniform, tokenizer, ["arc_local"], str(tmp_path), None, batch_size=4, chats=False)

    def rate(value: Callable[[str], float]) -> float:
        best = [
            max(range(len(row["choices"]["text"])), key=lambda j, r=row: value(r["choices"]["text"][j]))
            for row in rows
        ]
        return sum(row["choices"]["label"][j] == row["answerKey"] for row, j in zip(rows, best, strict=True)) / 12

    def num_tokens(text: str) -> int:
        return len(tokenizer(f"Answer: {text}", add_special_tokens=False)["input_ids"])

    prefix = len(tokenizer("Answer:", add_special_tokens=False)["input_ids"])
    assert found["benchmarks/arc_local/acc"] == rate(lambda text: -(num_tokens(text) - prefix))
    by_letter = rate(lambda text: -(num_tokens(text) - prefix) / len(text))
    assert found["benchmarks/arc_local"] == found["benchmarks/arc_local/acc_norm"] == by_letter


IFEVAL = Path(lm_eval.__file__).parent / "tasks" / "ifeval" / "ifeval.yaml"
OWN_IFEVAL = """
task: ifeval
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
num_fewshot: 0
doc_to_text: prompt
doc_to_target: 0
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 1280}
process_results: !function lm_eval.tasks.ifeval.utils.process_results
metric_list:
  - {metric: prompt_level_strict_acc, aggregation: mean}
  - {metric: inst_level_strict_acc, aggregation: !function lm_eval.tasks.ifeval.utils.agg_inst_level_acc}
  - {metric: prompt_level_loose_acc, aggregation: mean}
  - {metric: inst_level_loose_acc, aggregation: !function lm_eval.tasks.ifeval.utils.agg_inst_level_acc}
"""


def ifeval_rows(asked: list[dict[str, dict[str, object]]]) -> str:
    """Lines of IFEval's layout: every row has all keys of all instructions, most of them null."""
    keys = dict.fromkeys(key for row in asked for each in row.values() for key in each)
    rows = [
        {"key": i, "prompt": f"What is {i} plus 5?", "instruction_id_list": list(row)}
        | {"kwargs": [dict.fromkeys(keys) | each for each in row.values()]}
        for i, row in enumerate(asked)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["folder of the name on the Hub", "included", "overridden"])
def test_ifeval_has_four_numbers_without_a_network(
    how: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By lm-eval's own task and local data, or by a task in `benchmark_folder`, which may be called ifeval."""
    text = ifeval_rows(
        [
            {"punctuation:no_comma": {}},
            {"punctuation:no_comma": {}, "change_case:english_lowercase": {}},  # both rules: right, wrong
            {"startend:end_checker": {"end_phrase": "is 8."}},  # wrong by the strict rules, right without the star
            {"keywords:existence": {"keywords": ["8"]}, "detectable_format:title": {}}  # right, wrong, and wrong
            | {"length_constraints:number_words": {"num_words": 4, "relation": "at least"}},
            {"length_constraints:number_words": {"num_words": 4, "relation": "less than"}},
        ]
    )
    name, folder = "ifeval", None if how.startswith("folder") else str(tmp_path)
    rows = tmp_path / ("google/IFEval/train.jsonl" if folder is None else "rows.jsonl")
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text(text)
    if how == "included":
        name = "ifeval_local"
        task = {"include": str(IFEVAL), "task": name, "dataset_path": "json"}
        task |= {"dataset_kwargs": {"data_files": {"train": rows.name}}}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    elif how == "overridden":
        (tmp_path / "own.yaml").write_text(OWN_IFEVAL.replace("ROWS", str(rows)))
    monkeypatch.chdir(tmp_path)
    langdetect = pytest.importorskip("langdetect")
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)
    model = saying(tokenizer, "It is 8.*", "<start_of_turn>model\n")
    found = benchmarks.run(model, tokenizer, [name], folder, None, batch_size=2, chats=True)
    metrics = {key.rpartition("/")[2]: value for key, value in found.items() if key.endswith("_acc")}
    assert metrics == {
        "prompt_level_strict_acc": 2 / 5,
        "inst_level_strict_acc": 4 / 8,
        "prompt_level_loose_acc": 3 / 5,
        "inst_level_loose_acc": 5 / 8,
    }
    assert found[f"benchmarks/{name}"] == 2 / 5 and found[f"benchmarks/{name}/shots"] == 0
    assert len({langdetect.detect("a b c") for _ in range(200)}) == 1  # unseeded, one in forty differs
    assert found[f"benchmarks/{name}/standard_error"] == pytest.approx((2 / 5 * 3 / 5 / 4) ** 0.5)


@pytest.mark.slow
def test_ifeval_counts_sentences_and_capital_words(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    nltk = pytest.importorskip("nltk")
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("run `python -m nltk.downloader punkt_tab` to run this")
    sentences, capitals = "length_constraints:number_sentences", "change_case:capital_word_frequency"
    (tmp_path / "rows.jsonl").write_text(
        ifeval_rows(
            [
                {sentences: {"num_sentences": 2, "relation": "less than"}},
                {sentences: {"num_sentences": 2, "relation": "at least"}},
                {capitals: {"capital_frequency": 1, "capital_relation": "less than"}},
                {capitals: {"capital_frequency": 1, "capital_relation": "at least"}},
            ]
        )
    )
    (tmp_path / "own.yaml").write_text(OWN_IFEVAL.replace("ROWS", str(tmp_path / "rows.jsonl")))
    benchmarks.check(BenchmarkArguments(["ifeval"], str(tmp_path)))
    model = saying(tokenizer, "It is 8.", "<start_of_turn>model\n")
    found = benchmarks.run(model, tokenizer, ["ifeval"], str(tmp_path), None, batch_size=2, chats=True)
    assert {value for key, value in found.items() if key.endswith("_acc")} == {2 / 4}


@pytest.mark.slow
def test_ifeval_without_its_sentence_splitter_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match=r"ifeval needs nltk's punkt_tab, which is not here; run `python -m nltk"):
        benchmarks.check(BenchmarkArguments(["ifeval"]))


@pytest.mark.parametrize(
    ("name", "is_base", "expected"),
    [
        ("google/gemma-2-2b", True, {"mmlu": 0.513, "gsm8k": 0.239}),
        ("google/gemma-2-27b", True, {"mmlu": 0.752, "winogrande": 0.837}),
        ("google/gemma-2-9b", False, {"mmlu": 0.723}),
    ],
)
def test_published_numbers_are_those_of_the_models_size(name: str, is_base: bool, expected: dict[str, float]) -> None:
    config = known_config(name)
    assert config is not None
    assert expected.items() <= published_scores(config, is_base).items()


def test_a_model_of_another_size_has_no_published_numbers() -> None:
    assert published_scores(load_config(str(PROJECT / TEACHER)), True) == {}
