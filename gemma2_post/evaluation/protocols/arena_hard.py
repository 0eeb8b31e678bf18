"""Arena-Hard (arXiv 2406.11939): hard prompts, each answer compared with a baseline's, in both orders.

The folder has the layout of Arena-Hard-Auto, 0.1 or 2.0: `question.jsonl`, and the baseline's answers in
`model_answer/`. Where its `judge_config.yaml` lies in it, the judge is asked in its words, else in this project's.

A verdict of `[[A>>B]]` counts as three, as there, and the score is the share of all verdicts that is won, a tie
counting half: with one baseline, that is what the Bradley-Terry fit of that project gives. Answers are greedy.
Unlike there: no control for style, a judge without a verdict is asked again, and the interval is not bootstrapped.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gemma2_post.data.turns import Message
from gemma2_post.evaluation.judging.judge import Both, Judge
from gemma2_post.evaluation.judging.rubrics import Question, much_better
from gemma2_post.evaluation.judging.winrate import pooled_rate
from gemma2_post.evaluation.protocols.outputs import text_of
from gemma2_post.evaluation.protocols.questions import Questions, file_name, read_answers, read_questions, write_lines
from gemma2_post.stage.errors import UserError

NAME = "arena_hard"
_BASELINES = {"arena-hard-v0.1": "gpt-4-0314", "creative_writing": "gemini-2.0-flash-001"} | dict.fromkeys(
    ["hard_prompt", "coding", "math"], "o3-mini-2025-01-31"
)
"""The project's baseline for each category of questions."""


@dataclass(frozen=True)
class ArenaHard:
    """The questions, with the answers that others are compared with."""

    questions: Questions
    baseline: str
    """The name of the baseline, or of the several ones of different categories."""
    answers: list[str]
    """The baseline's."""
    template: tuple[str, str] | None
    """System message and question of `judge_config.yaml`; None: the judge is asked in this project's words."""

    def asked(self, number: int, first: str, second: str) -> Question:
        """The question to compare two answers."""
        turn = self.questions.turns[number][0]
        if self.template is None:
            prompt: list[Message] = [{"role": "user", "content": turn}]
            return much_better(prompt, first, second)
        system, text = self.template
        return Question(text.format(**_fields(turn, first, second)), system)

    def measure(self, judge: Judge, said: dict[str, list[list[str]]]) -> dict[str, dict[str, float]]:
        """How often each model's answers beat the baseline's, with the 95% interval; also by category.

        Args:
            said: Each model's answers, by question and turn.
        """
        key, found = f"{NAME}_win_rate_vs_{self.baseline}", {}
        for name, answers in said.items():
            pairs = [
                None if answer == other else (self.asked(number, answer, other), self.asked(number, other, answer))
                for number, ((answer, *_), other) in enumerate(zip(answers, self.answers, strict=True))
            ]
            verdicts = judge.in_both_orders(pairs)
            missing = sum(both is not None and None in both for both in verdicts)
            asked = sum(pair is not None for pair in pairs)
            judge.check_most(missing, asked, f"pairs of {NAME}")
            found[name] = _rates(key, verdicts, self.questions.categories)
            found[name] |= {f"{key}/missing": missing, f"{key}/asked": asked}
        return found

    def write_answers(self, folder: Path, said: dict[str, list[list[str]]]) -> None:
        """Writes the answers of each model as Arena-Hard-Auto 2.0 does: `model_answer/NAME.jsonl`."""
        for name, answers in said.items():
            rows = []
            for key, (turn,), (answer, *_) in zip(self.questions.ids, self.questions.turns, answers, strict=True):
                messages = [{"role": "user", "content": turn}, {"role": "assistant", "content": {"answer": answer}}]
                rows.append({"uid": key, "ans_id": f"{name} {key}", "model": name, "messages": messages})
            write_lines(folder / "model_answer" / f"{file_name(name)}.jsonl", rows)


def _fields(turn: str, first: str, second: str) -> dict[str, str]:
    """The fields of the templates of 0.1 and 2.0."""
    old = {"question_1": turn, "answer_1": first, "answer_2": second}
    return old | {"QUESTION": turn, "ANSWER_A": first, "ANSWER_B": second}


def load(folder: str, baseline: str | None) -> ArenaHard:
    """The questions and the baseline's answers in a folder.

    Args:
        baseline: The name of a file in `model_answer`; None: the only one there, or the project's for each category.

    Raises:
        UserError: A file is missing or has another layout, or a question has no answer of the baseline.
    """
    rows = read_questions(folder, NAME)
    for row in rows:
        if _prompt(row) is None:
            raise UserError(
                f"{folder}/question.jsonl: question {_id(row)} has no prompt and no turns; take Arena-Hard-Auto's file"
            )
    categories = [str(row.get("category", "all")) for row in rows]
    turns = [[_prompt(row) or ""] for row in rows]
    questions = Questions(NAME, [_id(row) for row in rows], turns, categories, [0.0] * len(rows))
    answered: dict[str, list[list[str]]] = {}
    place = Path(folder) / "model_answer"
    is_alone = len(list(place.glob("*.jsonl"))) == 1
    wanted = [baseline if baseline or is_alone else _BASELINES.get(category) for category in categories]
    names: list[str] = []
    answers = []
    for name in dict.fromkeys(wanted):
        outputs = read_answers(place, name, "arena_hard_baseline")
        if outputs is None:
            raise UserError(f"{NAME}: {place} has no answers of a baseline; download one of that project's files")
        names.append(name or outputs.name)
        answered[str(name)] = [outputs.by_id.get(key, []) for key in questions.ids]
    for number, (key, name) in enumerate(zip(questions.ids, wanted, strict=True)):
        if not answered[str(name)][number]:
            raise UserError(f"{NAME}: the baseline has no answer to question {key}; take its whole file")
        answers.append(answered[str(name)][number][0])
    return ArenaHard(questions, ", ".join(names), answers, _template(Path(folder) / "judge_config.yaml"))


def _id(row: dict[str, Any]) -> str:
    return str(row.get("question_id", row.get("uid")))


def _prompt(row: dict[str, Any]) -> str | None:
    turns = row.get("turns")
    return text_of(turns[0]) if isinstance(turns, list) and turns else text_of(row.get("prompt"))


def _template(file: Path) -> tuple[str, str] | None:
    if not file.is_file():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        text = content["prompt_template"]
        found = str(content.get("system_prompt") or ""), str(text[0] if isinstance(text, list) else text)
        found[1].format(**_fields("", "", ""))
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: holds no prompt_template of a question and two answers ({error}); take the project's, or remove "
            "it"
        ) from error
    return found


def _rates(key: str, verdicts: list[Both | None], categories: list[str]) -> dict[str, float]:
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for both, category in zip(verdicts, categories, strict=True):
        won = battles(both)
        if won[1]:
            parts[key].append(won)
            parts[f"{key}/category-{category}"].append(won)
    found: dict[str, float] = {}
    for part, each in parts.items():
        wins, weights = zip(*each, strict=True)
        found[part], found[f"{part}/low"], found[f"{part}/high"] = pooled_rate(list(wins), list(weights))
    return found


def battles(both: Both | None) -> tuple[float, float]:
    """The weight that the first answer wins in both orders, and all weight; a missing verdict has none."""
    if both is None:
        return 1.0, 2.0
    one, two = both
    won = (one.weight * one.win if one else 0.0) + (two.weight * (1 - two.win) if two else 0.0)
    return won, float((one.weight if one else 0) + (two.weight if two else 0))
