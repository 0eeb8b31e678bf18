"""Answers from vLLM: a real server, started for each model, beside the same model in transformers.

These tests run where GEMMA2_POST_VLLM names vLLM's program; `python -m tests.vllm_environment DIR` makes one for CPUs.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from gemma2_post import evaluate
from gemma2_post.evaluation.answering import vllm_server
from gemma2_post.evaluation.answering.samples import PartlyAnswered, sample_answers
from gemma2_post.evaluation.answering.vllm_server import Server, serving
from gemma2_post.evaluation.inputs import load_judge
from gemma2_post.evaluation.judging.judge import Refusal
from gemma2_post.evaluation.judging.rubrics import comparison
from gemma2_post.evaluation.keys import EndpointArguments, JudgeArguments
from gemma2_post.evaluation.measure import load
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokens import STOP_TOKEN_IDS
from gemma2_post.stage.errors import UserError
from gemma2_post.tiny.data import prompts
from tests.conftest import TEACHER, run_stage
from tests.test_evaluate import evaluate_recipe
from tests.test_synthesize import rows_of, run_synthesize, synthesize_recipe

__all__ = ["evaluate_recipe", "run_synthesize", "synthesize_recipe"]  # fixtures

Recipe = dict[str, object]
needs_vllm = pytest.mark.skipif("GEMMA2_POST_VLLM" not in os.environ, reason="GEMMA2_POST_VLLM names no vLLM")


def server_of(tmp_path: Path, path: str = TEACHER) -> Server:
    config = load_config(path)
    program, positions = os.environ["GEMMA2_POST_VLLM"], config.max_position_embeddings
    return Server(program, path, tmp_path / "vllm.log", positions, config.num_key_value_heads)


@needs_vllm
@pytest.mark.slow
def test_vllm_gives_the_answers_of_transformers_and_is_started_again_when_it_dies(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    asked = [row["prompt"] for row in prompts("selection")[:100]]
    server, model = server_of(tmp_path), load(Path(TEACHER), torch.device("cpu"))
    expected = sample_answers(model, tokenizer, asked, 32, temperature=0.0)
    with serving(server, tokenizer, lambda: model, 32, seed=0) as sample:
        first = server.process
        found = sample(asked, 0.0, PartlyAnswered())
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert [each.prompt_ids for each in found] == [each.prompt_ids for each in expected]
        assert all(each.token_ids[-1] in STOP_TOKEN_IDS for each in found)
        assert server.version().startswith("0.")
        sampled = sample(asked, 1.0, PartlyAnswered())
        assert {each.text for each in sampled} != {each.text for each in found}
        os.killpg(first.pid, signal.SIGKILL)
        again = sample(asked[:5], 0.0, PartlyAnswered({1: found[1]}))
        assert again[1] is found[1], "it was answered already"
        assert [each.token_ids for each in again] == [each.token_ids for each in expected[:5]]
        assert server.process is not first
    assert server.process.poll() is not None, "it ends with the answers"


@needs_vllm
@pytest.mark.slow
def test_an_evaluation_by_vllm_measures_the_same_models(
    evaluate_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also its KL, which transformers computes; the second run starts no server."""
    values = evaluate_recipe | {"models": evaluate_recipe["models"][:2], "base": None}  # type: ignore[index]
    values |= {"engine": "vllm", "vllm_program": os.environ["GEMMA2_POST_VLLM"]}
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    models = json.loads((output / "models.json").read_text())
    assert models["rlhf/policy-0"]["kl_to_init"] == pytest.approx(0, abs=1e-6)
    assert models["sft"]["kl_to_init"] > 0.1
    assert models["rlhf/policy-0"]["gold"] > models["sft"]["gold"]
    assert json.loads((output / "stage.json").read_text())["vllm"].startswith("0.")
    monkeypatch.setattr(vllm_server.Server, "start", lambda _: pytest.fail("started again"))
    again = values | {"output_dir": str(output.with_name("again")), "graders": None}
    kept = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, again)
    assert json.loads((kept / "stage.json").read_text())["vllm"].startswith("0."), "it goes with the answers"


@needs_vllm
@pytest.mark.slow
def test_a_teacher_writes_by_vllm_what_it_writes_by_transformers(
    synthesize_recipe: Recipe, run_synthesize: Callable, tmp_path: Path
) -> None:
    """Greedily; what an interrupted run has written is kept."""
    values = synthesize_recipe | {"temperature": 0.0, "num_answers": 1}
    expected = rows_of(run_synthesize(values))
    by_vllm = values | {"engine": "vllm", "vllm_program": os.environ["GEMMA2_POST_VLLM"]}
    output = run_synthesize(by_vllm | {"output_dir": str(tmp_path / "by-vllm")})
    assert [row["messages"] for row in rows_of(output)] == [row["messages"] for row in expected]


@needs_vllm
@pytest.mark.slow
def test_a_judge_by_vllm_replies_as_by_transformers(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Greedily; a question without room for a reply is not asked; the server ends with the judge."""
    long = " ".join(["word"] * load_config(TEACHER).max_position_embeddings)
    questions = [comparison(row["prompt"], "Blue.", "Gray.") for row in prompts("selection")[:20]]
    questions.append(comparison([{"role": "user", "content": long}], "Blue.", "Gray."))
    found = {}
    for engine in ("transformers", "vllm"):
        program = {"judge_vllm_program": os.environ["GEMMA2_POST_VLLM"]} if engine == "vllm" else {}
        args = JudgeArguments(
            judge=TEACHER, judge_engine=engine, judge_max_tokens=8, endpoint=EndpointArguments(), **program
        )
        args.check()
        judge = load_judge(args, tmp_path / engine / "judgments.jsonl")
        assert judge is not None
        replies = found[engine] = {}
        with closing(judge):
            judge.ask(questions, 0, replies.__setitem__)
        assert isinstance(replies[questions[-1]], Refusal)
    assert found["vllm"] == found["transformers"]
    assert subprocess.run(["pgrep", "-f", f"serve {TEACHER}"], capture_output=True).returncode == 1


@needs_vllm
@pytest.mark.slow
def test_a_model_that_vllm_computes_otherwise_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    other = load(Path(TEACHER), torch.device("cpu"))
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    match = r"log-probabilities of .* differ from transformers' by \d.* nats per token, more than 0.1"
    with pytest.raises(UserError, match=match), serving(server_of(tmp_path), tokenizer, lambda: other, 8, seed=0):
        pytest.fail("it must not begin")


def test_what_a_server_said_last_is_in_the_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A program that ends at once, in place of one that finds no memory."""
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho ValueError: no room for the cache\nexit 3\n")
    program.chmod(0o755)
    server = Server(str(program), TEACHER, tmp_path / "vllm.log", 64, 2)
    begun = serving(server, tokenizer, partial(load, Path(TEACHER), torch.device("cpu")), 8, seed=0)
    with pytest.raises(UserError, match=r"vLLM ended with status 3 .*no room for the cache"), begun:
        pytest.fail("it must not begin")
    assert subprocess.run(["pgrep", "-f", str(program)], capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"judge": TEACHER, "judge_engine": "vllm", "judge_vllm_program": "no-such-program"},
            "judge_engine is vllm, and there is no program no-such-program",
        ),
        (
            {"judge": TEACHER, "judge_engine": "vllm", "judge_load_in": "4bit"},
            "judge_engine is vllm, which judge_load_in",
        ),
        ({"judge": TEACHER, "judge_vllm_program": "x"}, "judge_vllm_program does nothing without judge_engine: vllm"),
        (
            {"engine": "vllm", "vllm_program": "no-such-program"},
            "engine is vllm, and there is no program no-such-program",
        ),
        ({"vllm_program": "x"}, "vllm_program does nothing without engine: vllm"),
        ({"engine": "vlm"}, "write one of transformers, vllm"),
    ],
)
def test_an_engine_that_is_not_there_is_said_first(
    change: Recipe, message: str, evaluate_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, evaluate_recipe | change)
    assert not (tmp_path / "runs" / "evaluate").exists()


@pytest.mark.parametrize("change", [{"endpoint": "http://localhost/v1"}, {"load_in_4bit": True}])
def test_vllm_and_what_it_cannot_be_with_are_refused(
    change: Recipe, synthesize_recipe: Recipe, run_synthesize: Callable
) -> None:
    values = {key: value for key, value in synthesize_recipe.items() if key not in ("dtype", "batch_size")}
    with pytest.raises(UserError, match=r"engine is vllm, with .*; remove one of them"):
        run_synthesize(values | {"engine": "vllm"} | change)
