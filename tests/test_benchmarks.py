"""Academic benchmarks through lm-eval, on tasks whose data is a local file."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gemma2_post.core.errors import UserError
from gemma2_post.core.tokens import BOS
from gemma2_post.evaluation import benchmarks
from tests.conftest import TEACHER

lm_eval = pytest.importorskip("lm_eval")


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


def test_what_cannot_be_run_is_said_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="benchmark_folder nowhere is no folder"):
        benchmarks.check("here", ["preset"], "nowhere")
    with pytest.raises(UserError, match="names preset and more"):
        benchmarks.check("here", ["preset", "mmlu"], None)
    with pytest.raises(UserError, match="benchmarks names tiny_chioce, which lm-eval does not know"):
        benchmarks.check("here", ["tiny_chioce"], str(folder))
    benchmarks.check("here", ["tiny_choice"], str(folder))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(benchmarks, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'gemma2_post\[eval\]'"):
        benchmarks.check("here", ["preset"], None)
