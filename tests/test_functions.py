"""A user's function that grades or rewards: what it returns is checked, and what it raises is one sentence."""

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from datasets import Dataset

from gemma2_post.data.functions import load_function, load_grader
from gemma2_post.data.selection import Candidate
from gemma2_post.evaluation.answering.samples import load_graders
from gemma2_post.evaluation.answering.teacher import load_rewards
from gemma2_post.evaluation.keys import EndpointArguments, RewardFunctionArguments, SampleArguments, SynthesisArguments
from gemma2_post.evaluation.policies import noise_ceiling_of
from gemma2_post.evaluation.rewards import load_reward_functions
from gemma2_post.stage.errors import UserError

PROMPTS = [[{"role": "user", "content": "Hi"}]] * 3
ROWS = Dataset.from_dict({"prompt": PROMPTS, "answer": ["a", "b", "c"]})
ANSWERS = [[{"role": "assistant", "content": text}] for text in "abc"]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes the module `mine`; returns the path of its function `grade`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def write(code: str) -> str:
        (tmp_path / "mine.py").write_text(f"import math\nimport numpy\n\n{code}\n")
        return "mine:grade"

    return write


def returning(value: str) -> str:
    return f"def grade(completions, **_):\n    n = len(completions)\n    return {value}"


def as_grader(path: str) -> list[float]:
    return load_graders(SampleArguments(graders=[path]), ROWS)["grade"](completions=["a", "b", "c"], **ROWS[:])


def as_reward(path: str) -> list[float]:
    (function,) = load_reward_functions(
        RewardFunctionArguments(reward_functions=[path], missing_end_penalty=0.0), ["prompt"]
    )
    assert function.__name__ == "grade"
    given = {"trainer_state": None, "log_extra": None, "log_metric": None}
    return function(prompts=PROMPTS, completions=ANSWERS, completion_ids=[[1]] * 3, **given)


def in_synthesis(path: str) -> list[float]:
    candidates = [Candidate(0, [*PROMPTS[0], *answer], {"answer": "a"}, 0, "stop") for answer in ANSWERS]
    return load_rewards(SynthesisArguments(server=EndpointArguments(), reward_model=path), ROWS)(candidates)


CALLERS = [as_grader, as_reward, in_synthesis]
WRONG = {
    "too few": ("[1.0] * (n - 1)", "returned 2 values for 3 answers"),
    "too many": ("[1.0] * (n + 1)", "returned 4 values for 3 answers"),
    "nothing": ("None", "returned NoneType, not a list for 3 answers"),
    "one number": ("1.0", "returned float, not a list for 3 answers"),
    "a text": ("'abc'", "returned str, not a list"),
    "a generator": ("(1.0 for _ in range(n))", "returned generator, not a list"),
    "an array": ("numpy.ones(n)", "returned ndarray, not a list"),
    "a dictionary": ("dict.fromkeys(range(n), 1.0)", "returned dict, not a list"),
    "None for one": ("[1.0] * (n - 1) + [None]", "returned None; return a finite number"),
    "NaN": ("[math.nan] * n", "returned nan; return a finite number"),
    "infinity": ("[-math.inf] * n", "returned -inf; return a finite number"),
    "NaN of numpy": ("[numpy.float32('nan')] * n", r"returned .*nan.*; return a finite number"),
    "true": ("[True] * n", "returned True; return a finite number"),
    "true of numpy": ("[numpy.bool_(True)] * n", r"returned .*True.*; return a finite number"),
    "texts": ("['1.0'] * n", "returned '1.0'; return a finite number"),
    "complex": ("[1j] * n", "returned 1j; return a finite number"),
    "lists": ("[[1.0]] * n", r"returned \[1\.0\]; return a finite number"),
    "an integer that is no float": ("[10**400] * n", "returned 1000*; return a finite number"),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(("value", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_a_function_may_not_return(caller: Callable, value: str, message: str, written: Callable) -> None:
    with pytest.raises(UserError, match=f"^mine:grade {message}"):
        caller(written(returning(value)))


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    "value", ["[2] * n", "(2.0,) * n", "[numpy.float32(2)] * n", "[numpy.int64(2)] * n", "list(numpy.full(n, 2.0))"]
)
def test_numbers_of_any_kind_in_a_list_or_a_tuple_are_right(caller: Callable, value: str, written: Callable) -> None:
    found = caller(written(returning(value)))
    assert found == [2.0] * 3 and {type(each) for each in found} == {float}


RAISED = {
    "an error": ("raise ValueError('no\\n such answer')", "ValueError: no such answer", 7),
    "a key": ("{}['skill']", "KeyError: 'skill'", 7),
    "without words": ("assert False", "AssertionError: nothing", 7),
    "in a library": ("math.sqrt(-1)", "ValueError: ", 7),
    "in another function": ("helper(completions)", "ZeroDivisionError: division by zero", 4),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(("code", "message", "line"), RAISED.values(), ids=RAISED.keys())
def test_what_a_function_raises_is_one_sentence_with_its_place(
    caller: Callable, code: str, message: str, line: int, written: Callable, tmp_path: Path
) -> None:
    path = written(f"def helper(x): 1 / 0\n\ndef grade(completions, **_):\n    {code}\n    return [1.0]")
    with pytest.raises(UserError) as raised:
        caller(path)
    assert str(raised.value).startswith(f"mine:grade: calling it raised {message}")
    assert f"({tmp_path}/mine.py, line {line})" in str(raised.value) and "\n" not in str(raised.value)


MODULES = {
    "raises": ("x = 1 / 0", "mine:grade", r"importing its module raised ZeroDivisionError: .*mine\.py, line 4\)"),
    "ends the process": ("raise SystemExit(3)", "mine:grade", "importing its module raised SystemExit: 3"),
    "is no Python": ("def grade(:", "mine:grade", r"importing its module raised SyntaxError: .*mine\.py, line 4\)"),
    "imports what is not there": (
        "import not_installed",
        "mine:grade",
        r"importing its module raised ModuleNotFoundError: No module named 'not_installed' \(.*mine\.py, line 4\)",
    ),
    "imports a name that is not there": (
        "from math import nothing",
        "mine:grade",
        "importing its module raised ImportE",
    ),
    "holds a class": ("class grade: ...", "mine:grade", "is type, not a function"),
    "holds a number": ("grade = 4", "mine:grade", "is int, not a function"),
    "holds None": ("grade = None", "mine:grade", "there is no such function"),
    "holds a partial": ("from functools import partial\ngrade = partial(max, 1)", "mine:grade", "is partial, not a"),
    "holds it in a dictionary": (
        "D = {'grade': lambda completions: []}",
        "mine:D['grade']",
        "there is no such function",
    ),
    "lacks it": ("", "mine:grade", "there is no such function"),
    "is not there": ("", "not_there:grade", "there is no such function"),
    "is not in its package": ("", "mine.inner:grade", "there is no such function"),
    "has no name": ("", ":grade", "there is no such function"),
    "is relative": ("", ".mine:grade", "there is no such function"),
    "has a dash": ("", "my-module:grade", "there is no such function"),
    "is all that is named": ("", "mine", "there is no such function"),
}


@pytest.mark.parametrize(("code", "path", "message"), MODULES.values(), ids=MODULES.keys())
def test_a_module_that_gives_no_function_is_one_sentence(
    code: str, path: str, message: str, written: Callable
) -> None:
    written(code)
    with pytest.raises(UserError, match=rf"^{path.replace('[', '.').replace(']', '.')}: {message}"):
        load_function(path)


def test_a_function_that_does_not_take_the_columns_is_refused(written: Callable) -> None:
    with pytest.raises(UserError, match="cannot be called with completions and the columns skill"):
        load_grader(written("def grade(completions, answer): ..."), ["skill"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("return None", "returned None; return a finite number"),
        ("return math.nan", "returned nan; return a finite number"),
        ("return rows[0]['score']", "needs the column 'score'; add it to columns"),
        ("raise RuntimeError('no')", r": calling it raised RuntimeError: no \(.*mine\.py, line 5\)"),
    ],
)
def test_a_noise_ceiling_is_checked_too(code: str, message: str, written: Callable) -> None:
    path = written(f"def grade(rows):\n    {code}")
    with pytest.raises(UserError, match=f"^mine:grade ?{message}"):
        noise_ceiling_of(path, ROWS)


def test_a_fraction_is_a_number(written: Callable) -> None:
    path = written("from fractions import Fraction\n\ndef grade(rows): return Fraction(3, 4)")
    assert noise_ceiling_of(path, ROWS) == Fraction(3, 4)
