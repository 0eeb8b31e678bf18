"""What a stage that measures models computes; see `models/work.py`."""

from gemma2_post.evaluation import memory
from gemma2_post.evaluation.keys import JudgeArguments, MeasureArguments
from gemma2_post.models import cost, work
from gemma2_post.models.work import CONCURRENT, Model
from gemma2_post.stage.command import Checked
from gemma2_post.stage.work import Lengths, Pass, Rows, evenly


def prompts_of(checked: Checked, measured: MeasureArguments, rows: Rows) -> Lengths:
    """Lengths of the prompts."""
    args = measured.answers
    return rows.prompts_up_to(
        cost.longest_prompt(checked.models.values(), args.max_prompt_length, args.max_completion_length)
    )


def measuring(checked: Checked, measured: MeasureArguments, rows: Rows, answers: Lengths) -> list[Pass]:
    """One model: its answers, their logits by it and by the start, and their rewards."""
    config, batch_size = checked.models["init"], measured.answers.batch_size
    assert config is not None, "the planner asks only about models whose shapes it knows"
    model, number = Model(config, memory.compute_of(checked)), _number(measured, rows)
    both = prompts_of(checked, measured, rows).plus(answers)
    found = 2 * [work.reading(model, number, batch_size, both, answers.longest(batch_size))]
    return answering(checked, measured, rows, answers) + found


def answering(checked: Checked, measured: MeasureArguments, rows: Rows, answers: Lengths) -> list[Pass]:
    """One model's answers, and their rewards."""
    config, compute, args = checked.models["init"], memory.compute_of(checked), measured.answers
    assert config is not None, "the planner asks only about models whose shapes it knows"
    number, prompts, is_served = _number(measured, rows), prompts_of(checked, measured, rows), args.engine == "vllm"
    concurrent, both = CONCURRENT if is_served else args.batch_size, prompts.plus(answers)
    found = work.sampling(Model(config, compute), number, concurrent, prompts, answers, is_served)
    if scorer := checked.models.get("reward_model"):
        scoring = Model(scorer, compute, quantization=measured.rewards.reward_model_load_in)
        found.append(work.reading(scoring, number, measured.rewards.reward_batch_size, both))
    return found


def _number(measured: MeasureArguments, rows: Rows) -> int:
    return min(measured.samples.num_samples, rows.known or measured.samples.num_samples)


def judging(
    checked: Checked, measured: MeasureArguments, args: JudgeArguments, rows: Rows, num_models: int
) -> list[Pass]:
    """A local judge's replies about the answers of so many models and those of a baseline, in both orders."""
    judge, compute = checked.models.get("judge"), memory.compute_of(checked)
    if judge is None:
        return []
    answers = rows.answers_up_to(measured.answers.max_completion_length)
    pair = prompts_of(checked, measured, rows).plus(answers).plus(answers)
    question, asked = pair.plus(Lengths((memory.JUDGE_QUESTION,))), 2 * num_models * measured.samples.num_samples
    replies = evenly(args.judge_max_tokens)
    is_served, model = args.judge_engine == "vllm", Model(judge, compute, args.judge_load_in)
    return work.sampling(model, asked, CONCURRENT if is_served else memory.JUDGE_BATCH, question, replies, is_served)
