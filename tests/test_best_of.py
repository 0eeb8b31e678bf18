"""Best-of-n: the estimates are what all sets of n say, and a reward that knows the grade gains with n."""

import itertools
import json
import math
import random
from pathlib import Path
from statistics import mean

import pytest

from gemma2_post import evaluate
from gemma2_post.evaluation.best_of import accuracy, expected_best, kl, measure, numbers
from gemma2_post.stage.errors import UserError
from tests.conftest import run_stage
from tests.test_evaluate import evaluate_recipe

__all__ = ["evaluate_recipe"]  # a fixture
Recipe = dict[str, object]


def of_a_set(rewards: list[float], values: list[float], chosen: tuple[int, ...]) -> float:
    best = max(rewards[i] for i in chosen)
    return mean(values[i] for i in chosen if rewards[i] == best)


@pytest.mark.parametrize("num_rewards", [2, 4, 100])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_expected_best_is_the_mean_over_all_sets(n: int, num_rewards: int) -> None:
    """With few different rewards, many are tied; a set with several best ones takes each of them alike."""
    draw = random.Random(n)
    rewards = [float(draw.randrange(num_rewards)) for _ in range(7)]
    values = [draw.random() for _ in rewards]
    expected = mean(of_a_set(rewards, values, each) for each in itertools.combinations(range(7), n))
    assert expected_best(rewards, values, n) == pytest.approx(expected)


def test_the_reward_of_the_best_grows_and_a_reward_by_chance_gains_nothing() -> None:
    draw = random.Random(0)
    rewards = [[draw.random() for _ in range(8)] for _ in range(400)]
    apart = [[draw.random() for _ in range(8)] for _ in range(400)]
    found = measure(rewards, {"reward": rewards, "grade": apart})
    assert [found[f"best_of_{n}/reward"] for n in (1, 2, 4, 8)] == pytest.approx(
        [1 / 2, 2 / 3, 4 / 5, 8 / 9], abs=0.01
    )
    assert found["best_of_8/grade"] == pytest.approx(found["best_of_1/grade"], abs=0.04)
    assert found["best_of_8/kl"] == pytest.approx(math.log(8) - 7 / 8)
    assert found["best_of_4_accuracy/grade"] == pytest.approx(0.25, abs=0.04)
    assert found["best_of_4_accuracy/grade/by_chance"] == 0.25
    assert kl(1) == 0 and numbers(6) == [1, 2, 4]


def test_accuracy_is_the_share_of_sets_of_four_whose_best_is_found() -> None:
    assert accuracy([4, 3, 2, 1, 4, 3, 2, 1], [9, 1, 1, 1, 1, 9, 1, 1]) == 0.5
    assert accuracy([1, 1, 1, 1], [1, 1, 0, 0]) == 0.5, "equal rewards choose by chance, equal grades are all best"


def test_questions_of_several_turns_have_no_best_of_n(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"turns": ["What is 3 plus 5?", "And 2 more?"], "skill": "addition", "answer": "8"}] * 3
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = evaluate_recipe | {"datasets": [{"path": str(tmp_path / "questions.jsonl")}], "best_of": 4}
    with pytest.raises(
        UserError, match="best_of chooses among answers to one turn, and datasets has questions of sev"
    ):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)


def test_an_evaluation_measures_best_of_n_of_the_baseline(evaluate_recipe: Recipe, tmp_path: Path) -> None:
    values = evaluate_recipe | {"models": evaluate_recipe["models"][:2], "base": None}  # type: ignore[index]
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values | {"best_of": 4})
    found = json.loads((output / "best_of.json").read_text())
    assert found["best_of_1/reward"] < found["best_of_2/reward"] < found["best_of_4/reward"]
    assert {"best_of_4/gold", "best_of_4_accuracy/gold", "best_of_4_accuracy/gold/by_chance"} <= found.keys()
    assert json.loads((output / "stage.json").read_text())["metrics"].items() >= found.items()
    assert (output / "best-of-n.png").is_file()
