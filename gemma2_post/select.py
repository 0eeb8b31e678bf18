"""Selection: candidates, which override keys of one stage, answer the same prompts; the best of them goes on.

The pipeline trains the candidates, as stages of its own (`NAME-candidates`). This stage reads them; all answer the
same selection prompts, and the reward, a grader or a judge (asked in both orders) compares each one's answers with
those of the baseline, the first candidate. The highest win rate is chosen; of those that cannot be told from it, by
the 95% interval of their difference, the one that cost least to train. Writes the chosen model, `select.json` with the
table, and `answers.jsonl`, for people to read. With a `share` of the steps, the pipeline trains what was chosen anew,
with all of its steps.

    gemma2-post select recipes/tiny/select.yaml
"""

import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma2_post.data.rows import QUESTION
from gemma2_post.evaluation import memory as measuring
from gemma2_post.evaluation import work as computed
from gemma2_post.evaluation.keys import REFUSED, JudgeArguments, MeasureArguments
from gemma2_post.models import cost
from gemma2_post.models.shapes import num_parameters
from gemma2_post.stage import contract
from gemma2_post.stage.bounds import FILLED, Bounds
from gemma2_post.stage.command import Checked, Command, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.overrides import Overrides, in_words, of_grid
from gemma2_post.stage.paths import ModelPath, check_names
from gemma2_post.stage.recipe import Effect, key, part
from gemma2_post.stage.work import Pass, Rows, times

KEPT = "measured"
"""Folder beside the output for what the candidates answered, whatever the recipe says next."""
Selected = Literal["sft", "distill", "rlhf"]
"""The stages whose models answer prompts."""
_SHARE = Bounds(above=0, below=1)


@dataclass(kw_only=True)
class Recipe:
    """The keys of a selection."""

    select: Selected = key(help="The stage whose recipe the candidates override.")
    recipe: str | None = key(
        None, "That stage's recipe, a file beside this one; without it, STAGE.yaml.", effect=Effect.NONE
    )
    candidates: list[dict[str, Any]] | None = key(
        None, "What each candidate overrides; the first one is the baseline, and {} overrides nothing.", bounds=FILLED
    )
    grid: dict[str, Any] | None = key(
        None, "Instead of candidates: lists of values by key; the candidates are all their combinations."
    )
    share: float | None = key(
        None,
        "Share of the recipe's steps that each candidate takes; the chosen one is then trained with all of them.",
        bounds=_SHARE,
    )
    by: str = key("reward", "What compares answers: reward, judge, or the name of one of the graders.")
    models: list[ModelPath] | None = key(None, "Folders of the candidates, in their order; a pipeline sets it.")
    output_dir: str = key(help="Folder of the output.")
    measured: MeasureArguments = part(MeasureArguments)
    judging: JudgeArguments = part(JudgeArguments)


def candidates_of(values: dict[str, Any]) -> list[Overrides]:
    """What each candidate overrides, by the keys of a recipe.

    Raises:
        UserError: They are not given, given twice, malformed, or fewer than two.
    """
    candidates, grid = values.get("candidates"), values.get("grid")
    if (candidates is None) == (grid is None):
        found = "both candidates and a grid" if grid is not None else "neither candidates nor a grid"
        raise UserError(f"there are {found}; write one of them, for example `grid: {{learning_rate: [1e-4, 3e-4]}}`")
    if grid is not None:
        if not isinstance(grid, dict) or not all(isinstance(each, list) and each for each in grid.values()):
            raise UserError(f"grid is {grid!r}; write a list of values for each key: {{learning_rate: [1e-4, 3e-4]}}")
        candidates = of_grid(grid)
    if not isinstance(candidates, list) or not all(isinstance(each, dict) for each in candidates):
        raise UserError(f"candidates is {candidates!r}; write a list of mappings: [{{}}, {{learning_rate: 3e-4}}]")
    if len(candidates) < 2:
        raise UserError(f"there is {len(candidates)} candidate, and nothing to select from; write two or more")
    return candidates


def share_of(values: dict[str, Any]) -> float | None:
    """The share of the steps that candidates take, by the keys of a recipe; None for all of them.

    Raises:
        UserError: It is no share.
    """
    share = values.get("share")
    if share is not None and (not isinstance(share, float) or _SHARE.problem(share)):
        raise UserError(f"share is {share!r}; write a number {_SHARE.words}")
    return share


def main(stage: Stage, recipe: Recipe) -> None:
    """Lets all candidates answer, compares them, and copies the chosen one; what was answered before is kept."""
    from gemma2_post.evaluation import inputs
    from gemma2_post.evaluation.choice import choose, given
    from gemma2_post.evaluation.comparison import Comparison
    from gemma2_post.evaluation.judging.winrate import rate_interval
    from gemma2_post.evaluation.measure import Measurement

    overrides, folders = candidates_of(vars(recipe)), [Path(path) for path in recipe.models or []]
    done = [_finished(folder, words) for folder, words in zip(folders, map(in_words, overrides), strict=True)]
    kept = stage.output_dir.with_name(KEPT)
    measurement = Measurement(str(folders[0]), recipe.measured, kept)
    judge = inputs.load_judge(recipe.judging, stage.output_dir.with_name("judgments.jsonl"))
    print(f"{len(measurement.rows)} of {measurement.num_prompts} prompts, {len(folders)} candidates")
    contract.begin_afresh(stage.output_dir, stage.fingerprint)
    names = [folder.name for folder in folders]
    compared = Comparison(measurement, dict(zip(folders, names, strict=True)), names[0], kept)
    compared.answer()
    compared.write_answers(stage.output_dir / "answers.jsonl")
    measured = {name: _as_said(recipe, each) for name, each in compared.by_answers().items()}
    if judge:
        with closing(judge):
            compared.by_judge(judge)
    wins = [list(compared.wins[recipe.by].get(name, [0.5] * len(measurement.rows))) for name in names]
    work = [_work(folder, each) for folder, each in zip(folders, done, strict=True)]
    choice = choose(wins, work)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        low, high = rate_interval(given(wins[i]))
        rate = sum(given(wins[i])) / len(given(wins[i]))
        rows.append({"name": name, "path": str(folders[i]), "overrides": overrides[i], "is_tied": i in choice.tied})
        rows[i] |= {"win_rate": rate, "low": low, "high": high, "missing": wins[i].count(None)}
        rows[i] |= {"relative_work": work[i] / work[0], "seconds": done[i]["wall_seconds"]}
        rows[i] |= {metric: measured[name][metric] for metric in sorted(_measures(recipe))}
    said = in_sentence(rows, choice.chosen, choice.best, recipe.by)
    chosen = {"by": recipe.by, "chosen": names[choice.chosen], "overrides": overrides[choice.chosen], "why": said}
    contract.write_json(stage.output_dir / contract.CHOICE, chosen | {"candidates": rows})
    if recipe.share is None:
        copy_model(folders[choice.chosen], stage.output_dir)
    facts = {name: done[choice.chosen][name] for name in _FACTS if name in done[choice.chosen]}
    found = {"win_rate": rows[choice.chosen]["win_rate"], "relative_work": rows[choice.chosen]["relative_work"]}
    stage.finish(facts | measurement.engine, found | measured[names[choice.chosen]], said)


_FACTS = (
    *("base_model", "base_revision", "base_digest", "lineage", "adapter", "dtype"),
    *("tokenizer_digest", "template_digest"),
)
"""What a stage file says about a model, for the stages that read it."""


def _measures(recipe: Recipe) -> set[str]:
    """The metrics of each candidate."""
    rewards = recipe.measured.rewards
    found = recipe.measured.metrics - {"kl_to_init"} | {"kl_to_baseline"}
    return found if rewards.reward_model or rewards.reward_functions else found - {"reward"}


def _as_said(recipe: Recipe, measured: dict[str, float]) -> dict[str, float]:
    """A candidate's metrics as this stage calls them, without those that mean nothing here."""
    found = {name.replace("kl_to_init", "kl_to_baseline"): value for name, value in measured.items()}
    kept = _measures(recipe) | {"distinct_answers", "distinct_bigrams"}
    return {name: value for name, value in found.items() if name.partition("/")[0] in kept}


def _finished(folder: Path, words: str) -> dict[str, Any]:
    """The stage file of a candidate."""
    done = contract.read_done(folder)
    if done is None:
        raise UserError(f"the candidate with {words} is not finished ({folder}); train the candidates first")
    return done


def _work(folder: Path, done: dict[str, Any]) -> float:
    """What training a candidate cost: the rows that it was trained on, times the parameters of its model.

    Unlike seconds, it is the same whatever else the machine did, and however often the training was interrupted.
    """
    from gemma2_post.models.loading import load_config

    steps = contract.read_lines(folder / "log.jsonl", {"step": int}, is_appended_to=False)[-1]["step"]
    batch: int = done["fingerprint"]["recipe"]["global_batch_size"]
    return float(steps * batch * num_parameters(load_config(str(folder))))


def in_sentence(rows: list[dict[str, Any]], chosen: int, best: int, by: str) -> str:
    """What was chosen, and why.

    Args:
        rows: The candidates, as `select.json` has them.
        chosen: Number of the chosen one.
        best: Number of the one with the highest win rate.
    """
    words = [in_words(each["overrides"]) for each in rows]
    wins = [f"{each['win_rate']:.1%} ({each['low']:.1%} to {each['high']:.1%}) by {by}" for each in rows]
    if chosen != best:
        cost = rows[chosen]["relative_work"] / rows[best]["relative_work"]
        return (
            f"{words[chosen]}, which within the interval ties with {words[best]} and cost {cost:.2g} times as much to "
            f"train; wins {wins[chosen]} against {wins[best]}"
        )
    tied = "; ".join(word for i, word in enumerate(words) if rows[i]["is_tied"] and i != chosen)
    more = f"; not seen to differ from it: {tied}" if tied else ""
    if chosen == 0:
        return f"{words[0]}, the baseline: no candidate wins more by {by}{more}"
    return f"{words[chosen]}, whose answers win {wins[chosen]} against the baseline's{more}"


def copy_model(candidate: Path, output_dir: Path) -> None:
    """Copies a candidate's model, with what is beside it, but for the records of its training."""
    records = shutil.ignore_patterns("checkpoint-*", "tracker", contract.PROGRESS, *contract.RECORDS)
    shutil.copytree(candidate, output_dir, dirs_exist_ok=True, ignore=records)


def check(recipe: Recipe, launcher: Launcher) -> None:
    overrides, samples = candidates_of(vars(recipe)), recipe.measured.samples
    if recipe.share is not None and recipe.select == "rlhf":
        raise UserError("share is for sft and distill; what rlhf has trained is chosen as it is, so remove it")
    known = ["reward", "judge", *samples.grader_names]
    if recipe.by not in known:
        raise UserError(f"by is {recipe.by}; write {', '.join(known[:-1])} or {known[-1]}, or name it in graders")
    if recipe.by == "judge" and not recipe.judging.judge:
        raise UserError("by is judge, and there is none; name a judge")
    if recipe.by != "judge" and recipe.judging.judge:
        raise UserError(f"judge does nothing with by: {recipe.by}; write by: judge, or remove it")
    if launcher.num_processes > 1:
        raise UserError(
            "select is one process; start it with accelerate_configs/single_gpu.yaml or cpu.yaml, and let candidates "
            "answer side by side with answer_processes"
        )
    if recipe.models is not None and len(recipe.models) != len(overrides):
        raise UserError(f"models has {len(recipe.models)} folders for {len(overrides)} candidates; remove it")
    check_names("models", recipe.models or [])
    recipe.judging.check()
    recipe.measured.check(is_rewarded=recipe.by == "reward")


def metrics(recipe: Recipe) -> set[str]:
    return {"win_rate", "relative_work", "distinct_answers", "distinct_bigrams"} | _measures(recipe)


def _as_measured(checked: Checked[Recipe]) -> Checked[Recipe]:
    """With the baseline as the model to which the others are compared."""
    return Checked(
        checked.recipe, checked.launcher, checked.models | {"init": checked.models["models"]}, checked.num_gpus
    )


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    recipe, checked = checked.recipe, _as_measured(checked)
    return measuring.measuring(checked, recipe.measured) | measuring.judging(checked, recipe.measured, recipe.judging)


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    recipe, checked = checked.recipe, _as_measured(checked)
    number = len(recipe.models or [])
    answers = rows.answers_up_to(recipe.measured.answers.max_completion_length)
    found = times(number, computed.measuring(checked, recipe.measured, rows, answers))
    return found + computed.judging(checked, recipe.measured, recipe.judging, rows, number - 1)


def disk(checked: Checked[Recipe]) -> tuple[float, float]:
    config = checked.models["models"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    return (0 if checked.recipe.share else cost.FP32 * num_parameters(config)), 0


COMMAND = Command(
    "select",
    Recipe,
    main,
    metrics,
    check,
    refused=REFUSED
    | {
        "group_by": "the numbers are not broken down by a column here; remove it",
        "safety_datasets": "candidates are compared, not checked for safety; remove it",
    },
    row_formats={"datasets": QUESTION},
    is_selection=True,
    headline=["win_rate"],
    below_gate="read answers.jsonl next to select.json: do the candidates differ in what matters?",
    needed_models=["models", "reward_model", "judge"],
    memory=memory,
    disk=disk,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
