"""Win rates: what is exact, and that intervals are as wide as they say."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset
from scipy.stats import norm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gemma2_post.evaluation.answering import endpoint
from gemma2_post.evaluation.answering.samples import Answer
from gemma2_post.evaluation.comparison import Comparison
from gemma2_post.evaluation.judging import judge as judging
from gemma2_post.evaluation.judging.judge import Judge, Refusal, Reply, ask_endpoint, ask_model, summarize
from gemma2_post.evaluation.judging.rubrics import comparison
from gemma2_post.evaluation.judging.verdicts import Verdict
from gemma2_post.evaluation.judging.winrate import (
    LEAST_OVERLAP,
    difference,
    length_controlled,
    rate_interval,
    win_rate,
    wins_by,
)
from gemma2_post.evaluation.keys import AnswerArguments, EndpointArguments
from gemma2_post.evaluation.measure import Answered, Measurement
from gemma2_post.stage.errors import UserError, located
from tests.conftest import TEACHER
from tests.test_synthesize import completion, serve

__all__ = ["serve"]  # a fixture


def test_a_tie_is_half_a_win() -> None:
    assert wins_by([1.0, 2.0, 3.0, 0.0], [1.0, 1.0, 4.0, 0.0]) == [0.5, 1.0, 0.0, 0.5]
    assert win_rate([1.0, 0.5, 0.0, 1.0], [1] * 4, [1] * 4).rate == 0.625


@pytest.mark.parametrize(("won", "tied", "size"), [(0.6, 0.2, 120), (0.5, 0, 64), (0.9, 0, 805), (0.66, 0.3, 128)])
def test_95_percent_intervals_cover_the_truth_in_95_percent_of_repeats(won: float, tied: float, size: int) -> None:
    """Of wins that are 1, 0, or 1/2; 1,000 experiments, whose share has a standard error of 0.7%."""
    randomness = numpy.random.default_rng(0)
    truth, covered = won + 0.5 * tied, 0
    for _ in range(1000):
        wins = randomness.choice([1.0, 0.5, 0.0], p=[won, tied, 1 - won - tied], size=size)
        low, high = rate_interval(wins.tolist())
        covered += low <= truth <= high
    assert 930 <= covered <= 970


def test_what_never_varies_has_the_interval_of_wins_or_of_ties() -> None:
    assert rate_interval([0.5] * 20) == (0.5, 0.5)
    low, high = rate_interval([1.0] * 20)
    assert 0.83 < low < 0.85 and high == pytest.approx(1.0)


@pytest.mark.parametrize("share", [LEAST_OVERLAP, 0.3])
@pytest.mark.parametrize("size", [128, 805])
def test_the_win_rate_at_equal_lengths_is_within_its_interval(share: float, size: int) -> None:
    """Of 1,000 experiments with a known length effect; `share` of the answers are shorter than the others'."""
    randomness = numpy.random.default_rng(0)
    covered = found = 0
    for _ in range(1000):
        differences = randomness.normal(-100 * norm.ppf(share), 100, size).round()
        others = numpy.full(size, 1000)
        logits = 0.4 + 1.2 * numpy.tanh(differences / differences.std())
        wins = (randomness.random(size) < 1 / (1 + numpy.exp(-logits))).astype(float)
        controlled = length_controlled(wins.tolist(), (others + differences).tolist(), others.tolist())
        if controlled is not None:
            found += 1
            covered += controlled.low <= 1 / (1 + numpy.exp(-0.4)) <= controlled.high
    assert found > 400 and 0.93 <= covered / found <= 0.97


def test_intervals_of_differences_cover_the_truth_in_95_percent_of_repeats() -> None:
    """Of 400 experiments, whose share has a standard error of 1.1%; grades are 1, 0, or 1/2."""
    randomness = numpy.random.default_rng(0)
    covered = 0
    for _ in range(400):
        one, other = (randomness.choice([1.0, 0.5, 0.0], p=p, size=120) for p in ([0.6, 0.2, 0.2], [0.4, 0.2, 0.4]))
        found = difference(one.tolist(), other.tolist())
        covered += found.low <= 0.2 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_differences_are_paired_by_prompt() -> None:
    """What both models' values share, the difficulty of a prompt, does not widen the interval."""
    randomness = numpy.random.default_rng(3)
    difficulty = randomness.normal(size=200)
    values = difficulty + 0.3 + 0.1 * randomness.normal(size=200)
    found = difference(values.tolist(), difficulty.tolist())
    assert found.mean == pytest.approx(0.3, abs=0.03) and found.low < 0.3 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.1 / 200**0.5, rel=0.2)
    assert found.standard_error == pytest.approx(0.1 / 200**0.5, rel=0.2)


def test_length_control_takes_out_what_length_alone_wins() -> None:
    """The longer answer wins nine times of ten, whoever gave it; one model's are longer nine times of ten."""
    randomness = numpy.random.default_rng(1)
    lengths = randomness.integers(50, 150, size=4000)
    longer = randomness.random(4000) < 0.9
    others = numpy.where(longer, lengths - 40, lengths + 40)
    wins = (randomness.random(4000) < numpy.where(longer, 0.9, 0.1)).astype(float).tolist()
    raw = win_rate(wins, lengths.tolist(), others.tolist())
    assert (
        raw.rate == pytest.approx(0.82, abs=0.02)
        and raw.length_controlled.low < 0.5 < raw.length_controlled.high < 0.57
    )


def test_length_control_changes_nothing_where_length_plays_no_part() -> None:
    randomness = numpy.random.default_rng(2)
    lengths, others = randomness.integers(50, 150, size=(2, 4000))
    wins = (randomness.random(4000) < 0.7).astype(float).tolist()
    found = win_rate(wins, lengths.tolist(), others.tolist())
    assert found.length_controlled.rate == pytest.approx(found.rate, abs=0.02)
    assert length_controlled([1.0] * 5, [3] * 5, [3] * 5).rate > 0.9  # finite, without a difference to explain


def test_length_control_does_not_guess() -> None:
    """Where one model's answers are nearly always longer, little says what equal ones would win."""
    lengths = [40 + i for i in range(97)] + [1, 2, 3]
    assert length_controlled([0.0, 1.0] * 50, lengths, [10] * 100) is None
    assert length_controlled([0.0, 1.0] * 50, [40 + i for i in range(100)], [10] * 100) is None


# --- judges ---


def test_two_orders_make_one_win() -> None:
    a, b, tie, strong = Verdict(1.0), Verdict(0.0), Verdict(0.5), Verdict(1.0, 3)
    judged = summarize([(a, b), (b, a), (a, a), (tie, tie), (a, tie), (None, b), (None, None), (strong, a)])
    assert judged.wins == [1.0, 0.0, 0.5, 0.5, 0.75, None, None, 0.75]
    assert judged.disagreement == 3 / 6


PROMPTS = [[{"role": "user", "content": f"Say {i}."}] for i in range(6)]
OURS, THEIRS = [f"{i}" for i in range(6)], [f"no {i}" for i in range(5)] + ["5"]


class Asked:
    """Answers from a function of the question; counts what it is asked."""

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def __call__(self, questions, attempt, write) -> None:
        for each in questions:
            self.asked.append((each.text, attempt))
            said = self.reply(each.text, attempt)
            write(each, Reply(said, is_cut=False) if isinstance(said, str) else said)


def prefers_ours(text: str, _: int) -> str:
    return "[[B]]" if "answer A\nno" in text else "[[A]]"


def test_a_judge_is_asked_in_both_orders_and_only_once(tmp_path: Path) -> None:
    """Equal answers are a tie; what was judged before, also by a run that was killed, is not asked again."""
    cache = tmp_path / "judgments.jsonl"
    asked = Asked(prefers_ours)
    judged = Judge(asked, "j", 256, cache).compare(PROMPTS, OURS, THEIRS)
    assert judged.wins == [1.0] * 5 + [0.5] and judged.disagreement == 0 and len(asked.asked) == 10
    assert sorted(text for text, _ in asked.asked) == sorted(
        comparison(PROMPTS[i], *pair).text for i in range(5) for pair in ((OURS[i], THEIRS[i]), (THEIRS[i], OURS[i]))
    )
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])
    again = Asked(prefers_ours)
    assert Judge(again, "j", 256, cache).compare(PROMPTS, OURS, THEIRS) == judged and len(again.asked) == 3
    assert Judge(Asked(pytest.fail), "j", 256, cache).compare(PROMPTS, OURS, THEIRS) == judged
    other = Asked(prefers_ours)
    assert (
        Judge(other, "another judge", 256, cache).compare(PROMPTS, OURS, THEIRS) == judged and len(other.asked) == 10
    )


def test_a_judge_that_always_prefers_the_first_answer_decides_nothing(tmp_path: Path) -> None:
    judge = Judge(Asked(lambda *_: "[[A]]"), "j", 256, tmp_path / "j.jsonl")
    judged = judge.compare(PROMPTS[:5], OURS[:5], THEIRS[:5])
    assert judged.wins == [0.5] * 5 and judged.disagreement == 1.0


def test_nonsense_is_asked_again_then_counted_apart(tmp_path: Path) -> None:
    def reply(text: str, attempt: int) -> str:
        if "Say 0." in text:
            return "I cannot say."
        return "[[A]]" if "Say 1." not in text or attempt == 2 else "Hm."

    asked = Asked(reply)
    judged = Judge(asked, "j", 256, tmp_path / "j.jsonl").compare(PROMPTS[:3], OURS[:3], THEIRS[:3])
    assert judged.wins == [None, 0.5, 0.5]
    assert len(asked.asked) == 2 * (judging.ATTEMPTS + 3 + 1)
    assert judged.num_asked == 3


def test_a_judge_that_decides_less_than_half_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The reason follows from the replies: cut, out of room, refused, or without a verdict."""
    cases = {
        Reply("It seems", True): "10 had replies that were cut at judge_max_tokens 256; raise it",
        Reply(
            "It seems", True, True
        ): "10 left no room in the judge's context; take a judge with a longer one, or .* answers",
        Refusal("too long"): r"10 were refused \(too long\)",
        Reply("Hm.", False): r"10 had replies without one; read them in \S+j3.jsonl, or choose a stronger judge",
    }
    for number, (reply, reason) in enumerate(cases.items()):
        judge = Judge(Asked(lambda *_, reply=reply: reply), "j", 256, tmp_path / f"j{number}.jsonl")
        judge.compare(PROMPTS, OURS, THEIRS)
        judge.check_most(1, 2)
        match = f"here: the judge gave no verdict on 2 of 3 pairs. Of its questions, {reason}$"
        with pytest.raises(UserError, match=match), located("here"):
            judge.check_most(2, 3)
        read_again = Judge(Asked(lambda *_, reply=reply: reply), "j", 256, tmp_path / f"j{number}.jsonl")
        read_again.compare(PROMPTS, OURS, THEIRS)
        assert read_again.silent == judge.silent, "kept replies give the same reason"


def compared(num_equal: int, num_different: int) -> Comparison:
    """A comparison of two models that gave so many equal and different answers."""
    num = num_equal + num_different
    prompts = [[{"role": "user", "content": f"Say {i}."}] for i in range(num)]
    texts = {"theirs": ["no"] * num, "ours": ["no"] * num_equal + ["yes"] * num_different}
    answered = {
        name: Answered(prompts, [Answer(text, [], [1]) for text in each], [0.0] * num, [1] * num)
        for name, each in texts.items()
    }
    measurement = Measurement.__new__(Measurement)  # only its prompts are needed
    measurement.rows, measurement.args = Dataset.from_dict({"prompt": prompts}), AnswerArguments()
    measurement.group_by = None
    return Comparison(measurement, {}, "theirs", Path("progress"), answered=answered)


@pytest.mark.parametrize(("num_equal", "num_different"), [(0, 1), (5, 1), (98, 2), (1, 3)])
def test_equal_answers_do_not_hide_a_judge_that_gives_no_verdict(
    num_equal: int, num_different: int, tmp_path: Path
) -> None:
    judge = Judge(Asked(lambda *_: "I cannot say."), "j", 256, tmp_path / "j.jsonl")
    match = f"the judge gave no verdict on {num_different} of {num_different} pairs"
    with pytest.raises(UserError, match=match):
        compared(num_equal, num_different).by_judge(judge)


def test_equal_answers_alone_are_a_tie_that_nobody_is_asked_about(tmp_path: Path) -> None:
    found = compared(4, 0).by_judge(Judge(Asked(pytest.fail), "j", 256, tmp_path / "j.jsonl"))["ours"]
    assert (found["judge_win_rate_vs_theirs"], found["judge_win_rate_vs_theirs/missing"]) == (0.5, 0)


@pytest.mark.parametrize("num_judged", [0, 1, 2])
def test_a_judge_of_safety_must_judge_half_of_the_answers(num_judged: int, tmp_path: Path) -> None:
    def reply(text: str, _: int) -> str:
        return "[[violation]]" if any(f"Say {i}." in text for i in range(num_judged)) else "Well."

    comparison, prompts = compared(4, 0), [[{"role": "user", "content": f"Say {i}."}] for i in range(4)]
    answered, judge = {"ours": ["no"] * 4}, Judge(Asked(reply), "j", 256, tmp_path / "j.jsonl")
    if num_judged < 2:
        with pytest.raises(UserError, match=f"no verdict on {4 - num_judged} of 4 answers to safety_datasets"):
            comparison.safety(judge, prompts, answered)
    else:
        found = comparison.safety(judge, prompts, answered)["ours"]
        assert (found["violations"], found["violations/missing"]) == (1.0, 2)


def test_replies_are_written_as_they_come(tmp_path: Path) -> None:
    def breaks_down(questions, attempt, write) -> None:
        write(questions[0], Reply("[[A]]", is_cut=False))
        raise UserError("the endpoint is down")

    with pytest.raises(UserError, match="down"):
        Judge(breaks_down, "j", 256, tmp_path / "j.jsonl").compare(PROMPTS, OURS, THEIRS)
    (line,) = (tmp_path / "j.jsonl").read_text().splitlines()
    assert json.loads(line)["reply"] == "[[A]]"


def test_a_local_judge_leaves_out_what_it_cannot_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Such verdicts are missing, also where the other pair's are there; nothing is cut."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32, attn_implementation="eager")
    long = " ".join(["word"] * model.config.max_position_embeddings)
    judge = Judge(ask_model(lambda: model, tokenizer, max_tokens=4), "teacher", 256, tmp_path / "j.jsonl")
    judged = judge.compare(PROMPTS[:1], [long], ["short"])
    assert judged.wins == [None]
    assert not (tmp_path / "j.jsonl").exists()  # another judge's, or the same one's with room, is not spoilt


def test_a_reply_that_was_cut_is_asked_for_again_only_when_it_may_be_longer(tmp_path: Path) -> None:
    """All other replies are kept, and none is asked for once more."""

    def cut(text: str, _: int) -> Reply:
        said = prefers_ours(text, 0)
        return Reply(f"First, {said} leads, because", True) if "Say 0." in text else Reply(said, False)

    replies = tmp_path / "j.jsonl"
    first = Judge(Asked(cut), "j", 100, replies).compare(PROMPTS, OURS, THEIRS)
    assert first.wins == [None, *[1.0] * 4, 0.5], "what leads in the middle of a reply is no verdict"
    assert Judge(Asked(pytest.fail), "j", 100, replies).compare(PROMPTS, OURS, THEIRS) == first
    longer = Asked(prefers_ours)
    assert Judge(longer, "j", 200, replies).compare(PROMPTS, OURS, THEIRS).wins == [1.0] * 5 + [0.5]
    assert len(longer.asked) == 2


def test_what_was_turned_down_is_asked_again_by_the_next_run(tmp_path: Path) -> None:
    refused = Judge(Asked(lambda *_: Refusal("too long")), "j", 256, tmp_path / "j.jsonl").compare(
        PROMPTS, OURS, THEIRS
    )
    assert refused.wins == [None] * 5 + [0.5]
    mended = Judge(Asked(prefers_ours), "j", 256, tmp_path / "j.jsonl").compare(PROMPTS, OURS, THEIRS)
    assert mended.wins == [1.0] * 5 + [0.5]


def test_a_judge_that_thinks_aloud_is_read_right_and_asked_no_more_than_it_must_be(
    serve: Callable, tmp_path: Path
) -> None:
    """It weighs both marks before it decides, in its reply or in a field of its own, and is cut off now and then."""
    prompts = [[{"role": "user", "content": f"Say {i}."}] for i in range(40)]
    ours, theirs = [f"{i}" for i in range(40)], [f"no {i}" for i in range(40)]
    thought = "If brevity counts, [[A]] wins. But is that so? [[B]] may be right as well, or it is a [[tie]]. "

    def reply(request: dict) -> tuple[int, str]:
        text = request["messages"][0]["content"]
        number = next(i for i in range(40) if f"Say {i}." in text)
        mark = prefers_ours(text, 0)
        if number % 10 == 9:
            return completion(f"<think>{thought}", "length")
        if number % 10 == 8:
            return completion(f"{thought} So {mark} leads, but", "length")
        status, body = completion(
            f"The answer says it: {mark}" if number % 2 else f"<think>{thought}</think> **{mark}**"
        )
        if number % 2:
            answer = json.loads(body)
            answer["choices"][0]["message"]["reasoning_content"] = thought
            body = json.dumps(answer)
        return status, body

    server = serve(reply)
    client = endpoint.connect(server.url, EndpointArguments(), retries=0)
    judge = Judge(
        ask_endpoint(endpoint.Endpoint(client, "thinks"), 4096, concurrency=4), "thinks", 4096, tmp_path / "j.jsonl"
    )
    judged = judge.compare(prompts, ours, theirs)
    assert judged.wins == [None if i % 10 in (8, 9) else 1.0 for i in range(40)] and judged.disagreement == 0
    assert len(server.requests) == 2 * (32 + 8 * judging.ATTEMPTS)
    assert judge.compare(prompts, ours, theirs) == judged and len(server.requests) == 2 * (32 + 8 * judging.ATTEMPTS)


# --- leaderboards ---

PREFERENCES = {
    # Annotations: 2 for the model's answer, 1 for the baseline's, 1.5 for neither.
    "ahead": [2, 2, 2, 1.5, 1, 2, 2, 1, 2, 1.5, 2, 2],
    "level": [1, 2, 1.5, 1.5, 2, 1, 1, 2, 2, 1, 1.5, 1.5],
    "behind": [1, 1, 1, 1, 2, 1, 1, 1, 1, 1.5, 1, 1],
}
LEADERBOARD = {"ahead": (75.0, 3.501), "level": (50.0, 3.742), "behind": (12.5, 2.728)}
"""Of ten times these, in percent: win rates (8 wins and 2 ties of 12; 4 and 4; 1 and 1) and their standard errors,
sqrt(17.5 / 119 / 120) and so on, by hand."""


@pytest.mark.parametrize("model", PREFERENCES)
def test_a_leaderboard_of_annotations_is_reproduced(model: str) -> None:
    """AlpacaEval's win rate: the mean of preference - 1; the interval is that of its standard error."""
    wins = [preference - 1 for preference in PREFERENCES[model]] * 10
    rate, standard_error = LEADERBOARD[model]
    found = win_rate(wins, [10] * 120, [10] * 120)
    assert 100 * found.rate == rate
    assert 100 * (found.high - found.low) / 2 == pytest.approx(1.96 * standard_error, rel=0.07)


def test_verdicts_in_both_orders_make_the_known_table(tmp_path: Path) -> None:
    """MT-Bench's rule: a win is a win in both orders, and verdicts that contradict each other are a tie."""
    verdicts = {  # of the answer when it comes first, and when it comes second
        "right": ("[[A]]", "[[B]]"),
        "wrong": ("[[B]]", "[[A]]"),
        "first": ("[[A]]", "[[A]]"),
        "second": ("[[B]]", "[[B]]"),
        "equal": ("[[tie]]", "[[tie]]"),
    }
    answers = ["right"] * 9 + ["wrong"] * 4 + ["first"] * 3 + ["second"] * 2 + ["equal"] * 2
    prompts = [[{"role": "user", "content": f"Question {i}"}] for i in range(20)]

    def reply(text: str, _: int) -> str:
        first, second = (text.split(f"--- answer {mark}\n")[1].split("\n")[0] for mark in "AB")
        return verdicts[first][0] if second == "theirs" else verdicts[second][1]

    judged = Judge(Asked(reply), "j", 256, tmp_path / "j.jsonl").compare(prompts, answers, ["theirs"] * 20)
    assert (judged.wins.count(1.0), judged.wins.count(0.0), judged.wins.count(0.5)) == (9, 4, 7)
    assert win_rate(judged.wins, [1] * 20, [1] * 20).rate == (9 + 7 / 2) / 20
    assert judged.disagreement == 5 / 20
