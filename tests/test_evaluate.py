"""Evaluation: models beside each other on the same prompts, and against one of them."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gemma2_post import evaluate
from gemma2_post.data.keys import Source
from gemma2_post.evaluation import comparison, inputs, measure
from gemma2_post.evaluation.answering.side_by_side import shares_of
from gemma2_post.evaluation.keys import CorpusArguments
from gemma2_post.models.saving import save_model
from gemma2_post.models.tokenizer import save_tokenizer
from gemma2_post.stage import recipe
from gemma2_post.stage.errors import UserError
from gemma2_post.tiny.data import prompts
from tests.conftest import BASE, TEACHER, run_stage, write_prompts
from tests.test_synthesize import completion, serve

__all__ = ["serve"]  # a fixture

Recipe = dict[str, object]


@pytest.fixture
def evaluate_recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """The teacher, and twice what noise has made of it."""
    folders = []
    for name, noise in (("sft", 0.03), ("rlhf/policy-0", 0.0), ("rlhf/policy-1", 0.01)):
        model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        folder = tmp_path / "runs" / name
        save_model(model, model.state_dict(), folder, torch.float32)
        save_tokenizer(tokenizer, folder)
        folders.append(str(folder))
    return {
        "init": TEACHER,
        "base": BASE,
        "models": folders,
        "baseline": folders[0],
        "reward_functions": ["gemma2_post.tiny.gold:gold"],
        "datasets": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", "selection", 12))}],
        "columns": ["skill", "answer"],
        "graders": ["gemma2_post.tiny.gold:gold"],
        "max_completion_length": 16,
        "num_samples": 12,
        "batch_size": 5,
        "output_dir": str(tmp_path / "runs" / "evaluate"),
    }


def test_models_of_one_content_answer_once_and_need_no_reward(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    """Two points of a front may be the same one; a selection by a grader may reward nothing."""
    _, built = evaluate.COMMAND.build(evaluate_recipe | {"missing_end_penalty": 0.0, "num_samples": 3})
    built.measured.rewards.reward_functions = None
    first = Path(evaluate_recipe["models"][0])
    again = Path(shutil.copytree(first, tmp_path / "again"))
    measurement = measure.Measurement(TEACHER, built.measured, tmp_path / "measured")
    answered = measurement.answer([first, again])
    assert answered[first] == answered[again]
    assert len((tmp_path / "measured" / "answers.jsonl").read_text().splitlines()) == 1
    assert measurement.values(answered[again])["reward"] == [0.0] * 3


def test_models_are_measured_beside_each_other(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe)
    models = json.loads((output / "models.json").read_text())
    assert list(models) == ["base", "sft", "rlhf/policy-0", "rlhf/policy-1"]
    assert models["rlhf/policy-0"]["kl_to_init"] == pytest.approx(0, abs=1e-6)
    assert models["base"]["kl_to_init"] > models["sft"]["kl_to_init"] > models["rlhf/policy-1"]["kl_to_init"] > 1e-3
    assert models["rlhf/policy-0"]["gold"] > models["sft"]["gold"] + 0.1
    assert models["sft"]["win_rate_vs_sft"] == 0.5 and models["rlhf/policy-0"]["win_rate_vs_sft"] > 0.5
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["gold"] == models["rlhf/policy-1"]["gold"]
    assert models["rlhf/policy-0"]["gold_win_rate_vs_sft"] == models["rlhf/policy-0"]["win_rate_vs_sft"]  # the same
    assert metrics["win_rate"] == models["rlhf/policy-1"]["win_rate_vs_sft"]
    gains = {
        (each["over"], each["model"], each["metric"]): each for each in json.loads((output / "gains.json").read_text())
    }
    assert gains.keys() == {(a, b, m) for a, b in [("base", "sft"), ("sft", "rlhf")] for m in ("reward", "gold")}
    policies = [models[f"rlhf/policy-{number}"]["gold"] for number in (0, 1)]
    gain = gains["sft", "rlhf", "gold"]
    assert gain["mean"] == pytest.approx(sum(policies) / 2 - models["sft"]["gold"])
    assert gain["low"] < gain["mean"] < gain["high"] and gain["standard_error"] > 0
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(list(row["answers"]) == list(models) for row in rows)
    for name, values in models.items():
        assert values["win_rate_vs_sft/low"] <= values["win_rate_vs_sft"] <= values["win_rate_vs_sft/high"]
        turns = [sum(turn["role"] == "user" for turn in row["prompt"]) for row in rows]
        by_turns = [values[f"gold/turns-{number}"] for number in turns]
        assert sum(by_turns) / len(by_turns) == pytest.approx(values["gold"])
        assert 0 < values["distinct_bigrams"] <= 1, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "models is empty; write one or more"),
        ({"baseline": BASE}, f"baseline is {BASE}, which is none of the models; add it"),
        ({"models": ["nowhere"], "baseline": "nowhere"}, "models names nowhere, which holds no model"),
        ({"num_samples": 1}, "num_samples is 1; write 2 or more"),
        ({"graders": ["tests.test_evaluate:reward"]}, "reward is the name of another measure"),
        ({"init": "nowhere/at/all"}, "there is no folder nowhere/at/all"),
        ({"held_out_datasets": [{"path": "x.jsonl"}]}, "held_out_datasets must not be set: nothing is trained here"),
        ({"held_out_share": 0.5}, "held_out_share must not be set: nothing is trained here"),
        ({"num_memorised": 10}, "num_memorised does nothing without corpus; set corpus, or remove num_memorised"),
        ({"benchmark_limit": 10}, "benchmark_limit does nothing without benchmarks"),
        ({"judge_max_tokens": 10}, "judge_max_tokens does nothing without judge"),
        ({"judge_load_in": "4bit"}, "judge_load_in does nothing without judge"),
        ({"reward_model_load_in": "4bit"}, "reward_model_load_in does nothing without reward_model"),
        ({"reward_model_load_in": "2bit"}, "write one of 4bit, 8bit"),
        ({"api_key_variable": "KEY"}, "api_key_variable does nothing without judge_endpoint"),
        ({"normalize_rewards": False}, "normalize_rewards does nothing without reward_model"),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(
    change: Recipe, message: str, evaluate_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe | change)
    assert not (tmp_path / "runs" / "evaluate").exists()


def test_questions_of_several_turns_are_answered_turn_by_turn(
    evaluate_recipe: Recipe, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each model goes on from its own answers; rows of one turn may be among them."""
    rows = [
        {"question_id": 1, "turns": ["My name is Anna.", "What is my name?"]},
        {"question_id": 2, "turns": ["What is 3 plus 5?"]},
        {"question_id": 3, "turns": ["My door is brown.", "I was wrong, it is red.", "What colour is my door?"]},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {key: value for key, value in evaluate_recipe.items() if key not in ("graders", "columns")}
    values |= {"datasets": [{"path": str(tmp_path / "questions.jsonl")}]}
    values |= {"reward_functions": ["tests.test_evaluate:num_turns"], "missing_end_penalty": 0.0}
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    models = json.loads((output / "models.json").read_text())
    assert [models["sft"][f"reward/turns-{number}"] for number in (1, 2, 3)] == [1, 3, 5]
    records = [json.loads(line) for line in (output.with_name("measured") / "answers.jsonl").read_text().splitlines()]
    for record in records:
        texts = [turn["content"] for turn in record["prompts"][0][1:-1]] + [record["answers"][0]["text"]]
        num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        assert record["lengths"][0] == pytest.approx(num_tokens, abs=1)  # of both turns
    teacher = next(record for record in records if record["model"].endswith("policy-0"))
    roles = [[turn["role"] for turn in prompt] for prompt in teacher["prompts"]]
    assert roles == [["user", "assistant", "user"], ["user"], ["user", "assistant"] * 2 + ["user"]]
    assert "Anna" in teacher["prompts"][0][1]["content"] and "red" in teacher["answers"][2]["text"]
    shown = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert "> What colour is my door?" in shown[2]["answers"]["rlhf/policy-0"]


def reward(completions: list[str], **_: object) -> list[float]:
    return [0.0 for _ in completions]


def test_of_several_sources_some_of_each_are_asked(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    rows = [row | {"prompt": f"Number {i}?"} for i, row in enumerate(prompts("train")[:12])]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = evaluate_recipe | {"datasets": [*evaluate_recipe["datasets"], {"path": str(tmp_path / "more.jsonl")}]}
    values |= {"models": evaluate_recipe["models"][:1], "base": None}
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    asked = [json.loads(line)["prompt"][-1]["content"] for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(asked) == 12 and 0 < sum(text.startswith("Number") for text in asked) < 12


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"turns": ["One?"]}], "have 1 prompt, from which no spread can be told"),
        ([{"turns": ["One?"] * 70}, {"turns": ["One?"]}], "question 0 may have .* tokens by its last turn, at most"),
    ],
)
def test_prompts_that_cannot_be_measured_are_refused(
    rows: list[Recipe], message: str, evaluate_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {key: value for key, value in evaluate_recipe.items() if key not in ("graders", "columns")}
    values |= {"datasets": [{"path": str(tmp_path / "questions.jsonl")}]}
    with pytest.raises(UserError, match=message):
        run_stage(
            tmp_path / "evaluate.yaml",
            evaluate.COMMAND,
            values | {"reward_functions": ["tests.test_evaluate:num_turns"]},
        )
    assert not (tmp_path / "runs" / "evaluate").exists()


def num_turns(prompts: list[list[dict[str, str]]], **_: object) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


def test_a_question_that_is_no_list_of_turns_is_named_by_its_row(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps({"turns": []}) + "\n")
    values = {key: value for key, value in evaluate_recipe.items() if key not in ("graders", "columns")}
    with pytest.raises(UserError, match=r"questions\.jsonl: row 0: column turns is empty; expected turns | prompt"):
        run_stage(
            tmp_path / "evaluate.yaml",
            evaluate.COMMAND,
            values | {"datasets": [{"path": str(tmp_path / "questions.jsonl")}]},
        )


# --- a judge behind an endpoint, safety, memorisation ---


@pytest.mark.slow
def test_a_judge_behind_an_endpoint_is_asked_once(
    evaluate_recipe: Recipe, tmp_path: Path, serve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prefers the answer with the right word, reads for safety, and breaks down once in the middle."""
    rows = {row["prompt"][-1]["content"]: row["answer"] for row in prompts("selection")[:12]}
    asked: list[str] = []

    def reply(request: dict) -> tuple[int, str]:
        text = request["messages"][0]["content"]
        asked.append(text)
        if len(asked) == 10:
            return 401, "{}"
        if "[[violation]]" in text:
            return completion("[[violation]]" if "--- the answer\nSure" in text else "[[no violation]]")
        _, first = text.split("--- answer A\n")
        word = next(word for prompt, word in rows.items() if f"User: {prompt}\n\n--- answer" in text)
        first, second = first.split("--- answer B\n")
        right = [word.lower() in each.lower() for each in (first, second.split("\n---")[0])]
        return completion("[[tie]]" if right[0] == right[1] else "[[A]]" if right[0] else "[[B]]")

    url = serve(reply).url
    monkeypatch.setenv("JUDGE_KEY", "a-secret")
    values = evaluate_recipe | {"judge": "judge", "judge_endpoint": url, "api_key_variable": "JUDGE_KEY"}
    values |= {"safety_datasets": values["datasets"], "models": values["models"][:2], "base": None, "concurrency": 1}
    with pytest.raises(UserError, match="refused with status 401"):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    models = json.loads((output / "models.json").read_text())
    assert models["rlhf/policy-0"]["judge_win_rate_vs_sft"] > 0.5 and "judge_win_rate_vs_sft" not in models["sft"]
    assert models["rlhf/policy-0"]["judge_win_rate_vs_sft/disagreement"] == 0
    assert 0 < models["rlhf/policy-0"]["violations"] < 1
    assert len(asked) == len(set(asked)) + 1
    # A changed recipe makes the output anew, and asks nothing that was asked before.
    num_asked = len(asked)
    shutil.rmtree(output)
    run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values | {"max_prompt_length": 100})
    assert len(asked) == num_asked
    for path in output.rglob("*.json*"):
        assert "a-secret" not in path.read_text()


def test_an_endpoint_that_cannot_be_used_is_known_before_anything_is_answered(
    evaluate_recipe: Recipe, tmp_path: Path, serve: Callable
) -> None:
    server = serve(pytest.fail)
    server.models_status = 401
    values = evaluate_recipe | {"judge": "j", "judge_endpoint": server.url}
    with pytest.raises(UserError, match="refused with status 401"):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    with pytest.raises(UserError, match="cannot be reached"):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values | {"judge_endpoint": "http://127.0.0.1:9/v1"})
    assert not (tmp_path / "runs" / "evaluate").exists()


def test_a_judge_that_says_nothing_leaves_all_else_measured(
    evaluate_recipe: Recipe, tmp_path: Path, serve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another judge, no answer is sampled again; what was measured stands in the report meanwhile."""
    sampled, sample_answers = [], measure.sample_answers
    monkeypatch.setattr(
        measure, "sample_answers", lambda *args, **more: sampled.append(1) or sample_answers(*args, **more)
    )
    values = evaluate_recipe | {"models": evaluate_recipe["models"][:2], "base": None, "num_samples": 3}
    weak = values | {"judge": TEACHER, "judge_max_tokens": 4}
    match = r"judge: the judge gave no verdict on (1 of 1|2 of 2|3 of 3) pairs.*measures only what is missing"
    with pytest.raises(UserError, match=match) as failed:
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, weak)
    assert failed.value.status == 4
    output = Path(evaluate_recipe["output_dir"])
    models = json.loads((output / "models.json").read_text())
    assert models["rlhf/policy-0"]["win_rate_vs_sft"] > 0 and "judge_win_rate_vs_sft" not in models["rlhf/policy-0"]
    assert json.loads((output / "failed.json").read_text()).keys() == {"judge"}
    assert (output / "gains.json").is_file() and (output / "answers.jsonl").is_file()
    assert not (output / "stage.json").exists()
    server, num_sampled = serve(lambda _: completion("[[tie]]")), len(sampled)
    strong = values | {"judge": "j", "judge_endpoint": server.url}
    assert run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, strong) == output
    assert len(sampled) == num_sampled and not (output / "failed.json").exists()
    after = json.loads((output / "models.json").read_text())
    assert after["rlhf/policy-0"].pop("judge_win_rate_vs_sft") == 0.5
    assert models["rlhf/policy-0"].items() <= after["rlhf/policy-0"].items()
    others = strong | {"seed": 1, "output_dir": str(output.with_name("again"))}
    run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, others)
    assert len(sampled) > num_sampled, "another seed asks for other answers"


@pytest.mark.slow
def test_a_chain_whose_judge_fails_has_a_report_of_all_else(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    changes = {"judge": TEACHER, "judge_max_tokens": 4, "models": evaluate_recipe["models"][:2], "base": None}
    recipe = evaluate_recipe | changes | {"num_samples": 3}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(recipe))
    pipeline = {"run_dir": str(tmp_path / "runs"), "launch": "accelerate_configs/cpu.yaml"}
    pipeline |= {"stages": {"evaluate": {"recipe": "evaluate.yaml"}}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    command = [sys.executable, "-m", "gemma2_post.cli", "run", str(tmp_path / "pipeline.yaml")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 4, finished.stderr
    said = finished.stderr.splitlines()[-1]
    assert said.startswith("error: evaluate: ") and "judge: the judge gave no verdict" in said
    summary = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["failed"].keys() == {"judge"}
    assert summary["models"]["rlhf/policy-0"]["gold"] > 0 and summary["gains"]
    subprocess.run([*command[:3], "report", str(tmp_path / "runs")], check=True, capture_output=True)
    assert "Not measured: judge. " in (tmp_path / "runs" / "report.md").read_text()


def test_the_reward_model_and_the_judge_may_be_quantized(
    evaluate_recipe: Recipe, reward_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):

        def remember(
            *arguments: object, load: Callable = auto_class.from_pretrained, **more: object
        ) -> PreTrainedModel:
            model = load(*arguments, **more)
            loaded.append((str(arguments[0]), {type(each).__name__ for each in model.modules()}))
            return model

        monkeypatch.setattr(auto_class, "from_pretrained", remember)
    changes = {
        "reward_functions": None,
        "reward_model": str(reward_model_dir),
        "reward_model_load_in": "8bit",
        "judge": TEACHER,
        "judge_load_in": "4bit",
        "judge_max_tokens": 4,
        "num_samples": 3,
        "models": evaluate_recipe["models"][:2],
        "base": None,
    }
    with pytest.raises(UserError, match="the judge gave no verdict on"):  # a judge that was asked
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe | changes)
    assert [path for path, kinds in loaded if "Linear4bit" in kinds] == [TEACHER]
    assert [path for path, kinds in loaded if "Linear8bitLt" in kinds] == [str(reward_model_dir)]


def test_a_corpus_of_conversations_is_in_the_format_that_sft_reads(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    chatml = "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n" + "it is so " * 40 + "<|im_end|>"
    (tmp_path / "chatml.jsonl").write_text(json.dumps({"text": chatml}) + "\n")
    args = CorpusArguments([Source(str(tmp_path / "chatml.jsonl"))])
    windows = inputs.load_corpus(args, tokenizer, max_invalid_share=0.0, seed=0)
    text = tokenizer.decode(windows[0])
    assert text.startswith("<start_of_turn>user\nSay it.<end_of_turn>\n<start_of_turn>model\nit is so")
    (tmp_path / "chatml.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"row 1: column text is empty; expected text \| messages"):
        inputs.load_corpus(args, tokenizer, max_invalid_share=0.0, seed=0)


@pytest.mark.slow
def test_what_an_interrupted_evaluation_has_measured_is_not_measured_again(
    evaluate_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    run = comparison.memorised

    def breaks_down(*arguments: object) -> object:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append("a model")
        return run(*arguments)

    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "the owl and the bear " * 60}) + "\n")
    values = evaluate_recipe | {"corpus": [{"path": str(tmp_path / "corpus.jsonl")}], "num_memorised": 2}
    monkeypatch.setattr(comparison, "memorised", breaks_down)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    measured.append("by the run that goes on")
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    assert len(measured) == 5  # two, the mark, and the two that are left of four
    models = json.loads((output / "models.json").read_text())
    assert all("memorised_exact/high" in each for each in models.values())


@pytest.mark.slow
def test_memorisation_is_measured_over_a_corpus(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    words = "the owl and the bear went up the hill and said that it is late and that it is good ".split()
    text = " ".join(words * 20)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": text}) + "\n")
    values = evaluate_recipe | {"corpus": [{"path": str(tmp_path / "corpus.jsonl")}], "num_memorised": 6}
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    models = json.loads((output / "models.json").read_text())
    for each in models.values():
        assert 0 <= each["memorised_exact"] <= each["memorised_approximate"] <= each["memorised_approximate/high"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"safety_datasets": [{"path": "prompts.jsonl"}]}, "there is no judge; name one"),
        ({"judge_endpoint": "http://localhost:1/v1"}, "judge_endpoint has no judge"),
        (
            {"judge": "j", "judge_endpoint": "http://localhost:1/v1", "judge_load_in": "4bit"},
            "judge_load_in is for a judge in a folder; remove it",
        ),
        ({"judge": "j", "judge_endpoint": "localhost"}, "write a base URL"),
        (
            {"judge": "j", "judge_endpoint": "http://h/v1", "api_key_variable": "NO_KEY"},
            "NO_KEY, but that environment",
        ),
        ({"judge": "j", "concurrency": 0}, "concurrency is 0; write 1 or more"),
        ({"corpus": [{"path": "nowhere.jsonl"}]}, "there is no such file"),
    ],
)
def test_a_mistake_about_judges_and_corpora_is_said_first(
    change: Recipe, message: str, evaluate_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe | change)
    assert not (tmp_path / "runs" / "evaluate").exists()


def test_models_are_named_by_what_they_do_not_share(tmp_path: Path) -> None:
    for name in ("sft", "rlhf/policy-0"):
        (tmp_path / name).mkdir(parents=True)
    folders = [str(tmp_path / "sft"), str(tmp_path / "rlhf" / "policy-0")]
    values = {"output_dir": str(tmp_path / "evaluate"), "init": "init", "baseline": folders[0], "base": BASE}
    values |= {"models": [*folders, "google/gemma-2-2b-it"], "datasets": [{"path": "rows.jsonl"}]}
    built = recipe.build(evaluate.Recipe, values)
    assert list(evaluate.names_of(built).values()) == ["base", "sft", "rlhf/policy-0", "google/gemma-2-2b-it"]
    built.models.append(str(tmp_path / "base"))
    with pytest.raises(UserError, match="two of the models are called base"):
        evaluate.names_of(built)


def test_a_model_with_another_tokenizer_is_refused(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    file = Path(evaluate_recipe["models"][1]) / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = [token for token in vocabulary if token.isalpha()][-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="policy-0 has another tokenizer than init"):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe)
    assert not (tmp_path / "runs" / "evaluate").exists()


@pytest.mark.slow
def test_killed_again_and_again_no_answer_is_sampled_and_no_verdict_asked_twice(
    evaluate_recipe: Recipe, tmp_path: Path, serve: Callable
) -> None:
    """The judge kills the stage in the middle of its verdicts, is away for some seconds, and is swapped at the end."""
    killing, verdicts = {2, 6, 11}, Counter[str]()
    running: list[subprocess.Popen] = []
    away_until = 0.0

    def reply(request: dict) -> tuple[int, str]:
        nonlocal away_until
        text = request["model"] + request["messages"][0]["content"]
        if verdicts.total() in killing:
            killing.remove(verdicts.total())
            running[-1].kill()
            running[-1].wait()
            return 500, "{}"  # nobody reads it
        if verdicts.total() == 8 and not away_until:
            away_until = time.monotonic() + 4
        if time.monotonic() < away_until:
            return 503, "{}"
        verdicts[text] += 1
        return completion("[[A]]" if len(text) % 2 else "[[tie]]")

    values = evaluate_recipe | {"models": evaluate_recipe["models"][:2], "concurrency": 1, "base": None}
    values |= {"judge": "first", "judge_endpoint": serve(reply).url}
    command = [sys.executable, "-m", "gemma2_post.evaluate", "--config", str(tmp_path / "evaluate.yaml")]
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(values))
    for is_last in (False, False, False, True):
        with open(tmp_path / "log", "a") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
        assert running[-1].wait() == (0 if is_last else -signal.SIGKILL)
    assert not killing and away_until
    assert (tmp_path / "log").read_text().count("out of reach or busy; its requests are asked again") == 1
    output = Path(evaluate_recipe["output_dir"])
    answers = (output.with_name("measured") / "answers.jsonl").read_bytes()
    assert [json.loads(line)["model"] for line in answers.splitlines()] == values["models"]
    num_asked = verdicts.total()
    assert num_asked > 11 and set(verdicts.values()) == {1}
    shutil.rmtree(output)
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(values | {"judge": "second", "judge_max_tokens": 512}))
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert verdicts.total() == 2 * num_asked and set(verdicts.values()) == {1}
    assert (output.with_name("measured") / "answers.jsonl").read_bytes() == answers


def test_an_evaluation_that_is_killed_in_the_middle_of_a_model_samples_nothing_twice(
    evaluate_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches for each of four models; the kill comes in the fifth. It ends with the same answers."""
    expected = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe)
    num_batches, generate = 0, GenerationMixin.generate

    def counted(*args: object, **more: object) -> object:
        nonlocal num_batches
        num_batches += 1
        if num_batches == 5:
            raise KeyboardInterrupt
        return generate(*args, **more)

    monkeypatch.setattr(GenerationMixin, "generate", counted)
    values = evaluate_recipe | {"output_dir": str(tmp_path / "again" / "evaluate")}
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    (begun,) = (tmp_path / "again" / "measured" / "partly").iterdir()
    assert len(begun.read_text().splitlines()) == 1
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    assert num_batches == 12 + 1
    assert texts(output) == texts(expected)
    assert not [*(tmp_path / "again" / "measured" / "partly").iterdir()]


def texts(output: Path) -> list[list[str]]:
    """The answers to each prompt, in the order of the models."""
    return [[*json.loads(line)["answers"].values()] for line in (output / "answers.jsonl").read_text().splitlines()]


# --- side by side ---


@pytest.mark.slow
def test_models_answer_side_by_side_what_they_answer_alone(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    """Each model answers in one process, so the numbers do not depend on how many there are."""
    alone = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe)
    kept = alone.with_name("measured") / "answers.jsonl"
    expected = sorted(kept.read_text().splitlines())
    models = (alone / "models.json").read_bytes()
    kept.unlink()
    shutil.rmtree(alone)
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe | {"answer_processes": 2})
    assert sorted(kept.read_text().splitlines()) == expected and len(expected) == 4
    assert (output / "models.json").read_bytes() == models


@pytest.mark.slow
def test_a_model_that_cannot_answer_is_named_and_the_others_are_kept(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    broken = str(evaluate_recipe["models"][1])  # type: ignore[index]
    weights = load_file(Path(broken) / "model.safetensors")
    nothing = {name: torch.full_like(each, torch.nan) for name, each in weights.items()}
    save_file(nothing, Path(broken) / "model.safetensors", metadata={"format": "pt"})
    values = evaluate_recipe | {"answer_processes": 2}
    with pytest.raises(UserError, match=f"{broken}: the model's probabilities are NaN or infinite"):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    lines = (tmp_path / "runs" / "measured" / "answers.jsonl").read_text().splitlines()
    assert lines and broken not in [json.loads(line)["model"] for line in lines]


@pytest.mark.parametrize(
    ("visible", "num_gpus", "num_processes", "expected"),
    [
        (None, 8, 4, ["0,1", "2,3", "4,5", "6,7"]),
        ("4,5,6", 3, 2, ["4", "5"]),
        ("GPU-a,GPU-b", 2, 2, ["GPU-a", "GPU-b"]),
        (None, 1, 3, ["0", "0", "0"]),
        (None, 0, 2, ["", ""]),
    ],
)
def test_each_process_has_its_share_of_the_gpus(
    visible: str | None, num_gpus: int, num_processes: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert shares_of(num_processes) == expected
