"""How often a reward model is right on RewardBench, RewardBench 2, and pairs: the rules, the layouts, the stage."""

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from gemma2_post import evaluate
from gemma2_post.data.ranked import RANKED
from gemma2_post.data.turns import InvalidRow
from gemma2_post.evaluation.comparison import Comparison
from gemma2_post.evaluation.findings import Findings, PartsFailedError
from gemma2_post.evaluation.reward_benchmarks import Ranked, benchmark_of, measure, ties_score
from gemma2_post.models import reward_model
from gemma2_post.report import models as reported
from gemma2_post.stage.errors import UserError
from tests.conftest import run_stage
from tests.test_evaluate import evaluate_recipe

__all__ = ["evaluate_recipe"]  # a fixture

Recipe = dict[str, object]
COUNTS = {"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28}
COUNTS |= {"mt-bench-med": 40, "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134}
COUNTS |= {"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46}
COUNTS |= {"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 250}
COUNTS |= {"xstest-should-respond": 154, "donotanswer": 136, "math-prm": 984}
COUNTS |= dict.fromkeys([f"hep-{language}" for language in ("cpp", "go", "java", "js", "python", "rust")], 164)


def row(rewards: list[float], subset: str, num_chosen: int = 1, key: str = "") -> Ranked:
    return Ranked(rewards, num_chosen, subset, key)


def test_sections_of_the_first_benchmark_weigh_their_subsets() -> None:
    """All of math-prm is wrong, and one of two easy ones; a tie is wrong, too."""
    rows = [row([2.0, 1.0], subset) for subset in COUNTS if subset not in ("math-prm", "alpacaeval-easy")]
    rows += [row([1.0, 1.0], "math-prm"), row([2.0, 1.0], "alpacaeval-easy"), row([1.0, 2.0], "alpacaeval-easy")]
    assert benchmark_of(rows) == "reward_bench"
    found = measure(rows)
    assert found["reward_bench/alpacaeval-easy"] == 0.5 and found["reward_bench/alpacaeval-easy/rows"] == 2
    assert found["reward_bench/Chat"] == pytest.approx(1 - 0.5 * 100 / (100 + 95 + 95 + 28 + 40))
    assert found["reward_bench/Reasoning"] == pytest.approx(0.5) and found["reward_bench/Safety"] == 1
    assert found["reward_bench/score"] == pytest.approx((found["reward_bench/Chat"] + 1 + 1 + 0.5) / 4)
    missing = measure([each for each in rows if each.subset != "donotanswer"])
    assert "reward_bench/Safety" not in missing and "reward_bench/score" not in missing
    assert missing["reward_bench/Chat"] == found["reward_bench/Chat"]


def test_the_best_of_four_shares_what_it_shares() -> None:
    rows = [row([4, 1, 2, 3], "Math"), row([1, 4, 2, 3], "Math"), row([4, 4, 2, 3], "Math"), row([4, 4, 4, 4], "Math")]
    found = measure(rows)
    assert found["reward_bench_2/Math"] == pytest.approx((1 + 0 + 1 / 2 + 1 / 4) / 4)
    assert found["reward_bench_2/Math/low"] < found["reward_bench_2/Math"] < found["reward_bench_2/Math/high"]
    assert "reward_bench_2/score" not in found
    rows += [row([2, 1, 1, 1], name) for name in ("Factuality", "Precise IF", "Safety", "Focus")]
    rows += [row([2, 1], "Ties", key="ref:0"), row([3, 2, 0], "Ties", 2, "tied:0")]
    found = measure(rows)
    ties = 0.3 + 0.3 + 0.2 * 1 + 0.2 * 0 + 0.01 * math.tanh(1 / 1 - 1)
    assert found["reward_bench_2/Ties"] == pytest.approx(ties)
    assert found["reward_bench_2/score"] == pytest.approx((7 / 16 + 4 + ties) / 6)


def test_the_subset_of_ties_counts_accuracy_and_margins() -> None:
    """Margins of `tied` rows are held against those of the `ref` row of the same number."""
    rows = [
        row([5, 4, 1], "Ties", 2, "tied:0"),  # margin 3, difference 1
        row([3, 1], "Ties", 1, "ref:0"),  # margin 2
        row([5, 1, 2], "Ties", 2, "tied:1"),  # wrong: margin -1, difference 4
        row([1, 3], "Ties", 1, "ref:1"),  # wrong
        row([9, 8, 7], "Ties", 2, "tied:2"),  # without a reference: accuracy only
    ]
    margins = (math.tanh(2 / 1 - 1) + math.tanh(-2 / 4 - 1)) / 2
    assert ties_score(rows) == pytest.approx(0.3 * 2 / 3 + 0.3 / 2 + 0.2 / 2 + 0.2 / 2 + 0.01 * margins)
    same = [row([2, 2, 1], "Ties", 2, "tied:0"), row([2, 1], "Ties", 1, "ref:0")]
    assert ties_score(same) == pytest.approx(0.6 + 0.4 + 0.01)
    assert ties_score([row([1, 1, 1], "Ties", 2, "tied:0"), row([2, 1], "Ties", 1, "ref:0")]) == pytest.approx(0.3)


def test_pairs_of_neither_benchmark_have_a_score_of_their_own() -> None:
    found = measure([row([2, 1], "mine"), row([1, 1], "mine"), row([1, 2], "yours")])
    assert found["pairs/mine"] == 0.75 and found["pairs/score"] == 0.5 and found["pairs/yours/rows"] == 1


@pytest.mark.parametrize(
    ("columns", "answers"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "subset": "s", "id": 3}, ["a", "b"]),
        ({"prompt": "Hi", "chosen": ["a", "c"], "rejected": ["b"], "subset": "s", "id": "3"}, ["a", "c", "b"]),
        ({"prompt": "Hi", "chosen": "a\n\nHuman: b", "rejected": "b", "subset": "s", "id": 3}, ["a\n\nHuman: b", "b"]),
        (
            {
                side: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
                for side, text in (("chosen", "a"), ("rejected", "b"))
            }
            | {"subset": "s", "id": 3},
            ["a", "b"],
        ),
    ],
)
def test_each_layout_is_read(columns: dict, answers: list[str]) -> None:
    found = RANKED.read(columns)
    assert found["answers"] == answers and found["prompt"] == [{"role": "user", "content": "Hi"}]
    assert (found["subset"], found["id"], found["num_chosen"]) == ("s", "3", len(answers) - 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "Hi", "chosen": ["a"], "rejected": [" "]}, "an answer is empty"),
        ({"prompt": "Hi", "answer": "a"}, "of no known format; expected prompt"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [{"name": "x"}]}, "column tools would be lost"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 5}, "is below"),
        ({"prompt": "Hi", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Ties"}, "need ref:N or tied:N"),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused(columns: dict, message: str) -> None:
    with pytest.raises(InvalidRow, match=message):
        RANKED.read(columns)


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 5},
        {"prompt": "Hi", "response_1": "a", "response_2": "b", "preference_strength": 0},
    ],
)
def test_a_pair_of_which_neither_is_better_is_read_as_a_tie(columns: dict) -> None:
    """Else the answer that comes first would count as the better one."""
    assert RANKED.read(columns)["is_tie"]
    assert not RANKED.read({"prompt": "Hi", "chosen": "a", "rejected": "b"})["is_tie"]


def test_the_report_shows_subsets_that_are_called_like_parts_of_an_interval() -> None:
    found = measure([row([2, 1], "low"), row([1, 2], "high")])
    assert [name for name, _ in reported.known_sets({"reward_model": found})] == ["pairs", "pairs, high", "pairs, low"]


@pytest.mark.slow
def test_several_files_of_own_pairs_count_as_one_set_without_ties(
    evaluate_recipe: Recipe, reward_model_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def pair(i: int) -> dict:
        return {"prompt": f"What is {i} plus 1?", "chosen": f"It is {i + 1}.", "rejected": "No."}

    ties = [pair(9) | {"score_chosen": 3, "score_rejected": 3}]
    (tmp_path / "a.json").write_text(json.dumps([pair(i) for i in range(3)]))
    (tmp_path / "b.json").write_text(json.dumps([pair(i) for i in range(3, 5)] + ties))
    values = {key: value for key, value in evaluate_recipe.items() if key != "reward_functions"}
    values |= {"reward_model": str(reward_model_dir), "models": values["models"][:2], "base": None}  # type: ignore
    values |= {"reward_benchmarks": [{"path": str(tmp_path / name)} for name in ("a.json", "b.json")]}
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    found = json.loads((output / "reward_benchmarks.json").read_text())
    model = reward_model.load(str(reward_model_dir), tokenizer).model
    right = []
    for each in map(pair, range(5)):
        prompt = {"role": "user", "content": each["prompt"]}
        said = [[prompt, {"role": "assistant", "content": each[side]}] for side in ("chosen", "rejected")]
        chosen, rejected = reward_model.score(model, tokenizer, said)
        right.append(chosen > rejected)
    assert found["pairs/all/rows"] == 5 and found["pairs/score"] == sum(right) / 5


@pytest.mark.slow
def test_known_sets_that_cannot_be_measured_do_not_stop_the_other_parts(
    evaluate_recipe: Recipe, reward_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> dict[str, float]:
        raise UserError("no reward")

    monkeypatch.setattr(Comparison, "on_known_sets", fails)
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": "Hi", "chosen": "a", "rejected": "b"}]))
    values = {key: value for key, value in evaluate_recipe.items() if key != "reward_functions"}
    values |= {"reward_model": str(reward_model_dir), "models": values["models"][:2], "base": None}  # type: ignore
    values |= {"reward_benchmarks": [{"path": str(tmp_path / "pairs.json")}]}
    with pytest.raises(PartsFailedError) as raised:
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    assert raised.value.status == 4
    output = Path(str(values["output_dir"]))
    assert json.loads((output / "failed.json").read_text()) == {"reward_benchmarks": "no reward"}
    assert all("reward" in each for each in json.loads((output / "models.json").read_text()).values())


def test_what_failed_is_found_even_if_nothing_else_was_measured(tmp_path: Path) -> None:
    """The report looks for an evaluation by `models.json`."""
    found = Findings(tmp_path, ["sft"])

    def fails() -> dict[str, dict[str, float]]:
        raise UserError("no reward")

    found.add("rewards", fails)
    found.add("memorization", dict)
    assert json.loads((tmp_path / "models.json").read_text()) == {"sft": {}}
    found.add_of_reward_model("best_of", lambda: {"best_of_2/reward": math.nan})
    assert found.reward_model == {} and list(found.failed) == ["rewards", "best_of"]
    with pytest.raises(
        PartsFailedError, match=r"rewards: no reward; best_of: the reward model: best_of_2/reward is nan"
    ):
        found.check()


@pytest.mark.slow
def test_the_stage_measures_its_reward_model_and_keeps_what_it_has_scored(
    evaluate_recipe: Recipe, reward_model_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    second = [
        {"id": str(i), "prompt": f"What is {i} plus 1?", "chosen": [f"It is {i + 1}."], "subset": "Math"}
        | {"rejected": ["It is 7.", "No.", f"{i}"], "num_correct": 1, "total_completions": 4}
        for i in range(5)
    ]
    first = [
        {"id": i, "prompt": f"What is {i} plus 1?", "chosen": f"It is {i + 1}.", "rejected": "No.", "subset": "hep-go"}
        for i in range(4)
    ]
    files = {"second.json": second, "first.json": first}
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps(rows))
    values = {key: value for key, value in evaluate_recipe.items() if key != "reward_functions"}
    values |= {"reward_model": str(reward_model_dir), "models": values["models"][:2], "base": None}  # type: ignore
    values |= {"reward_benchmarks": [{"path": str(tmp_path / name)} for name in files]}
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    found = json.loads((output / "reward_benchmarks.json").read_text())
    loaded = reward_model.load(str(reward_model_dir), tokenizer)

    def rewards(row: dict) -> list[float]:
        chosen, rejected = (
            [row[side]] if isinstance(row[side], str) else row[side] for side in ("chosen", "rejected")
        )
        prompt = {"role": "user", "content": row["prompt"]}
        conversations = [[prompt, {"role": "assistant", "content": text}] for text in [*chosen, *rejected]]
        return reward_model.score(loaded.model, tokenizer, conversations)

    assert found["reward_bench_2/Math"] == sum(max(each) == each[0] for each in map(rewards, second)) / 5
    assert found["reward_bench/hep-go"] == sum(a > b for a, b in map(rewards, first)) / 4
    metrics = json.loads((output / "metrics.json").read_text())
    assert found.items() <= metrics.items()
    shown = dict(reported.known_sets({"reward_model": found}))
    assert shown["RewardBench 2, Math"].endswith("of 5")
    kept = (output.with_name("measured") / "reward_benchmarks.jsonl").read_text()
    assert len(kept.splitlines()) == 2
    shutil.rmtree(output)
    run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    assert json.loads((output / "reward_benchmarks.json").read_text()) == found
    assert (output.with_name("measured") / "reward_benchmarks.jsonl").read_text() == kept


def test_sets_for_a_reward_model_need_one(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": "Hi", "chosen": "a", "rejected": "b"}]))
    values = evaluate_recipe | {"reward_benchmarks": [{"path": str(tmp_path / "pairs.json")}]}
    with pytest.raises(UserError, match="reward_benchmarks are sets for a reward model, and there is none"):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
