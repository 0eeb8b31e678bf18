"""AlpacaEval (arXiv 2404.04475): each answer compared with the one in a file, in both orders.

The file has AlpacaEval's layout: rows of `instruction`, `output`, and `generator`, such as its baseline's outputs.
What models answer is written in the same layout, for its own tools.

The win rate is the mean over the instructions; the one at equal lengths is `winrate.length_controlled`, by characters.
Unlike there: the judge is asked in this project's words, in both orders, and says which answer is better, instead of
the probabilities of its marks.
"""

from dataclasses import dataclass
from pathlib import Path

from gemma2_post.data.files import read_file
from gemma2_post.evaluation.judging.judge import Judge
from gemma2_post.evaluation.protocols.questions import Questions, file_name
from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

NAME = "alpaca_eval"


@dataclass(frozen=True)
class AlpacaEval:
    """The instructions, with the outputs that others are compared with."""

    questions: Questions
    baseline: str
    """The generator of the outputs."""
    outputs: list[str]

    def measure(self, judge: Judge, said: dict[str, list[list[str]]]) -> dict[str, dict[str, float]]:
        """How often each model's outputs beat the file's, also at equal lengths, with 95% intervals.

        Args:
            said: Each model's answers, by instruction and turn.
        """
        key, found = f"{NAME}_win_rate_vs_{self.baseline}", {}
        for name, answers in said.items():
            outputs = [turns[0] for turns in answers]
            judged = judge.compare(self.questions.prompts, outputs, self.outputs)
            judge.check_most(judged.wins.count(None), judged.num_asked, f"pairs of {NAME}")
            found[name] = judged.versus(key, [len(text) for text in outputs], [len(text) for text in self.outputs])
        return found

    def write_answers(self, folder: Path, said: dict[str, list[list[str]]]) -> None:
        """Writes the outputs of each model as AlpacaEval does: `NAME/model_outputs.json`."""
        questions = self.questions
        for name, answers in said.items():
            rows = [
                {"dataset": dataset, "instruction": turn, "output": turns[0], "generator": name}
                for dataset, (turn,), turns in zip(questions.categories, questions.turns, answers, strict=True)
            ]
            place = folder / file_name(name) / "model_outputs.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            contract.write_json(place, rows)


def load(file: str) -> AlpacaEval:
    """The instructions and outputs in a file.

    Raises:
        UserError: The file cannot be read, or a row has another layout.
    """
    if not Path(file).is_file():
        raise UserError(f"{NAME} names {file}, which is no file; give outputs such as alpaca_eval.json")
    rows = list(read_file(Path(file), set()))
    if not rows:
        raise UserError(f"{file}: there are no outputs here; download it again")
    for number, row in enumerate(rows):
        if not isinstance(row.get("instruction"), str) or not isinstance(row.get("output"), str):
            raise UserError(
                f"{file}: row {number} has the columns {', '.join(row)}; expected instruction and output, as texts"
            )
    turns = [[row["instruction"]] for row in rows]
    instructions = Questions(
        NAME,
        [f"{NAME} {number}" for number in range(len(rows))],
        turns,
        [str(row.get("dataset", "all")) for row in rows],
        [1.0] * len(rows),
    )
    return AlpacaEval(instructions, str(rows[0].get("generator") or Path(file).stem), [row["output"] for row in rows])
