"""The report of a run: on the terminal, and as a page that needs nothing else."""

import base64
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemma2_post.report.models import gained
from gemma2_post.report.page import curve
from gemma2_post.report.report import report, to_show
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of three stages whose models have answered three prompts."""
    folder = tmp_path / "tiny"
    stages = {}
    for name, metrics, gates in [
        ("sft", {"gold_before": 0.6, "gold": 1.1}, {"gold": ">= 1"}),
        ("warp", {"gold": 1.4}, {}),
        ("evaluate", {"win_rate": 0.8}, {"win_rate": ">= 0.9"}),
    ]:
        wanted = {"recipe": {"seed": 0, "note": "<b>&"}, "inputs": {}, "code": {}, "versions": {"torch": "2.13.0"}}
        contract.begin(folder / name, wanted)
        contract.finish(folder / name, name, wanted, 61.0, {}, metrics)
        stages[name] = {"status": "done", "wall_seconds": 61.0, "metrics": metrics, "gates": gates}
    (folder / "sft" / "log.jsonl").write_text("".join(f'{{"step": {i}, "loss": {2.5 - i}}}\n' for i in range(3)))
    (folder / "warp" / "front-reward.png").write_bytes(PIXEL)
    values = {"reward": 0.5, "kl_to_init": 0.0, "stop_rate": 1.0, "mean_tokens": 7.0, "win_rate_vs_sft": 0.25}
    values |= {"win_rate_vs_sft/low": 0.2, "win_rate_vs_sft/high": 0.31, "win_rate_vs_sft/length_controlled": 0.22}
    values |= {"win_rate_vs_sft/length_controlled/low": 0.17, "win_rate_vs_sft/length_controlled/high": 0.27}
    values |= {"benchmarks/mmlu": 0.512, "benchmarks/mmlu/standard_error": 0.01, "gold/turns-2": 1.0}
    values |= {"benchmarks/mmlu/shots": 5.0, "benchmarks/mmlu/published": 0.561}
    values |= {"benchmarks/ifeval": 0.4, "benchmarks/ifeval/shots": 0.0}
    key = "judge_win_rate_vs_sft"
    judged = {key: 0.6, f"{key}/low": 0.55, f"{key}/high": 0.64, f"{key}/disagreement": 0.3, f"{key}/missing": 2} | {
        f"{key}/asked": 12
    }
    models = {
        "sft": values | {"gold": 1.0, "violations": 0.02, "gold/turns-1": 1.0},
        "warp": values | {"gold": 1.25, "gold/standard_error": 0.1, "gold/turns-1": 1.5} | judged,
    }
    summary = {"run": "tiny", "recipe": "pipeline.yaml", "status": "done", "wall_seconds": 125.0}
    summary |= {"grader": "gold", "headlines": {"sft": "gold 0.6 -> 1.1"}}
    gain = {"model": "warp", "over": "sft", "metric": "gold", "mean": 0.25, "low": 0.1, "high": 0.4}
    summary["gains"] = [gain, gain | {"metric": "reward", "low": -1.0}]
    (folder / "summary.json").write_text(json.dumps(summary | {"stages": stages, "models": models, "liti": []}))
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "answers": {"sft": before, "warp": after}}
        for prompt, before, after in [
            ("One?", "same", "same"),
            ("Two <script>?", "3 </details>", "2\nor so"),
            ("Long?", "word " * 500, "short"),
        ]
    ]
    (folder / "evaluate" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_report_shows_the_models_and_what_has_changed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(run_dir)
    printed = capsys.readouterr().out
    assert "1.25" in printed and "25%" in printed and "win rate vs sft" in printed
    assert "Two <script>?" in printed and "One?" not in printed and printed.count("word") < 150
    assert str(run_dir / "report.html") in printed and str(run_dir / "report.md") in printed


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [
        (0.04, 0.09, "higher by 0.040 to 0.090"),
        (-0.09, -0.04, "lower by 0.040 to 0.090"),
        (-0.02, 0.03, "not seen to differ (-0.020 to +0.030)"),
        (0.0, 0.0, "not seen to differ (+0.000 to +0.000)"),
    ],
)
def test_what_is_said_of_a_gain_follows_from_its_interval(low: float, high: float, sentence: str) -> None:
    assert gained({"low": low, "high": high}) == sentence


def test_gains_are_on_the_terminal_and_on_the_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only those of the headline metric."""
    report(run_dir)
    said = "gold is higher by 0.100 to 0.400"
    assert f"warp against sft: {said}" in capsys.readouterr().out
    assert f"- warp against sft: {said}" in (run_dir / "report.md").read_text()
    assert said in (run_dir / "report.html").read_text()
    assert "not seen to differ" not in (run_dir / "report.md").read_text()


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no summary\.json; name the folder of a run"):
        report(tmp_path)


class Page(HTMLParser):
    """The tags of a page that may point elsewhere, and its text; a tag that is not closed fails."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_without_scripts_or_anything_from_elsewhere(run_dir: Path) -> None:
    report(run_dir)
    page = Page((run_dir / "report.html").read_text())
    assert page.sources == [f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"]
    for text in (
        "done in 2:05",
        "gold 0.6 → 1.1",
        "gold >= 1",
        "1.25 ± 0.20",
        "says the reward",
        "25% 20 to 31",
        "says the judge",
        "60% 55 to 64",
        "changes its mind with the order in 30% of pairs; no verdict on 2 of 12",
        "gold, 2 turns",
        "51.2% ± 2.0%",
        "mmlu, 5-shot",
        "mmlu, published",
        "56.1%",
        "ifeval, 0-shot",
        "the base model reads plain text, the other models the chat format",
        "table 17",
        "violations of safety",
        "Two <script>?",
        "2\nor so",
        "<b>&",
    ):
        assert text in page.text, text
    assert "win_rate >= 0.9" not in page.text  # which it has not passed
    assert "torch 2.13.0" in page.text and "seed: 0" in page.text


def test_the_same_in_markdown(run_dir: Path) -> None:
    report(run_dir)
    text = (run_dir / "report.md").read_text()
    assert "| sft | 1:01 | gold 0.6 → 1.1 | gold >= 1 |" in text and "](warp/front-reward.png)" in text
    assert "> **warp:** 2 or so" in text and "&lt;script&gt;?" in text and "3 </details>" not in text
    assert "| warp | 60.0% | 55.0 to 64.0 |  | 30.0% | 2 of 12 |" in text
    assert "| mmlu, 5-shot | 51.2% ± 2.0% |" in text and "| ifeval, 0-shot | 40.0%" in text and "table 17" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table


def test_a_baseline_may_be_called_by_a_path(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text().replace("vs_sft", "vs_google/gemma-2-2b-it"))
    (run_dir / "summary.json").write_text(json.dumps(summary))
    report(run_dir)
    page = Page((run_dir / "report.html").read_text())
    assert "Whose answers beat those of google/gemma-2-2b-it" in page.text and "25% 20 to 31" in page.text


def test_one_conversation_of_each_length_is_shown_first() -> None:
    rows = [{"prompt": [{}] * length, "answers": {"a": "", "b": str(i)}} for i, length in enumerate([1, 1, 3, 1, 5])]
    rows[0]["answers"]["b"] = "changed"
    assert [len(row["prompt"]) for row in to_show(rows, 2)] == [1, 3]
    assert [len(row["prompt"]) for row in to_show(rows, 4)] == [1, 3, 5, 1]


def test_a_curve_says_where_it_begins_and_ends() -> None:
    svg = str(curve([(0, 2.0), (10, 1.0), (20, 1.5)]))
    assert svg.count("<text") == 4 and ">2<" in svg and ">1.5<" in svg and ">step 0<" in svg and ">20<" in svg
    assert "nan" not in str(curve([(0, 1.0), (10, 1.0)]))


DAMAGES = {
    "a cut line": ("sft/log.jsonl", lambda old: old + b'{"step": 9, "lo', "line 4 (it is not JSON)"),
    "a line that is no text": ("sft/log.jsonl", lambda old: b"\xff\xfe\n" + old, "line 1 (it is not UTF-8)"),
    "lines without steps": ("sft/log.jsonl", lambda old: b'{"loss": 1}\n[]\n' + old, "line 1 (step is missing) and 1"),
    "answers cut": ("evaluate/answers.jsonl", lambda old: old + b'{"prompt": [', "line 4 (it is not JSON)"),
    "answers without a prompt": (
        "evaluate/answers.jsonl",
        lambda old: b'{"answers": {}}\n' + old,
        "line 1 (prompt is",
    ),
    "a picture cut": ("warp/front-reward.png", lambda old: old[:-9], "no whole picture"),
    "a picture that is empty": ("warp/front-reward.png", lambda old: b"", "no whole picture"),
    "a stage file cut": ("warp/stage.json", lambda old: old[:30], "the file is damaged (it is not JSON)"),
    "a stage file of the wrong shape": ("warp/stage.json", lambda old: b"[]", "it holds list, not an object"),
    "a stage file without keys": ("warp/stage.json", lambda old: b"{}", "stage is missing"),
    "a stage that is unknown": ("warp/stage.json", lambda old: old.replace(b'"warp"', b'"wrap"'), "wrap, which is no"),
}


@pytest.mark.parametrize(("file", "damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_damaged_is_left_out_and_named(
    file: str, damage: Callable[[bytes], bytes], reason: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = damage((run_dir / file).read_bytes())
    (run_dir / file).write_bytes(damaged)
    report(run_dir)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert str(run_dir / file) in warning and reason in warning
    page = Page((run_dir / "report.html").read_text())
    assert "Two <script>?" in page.text and "gold 0.6 → 1.1" in page.text and "1.25 ± 0.20" in page.text
    assert (run_dir / file).read_bytes() == damaged


def test_values_that_are_no_numbers_are_left_out_of_a_curve(run_dir: Path) -> None:
    log = run_dir / "sft" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "loss": NaN}\n{"step": 4, "loss": null}\n{"step": 5, "loss": "x"}\n')
    report(run_dir)
    assert ">0.5<" in (run_dir / "report.html").read_text()  # the last value that is one


@pytest.mark.parametrize("content", [b"", b'{"run": "ti', b"[]", b"{}", b"\xff", b'{"run": 1}'])
def test_a_damaged_summary_is_one_sentence(content: bytes, run_dir: Path) -> None:
    (run_dir / "summary.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"summary\.json: the file is damaged \(.*\); remove it; the next run writes it"
    ):
        report(run_dir)
