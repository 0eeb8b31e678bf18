"""The prompts of evaluation sets, which must stay out of what models learn from."""

from collections.abc import Iterator

from gemma2_post.curation import rows
from gemma2_post.curation.decontamination import Asked, Outside
from gemma2_post.curation.keys import DecontaminationArguments
from gemma2_post.data.keys import Source
from gemma2_post.data.rows import QUESTION, QUESTIONS
from gemma2_post.data.sources import rows_of
from gemma2_post.data.turns import InvalidRow
from gemma2_post.evaluation import benchmarks
from gemma2_post.evaluation.keys import BenchmarkArguments
from gemma2_post.stage.errors import UserError

_ASKED = (*QUESTIONS, "ctx", "sentence", "goal", "text")
"""Columns of a benchmark's rows that hold what is asked, where the task names no column."""


def benchmark_arguments(args: DecontaminationArguments) -> BenchmarkArguments:
    """The benchmarks as an evaluation names them."""
    return BenchmarkArguments(benchmarks=args.benchmarks, benchmark_folder=args.benchmark_folder)


def load(args: DecontaminationArguments) -> Outside:
    """All prompts that must stay out: the user's turns of each row of the sets, and the questions of the benchmarks.

    Raises:
        UserError: A set has no prompts, or cannot be read.
    """
    found: list[Asked] = []
    for name, source in zip(rows.names_of(args.evaluation_sets or []), args.evaluation_sets or [], strict=True):
        prompts = list(_prompts_of(name, source))
        if not prompts:
            raise UserError(
                f"evaluation_sets: {name} has no prompts; expected {QUESTION.expected}, so correct it or remove it"
            )
        found += prompts
    if args.benchmarks:
        benchmarks.check(benchmark_arguments(args))
        benchmarks.load_data(benchmark_arguments(args))
        for task in benchmarks.names_of(args.benchmarks):
            questions = list(_questions_of(task, args.benchmark_folder))
            if not questions:
                raise UserError(f"benchmarks: {task} has no questions; correct it or remove it")
            found += questions
    return Outside(found, args.overlap_words, args.max_overlap, args.near_prompt_edits)


def _prompts_of(name: str, source: Source) -> Iterator[Asked]:
    """What the user says in each row: of a conversation all turns, because the last one alone may be no more than
    "Who am I?".
    """
    for number, columns in enumerate(rows_of(source, set(QUESTION.columns))):
        try:
            row = QUESTION.read(columns, columns)
        except InvalidRow:
            continue
        turns = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"] + row["later"]
        yield Asked(name, number, "\n".join(turns))


def _questions_of(name: str, folder: str | None) -> Iterator[Asked]:
    """The questions of a task, or of all tasks of a group, of the split that it is scored on."""
    number = 0
    for task in benchmarks.task_manager(folder).load([name])["tasks"].values():
        for document in task.test_docs() if task.has_test_docs() else task.validation_docs():
            # Its doc_to_decontamination_query reads a text made by a template, as ARC's, as Python, and fails.
            columns = (task.config.doc_to_decontamination_query, *_ASKED)
            text = next((document[each] for each in columns if isinstance(document.get(each), str)), None)
            yield Asked(name, number, text if text is not None else str(task.doc_to_text(document)))
            number += 1
