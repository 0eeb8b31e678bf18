"""What is measured on preference pairs equals what numpy, scipy and pencil say of hand-made ones."""

import json
import math
from pathlib import Path
from random import Random

import numpy
import pytest
from PIL import Image
from scipy.stats import pearsonr, spearmanr

from gemma2_post.evaluation.pairs import (
    ScoredPair,
    measure_pairs,
    plot_pairs,
    rank_correlation,
    rank_correlation_ceiling,
)


def pair(difference: float, num_turns: int = 1, chosen_tokens: int = 10, rejected_tokens: int = 10) -> ScoredPair:
    return ScoredPair(difference, 0.0, num_turns, chosen_tokens, rejected_tokens)


def random_pairs(num_pairs: int) -> list[ScoredPair]:
    random = Random(0)
    return [
        ScoredPair(
            random.gauss(0.5, 1),
            random.gauss(0, 1),
            random.randint(1, 3),
            random.randint(5, 60),
            random.randint(5, 60),
        )
        for _ in range(num_pairs)
    ]


def wilson(right: float, total: int) -> tuple[float, float]:
    z = 1.959963984540054
    share = right / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return centre - half, centre + half


# --- accuracy ---


def test_accuracy_counts_a_tie_half_and_has_a_wilson_interval() -> None:
    metrics = measure_pairs([pair(2.0)] * 5 + [pair(-1.0)] * 3 + [pair(0.0)] * 2)
    assert metrics["accuracy"] == 0.6
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx(wilson(6, 10), rel=1e-12)
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx((0.3127, 0.8318), abs=1e-4)


@pytest.mark.parametrize("num_ties", [1, 2, 5])
def test_a_model_that_knows_nothing_is_as_likely_above_one_half_as_below(num_ties: int) -> None:
    metrics = measure_pairs([pair(0.0)] * num_ties)
    assert metrics["accuracy"] == 0.5
    assert metrics["accuracy_low"] + metrics["accuracy_high"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("difference", "accuracy"), [(1.0, 1.0), (-1.0, 0.0)])
def test_one_pair_has_an_interval_too(difference: float, accuracy: float) -> None:
    metrics = measure_pairs([pair(difference)])
    assert metrics["accuracy"] == accuracy
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx(wilson(accuracy, 1), abs=1e-12)


def test_accuracy_by_turns() -> None:
    metrics = measure_pairs([pair(1, 1), pair(1, 3), pair(-1, 3), pair(0, 1), pair(-1, 12), pair(1, 3)])
    groups = {name: value for name, value in metrics.items() if name.startswith("accuracy/turns/")}
    assert groups == {"accuracy/turns/1": 0.75, "accuracy/turns/3": 2 / 3, "accuracy/turns/12": 0.0}
    assert list(groups) == ["accuracy/turns/1", "accuracy/turns/3", "accuracy/turns/12"]
    assert metrics["accuracy_single_turn"] == 0.75 and metrics["accuracy_multi_turn"] == 0.5


@pytest.mark.parametrize(("num_turns", "missing"), [(1, "accuracy_multi_turn"), (2, "accuracy_single_turn")])
def test_a_group_without_pairs_has_no_accuracy(num_turns: int, missing: str) -> None:
    metrics = measure_pairs([pair(1, num_turns), pair(-1, num_turns)])
    assert metrics[f"accuracy/turns/{num_turns}"] == 0.5 and missing not in metrics


def test_accuracy_by_length() -> None:
    """Of similar length are answers that differ by at most a tenth of the longer."""
    metrics = measure_pairs(
        [
            pair(1, 1, 100, 90),
            pair(1, 1, 90, 100),
            pair(-1, 1, 7, 7),
            *(pair(difference, 1, 100, 89) for difference in (1, 1, 1, -1)),
            *(pair(difference, 1, 3, 4) for difference in (-1, -1, 0, 1)),
        ]
    )
    assert {name: value for name, value in metrics.items() if "/length/" in name} == {
        "accuracy/length/similar": 2 / 3,
        "accuracy/length/chosen_longer": 0.75,
        "accuracy/length/chosen_shorter": 0.375,
    }


# --- calibration ---


def with_accuracy(probability: float, right: int, total: int, scale: float = 1.0) -> list[ScoredPair]:
    """Pairs of which the model is sure with this probability (the logit times `scale`), so many of them right."""
    difference = scale * math.log(probability / (1 - probability))
    return [pair(difference)] * right + [pair(-difference)] * (total - right)


def test_a_perfectly_calibrated_model_has_no_calibration_error() -> None:
    pairs = with_accuracy(0.6, 6, 10) + with_accuracy(0.75, 30, 40) + with_accuracy(0.99, 99, 100) + [pair(0)] * 3
    assert measure_pairs(pairs)["calibration_error"] == pytest.approx(0, abs=1e-12)


def test_an_overconfident_model_has_its_calibration_error() -> None:
    """At twice the logits: 0.8 becomes 16/17, 0.6 becomes 9/13."""
    pairs = with_accuracy(0.8, 80, 100, scale=2) + with_accuracy(0.6, 30, 50, scale=2)
    expected = (100 * (16 / 17 - 0.8) + 50 * (9 / 13 - 0.6)) / 150
    assert measure_pairs(pairs)["calibration_error"] == pytest.approx(expected, rel=1e-12)
    assert measure_pairs([pair(800.0), pair(-800.0)])["calibration_error"] == 0.5


def test_within_a_bin_only_the_means_count() -> None:
    """0.81 and 0.84 are in one bin, 0.86 is in the next; each is 0.5 right."""
    pairs = with_accuracy(0.81, 2, 2) + with_accuracy(0.84, 0, 2) + with_accuracy(0.86, 2, 4)
    assert measure_pairs(pairs)["calibration_error"] == pytest.approx((4 * 0.325 + 4 * 0.36) / 8, rel=1e-12)


# --- rewards and lengths ---


def test_rewards_and_their_correlation_with_length_are_those_of_scipy() -> None:
    pairs = random_pairs(200)
    rewards = numpy.array([[each.chosen, each.rejected] for each in pairs])
    lengths = numpy.array([[each.chosen_tokens, each.rejected_tokens] for each in pairs], dtype=float)
    metrics = measure_pairs(pairs)
    assert metrics["reward_mean"] == pytest.approx(rewards.mean(), rel=1e-12)
    assert metrics["reward_spread"] == pytest.approx(rewards.std(), rel=1e-12)
    overall = pearsonr(numpy.concatenate(rewards.T), numpy.concatenate(lengths.T)).statistic
    within = pearsonr(rewards @ [1, -1], lengths @ [1, -1]).statistic
    assert metrics["length_correlation"] == pytest.approx(overall, rel=1e-9)
    assert metrics["length_correlation_within_pairs"] == pytest.approx(within, rel=1e-9)
    assert abs(overall) < 0.2 and abs(within) < 0.2
    assert metrics["accuracy"] == (rewards[:, 0] > rewards[:, 1]).mean()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_reward_that_is_the_length_is_found_out(sign: int) -> None:
    lengths = [(each.chosen_tokens, each.rejected_tokens) for each in random_pairs(50)]
    metrics = measure_pairs([ScoredPair(sign * 0.3 * a, sign * 0.3 * b, 1, a, b) for a, b in lengths])
    assert metrics["length_correlation"] == pytest.approx(sign, rel=1e-12)
    assert metrics["length_correlation_within_pairs"] == pytest.approx(sign, rel=1e-12)
    assert metrics["accuracy/length/chosen_longer"] == (sign == 1)
    assert metrics["accuracy/length/chosen_shorter"] == (sign == -1)


def test_a_preference_for_length_within_pairs_shows_also_when_prompts_hide_it() -> None:
    """Long prompts have low rewards, so that overall the correlation is negative; the longer answer always wins."""
    pairs = [ScoredPair(-prompt + 0.1 * more, -prompt, 1, prompt + more, prompt) for prompt, more in zip(
        range(10, 100, 10), range(1, 10), strict=True
    )]  # fmt: skip
    metrics = measure_pairs(pairs)
    assert metrics["length_correlation"] < -0.9
    assert metrics["length_correlation_within_pairs"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, -2.7])
@pytest.mark.parametrize("num_pairs", [1, 2, 3, 7])
def test_constant_rewards_give_numbers(reward: float, num_pairs: int) -> None:
    """The standard deviation of three times 0.1 is not 0 in floating point."""
    metrics = measure_pairs([ScoredPair(reward, reward, 1 + i % 2, 5 + i, 9 - i) for i in range(num_pairs)])
    assert metrics["accuracy"] == 0.5 and metrics["calibration_error"] == 0
    assert metrics["length_correlation"] == metrics["length_correlation_within_pairs"] == 0
    assert metrics["reward_mean"] == pytest.approx(reward) and metrics["reward_spread"] == pytest.approx(0, abs=1e-12)


def test_a_constant_difference_gives_numbers() -> None:
    """As of a model that prefers one marker: the rewards differ, their differences do not, but for rounding."""
    rewards = [0.1 * i for i in range(20)]
    metrics = measure_pairs([ScoredPair(reward + 0.7, reward, 1, i, 40 - i) for i, reward in enumerate(rewards)])
    assert metrics["length_correlation_within_pairs"] == 0


def test_every_measure_is_finite_and_can_be_written_as_json() -> None:
    for num_pairs in (1, 2, 30):
        metrics = measure_pairs(random_pairs(num_pairs))
        assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


# --- rank correlation ---


def test_rank_correlation_is_spearmans_with_ties_shared() -> None:
    rewards, grades = [0.3, -1.0, 2.0, 7.0, 0.9], [1.0, 0.0, 1.0, 5.0, 5.0]
    assert rank_correlation(rewards, grades) == pytest.approx(spearmanr(rewards, grades).statistic, rel=1e-12)
    ranks, others = [2, 1, 4, 5, 3], [2.5, 1, 2.5, 4.5, 4.5]
    assert rank_correlation(rewards, grades) == pytest.approx(pearsonr(ranks, others).statistic, rel=1e-12)
    assert rank_correlation([1.0, 2.0, 30.0], [-3.0, -2.0, -1.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 30.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_rewards_that_order_everything_rightly_reach_the_ceiling_and_no_more() -> None:
    grades = [1.5] * 7 + [1.0] * 3 + [0.25, 0.0, 0.0]
    random = Random(1)
    for _ in range(5):
        rewards = [grade + 0.01 * random.random() for grade in grades]
        assert rank_correlation(rewards, grades) == pytest.approx(rank_correlation_ceiling(grades), rel=1e-9)
    assert rank_correlation_ceiling(grades) < 0.95 and rank_correlation_ceiling([1.0, 2.0, 3.0]) == 1.0


@pytest.mark.parametrize(("rewards", "grades"), [([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3), ([1.0], [2.0])])
def test_without_an_order_the_rank_correlation_is_zero(rewards: list[float], grades: list[float]) -> None:
    assert rank_correlation(rewards, grades) == 0.0


# --- plot ---


@pytest.mark.parametrize(
    "pairs",
    [random_pairs(60), [pair(1.0)], [pair(0.0)], [pair(-1.0, 2), pair(1.0, 2)], [pair(0.1)] * 4],
    ids=["many", "one", "a tie", "one group", "one bin"],
)
@pytest.mark.parametrize("noise_ceiling", [None, 0.86])
def test_the_plot_is_a_picture(pairs: list[ScoredPair], noise_ceiling: float | None, tmp_path: Path) -> None:
    plot_pairs(pairs, tmp_path, noise_ceiling)
    for name in ("calibration.png", "turns.png"):
        with Image.open(tmp_path / name) as picture:
            assert (picture.format, picture.size) == ("PNG", (825, 600))
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 10


def test_what_draws_the_plot_is_installed_with_the_package() -> None:
    """It is imported when a model is trained and saved: too late to be missed."""
    assert '"matplotlib' in Path("pyproject.toml").read_text()
