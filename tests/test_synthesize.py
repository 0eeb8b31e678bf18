"""Teacher-written data: from a local model and from an endpoint, interrupted and resumed, selected and counted."""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from gemma2_post import synthesize
from gemma2_post.data.duplicates import find_duplicates
from gemma2_post.data.keys import Source
from gemma2_post.data.selection import Candidate, pairs_of, select
from gemma2_post.models import cost
from gemma2_post.models.loading import load_config
from gemma2_post.stage import contract, launcher
from gemma2_post.stage.command import Checked
from gemma2_post.stage.errors import UserError
from gemma2_post.tiny.gold import gold
from tests.conftest import TEACHER, load_conversations, load_preferences, load_prompts, run_stage, write_prompts
from tests.test_reward import make_reward_model

Recipe = dict[str, object]
Run = Callable[[Recipe], Path]
KEY = "a-secret-of-the-environment"


@pytest.fixture
def synthesize_recipe(tmp_path: Path) -> Recipe:
    return {
        "model_name_or_path": TEACHER,
        "dtype": "float32",
        "datasets": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", "train", 20))}],
        "columns": ["skill", "answer"],
        "output_dir": str(tmp_path / "out"),
        "max_new_tokens": 24,
        "batch_size": 8,
    }


@pytest.fixture
def run_synthesize(tmp_path: Path) -> Run:
    return partial(run_stage, tmp_path / "recipe.yaml", synthesize.COMMAND)


def rows_of(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "data.jsonl").read_text().split("\n")[:-1]]


def metrics_of(output_dir: Path) -> dict[str, float]:
    return json.loads((output_dir / "stage.json").read_text())["metrics"]


# --- a local teacher ---


def test_a_local_teacher_writes_rows_that_sft_reads(run_synthesize: Run, synthesize_recipe: Recipe) -> None:
    output = run_synthesize(synthesize_recipe)
    rows, metrics = rows_of(output), metrics_of(output)
    prompts = load_prompts([Source(synthesize_recipe["datasets"][0]["path"])], 0.0, 0)["prompt"]
    assert [row["messages"][:-1] for row in rows] == list(prompts)
    assert mean(gold([row["messages"][-1]["content"] for row in rows], [row["answer"] for row in rows])) > 1.0
    assert rows[0]["teacher"] == {
        "model": TEACHER,
        "revision": None,
        "quantization": None,
        "temperature": 1.0,
        "max_new_tokens": 24,
        "seed": 0,
        "sample": 0,
    }
    dropped = sum(count for name, count in metrics.items() if name.startswith("dropped"))
    assert metrics["num_kept"] == len(rows) == metrics["num_answers"] - dropped and metrics["num_answers"] == 20
    for path in (output / "data.jsonl", output):
        loaded = load_conversations([Source(str(path))], 0.0, 0, ["skill", "answer"])
        assert loaded["messages"] == [row["messages"] for row in rows]


@pytest.mark.slow
def test_copies_of_a_teacher_write_side_by_side_what_it_writes_alone(
    run_synthesize: Run, synthesize_recipe: Recipe, tmp_path: Path
) -> None:
    alone = run_synthesize(synthesize_recipe)
    together = run_synthesize(
        synthesize_recipe | {"answer_processes": 2, "output_dir": str(tmp_path / "side-by-side")}
    )
    assert [row["messages"] for row in rows_of(together)] == [row["messages"] for row in rows_of(alone)]


@pytest.mark.parametrize("quantization", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_teacher_answers(run_synthesize: Run, synthesize_recipe: Recipe, quantization: str) -> None:
    output = run_synthesize(synthesize_recipe | {"dtype": "bfloat16", quantization: True})
    assert metrics_of(output)["num_kept"] >= 15


def test_an_interrupted_run_goes_on_and_ends_with_the_same_file(
    run_synthesize: Run, synthesize_recipe: Recipe, tmp_path: Path
) -> None:
    values = synthesize_recipe | {"num_answers": 2}
    whole = run_synthesize(values)
    interrupted = tmp_path / "interrupted"
    contract.begin(interrupted, json.loads((whole / "stage.json").read_text())["fingerprint"])
    (interrupted / "progress").mkdir()
    answers = (whole / "progress" / "answers.jsonl").read_bytes()
    kept = answers[: len(answers) * 2 // 3 - 5]  # killed in the middle of a batch, and of a line
    (interrupted / "progress" / "answers.jsonl").write_bytes(kept)
    shutil.copy(whole / "progress" / "sampling.json", interrupted / "progress")
    resumed = run_synthesize(values | {"output_dir": str(interrupted)})
    assert (resumed / "data.jsonl").read_bytes() == (whole / "data.jsonl").read_bytes()
    assert (resumed / "progress" / "answers.jsonl").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert metrics_of(resumed)["num_answers"] == 40


def test_several_answers_differ_and_the_best_is_kept(run_synthesize: Run, synthesize_recipe: Recipe) -> None:
    values = synthesize_recipe | {"num_answers": 4, "reward_model": "gemma2_post.tiny.gold:gold"}
    output = run_synthesize(values)
    answers = [json.loads(line) for line in (output / "progress" / "answers.jsonl").read_text().splitlines()]
    assert len({(answer["row"], answer["text"]) for answer in answers}) > 30
    rows = rows_of(output)
    by_row: dict[int, list[str]] = {}
    for answer in answers:
        by_row.setdefault(answer["row"], []).append(answer["text"])
    prompts = load_prompts([Source(values["datasets"][0]["path"])], 0.0, 0)["prompt"]
    for row in rows:
        texts = by_row[prompts.index(row["messages"][:-1])]
        assert row["teacher"]["reward"] == max(gold(texts, [row["answer"]] * len(texts)))
    finished = [answer["row"] for answer in answers if answer["finish_reason"] == "stop"]
    assert metrics_of(output)["dropped_not_best"] == len(finished) - len(set(finished))


def test_a_reward_model_picks_the_best(
    run_synthesize: Run, synthesize_recipe: Recipe, model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    directory = make_reward_model(model_dir, tokenizer, tmp_path / "reward")
    output = run_synthesize(synthesize_recipe | {"num_answers": 3, "reward_model": str(directory)})
    answers = [json.loads(line) for line in (output / "progress" / "answers.jsonl").read_text().splitlines()]
    prompts = load_prompts([Source(synthesize_recipe["datasets"][0]["path"])], 0.0, 0)["prompt"]
    model = AutoModelForSequenceClassification.from_pretrained(directory)

    def reward(messages: list[dict[str, str]]) -> float:
        ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            return model(**ids).logits.item()

    for row in rows_of(output)[:5]:
        *prompt, _ = row["messages"]
        of_prompt = [answer for answer in answers if answer["row"] == prompts.index(prompt)]
        texts = {answer["text"] for answer in of_prompt if answer["finish_reason"] == "stop"}
        rewards = [reward([*prompt, {"role": "assistant", "content": text}]) for text in texts]
        assert row["teacher"]["reward"] == pytest.approx(reward(row["messages"]), abs=1e-4)
        assert row["teacher"]["reward"] == pytest.approx(max(rewards), abs=1e-4)
    with pytest.raises(UserError, match="teacher is a language model, not a reward model; name the output of the"):
        run_synthesize(
            synthesize_recipe | {"num_answers": 2, "reward_model": TEACHER, "output_dir": str(tmp_path / "other")}
        )


def pairs_in(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "pairs" / "data.jsonl").read_text().splitlines()]


def test_the_best_answer_against_the_worst_is_a_pair_that_reward_reads(
    run_synthesize: Run, synthesize_recipe: Recipe
) -> None:
    output = run_synthesize(
        synthesize_recipe | {"num_answers": 4, "reward_model": "gemma2_post.tiny.gold:gold", "pairs": True}
    )
    pairs, best = pairs_in(output), {row["messages"][0]["content"]: row for row in rows_of(output)}
    assert metrics_of(output)["num_pairs"] == len(pairs) > 5
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert pair[f"score_{side}"] == gold([pair[side][0]["content"]], [pair["answer"]])[0]
        assert pair["score_chosen"] > pair["score_rejected"]
        if row := best.get(pair["prompt"][0]["content"]):
            assert row["messages"] == [*pair["prompt"], *pair["chosen"]]
    read = load_preferences([Source(str(output / "pairs"))], 0.0, 0, ["answer"], score_margin=0.5)
    assert read["chosen"] == [pair["chosen"] for pair in pairs]
    assert read["margin"] == pytest.approx([(p["score_chosen"] - p["score_rejected"]) / 2 for p in pairs])


def test_answers_of_one_text_are_no_pair_whatever_a_rounding_says() -> None:
    said = [("It is 8.", 1.0), ("It is 9.", 0.5), ("It is 8.", 1.0 + 1e-8)]
    found = [
        Candidate(
            row, [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], {}, i, "stop", reward
        )
        for row, texts in enumerate((said, said[::2]))
        for i, (text, reward) in enumerate(texts)
    ]
    assert [(best.row, best.sample, worst.sample) for best, worst in pairs_of(found)] == [(0, 2, 1)]


def test_a_reward_model_reads_no_more_than_it_was_trained_on(
    run_synthesize: Run, synthesize_recipe: Recipe, endpoint_recipe: Recipe, reward_model_dir: Path, serve: Callable
) -> None:
    """Of a local teacher the answer cannot be too long; of an endpoint, longer ones are dropped."""
    scored = {"num_answers": 2, "reward_model": str(reward_model_dir)}
    with pytest.raises(
        UserError, match="max_new_tokens 192 leaves 0 of the reward model's 192 positions for a prompt"
    ):
        run_synthesize(synthesize_recipe | scored | {"max_new_tokens": 192})

    def reply(request: dict) -> tuple[int, str]:
        return completion("word " * (400 if request["seed"] % 2 else 4))

    output = run_synthesize(endpoint_recipe | scored | {"endpoint": serve(reply).url})
    assert metrics_of(output)["dropped_ungraded"] > 0
    assert all(len(row["messages"][-1]["content"]) < 30 for row in rows_of(output))


def test_a_judge_grades_answers_and_those_without_a_grade_are_in_no_pair(
    run_synthesize: Run, synthesize_recipe: Recipe, serve: Callable, tmp_path: Path
) -> None:
    """It likes short answers, and says nothing of those that are sure."""

    def reply(request: dict) -> tuple[int, str]:
        answer = request["messages"][0]["content"].split("--- the answer\n")[1].split("\n\n---")[0]
        return completion("I cannot say." if "Sure" in answer else f"[[{max(1, 10 - len(answer.split()))}]]")

    judge = {"judge": "j", "judge_endpoint": serve(reply).url, "concurrency": 2}
    output = run_synthesize(synthesize_recipe | judge | {"num_answers": 3, "pairs": True})
    metrics, pairs = metrics_of(output), pairs_in(output)
    assert 0 < metrics["dropped_ungraded"] < 20 and pairs
    for pair in pairs:
        lengths = [len(pair[side][0]["content"].split()) for side in ("chosen", "rejected")]
        assert lengths[0] < lengths[1] and "Sure" not in pair["rejected"][0]["content"]
        assert pair["score_chosen"] == max(1, 10 - lengths[0])
    assert (tmp_path / "judgments.jsonl").is_file()  # beside the output: another recipe asks nothing again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": True}, "pairs needs to know which answer is better; name a reward_model or a judge"),
        ({"judge": TEACHER}, "judge picks the best of num_answers, which is 1; raise num_answers"),
        ({"judge": "j", "reward_model": "a:b", "num_answers": 2}, "judge and reward_model both say which answer is"),
        ({"judge_endpoint": "http://localhost:1/v1"}, "judge_endpoint has no judge"),
        ({"concurrency": 2}, "concurrency does nothing without endpoint or judge_endpoint; set"),
        ({"endpoint_retries": 2}, "endpoint_retries does nothing without endpoint; set endpoint, or remove"),
    ],
)
def test_scores_that_cannot_be_made_are_refused(synthesize_recipe: Recipe, change: Recipe, message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthesize.COMMAND.build(synthesize_recipe | change)


@pytest.mark.parametrize("at_endpoint", [False, True], ids=["local teacher", "endpoint"])
def test_a_local_judge_is_planned(synthesize_recipe: Recipe, at_endpoint: bool) -> None:
    judged = {"judge": TEACHER, "num_answers": 2, "judge_max_tokens": 32}
    served = {"endpoint": "http://localhost:1/v1"} if at_endpoint else {}
    _, recipe = synthesize.COMMAND.build(synthesize_recipe | judged | served)
    config = load_config(TEACHER)
    models = {"judge": config} | ({} if at_endpoint else {"model_name_or_path": config})
    phases = synthesize.memory(Checked(recipe, launcher.of_this_process(None), models))
    assert phases["judge"]["judge"] == cost.weights(config, cost.BF16)
    assert "judge" in synthesize.COMMAND.needed_models


# --- what is kept ---


def candidate(row: int, text: str, finish_reason: str = "stop", prompt: str = "") -> Candidate:
    messages = [{"role": "user", "content": prompt or f"Question {row}?"}, {"role": "assistant", "content": text}]
    return Candidate(row, messages, {}, 0, finish_reason)


def test_every_drop_is_counted_by_its_reason() -> None:
    candidates = [
        candidate(0, "It is so."),
        candidate(0, "It is  SO.", prompt="Question 0?"),
        candidate(1, "It is and", "length"),
        candidate(2, "  "),
        candidate(3, "It is.<end_of_turn>"),
        candidate(4, "I cannot say that", "content_filter"),
        candidate(5, "It is so."),
    ]
    kept, dropped = select(candidates, None)
    assert [each.row for each in kept] == [0, 5]
    assert dropped == {
        "dropped_refused": 0,
        "dropped_unfinished": 2,
        "dropped_invalid": 2,
        "dropped_exact_duplicate": 1,
        "dropped_near_duplicate": 0,
    }


def test_the_best_answer_is_one_that_may_be_kept_and_the_first_of_equals() -> None:
    candidates = [
        candidate(0, "a long answer that was cut", "length"),
        candidate(0, "second"),
        candidate(0, "third!"),
        candidate(1, "a"),
    ]
    kept, dropped = select(candidates, lambda rows: [float(len(each.messages[-1]["content"])) for each in rows])
    assert [each.messages[-1]["content"] for each in kept] == ["second", "a"] and kept[0].reward == 6.0
    assert dropped["dropped_not_best"] == 1


LONG = " ".join(f"word{i}" for i in range(60))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (("What is 3 plus 5?", "It is 8."), ("what is  3 plus 5?", "It is 8.\n"), "exact"),
        (("What is 3 plus 5?", "It is 8."), ("What is 3 plus 4?", "It is 7."), None),
        (("What is 3 plus 5?", "It is 8."), ("What is 3 plus 5?", "Sure! 8."), None),
        ((LONG, LONG), (LONG + " more", LONG + " too"), "near"),
        (("2 + 2?", "4"), ("2 * 2?", "4"), None),
        (("Good?", "\U0001f44d"), ("Good?", "\U0001f44e"), None),
        ((LONG, "Is it so?", "Yes."), (LONG, "Is it old?", "Yes."), None),
        ((LONG, "Yes."), (LONG, "No."), None),
        (("Yes?", LONG), ("No?", LONG), None),
        ((LONG, LONG), (LONG, LONG.replace("word30", "other").replace("word10", "other")), None),
    ],
)
def test_duplicates_say_the_same_to_the_same(
    first: tuple[str, ...], second: tuple[str, ...], expected: str | None
) -> None:
    assert find_duplicates([first, second]) == [None, expected]


def test_a_duplicate_of_what_was_dropped_is_compared_with_what_was_kept() -> None:
    assert find_duplicates([("a b", "c"), ("a b", "C"), ("x", "y"), ("A b", "c")]) == [None, "exact", None, "exact"]


# --- an endpoint ---


class Server(ThreadingHTTPServer):
    """A small OpenAI-compatible server; `reply` makes status and body of a request's JSON."""

    def __init__(self, reply: Callable[[dict], tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.models_status = 200
        self.requests: list[dict] = []
        self.keys: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.keys.add(self.headers["Authorization"])
        status, body = self.server.reply(request)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        """Its models."""
        self.send_response(self.server.models_status)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


def completion(text: object, finish_reason: str = "stop") -> tuple[int, str]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return 200, json.dumps({"choices": [choice], "usage": {"completion_tokens": len(str(text).split())}})


def echo(request: dict) -> tuple[int, str]:
    return completion(f"You said: {request['messages'][-1]['content']}")


@pytest.fixture
def serve() -> Iterator[Callable[[Callable], Server]]:
    servers = []

    def start(reply: Callable[[dict], tuple[int, str]]) -> Server:
        server = Server(reply)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def endpoint_recipe(synthesize_recipe: Recipe) -> Recipe:
    values = {key: value for key, value in synthesize_recipe.items() if key not in ("dtype", "batch_size")}
    return values | {"endpoint_retries": 1, "endpoint_timeout": 5.0, "concurrency": 3}


def test_an_endpoint_answers_and_its_key_is_written_nowhere(
    run_synthesize: Run, endpoint_recipe: Recipe, serve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    server = serve(echo)
    output = run_synthesize(
        endpoint_recipe | {"endpoint": server.url, "api_key_variable": "THE_KEY", "temperature": 0.7}
    )
    rows = rows_of(output)
    assert all(row["messages"][-1]["content"] == f"You said: {row['messages'][-2]['content']}" for row in rows)
    assert server.keys == {f"Bearer {KEY}"}
    assert {(request["model"], request["temperature"], request["max_tokens"]) for request in server.requests} == {
        (TEACHER, 0.7, 24)
    }
    assert len({request["seed"] for request in server.requests}) == 20
    files = [path for path in output.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)


def test_what_fails_once_is_asked_again(run_synthesize: Run, endpoint_recipe: Recipe, serve: Callable) -> None:
    failed: set[str] = set()

    def reply(request: dict) -> tuple[int, str]:
        text = request["messages"][-1]["content"]
        if len(failed) < 2 and text not in failed:
            failed.add(text)
            return (500, "{}") if len(failed) == 1 else (429, "{}")
        return echo(request)

    output = run_synthesize(endpoint_recipe | {"endpoint": serve(reply).url})
    assert len(failed) == 2 and metrics_of(output)["num_answers"] == 20


def test_an_endpoint_that_breaks_down_loses_nothing_and_is_asked_for_the_rest_only(
    run_synthesize: Run, endpoint_recipe: Recipe, serve: Callable, tmp_path: Path
) -> None:
    whole = run_synthesize(endpoint_recipe | {"endpoint": serve(echo).url, "output_dir": str(tmp_path / "whole")})
    count = iter(range(1000))
    broken = serve(lambda request: echo(request) if next(count) < 9 else (500, "out of memory"))
    with pytest.raises(UserError, match=r"recipe.yaml: prompt in row \d+ \('.*'\): http.* refused with status 500"):
        run_synthesize(endpoint_recipe | {"endpoint": broken.url})
    answers = Path(endpoint_recipe["output_dir"]) / "progress" / "answers.jsonl"
    assert len(answers.read_text().splitlines()) == 9  # those in flight when it broke are among them
    with pytest.raises(UserError, match=r"9 answers that were sampled in another way \(temperature 1.0 -> 0.5\)"):
        run_synthesize(endpoint_recipe | {"endpoint": broken.url, "temperature": 0.5})
    rows = Path(endpoint_recipe["datasets"][0]["path"])
    as_it_was = rows.read_text()
    rows.write_text(as_it_was.replace("What is", "Say what is"))
    with pytest.raises(UserError, match=r"sampled in another way \(prompts \w+ -> \w+\)"):
        run_synthesize(endpoint_recipe | {"endpoint": broken.url})
    rows.write_text(as_it_was)
    mended = serve(echo)
    resumed = run_synthesize(endpoint_recipe | {"endpoint": mended.url, "endpoint_timeout": 7.0})
    assert len(mended.requests) == 11
    assert (resumed / "data.jsonl").read_bytes() == (whole / "data.jsonl").read_bytes()


def test_line_separators_and_other_signs_survive_an_interruption(
    run_synthesize: Run, endpoint_recipe: Recipe, serve: Callable
) -> None:
    count = iter(range(1000))
    strange = serve(lambda _: completion("a\u2028b\u0085c \U0001f600") if next(count) < 5 else (401, "{}"))
    with pytest.raises(UserError, match="refused with status 401"):
        run_synthesize(endpoint_recipe | {"endpoint": strange.url})
    output = run_synthesize(endpoint_recipe | {"endpoint": serve(echo).url})
    assert sum(row["messages"][-1]["content"] == "a\u2028b\u0085c \U0001f600" for row in rows_of(output)) == 5


def test_what_an_endpoint_refuses_is_counted_unless_it_refuses_everything(
    run_synthesize: Run, endpoint_recipe: Recipe, serve: Callable, tmp_path: Path
) -> None:
    picky = serve(lambda request: (400, "{}") if "first word" in request["messages"][-1]["content"] else echo(request))
    output = run_synthesize(endpoint_recipe | {"endpoint": picky.url})
    metrics = metrics_of(output)
    assert 0 < metrics["dropped_refused"] == 20 - metrics["num_kept"]
    assert not any("first word" in row["messages"][-1]["content"] for row in rows_of(output))
    deaf = serve(lambda _: (422, '{"error": {"message": "no such parameter: seed"}}'))
    with pytest.raises(UserError, match=r"no such parameter: seed.* as all 20 requests so far"):
        run_synthesize(endpoint_recipe | {"endpoint": deaf.url, "output_dir": str(tmp_path / "deaf")})


def test_half_a_character_and_a_list_of_parts_do_no_harm(
    run_synthesize: Run, endpoint_recipe: Recipe, serve: Callable
) -> None:
    choice = '{"message": {"content": "so \\ud83d"}, "finish_reason": "stop"}'
    broken = f'{{"choices": [{choice}], "usage": {{"completion_tokens": null}}}}'
    count = iter(range(1000))
    server = serve(lambda request: (200, broken) if next(count) < 1 else echo(request))
    metrics = metrics_of(run_synthesize(endpoint_recipe | {"endpoint": server.url}))
    assert (metrics["dropped_invalid"], metrics["num_kept"]) == (1, 19)


def sleepy(_: dict) -> tuple[int, str]:
    threading.Event().wait(2)
    return completion("late")


BAD_ENDPOINTS = {
    "unauthorised": (lambda _: (401, '{"error": {"message": "no key ' + KEY + '"}}'), "refused with status 401"),
    "parts": (lambda _: completion([{"type": "text"}]), "answered what is no chat completion"),
    "unknown model": (lambda _: (404, '{"error": {"message": "no such model"}}'), "refused with status 404"),
    "a web page": (lambda _: (200, "<html>Welcome</html>"), "answered what is no chat completion ('<html>Welcome"),
    "no choices": (lambda _: (200, '{"choices": []}'), "answered what is no chat completion"),
    "not an object": (lambda _: (200, "[1]"), "answered what is no chat completion"),
    "too slow": (sleepy, "did not answer within 0.2 s, 1 times; raise endpoint_timeout"),
}


def one_sentence(
    file: Path, values: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The sentence with which the stage ends as a user starts it; anything else fails."""
    file.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(sys, "argv", ["synthesize", "--config", str(file)])
    with pytest.raises(SystemExit) as stopped:
        synthesize.COMMAND.launch()
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return sentence


@pytest.mark.parametrize(("reply", "message"), BAD_ENDPOINTS.values(), ids=BAD_ENDPOINTS.keys())
def test_a_bad_endpoint_is_one_sentence_that_names_the_prompt(
    reply: Callable[[dict], tuple[int, str]],
    message: str,
    endpoint_recipe: Recipe,
    serve: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THE_KEY", KEY + "\n")
    quick = {
        "endpoint": serve(reply).url,
        "endpoint_timeout": 0.2,
        "endpoint_retries": 0,
        "api_key_variable": "THE_KEY",
    }
    sentence = one_sentence(tmp_path / "recipe.yaml", endpoint_recipe | quick, capsys, monkeypatch)
    assert "recipe.yaml: prompt in row " in sentence and message in sentence and KEY not in sentence
    assert not (Path(endpoint_recipe["output_dir"]) / "stage.json").exists()


BAD = {
    "nobody there": ({"endpoint": "http://127.0.0.1:9/v1", "endpoint_retries": 0}, "cannot be reached"),
    "copies of an endpoint": (
        {"endpoint": "http://localhost/v1", "answer_processes": 2},
        "answer_processes is for a teacher that transformers runs here",
    ),
    "no URL": ({"endpoint": "localhost"}, "write a base URL such as"),
    "a key in the URL": ({"endpoint": "http://me:secret@localhost/v1"}, "endpoint holds a user, a password"),
    "quantised endpoint": ({"endpoint": "http://localhost/v1", "load_in_4bit": True}, "load_in_4bit has no effect"),
    "no key": ({"endpoint": "http://localhost/v1", "api_key_variable": "NOT_SET"}, "variable holds no key; set it"),
    "a reward that needs a column": (
        {"reward_model": "gemma2_post.tiny.gold:gold", "num_answers": 2, "columns": ["skill"]},
        "gold cannot be called with completions and the columns skill (missing a required argument: 'answer')",
    ),
    "best of one": ({"reward_model": "gemma2_post.tiny.gold:gold"}, "the best of num_answers, which is 1"),
    "equal answers": ({"num_answers": 2, "temperature": 0.0}, "gives no different answers"),
    "no answers": ({"num_answers": 0}, "num_answers is 0; write 1 or more"),
    "held out": ({"held_out_share": 0.1}, "held_out_share must not be set: every prompt is answered"),
    "an adapter": ({"model_name_or_path": "ADAPTER"}, "is an adapter, not a model"),
    "too long to answer": (
        {"max_new_tokens": 2000, "dtype": "float32"},
        "max_new_tokens 2000 leaves 0 of the model's 512 positions for a prompt",
    ),
    "long prompts": ({"max_prompt_length": 5, "dtype": "float32"}, "all 20 prompts are longer than max_prompt_length"),
    "a prompt that ends with the model's turn": (
        {"datasets": [{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]},
        "row 0: the last turn is the model's; it must be the user's",
    ),
    "a model's turn only": (
        {"datasets": [{"messages": [{"role": "assistant", "content": "Ho"}]}]},
        "row 0: there is no user turn to answer",
    ),
    "empty": ({"datasets": []}, "the file is empty"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence(
    values: Recipe,
    message: str,
    synthesize_recipe: Recipe,
    endpoint_recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = dict(values)
    if "datasets" in values:
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values["datasets"]))
        values |= {"datasets": [{"path": str(tmp_path / "bad.jsonl")}], "columns": None}
    if values.get("model_name_or_path") == "ADAPTER":
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        values["model_name_or_path"] = str(tmp_path / "adapter")
    recipe = endpoint_recipe if "endpoint" in values else synthesize_recipe
    sentence = one_sentence(tmp_path / "recipe.yaml", recipe | values, capsys, monkeypatch)
    assert message in sentence and "secret" not in sentence.replace("holds a user, a password", "")
    assert not (Path(recipe["output_dir"]) / "stage.json").exists()


def test_a_teacher_of_which_nothing_can_be_kept_says_so(
    synthesize_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = synthesize_recipe | {"max_new_tokens": 1}
    sentence = one_sentence(tmp_path / "recipe.yaml", values, capsys, monkeypatch)
    assert "none of the 20 answers can be kept" in sentence and "raise max_new_tokens" in sentence


def test_an_endpoint_is_asked_as_it_wants_and_one_bad_reply_is_counted(
    run_synthesize: Run, endpoint_recipe: Recipe, serve: Callable
) -> None:
    """Newer servers name the longest answer otherwise; text may come in parts; a 403 is about one row."""
    seen: list[str] = []

    def reply(request: dict) -> tuple[int, str]:
        if "max_tokens" in request:
            return 400, '{"error": {"message": "Unsupported parameter: use max_completion_tokens instead."}}'
        assert request["max_completion_tokens"] == 24
        seen.append(request["messages"][-1]["content"])
        if len(seen) == 3:
            return 403, '{"error": {"message": "moderated"}}'
        if len(seen) == 5:
            return 200, '{"choices": []}'
        parts = [
            {"type": "reasoning", "text": "Hm."},
            {"type": "text", "text": "It is "},
            {"type": "text", "text": "so."},
        ]
        choice = {"message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}
        return 200, json.dumps({"choices": [choice]})

    output = run_synthesize(endpoint_recipe | {"endpoint": serve(reply).url, "concurrency": 1})
    assert metrics_of(output)["dropped_refused"] == 2 and len(seen) == 20
    assert {row["messages"][-1]["content"] for row in rows_of(output)} == {"It is so."}
