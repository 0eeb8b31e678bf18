"""A new stage is a module and a line: chain, plan, gate, report and fingerprint follow from what the module says."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from gemma2_post import cli
from gemma2_post.pipeline import check, entries, loading, steps
from gemma2_post.pipeline.loading import load_pipeline
from gemma2_post.stage import stages
from gemma2_post.stage.command import Command
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.fingerprint import differences
from gemma2_post.stage.paths import FilePath, FunctionPath, Kind, ModelPath, references
from gemma2_post.stage.recipe import key
from tests.conftest import BASE

MODULE = '''
"""Counts words: the smallest stage there is."""

from dataclasses import dataclass
from pathlib import Path

from gemma2_post.stage import contract
from gemma2_post.stage.command import GRADER, Command, Curve
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.paths import FilePath, FunctionPath, ModelPath
from gemma2_post.stage.recipe import key


@dataclass
class Recipe:
    output_dir: str = key(help="Folder of the output.")
    text: FilePath = key(help="What is counted.")
    graders: list[FunctionPath] | None = key(None, "Functions of the number.")
    start: ModelPath | None = key(None, "Folder of earlier words, which are counted, too.")
    step: int = key(1, "How much a word counts.")


def main(stage, recipe):
    contract.begin(stage.output_dir, stage.fingerprint)
    text = Path(recipe.text).read_text()
    if recipe.start:
        text += " " + " ".join(contract.read_json(Path(recipe.start) / "words.json"))
    words = text.split()
    lines = "".join(f'{{"step": {i}, "words": {i * recipe.step}}}\\n' for i in range(len(words)))
    (stage.output_dir / "log.jsonl").write_text(lines)
    contract.write_json(stage.output_dir / "words.json", words)
    stage.finish({}, {"words": recipe.step * len(words)})


def check(recipe, launcher):
    if recipe.step < 1:
        raise UserError(f"step is {recipe.step}; write 1 or more")


COMMAND = Command(
    "toy",
    Recipe,
    main,
    metrics=lambda recipe: {"words"},
    check=check,
    headline=[GRADER, "words"],
    below_gate="are there enough words?",
    curves=[Curve("log.jsonl", "words", "words so far")],
    needed_models=[],
    memory=lambda checked: {"reading": {"text": 1e9}, "counting": {"text": 2e9}},
    disk=lambda checked: (3e3, 0),
)

if __name__ == "__main__":
    COMMAND.launch()
'''
REGISTERED = """
from gemma2_post.cli import main
from gemma2_post.stage.stages import STAGES

STAGES["toy"] = "toy_stage"

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """The folder of the stage's module, the line that registers it, and a pipeline of two of its kind."""
    (tmp_path / "toy_stage.py").write_text(MODULE)
    (tmp_path / "registered.py").write_text(REGISTERED)
    (tmp_path / "text.txt").write_text("one two three")
    run_dir = tmp_path / "run"
    recipe = {"output_dir": str(run_dir / "first"), "text": str(tmp_path / "text.txt")}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(recipe))
    second = recipe | {"output_dir": str(run_dir / "second"), "start": str(run_dir / "first")}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    entries = {
        "first": {"recipe": "first.yaml", "stage": "toy", "gates": {"words": ">= 3"}},
        "second": {"recipe": "second.yaml", "stage": "toy"},
    }
    content = {"run_dir": str(run_dir), "launch": "accelerate_configs/cpu.yaml", "stages": entries}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path


def gemma2_post(toy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{toy}:{Path.cwd()}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(toy / "registered.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_stage_of_a_module_and_a_line_runs_in_a_pipeline(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = str(toy / "pipeline.yaml")
    monkeypatch.syspath_prepend(toy)
    monkeypatch.setitem(stages.STAGES, "toy", "toy_stage")
    cli.plan(Path(pipeline))
    assert "text 2.0" in capsys.readouterr().out

    ran = gemma2_post(toy, "run", pipeline, "--report")
    assert ran.returncode == 0, ran.stderr
    assert "first: done" in ran.stdout and "words 3" in ran.stdout and "words 6" in ran.stdout
    summary = json.loads((toy / "run" / "summary.json").read_text())
    assert summary["stages"]["second"]["metrics"] == {"words": 6} and summary["headlines"]["second"] == "words 6"
    page = (toy / "run" / "report.html").read_text()
    assert "words so far" in page and "words &gt;= 3" in page

    (toy / "text.txt").write_text("one two")
    below = gemma2_post(toy, "run", pipeline)
    assert below.returncode == 3 and "wants >= 3" in below.stderr and "are there enough words?" in below.stderr
    assert f"first: runs again, because {toy / 'text.txt'} " in below.stdout and "second: " not in below.stdout

    (toy / "second.yaml").write_text((toy / "second.yaml").read_text() + "step: 0\n")
    with pytest.raises(UserError, match=r"second\.yaml: step is 0; write 1 or more"):
        cli.check([Path(pipeline)])


@dataclass
class Recipe:
    output_dir: str = key(help="Folder of the output.")
    init: ModelPath | None = key(None, "A model.")


@dataclass
class WithLexicon(Recipe):
    lexicon: FilePath | None = key(None, "A file.")
    scorer: FunctionPath | None = key(None, "A function.")
    experts: list[ModelPath] | None = key(None, "More models.")


def command(recipe: type, **facts: object) -> Command:
    return Command("toy", recipe, lambda stage, recipe: None, lambda recipe: set(), lambda *_: None, **facts)


def test_a_key_that_names_something_is_hashed_and_looked_for_and_handed_over_by_its_type_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lexicon = tmp_path / "words.txt"
    lexicon.write_text("a")
    values = {"output_dir": "x", "lexicon": str(lexicon), "scorer": "gemma2_post.tiny.gold:gold", "experts": [BASE]}
    found = [(each.key, each.kind, each.name) for each in references(WithLexicon, values)]
    assert found == [
        ("lexicon", Kind.FILE, str(lexicon)),
        ("scorer", Kind.FUNCTION, "gemma2_post.tiny.gold:gold"),
        ("experts", Kind.MODEL, BASE),
    ]
    before = command(WithLexicon).fingerprint(values)
    assert before["inputs"].keys() == {str(lexicon), "gemma2_post.tiny.gold:gold", BASE}
    lexicon.write_text("b")
    (change,) = differences(before, command(WithLexicon).fingerprint(values)).output
    assert change.startswith(f"{lexicon} ")

    monkeypatch.setitem(stages.STAGES, "toy", "tests.toy")
    commands = {"toy": command(WithLexicon)}
    original = stages.command_of
    for module in (entries, loading, steps):
        monkeypatch.setattr(module, "command_of", lambda name: commands.get(name) or original(name))
    run_dir = tmp_path / "run"
    recipe = {"output_dir": str(run_dir / "second"), "experts": [str(run_dir / "first"), BASE]}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({"output_dir": str(run_dir / "first")}))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(recipe))
    toys = {name: {"recipe": f"{name}.yaml", "stage": "toy"} for name in ("first", "second")}
    content = {"run_dir": str(run_dir), "launch": "accelerate_configs/cpu.yaml", "stages": toys}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    pipeline = load_pipeline(path, tmp_path / "elsewhere")
    assert list(pipeline.reads_of("second")) == [("experts", "first")]
    assert pipeline.references_of("second") == {"experts": [str(tmp_path / "elsewhere" / "first"), BASE]}
    check.check(pipeline)

    recipe["experts"] = [str(tmp_path / "not" / "there")]
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"second\.yaml: experts is .*there, which no earlier stage makes"):
        check.check(load_pipeline(path))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({"output_dir": "x", "scorer": "gemma2_post.tiny.gold:lead"}))
    with pytest.raises(UserError, match=r"second\.yaml: gemma2_post\.tiny\.gold:lead: there is no such function"):
        check.check(load_pipeline(path))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({"output_dir": "x", "lexicon": str(tmp_path / "no.txt")}))
    with pytest.raises(UserError, match=r"second\.yaml: lexicon is .*no\.txt, and there is no such file"):
        check.check(load_pipeline(path))
