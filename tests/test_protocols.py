"""MT-Bench, Arena-Hard, and AlpacaEval from files of their layouts; answers that exist already."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from gemma2_post import evaluate
from gemma2_post.evaluation.judging.judge import Judge, Reply
from gemma2_post.evaluation.judging.rubrics import Question
from gemma2_post.evaluation.judging.verdicts import Verdict, grade
from gemma2_post.evaluation.judging.winrate import mean_interval, pooled_rate
from gemma2_post.evaluation.protocols import alpaca_eval, arena_hard, mt_bench
from gemma2_post.evaluation.protocols.outputs import read_outputs
from gemma2_post.report import models as reported
from gemma2_post.stage.errors import UserError
from gemma2_post.tiny.data import prompts
from tests.conftest import run_stage
from tests.test_evaluate import evaluate_recipe
from tests.test_synthesize import completion, serve

__all__ = ["evaluate_recipe", "serve"]  # fixtures

Recipe = dict[str, object]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def mt_bench_dir(tmp_path: Path) -> Path:
    """FastChat's layout: four questions of two turns, one of a category that needs correct answers."""
    folder = tmp_path / "data" / "mt_bench"
    questions = [("writing", "Write."), ("math", "What is 3 plus 5?"), ("stem", "Why?"), ("writing", "Write more.")]
    write_lines(
        folder / "question.jsonl",
        [
            {"question_id": 81 + i, "category": category, "turns": [turn, f"And then {i}?"]}
            for i, (category, turn) in enumerate(questions)
        ],
    )
    reference = {"question_id": 82, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["Eight.", "Nine."]}]}
    write_lines(folder / "reference_answer" / "gpt-4.jsonl", [reference])
    return folder


@pytest.fixture
def arena_hard_dir(tmp_path: Path) -> Path:
    """Arena-Hard-Auto 0.1's layout, with the answers of its baseline and of another model."""
    folder = tmp_path / "data" / "arena-hard-v0.1"
    write_lines(
        folder / "question.jsonl",
        [
            {"question_id": f"q{i}", "category": "arena-hard-v0.1", "cluster": "x", "turns": [{"content": f"Do {i}."}]}
            for i in range(4)
        ],
    )
    for name in ("gpt-4-0314", "another"):
        write_lines(
            folder / "model_answer" / f"{name}.jsonl",
            [
                {"question_id": f"q{i}", "model_id": name, "choices": [{"turns": [{"content": f"{name} does {i}."}]}]}
                for i in range(4)
            ],
        )
    return folder


def judge_of(reply: Callable[[Question], str], tmp_path: Path) -> Judge:
    def ask(questions: list[Question], attempt: int, write: Callable) -> None:
        for each in questions:
            write(each, Reply(reply(each), is_cut=False))

    return Judge(ask, "j", 256, tmp_path / "judgments.jsonl")


# --- grades ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[3]] would be harsh. Rating: [[8.5]]", 8.5),
        ("It is not a [[10]]. Rating: [[6]].", 6),
        ("Rating: [[9/10]]", 9),
        ("Rating: **[[4]]**", 4),
        ("Rating: [5]", 5),
        ("See [1]. Rating: [[2]]", 2),
        ('{"rating": 6}', 6),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("Rating: 7", None),
        ("<think>[[3]]", None),
        ("<think>[[3]]</think> [[4]]", 4),
        ("[[A]]", None),
    ],
)
def test_the_last_grade_counts(text: str, expected: float | None) -> None:
    assert grade(text) == expected


def test_a_grade_in_the_middle_of_a_reply_that_was_cut_is_none() -> None:
    assert grade("At first sight [[7]], but", is_cut=True) is None and grade("So: [[7]]", is_cut=True) == 7


# --- MT-Bench ---


def test_mt_bench_grades_each_turn_and_compares_each_turn(mt_bench_dir: Path, tmp_path: Path) -> None:
    """Only math is judged with correct answers; a pair is won if both orders agree."""
    bench = mt_bench.load(str(mt_bench_dir), "sft")
    assert bench.references == [None, ["Eight.", "Nine."], None, None]
    assert bench.questions.temperatures == [0.7, 0.0, 0.1, 0.7]
    said = {"sft": [[f"a{i}", f"b{i}"] for i in range(4)], "rlhf": [[f"c{i}", f"d{i}"] for i in range(4)]}
    said["rlhf"][3] = said["sft"][3]
    asked: list[str] = []

    def reply(question: Question) -> str:
        asked.append(question.text)
        if "answer A" not in question.text:
            (answer,) = re.findall(r"--- the answer\n(\w+)", question.text)
            return f"[[{ {'a': 3, 'b': 4, 'c': 6, 'd': 9}[answer[0]] + int(answer[1]) % 2 }]]"
        first = re.findall(r"--- answer A\n(\w)(\w)", question.text)[0]
        if first[1] == "2":
            return "[[A]]"  # whichever is first
        return "[[A]]" if first[0] == "c" else "[[B]]"

    found = bench.measure(judge_of(reply, tmp_path), said)
    assert found["sft"]["mt_bench"] == pytest.approx(numpy.mean([3, 4, 3, 4, 4, 5, 4, 5]))
    assert found["rlhf"]["mt_bench/turn-1"] == pytest.approx((6 + 7 + 6 + 4) / 4)
    assert found["rlhf"]["mt_bench/turn-2"] == pytest.approx((9 + 10 + 9 + 5) / 4)
    assert found["rlhf"]["mt_bench/category-math"] == 8.5
    assert (found["rlhf"]["mt_bench/low"], found["rlhf"]["mt_bench/high"]) == mean_interval([7.5, 8.5, 7.5, 4.5])
    key = "mt_bench_win_rate_vs_sft"
    assert found["rlhf"][key] == (1 + 1 + 1 + 1 + 0.5 * 4) / 8, "won twice, once changed its mind, once equal"
    assert found["rlhf"][f"{key}/category-stem"] == 0.5 and found["rlhf"][f"{key}/asked"] == 6
    assert key not in found["sft"]
    graded = [text for text in asked if "answer A" not in text]
    assert len(graded) == 14, "equal answers are graded once"
    math = [text for text in asked if "3 plus 5" in text]
    assert all("--- what is correct\nEight." in text for text in math) and sum("Nine." in text for text in math) == 4
    assert not any("what is correct" in text for text in asked if "3 plus 5" not in text)
    second = next(text for text in graded if "And then 0?" in text)
    assert "User: Write.\n\nAssistant: a0\n\nUser: And then 0?" in second and "--- the answer\nb0" in second
    compared = next(text for text in asked if "answer A" in text and "And then 0?" in text)
    assert "--- answer A\nc0\n\n> And then 0?\n\nd0\n" in compared


def test_mt_bench_asks_in_the_words_of_the_projects_own_prompts(mt_bench_dir: Path, tmp_path: Path) -> None:
    fields = {
        "single-v1": "{question}|{answer}",
        "single-math-v1": "{question}|{ref_answer_1}|{answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "single-math-v1-multi-turn": "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}|{answer_1}|{answer_2}",
        "pair-v2": "{question}|{answer_a}|{answer_b}",
        "pair-math-v1": "{question}|{ref_answer_1}|{answer_a}|{answer_b}",
        "pair-v2-multi-turn": "{question_1}|{question_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
        "pair-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
    }
    rows = [{"name": name, "system_prompt": name, "prompt_template": text} for name, text in fields.items()]
    write_lines(mt_bench_dir.parent / "judge_prompts.jsonl", rows)  # beside the folder, as in FastChat
    bench = mt_bench.load(str(mt_bench_dir), "sft")
    answers, others = ["a", "b"], ["c", "d"]
    assert bench.graded(0, answers, 0) == Question("Write.|a", "single-v1")
    assert bench.graded(0, answers, 1) == Question("Write.|a|And then 0?|b", "single-v1-multi-turn")
    assert bench.graded(1, answers, 0) == Question("What is 3 plus 5?|Eight.|a", "single-math-v1")
    assert bench.graded(1, answers, 1).text == "What is 3 plus 5?|Eight.|And then 1?|Nine.|a|b"
    assert bench.paired(0, (answers, others), 0)[1] == Question("Write.|c|a", "pair-v2")
    assert bench.paired(1, (answers, others), 1)[0] == Question("Eight.|Nine.|a|b|c|d", "pair-math-v1-multi-turn")
    assert bench.graded(0, answers, 0).messages[0] == {"role": "system", "content": "single-v1"}
    write_lines(mt_bench_dir.parent / "judge_prompts.jsonl", rows[1:])
    with pytest.raises(UserError, match="there is no prompt single-v1; take FastChat's file, or remove it"):
        mt_bench.load(str(mt_bench_dir), "sft")


def test_a_question_of_math_without_a_correct_answer_is_refused(mt_bench_dir: Path) -> None:
    (mt_bench_dir / "reference_answer" / "gpt-4.jsonl").unlink()
    with pytest.raises(UserError, match="question 82 is of the category math, which is judged with a correct answer"):
        mt_bench.load(str(mt_bench_dir), "sft")


# --- Arena-Hard ---


def test_arena_hard_counts_a_much_better_answer_as_three(arena_hard_dir: Path, tmp_path: Path) -> None:
    """The score is the share of all battles that is won, which is what a Bradley-Terry fit to one baseline gives."""
    bench = arena_hard.load(str(arena_hard_dir), "gpt-4-0314")
    assert bench.baseline == "gpt-4-0314" and bench.answers[2] == "gpt-4-0314 does 2."
    marks = {  # by question: our answer first, the baseline's first
        "0": ("[[A>>B]]", "[[B>A]]"),
        "1": ("[[A=B]]", "[[A>B]]"),
        "2": ("I cannot say.", "[[A>>B]]"),
    }

    def reply(question: Question) -> str:
        number = re.findall(r"User: Do (\d)", question.text)[0]
        return marks[number]["answer A\ngpt-4" in question.text]

    said = {"ours": [["zero"], ["one"], ["two"], ["gpt-4-0314 does 3."]]}
    found = bench.measure(judge_of(reply, tmp_path), said)["ours"]
    key = "arena_hard_win_rate_vs_gpt-4-0314"
    won, battles = 3 + 1 + 0.5 + 0 + 0 + 1, 3 + 1 + 1 + 1 + 3 + 2
    assert found[key] == pytest.approx(won / battles) and found[f"{key}/missing"] == 1
    assert found[f"{key}/low"] < found[key] < found[f"{key}/high"] and found[f"{key}/asked"] == 3
    assert found[f"{key}/category-arena-hard-v0.1"] == found[key]


def test_arena_hard_finds_the_baseline_of_each_category_and_its_own_prompt(tmp_path: Path) -> None:
    """The layout of 2.0, where creative writing has another baseline."""
    categories = ["hard_prompt", "creative_writing"]
    rows = [{"uid": str(i), "category": each, "prompt": f"Do {i}."} for i, each in enumerate(categories)]
    write_lines(tmp_path / "question.jsonl", rows)
    for name in ("o3-mini-2025-01-31", "gemini-2.0-flash-001", "more"):
        messages = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": f"{name} {i}"}}]
                    for i in range(2)]  # fmt: skip
        answers = [{"uid": str(i), "model": name, "messages": each} for i, each in enumerate(messages)]
        write_lines(tmp_path / "model_answer" / f"{name}.jsonl", answers)
    config = {"system_prompt": "Judge.", "prompt_template": ["<{question_1}><{answer_1}><{answer_2}>"]}
    (tmp_path / "judge_config.yaml").write_text(yaml.safe_dump(config))
    bench = arena_hard.load(str(tmp_path), None)
    assert bench.answers == ["o3-mini-2025-01-31 0", "gemini-2.0-flash-001 1"]
    assert bench.asked(0, "x", "y") == Question("<Do 0.><x><y>", "Judge.")
    assert arena_hard.load(str(tmp_path), "more").answers == ["more 0", "more 1"]
    with pytest.raises(UserError, match=r"arena_hard_baseline is nobody, and .* has gemini-2.0-flash-001, more, o3"):
        arena_hard.load(str(tmp_path), "nobody")
    bench.write_answers(tmp_path / "written", {"rlhf/policy-0": [["a"], ["b"]]})
    written = read_outputs(str(tmp_path / "written" / "model_answer" / "rlhf--policy-0.jsonl"))
    assert (written.name, written.by_id) == ("rlhf/policy-0", {"0": ["a"], "1": ["b"]})


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_the_interval_of_a_pooled_rate_covers_the_truth(rate: float) -> None:
    random, covered = numpy.random.default_rng(0), 0
    for _ in range(1000):
        skill = random.beta(4 * rate, 4 * (1 - rate), 200)
        wins, weights = numpy.zeros(200), numpy.zeros(200)
        for _ in range(2):
            weight = numpy.where(random.random(200) < 0.4, 3, 1)
            wins += weight * (random.random(200) < skill)
            weights += weight
        _, low, high = pooled_rate(list(wins), list(weights))
        covered += low <= rate <= high
    assert 0.93 <= covered / 1000 <= 0.97


# --- AlpacaEval, and answers that exist already ---


def test_alpaca_eval_reads_outputs_and_writes_them(tmp_path: Path) -> None:
    rows = [
        {"dataset": "koala", "instruction": f"Say {i}.", "output": f"no {i}", "generator": "gpt4", "datasplit": "eval"}
        for i in range(20)
    ]
    (tmp_path / "baseline.json").write_text(json.dumps(rows))
    bench = alpaca_eval.load(str(tmp_path / "baseline.json"))
    said = {"ours": [[f"{i}" if i else "no 0"] for i in range(20)]}
    judge = judge_of(lambda question: "[[B]]" if "answer A\nno" in question.text else "[[A]]", tmp_path)
    found = bench.measure(judge, said)["ours"]
    assert found["alpaca_eval_win_rate_vs_gpt4"] == (19 + 0.5) / 20
    assert "alpaca_eval_win_rate_vs_gpt4/length_controlled" not in found, "all answers are shorter"
    bench.write_answers(tmp_path, said)
    written = json.loads((tmp_path / "ours" / "model_outputs.json").read_text())
    assert written[1] == {"dataset": "koala", "instruction": "Say 1.", "output": "1", "generator": "ours"}
    read = read_outputs(str(tmp_path / "ours" / "model_outputs.json"))
    assert (read.name, bench.questions.answers_of(read)) == ("ours", said["ours"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "Hi"}], "row 0 has the columns instruction; expected instruction and output"),
        ([{"question_id": 1, "choices": []}], "row 0 has no answer; expected choices"),
        (
            [{"instruction": "Hi", "output": "a"}, {"instruction": "Hi", "output": "b"}],
            "row 1 answers a prompt that an earlier row answers differently",
        ),
    ],
)
def test_outputs_of_another_layout_are_refused(rows: list[dict], message: str, tmp_path: Path) -> None:
    (tmp_path / "outputs.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        read_outputs(str(tmp_path / "outputs.json"))


# --- all of it in one evaluation ---


@pytest.fixture
def judged_recipe(evaluate_recipe: Recipe, mt_bench_dir: Path, arena_hard_dir: Path, tmp_path: Path) -> Recipe:
    rows = prompts("selection")[:12]
    given = [
        {
            "instruction": "\n\n".join(turn["content"] for turn in row["prompt"]),
            "output": row["answer"],
            "generator": "gpt",
        }
        for row in rows
    ]
    (tmp_path / "model_outputs.json").write_text(json.dumps(given))
    (tmp_path / "baseline.json").write_text(
        json.dumps([row | {"output": "No.", "generator": "davinci"} for row in given])
    )
    models = evaluate_recipe["models"]
    assert isinstance(models, list)
    return evaluate_recipe | {
        "models": models[:2],
        "base": None,
        "group_by": "skill",
        "judge": "judge",
        "mt_bench": str(mt_bench_dir),
        "arena_hard": str(arena_hard_dir),
        "arena_hard_baseline": "another",
        "alpaca_eval": str(tmp_path / "baseline.json"),
        "outputs": [str(tmp_path / "model_outputs.json")],
    }


@pytest.mark.slow
def test_protocols_and_given_answers_stand_beside_the_models(
    judged_recipe: Recipe, tmp_path: Path, serve: Callable, tokenizer: PreTrainedTokenizerBase
) -> None:
    """What cannot be measured of given answers is left out; a second run samples and asks nothing again."""

    def reply(request: dict) -> tuple[int, str]:
        text = request["messages"][-1]["content"]
        if "answer A" not in text:
            return completion("[[7]]")
        first, second = text.split("--- answer A\n")[1].split("--- answer B\n")
        return completion("[[A]]" if len(first.strip()) >= len(second.split("\n\n---")[0].strip()) else "[[B]]")

    server = serve(reply)
    values = judged_recipe | {"judge_endpoint": server.url, "concurrency": 1}
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    models = json.loads((output / "models.json").read_text())
    assert list(models) == ["gpt", "sft", "rlhf/policy-0"]
    gpt, policy = models["gpt"], models["rlhf/policy-0"]
    assert "kl_to_init" not in gpt and gpt["stop_rate"] == 1 and gpt["gold"] > models["sft"]["gold"]
    assert "judge_win_rate_vs_sft" in gpt and "mt_bench" not in gpt
    skills = {row["skill"] for row in prompts("selection")[:12]}
    for metric in ("gold", "reward", "win_rate_vs_sft", "judge_win_rate_vs_sft", "gold_win_rate_vs_sft"):
        of = {row["skill"]: 0 for row in prompts("selection")[:12]}
        for row in prompts("selection")[:12]:
            of[row["skill"]] += 1
        mean = sum(count * policy[f"{metric}/skill-{skill}"] for skill, count in of.items()) / 12
        assert mean == pytest.approx(policy[metric]), metric
    assert policy["mt_bench"] == 7 and policy["mt_bench_win_rate_vs_sft/asked"] <= 8
    assert 0 <= policy["arena_hard_win_rate_vs_another"] <= 1
    assert 0 <= policy["alpaca_eval_win_rate_vs_davinci"] <= 1 and len(skills) > 1
    metrics = json.loads((output / "metrics.json").read_text())
    assert {"mt_bench", "mt_bench_win_rate", "arena_hard_win_rate", "alpaca_eval_win_rate"} <= metrics.keys()
    contests = {contest.judge: contest for contest in reported.contests(models)}
    assert contests["the judge on Arena-Hard"].baseline == "another"
    assert contests["the judge on AlpacaEval"].wins.keys() == {"gpt", "sft", "rlhf/policy-0"}
    assert "MT-Bench, category math" in reported.additional(models, "gold")
    assert (output / "alpaca_eval" / "rlhf--policy-0" / "model_outputs.json").is_file()
    assert (output / "mt_bench" / "model_answer" / "sft.jsonl").is_file()
    gains = json.loads((output / "gains.json").read_text())
    assert {(each["over"], each["model"]) for each in gains} == {("sft", "rlhf")}

    num_asked, measured = len(server.requests), (output.with_name("measured") / "conversations.jsonl").read_text()
    shutil.rmtree(output)
    run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values | {"group_by": None, "max_prompt_length": 150})
    assert len(server.requests) == num_asked
    assert (output.with_name("measured") / "conversations.jsonl").read_text() == measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": None}, "mt_bench has answers to judge, and there is no judge; name one"),
        ({"arena_hard": None}, "arena_hard_baseline does nothing without arena_hard"),
        ({"arena_hard_baseline": None}, "arena_hard_baseline is gpt-4-0314, and"),
        ({"group_by": "colour"}, "group_by is colour, which held-out rows lack"),
        ({"mt_bench": "recipes"}, "mt_bench: recipes has no question.jsonl"),
    ],
)
def test_a_mistake_about_protocols_is_said_before_anything_is_answered(
    change: Recipe, message: str, judged_recipe: Recipe, arena_hard_dir: Path, tmp_path: Path, serve: Callable
) -> None:
    (arena_hard_dir / "model_answer" / "gpt-4-0314.jsonl").rename(arena_hard_dir / "model_answer" / "x.jsonl")
    values = judged_recipe | {"judge_endpoint": serve(pytest.fail).url} | change
    if not values["judge"]:
        del values["judge_endpoint"]
    with pytest.raises(UserError, match=message):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    assert not (tmp_path / "runs" / "evaluate").exists()


def test_outputs_that_answer_only_some_prompts_are_refused(
    judged_recipe: Recipe, tmp_path: Path, serve: Callable
) -> None:
    given = json.loads((tmp_path / "model_outputs.json").read_text())
    (tmp_path / "model_outputs.json").write_text(json.dumps(given[:3]))
    values = judged_recipe | {"judge_endpoint": serve(pytest.fail).url}
    match = r"outputs of gpt answer \d of 12 questions of datasets, .* of alpaca_eval; give answers to all"
    with pytest.raises(UserError, match=match):
        run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)


@pytest.mark.slow
def test_outputs_for_a_protocol_may_share_some_prompts_with_the_test_set(
    judged_recipe: Recipe, tmp_path: Path, serve: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("model_outputs.json", "baseline.json"):
        (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text())[:3]))
    values = judged_recipe | {"judge_endpoint": serve(lambda _: completion("[[tie]]")).url, "mt_bench": None}
    output = run_stage(tmp_path / "evaluate.yaml", evaluate.COMMAND, values)
    models = json.loads((output / "models.json").read_text())
    assert models["gpt"].keys() >= {"alpaca_eval_win_rate_vs_davinci"} and "reward" not in models["gpt"]
    assert re.search(r"outputs of gpt answer \d of 12 questions of datasets, and are left out there", caplog.text)


def test_a_strong_verdict_is_three_battles() -> None:
    strong, weak, tie = Verdict(1.0, 3), Verdict(0.0), Verdict(0.5)
    assert arena_hard.battles((strong, weak)) == (4.0, 4.0)
    assert arena_hard.battles((tie, None)) == (0.5, 1.0) and arena_hard.battles(None) == (1.0, 2.0)
    assert mt_bench.consistent((Verdict(1.0), Verdict(0.0))) == 1 and mt_bench.consistent((tie, strong)) == 0.5


def test_a_file_without_outputs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outputs.json").write_text("[]")
    with pytest.raises(UserError, match="there are no outputs here"):
        alpaca_eval.load(str(tmp_path / "outputs.json"))
