"""MT-Bench (arXiv 2306.05685): 80 questions of two turns, graded from 1 to 10 and compared in pairs, by category.

The folder has FastChat's layout: `question.jsonl`, and `reference_answer/` with one file of correct answers. Where
FastChat's `judge_prompts.jsonl` lies in it or beside it, the judge is asked in its words, else in this project's.

Answers are sampled at the temperature of their category. As there, a grade is for one turn, in view of the turns
before it; a pair is won only if both orders agree, and is a tie otherwise; math, reasoning, and coding are judged with
correct answers. Unlike there, all of a judge's reply is read, not the first mark (`verdicts.py`), a judge without a
verdict is asked again, and each model is compared with the recipe's baseline.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from gemma2_post.data.files import read_file
from gemma2_post.data.labeled_pairs import quoting
from gemma2_post.data.turns import Message
from gemma2_post.evaluation.judging.judge import Both, Judge
from gemma2_post.evaluation.judging.rubrics import Question, comparison, grading
from gemma2_post.evaluation.judging.winrate import mean_interval, rate_interval
from gemma2_post.evaluation.protocols.questions import Questions, file_name, read_answers, read_questions, write_lines
from gemma2_post.stage.errors import UserError

NAME = "mt_bench"
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ["extraction", "math", "coding", "reasoning"], 0.0
)
_OTHER_TEMPERATURE = 0.7
_WITH_REFERENCE = {"math", "reasoning", "coding"}
_SETTINGS = {
    "single": ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"),
    "pair": ("pair-v2", "pair-math-v1", "pair-v2-multi-turn", "pair-math-v1-multi-turn"),
}
"""FastChat's prompts for the first turn, with a reference, for the second turn, and with a reference."""


@dataclass(frozen=True)
class MTBench:
    """The questions, with what the judge is given."""

    questions: Questions
    baseline: str
    """The model that others are compared with in pairs."""
    references: list[list[str] | None]
    """Correct answers by turn, of the categories that need them."""
    prompts: dict[str, dict[str, str]] | None
    """FastChat's prompts by name; None: the judge is asked in this project's words."""

    def graded(self, number: int, answers: list[str], turn: int) -> Question:
        """The question to grade an answer.

        Args:
            answers: The model's answers by turn.
            turn: The turn that is graded, from 0.
        """
        if self.prompts:
            shown = {"answer": answers[0], "answer_1": answers[0], "answer_2": answers[min(turn, len(answers) - 1)]}
            return self._asked("single", number, turn, shown)
        return grading(
            conversation(self.questions.turns[number][: turn + 1], answers),
            answers[turn],
            self._reference(number, turn),
        )

    def paired(self, number: int, answers: tuple[list[str], list[str]], turn: int) -> tuple[Question, Question]:
        """The questions to compare two models' answers, in both orders."""
        first, second = answers
        return self._pair(number, first, second, turn), self._pair(number, second, first, turn)

    def _pair(self, number: int, first: list[str], second: list[str], turn: int) -> Question:
        if self.prompts:
            shown = {"answer_a": first[0], "answer_b": second[0]}
            for side, answers in (("a", first), ("b", second)):
                shown |= {f"answer_{side}_1": answers[0], f"answer_{side}_2": answers[min(turn, len(answers) - 1)]}
            return self._asked("pair", number, turn, shown)
        turns = self.questions.turns[number]
        one, two = (quoting(turns[: turn + 1], answers[: turn + 1]) for answers in (first, second))
        return comparison(conversation(turns[:1], []), one, two, self._reference(number, turn))

    def _reference(self, number: int, turn: int) -> list[str] | None:
        reference = self.references[number]
        return reference[: turn + 1] if reference else None

    def _asked(self, kind: str, number: int, turn: int, shown: dict[str, str]) -> Question:
        assert self.prompts is not None
        template = self.prompts[_SETTINGS[kind][2 * (turn > 0) + (self.references[number] is not None)]]
        turns = self.questions.turns[number]
        fields = shown | {"question": turns[0], "question_1": turns[0], "question_2": turns[min(1, len(turns) - 1)]}
        for i, each in enumerate(self.references[number] or []):
            fields[f"ref_answer_{i + 1}"] = each
        return Question(template["prompt_template"].format(**fields), template["system_prompt"])

    def measure(self, judge: Judge, said: dict[str, list[list[str]]]) -> dict[str, dict[str, float]]:
        """Each model's grades, and how often its answers beat the baseline's, with 95% intervals over the questions.

        Args:
            said: Each model's answers, by question and turn.
        """
        found = {name: self._grades(judge, answers) for name, answers in said.items()}
        for name in [each for each in said if each != self.baseline]:
            found[name] |= self._wins(judge, said[name], said[self.baseline])
        return found

    def _grades(self, judge: Judge, answers: list[list[str]]) -> dict[str, float]:
        places = self._places()
        grades = judge.grades([self.graded(number, answers[number], turn) for number, turn in places])
        judge.check_most(grades.count(None), len(grades), f"answers to {NAME}")
        given = {place: grade for place, grade in zip(places, grades, strict=True) if grade is not None}
        found = self._by_part(NAME, given)
        found[f"{NAME}/low"], found[f"{NAME}/high"] = mean_interval(by_question(given))
        return found | {f"{NAME}/missing": grades.count(None)}

    def _wins(self, judge: Judge, answers: list[list[str]], others: list[list[str]]) -> dict[str, float]:
        places, key = self._places(), f"{NAME}_win_rate_vs_{self.baseline}"
        pairs = [
            None
            if answers[number][: turn + 1] == others[number][: turn + 1]
            else self.paired(number, (answers[number], others[number]), turn)
            for number, turn in places
        ]
        wins = dict(zip(places, map(consistent, judge.in_both_orders(pairs)), strict=True))
        given = {place: win for place, win in wins.items() if win is not None}
        judge.check_most(len(wins) - len(given), sum(pair is not None for pair in pairs), f"pairs of {NAME}")
        found = self._by_part(key, given)
        found[f"{key}/low"], found[f"{key}/high"] = rate_interval(by_question(given))
        asked = sum(pair is not None for pair in pairs)
        return found | {f"{key}/missing": len(wins) - len(given), f"{key}/asked": asked}

    def _places(self) -> list[tuple[int, int]]:
        """All questions and turns."""
        return [(number, turn) for number, turns in enumerate(self.questions.turns) for turn in range(len(turns))]

    def _by_part(self, key: str, values: dict[tuple[int, int], float]) -> dict[str, float]:
        """The mean of values by question and turn: of all, by turn, and by category."""
        parts: dict[str, list[float]] = defaultdict(list)
        for (number, turn), value in values.items():
            for part in (key, f"{key}/turn-{turn + 1}", f"{key}/category-{self.questions.categories[number]}"):
                parts[part].append(value)
        return {part: mean(each) for part, each in parts.items()}

    def write_answers(self, folder: Path, said: dict[str, list[list[str]]]) -> None:
        """Writes the answers of each model as FastChat does: `model_answer/NAME.jsonl`."""
        for name, answers in said.items():
            rows = [
                {"question_id": key, "answer_id": f"{name} {key}", "model_id": name}
                | {"choices": [{"index": 0, "turns": turns}]}
                for key, turns in zip(self.questions.ids, answers, strict=True)
            ]
            write_lines(folder / "model_answer" / f"{file_name(name)}.jsonl", rows)


def conversation(turns: list[str], answers: list[str]) -> list[Message]:
    """The user's turns, each but the last with the model's answer."""
    found: list[Message] = []
    for i, turn in enumerate(turns):
        found.append({"role": "user", "content": turn})
        if i + 1 < len(turns):
            found.append({"role": "assistant", "content": answers[i]})
    return found


def load(folder: str, baseline: str) -> MTBench:
    """The questions, references, and prompts in a folder.

    Args:
        baseline: The model that others are compared with in pairs.

    Raises:
        UserError: A file is missing or has another layout, or a question that needs a correct answer has none.
    """
    rows = read_questions(folder, NAME)
    for row in rows:
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise UserError(
                f"{folder}/question.jsonl: question {row.get('question_id')} has no list of texts as turns; "
                "take FastChat's file"
            )
    categories = [str(row.get("category", "all")) for row in rows]
    questions = Questions(
        NAME,
        [str(row.get("question_id")) for row in rows],
        [row["turns"] for row in rows],
        categories,
        [_TEMPERATURES.get(each, _OTHER_TEMPERATURE) for each in categories],
    )
    return MTBench(questions, baseline, _references(folder, rows, questions), _prompts(folder, questions))


def _references(folder: str, rows: list[dict[str, Any]], questions: Questions) -> list[list[str] | None]:
    given = read_answers(Path(folder) / "reference_answer", None, "reference_answer")
    found: list[list[str] | None] = []
    for row, key, turns in zip(rows, questions.ids, questions.turns, strict=True):
        if row.get("category") not in _WITH_REFERENCE:
            found.append(None)
            continue
        reference = given.by_id.get(key) if given else row.get("reference")
        if not isinstance(reference, list) or len(reference) < len(turns):
            raise UserError(
                f"{NAME}: question {key} is of the category {row['category']}, which is judged with a correct answer "
                f"to each turn, and {folder}/reference_answer has none; add it"
            )
        found.append([str(each) for each in reference])
    return found


def _prompts(folder: str, questions: Questions) -> dict[str, dict[str, str]] | None:
    places = [Path(folder) / "judge_prompts.jsonl", Path(folder).absolute().parent / "judge_prompts.jsonl"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    found: dict[str, dict[str, str]] = {str(row.get("name")): row for row in read_file(file, set())}
    missing = [name for names in _SETTINGS.values() for name in names if name not in found]
    if missing:
        raise UserError(f"{file}: there is no prompt {missing[0]}; take FastChat's file, or remove it")
    if max(map(len, questions.turns)) > 2:
        raise UserError(f"{file}: FastChat's prompts are for two turns, and a question has more; remove the file")
    return found


def consistent(both: Both | None) -> float | None:
    """1 or 0 if both orders agree that the first answer is better or worse, 0.5 otherwise; None if one is missing."""
    if both is None:
        return 0.5
    one, two = both
    if one is None or two is None:
        return None
    return one.win if one.win == 1 - two.win else 0.5


def by_question(values: dict[tuple[int, int], float]) -> list[float]:
    """The mean of each question's values."""
    found: dict[int, list[float]] = defaultdict(list)
    for (number, _), value in values.items():
        found[number].append(value)
    return [mean(each) for each in found.values()]
