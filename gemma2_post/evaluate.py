"""Evaluation: what models answer to test prompts, side by side and against one of them.

Reads models, the one that RLHF started from (`init`), and a reward; writes `models.json` (reward, KL to `init`, stop
rate, length, distinctness, grades; also by number of turns) and `answers.jsonl`, for people to read. Prompts, seed and
temperature are the same for all models. The reward, each grader and, if there is one, a judge (another model, local or
behind an endpoint, asked in both orders) compare each answer with the `baseline`'s to the same prompt; `gains.json`
has the difference of each model to the one before it, paired by prompt, with its 95% interval. The judge also reads
the answers to `safety_datasets`, and to the questions of MT-Bench, Arena-Hard, and AlpacaEval, from their own files.
Models that are not of the chain answer beside it (`others`), or have answered (`outputs`). `reward_benchmarks` say how
often the reward model is right. With a `corpus`, the stage measures how much of it each model has memorized;
`benchmarks` are lm-eval's.

    python -m gemma2_post.evaluate --config recipes/tiny/evaluate.yaml
"""

import os
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_post.data.keys import Source
from gemma2_post.data.ranked import RANKED
from gemma2_post.data.rows import DOCUMENT, PROMPT, QUESTION
from gemma2_post.evaluation import memory as measuring
from gemma2_post.evaluation import work as computed
from gemma2_post.evaluation.keys import (
    REFUSED,
    BenchmarkArguments,
    CorpusArguments,
    JudgeArguments,
    MeasureArguments,
    OtherArguments,
    ProtocolArguments,
)
from gemma2_post.models import work as passes
from gemma2_post.stage import contract
from gemma2_post.stage.bounds import FILLED, Bounds
from gemma2_post.stage.command import Checked, Command, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.paths import ModelPath
from gemma2_post.stage.recipe import key, part
from gemma2_post.stage.work import Lengths, Pass, Rows, times

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = "measured"
"""Folder beside the output for what was measured, whatever the recipe says next."""


@dataclass(kw_only=True)
class Recipe:
    """The keys of an evaluation."""

    output_dir: str = key(help="Folder of the output.")
    init: ModelPath = key(help="The model that RLHF started from; KL is measured to it.")
    models: list[ModelPath] = key(help="Folders of the models; metrics.json is about the last one.", bounds=FILLED)
    baseline: ModelPath = key(help="One of the models; the others' answers win or lose against its answers.")
    base: ModelPath | None = key(None, "The model that all training started from; measured, too, as `base`.")
    measured: MeasureArguments = part(MeasureArguments)
    judging: JudgeArguments = part(JudgeArguments)
    beside: OtherArguments = part(OtherArguments)
    protocols: ProtocolArguments = part(ProtocolArguments)
    memorizing: CorpusArguments = part(CorpusArguments)
    benchmarks: BenchmarkArguments = part(BenchmarkArguments)
    reward_benchmarks: list[Source] | None = key(
        None, "Sets in the layouts of RewardBench and RewardBench 2, or pairs, on which the reward model is measured."
    )
    best_of: int | None = key(
        None,
        "Answers of baseline to each prompt, among which the reward chooses: best-of-n over n up to this.",
        bounds=Bounds(at_least=2),
    )


def main(stage: Stage, recipe: Recipe) -> None:
    """Lets all models answer and compares them; a part that fails, such as a judge, does not stop the others.

    What was measured before is kept, by what decides it.
    """
    from gemma2_post.evaluation import benchmarks, inputs
    from gemma2_post.evaluation.answering.others import load_others
    from gemma2_post.evaluation.comparison import Comparison
    from gemma2_post.evaluation.findings import Findings
    from gemma2_post.evaluation.measure import Measurement

    check_models(recipe.models)
    kept = stage.output_dir.with_name(KEPT)
    measurement = Measurement(recipe.init, recipe.measured, kept)
    check_tokenizers(recipe, measurement.tokenizer)
    if recipe.best_of and any(measurement.later):
        raise UserError("best_of chooses among answers to one turn, and datasets has questions of several; remove it")
    names = names_of(recipe)
    baseline = names[Path(recipe.baseline)]
    judge = inputs.load_judge(recipe.judging, stage.output_dir.with_name("judgments.jsonl"))
    unsafe = inputs.load_safety_prompts(recipe.judging, measurement)
    known_sets = inputs.load_known_sets(recipe.reward_benchmarks, measurement, recipe.measured.data)
    protocols = inputs.load_protocols(recipe.protocols, baseline, measurement)
    outputs = inputs.load_outputs(recipe.protocols, list(names.values()), protocols, measurement)
    taken = [*names.values(), *(each.name for each in outputs)]
    others = load_others(recipe.beside, taken, measurement, kept / "others.jsonl")
    max_invalid_share, seed = recipe.measured.data.max_invalid_share, recipe.measured.answers.seed
    corpus = inputs.load_corpus(recipe.memorizing, measurement.tokenizer, max_invalid_share, seed)
    if recipe.benchmarks.benchmarks:
        benchmarks.load_data(recipe.benchmarks)
    print(f"{len(measurement.rows)} of {measurement.num_prompts} prompts, {len(names)} models")
    contract.begin_afresh(stage.output_dir, stage.fingerprint)
    compared = Comparison(measurement, names, baseline, kept, outputs, others)
    compared.answer()
    compared.write_answers(stage.output_dir / "answers.jsonl")
    said = [compared.converse(protocol, stage.output_dir) for protocol in protocols]  # before a judge is loaded
    of_safety = compared.answer_safety(unsafe)
    found = Findings(stage.output_dir, compared.all_names(said))
    found.add("rewards", compared.by_answers)
    if not found.failed:
        contract.write_json(stage.output_dir / contract.GAINS, compared.gains())
    found.add_of_reward_model("reward_benchmarks", partial(compared.on_known_sets, known_sets))
    if "reward_benchmarks" not in found.failed:
        contract.write_json(stage.output_dir / contract.KNOWN_SETS, found.reward_model)
    found.add_of_reward_model("best_of", partial(compared.best_of, recipe.best_of, stage.output_dir))
    if judge:
        with closing(judge):
            found.add("judge", partial(compared.by_judge, judge))
            for protocol, conversations in zip(protocols, said, strict=True):
                found.add(protocol.questions.protocol, partial(protocol.measure, judge, conversations))
            found.add("safety", partial(compared.safety, judge, unsafe, of_safety))
    found.add("memorization", partial(compared.memorization, corpus))
    found.add("benchmarks", partial(compared.benchmarks, recipe.benchmarks))
    found.check()
    last = [*found.models.values()][-1]
    baselines = [baseline, *(protocol.baseline for protocol in protocols)]
    of_last = {without_baseline(name, baselines): value for name, value in last.items()}
    stage.finish(measurement.engine, of_last | found.reward_model)


def without_baseline(metric: str, baselines: list[str]) -> str:
    """The name of a metric, for gates: `win_rate` for `win_rate_vs_sft`."""
    for each in sorted(baselines, key=len, reverse=True):
        metric = metric.replace(f"_vs_{each}", "")
    return metric


def check_models(models: list[str]) -> None:
    """Refuses folders that hold no model.

    Raises:
        UserError: A folder of `models` holds none.
    """
    for path in models:
        is_folder = Path(path).exists() or path.count("/") != 1
        if is_folder and not (Path(path) / "config.json").is_file():
            raise UserError(f"models names {path}, which holds no model; run the stage that makes it")


def check_tokenizers(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuses models whose tokenizer is not that of `init`.

    Raises:
        UserError: A model has another tokenizer.
    """
    from gemma2_post.models.loading import load_config
    from gemma2_post.models.tokenizer import load_tokenizer, tokenizer_digest

    for path in [*recipe.models, *([recipe.base] if recipe.base else [])]:
        if tokenizer_digest(load_tokenizer(path, load_config(path))) != tokenizer_digest(tokenizer):
            raise UserError(f"{path} has another tokenizer than init {recipe.init}; compare models that share one")


def names_of(recipe: Recipe) -> dict[Path, str]:
    """Names of the models by path: the path below the run folder (`sft`, `rlhf/policy-0`), or the whole path.

    Raises:
        UserError: Two models have the same name.
    """
    run_dir = os.path.abspath(Path(recipe.output_dir).parent)
    names = {Path(recipe.base): "base"} if recipe.base else {}
    for path in recipe.models:
        is_of_run = os.path.abspath(path).startswith(run_dir + os.sep)
        names.setdefault(Path(path), os.path.relpath(path, run_dir) if is_of_run else path)
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise UserError(f"two of the models are called {twice[0]}; rename a folder")
    return names


def check(recipe: Recipe, launcher: Launcher) -> None:
    if launcher.num_processes > 1:
        raise UserError(
            "evaluate is one process; start it with accelerate_configs/single_gpu.yaml or cpu.yaml, and let models "
            "answer side by side with answer_processes"
        )
    judging, tasks = recipe.judging, recipe.benchmarks
    if tasks.benchmarks:
        from gemma2_post.evaluation import benchmarks  # a slow import

        benchmarks.check(tasks)
    judging.check()
    recipe.protocols.check(judging.judge)
    recipe.beside.check()
    if recipe.protocols.metrics or recipe.protocols.outputs:
        from gemma2_post.evaluation import inputs  # a slow import

        inputs.read_protocols(recipe.protocols, recipe.baseline)
        for file in recipe.protocols.outputs or []:
            inputs.read_outputs(file)
    tasks.check()
    recipe.memorizing.check()
    if judging.judge_endpoint:
        from gemma2_post.evaluation.answering import endpoint  # a slow import

        endpoint.connect(judging.judge_endpoint, judging.endpoint, endpoint.JUDGE_RETRIES)
    if recipe.reward_benchmarks and not recipe.measured.rewards.reward_model:
        raise UserError("reward_benchmarks are sets for a reward model, and there is none; name a reward_model")
    if recipe.baseline not in recipe.models:
        raise UserError(f"baseline is {recipe.baseline}, which is none of the models; add it to models")
    recipe.measured.check()


def metrics(recipe: Recipe) -> set[str]:
    from gemma2_post.evaluation import best_of, reward_benchmarks  # slow imports

    found = recipe.measured.metrics | {"win_rate", "distinct_answers", "distinct_bigrams"}
    found |= {f"{grader}_win_rate" for grader in recipe.measured.samples.grader_names}
    found |= {"judge_win_rate"} if recipe.judging.judge else set()
    found |= recipe.protocols.metrics
    found |= reward_benchmarks.SCORES if recipe.reward_benchmarks else set()
    if recipe.best_of:
        graded = recipe.measured.samples.grader_names
        found |= {f"best_of_{n}/{name}" for n in best_of.numbers(recipe.best_of) for name in ("reward", *graded)}
        found |= {f"best_of_4_accuracy/{name}" for name in graded if recipe.best_of >= best_of.NUM_IN_ACCURACY}
    found |= {"violations"} if recipe.judging.safety_datasets else set()
    found |= {"benchmarks"} if recipe.benchmarks.benchmarks else set()
    return found | ({"memorised_exact", "memorised_approximate"} if recipe.memorizing.corpus else set())


MEMORISED = 50, 50
"""Tokens of the corpus that a model reads and continues (`evaluation/memorisation.py`)."""


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    recipe, found = checked.recipe, measuring.measuring(checked, checked.recipe.measured)
    return found | measuring.judging(checked, recipe.measured, recipe.judging)


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    """Every model's answers; the base model's are as long as they may be. `safety_datasets`, protocols,
    benchmarks, and what `others` do, whose sizes are not known, are not counted."""
    recipe, measured = checked.recipe, checked.recipe.measured
    config, compute = checked.models["init"], measuring.compute_of(checked)
    assert config is not None, "the planner asks only about models whose shapes it knows"
    limit, others = measured.answers.max_completion_length, len(set(recipe.models))
    answers = rows.answers_up_to(limit)
    found = times(others, computed.measuring(checked, measured, rows, answers))
    if recipe.base:
        found += computed.measuring(checked, measured, rows, Lengths((limit,)))
    num_models = others + (recipe.base is not None)
    if recipe.memorizing.corpus:
        prefix, continuation = (Lengths((tokens,)) for tokens in MEMORISED)
        number, model = recipe.memorizing.num_memorised, passes.Model(config, compute)
        found += times(num_models, passes.sampling(model, number, measured.answers.batch_size, prefix, continuation))
    if recipe.best_of:
        found += times(recipe.best_of, computed.answering(checked, measured, rows, answers))
    found += computed.judging(checked, measured, recipe.judging, rows, num_models - 1)
    return found


COMMAND = Command(
    "evaluate",
    Recipe,
    main,
    metrics,
    check,
    refused=REFUSED,
    row_formats={"datasets": QUESTION, "safety_datasets": PROMPT, "corpus": DOCUMENT, "reward_benchmarks": RANKED},
    is_test=True,
    headline=["win_rate"],
    pictures={"best-of-n.png": "Does more choice by the reward make better answers?"},
    below_gate="read answers.jsonl next to models.json: which model fails, and on which prompts?",
    needed_models=["init", "reward_model", "judge"],
    memory=memory,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
