"""Academic benchmarks through lm-eval, on tasks whose data is a local file."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gemma2_post.evaluation import benchmarks
from gemma2_post.evaluation.keys import BenchmarkArguments
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokens import BOS
from gemma2_post.stage.errors import UserError, located
from tests.conftest import TEACHER

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
