"""What a judge is worth on pairs that people have labeled: agreement, position, verbosity, what is missing, cost."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from gemma2_post.evaluation.judging.judge_quality import LabeledPair, by_group, quality
from gemma2_post.evaluation.judging.verdicts import Verdict
from gemma2_post.evaluation.keys import EndpointArguments, JudgeArguments
from gemma2_post.judge_check import judge_check, read_pairs
from gemma2_post.stage.errors import UserError
from tests.conftest import TEACHER
from tests.test_synthesize import completion, serve

__all__ = ["serve"]  # a fixture

A, B, TIE = Verdict(1.0), Verdict(0.0), Verdict(0.5)
PROMPT = [{"role": "user", "content": "Say it."}]


def pair(first: str, second: str, label: float, group: str = "all") -> LabeledPair:
    return LabeledPair(PROMPT, first, second, label, group)


def test_the_figures_of_a_judge_follow_from_its_verdicts() -> None:
    pairs = [pair("long one", "short", 0.0, "x"), pair("a", "bb", 1.0, "x"), pair("aa", "bb", 0.5, "y"),
             pair("aaa", "b", 1.0, "y")]  # fmt: skip
    verdicts = [(A, A), (A, B), (TIE, None), (None, None)]
    found = quality(pairs, verdicts)
    assert found.agreement and found.agreement.share == pytest.approx((0.5 + 1 + 1) / 3)
    assert found.agreement_in_both_orders and found.agreement_in_both_orders.share == 0.5
    assert found.consistency and found.consistency.share == 0.5
    assert found.first_shown and found.first_shown.share == pytest.approx((1 + 0.5) / 2)
    assert found.longer and found.longer.share == pytest.approx((0.5 + 0) / 2)
    assert found.longer_by_labels and found.longer_by_labels.share == pytest.approx((0 + 0 + 1) / 3)
    assert found.verbosity_bias and found.verbosity_bias.share == pytest.approx((0.5 + 0) / 2)
    assert (found.num_verdicts, found.num_missing) == (8, 3)
    groups = by_group(pairs, verdicts)
    assert groups["y"].num_missing == 3 and groups["x"].agreement.share == 0.75
    assert quality(pairs[3:], verdicts[3:]).agreement is None


@pytest.mark.parametrize(("position", "length"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.5)])
def test_biases_are_found_in_a_judge_that_has_them(position: float, length: float) -> None:
    """A judge that errs at random, or prefers what is shown first, or what is longer."""
    random = numpy.random.default_rng(0)
    pairs, verdicts = [], []
    for _ in range(2000):
        first, second = ("a" * int(n) for n in random.integers(1, 100, 2))
        label = float(random.random() < 0.5)
        both = []
        for is_swapped in (False, True):
            right = label if not is_swapped else 1 - label
            says = right if random.random() < 0.7 else 1 - right
            if random.random() < position:
                says = 1.0
            elif random.random() < length and len(first) != len(second):
                says = float((len(first) > len(second)) != is_swapped)
            both.append(Verdict(says))
        pairs.append(pair(first, second, label))
        verdicts.append(tuple(both))
    found = quality(pairs, verdicts)
    assert found.first_shown.low <= 0.5 + position / 2 <= found.first_shown.high
    assert (found.first_shown.low > 0.5) == (position > 0)
    assert (found.verbosity_bias.low > 0.1) == (length > 0)


LAYOUTS = {
    "LLMBar": [{"input": "Hi", "output_1": "Hello.", "output_2": "No.", "label": 1}],
    "Auto-J": [
        {"scenario": "chitchat", "prompt": "Hi", "response 1": "No.", "response 2": "Hello.", "label": 1},
        {"scenario": "chitchat", "prompt": "Hi", "response 1": "No.", "response 2": "Not.", "label": 2},
    ],
    "JudgeBench": [{"question": "Hi", "response_A": "Hello.", "response_B": "No.", "label": "A>B"}],
    "AlpacaFarm": [{"instruction": "Hi", "input": "", "output_1": "No.", "output_2": "Hello.", "preference": 2}],
    "preference pairs": [{"prompt": "Hi", "chosen": "Hello.", "rejected": "No.", "subset": "s"}],
    "MT-Bench": [
        {
            "conversation_a": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "Hello again."},
            ],
            "conversation_b": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "No."},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "No again."},
            ],
            "winner": "model_a",
        }
    ],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_labeled_pairs_of_each_layout_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps(LAYOUTS[name]))
    found = read_pairs(str(tmp_path / "pairs.json"))[0]
    better, worse = (found.first, found.second) if found.label == 1 else (found.second, found.first)
    assert better.startswith("Hello") and worse.startswith("No") and found.prompt[0]["content"] == "Hi"
    if name == "MT-Bench":
        assert better == "Hello.\n\n> And?\n\nHello again."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "Hi", "output_1": "a", "output_2": "b", "label": 3}, "row 0: label is 3; expected one of 1, 2"),
        (
            {"input": "Hi", "output_1": "a"},
            r"row 0: the columns input, output_1 are of no known format; expected outp",
        ),
        ({"output_1": "a", "output_2": "b", "label": 1}, "row 0: "),
    ],
)
def test_pairs_that_cannot_be_read_are_refused_with_the_row(row: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=message):
        read_pairs(str(tmp_path / "pairs.json"))


def test_a_judge_is_asked_in_both_orders_once_and_its_cost_is_counted(
    tmp_path: Path, serve: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input": f"Say {i}.", "output_1": f"{i}", "output_2": "no", "label": 1} for i in range(6)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))

    def reply(request: dict) -> tuple[int, str]:
        text = request["messages"][0]["content"]
        if "Say 5." in text:
            return completion("I cannot say.")
        status, body = completion("[[B]]" if "answer A\nno" in text else "[[A]]")
        answer = json.loads(body) | {"usage": {"prompt_tokens": 100, "completion_tokens": 7}}
        return status, json.dumps(answer)

    server = serve(reply)
    args = JudgeArguments(judge="j", judge_endpoint=server.url, endpoint=EndpointArguments(concurrency=2))
    judge_check(str(tmp_path / "pairs.json"), args, None, tmp_path / "check.json")
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["agreement"]["share"] == 1 and found["first_shown"]["share"] == 0.5
    assert (found["num_missing"], found["num_verdicts"]) == (2, 12) and found["consistency"]["num_pairs"] == 5
    assert found["tokens"]["questions"] >= 1000 and found["tokens"]["replies"] >= 70
    said = capsys.readouterr().out
    assert (
        "agrees with the label            100.0%" in said and "2 of 12" in said and "had replies without one" in said
    )
    num_asked = len(server.requests)
    assert num_asked == 10 + 2 * 3
    judge_check(str(tmp_path / "pairs.json"), args, None, tmp_path / "check.json")
    assert len(server.requests) == num_asked


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_is_no_number_of_pairs_is_refused(limit: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--limit is {limit}"):
        judge_check(
            str(tmp_path / "pairs.json"),
            JudgeArguments(judge="j", endpoint=EndpointArguments()),
            limit,
            tmp_path / "check.json",
        )


@pytest.mark.slow
def test_the_command_measures_a_local_judge(tmp_path: Path) -> None:
    rows = [{"input": "What is 3 plus 5?", "output_1": "It is 8.", "output_2": "It is 2.", "label": 1}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "gemma2_post.cli", "judge-check", str(tmp_path / "pairs.json")]
    command += ["--judge", TEACHER, "--judge_max_tokens", "8", "--json", str(tmp_path / "check.json")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "no verdict                       2 of 2" in finished.stdout
    assert json.loads((tmp_path / "check.json").read_text())["num_missing"] == 2
