"""WARP's merges: policies trained from one start become one model; the way back to that start is a front.

Reads a start and policies that were trained from it (models, or LoRA adapters, which merge exactly); writes plain
Hugging Face models. Stage 2 of WARP (arXiv 2406.16768) interpolates the policies' task vectors spherically, with one
angle per layer (`slerp`); stage 3 moves back toward a start: (1 - eta) start + eta merged. One `eta` makes one model,
in `output_dir`; several make one `output_dir/eta-ETA` each and read the inputs only once.

As a tool, for any models of one architecture:

    python -m gemma2_post.warp --init DIR --policies DIR DIR --eta 0.3 --output_dir DIR

With `interpolation: linear`, the merge is a soup of what any stage has trained (arXiv 2203.05482), with `greedy` of
those members that raise a measure on the selection prompts.

With selection prompts (`datasets`), the points are measured side by side with the runs that they come from, rewarded
as those were in training, and the best one under a KL budget is released to `output_dir`; by the reward or, because
that is what a policy exploits, by a judge's or a grader's wins against the start (`release_by`):

    python -m gemma2_post.warp --config recipes/tiny/warp.yaml
"""

from dataclasses import dataclass

from gemma2_post.data.rows import QUESTION
from gemma2_post.evaluation import memory as measuring
from gemma2_post.evaluation import work as measured
from gemma2_post.evaluation.keys import REFUSED, ReleaseArguments
from gemma2_post.models import cost
from gemma2_post.models.shapes import num_parameters
from gemma2_post.stage import contract
from gemma2_post.stage.command import GRADER, Checked, Command, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.recipe import Effect, key, keys_of, part
from gemma2_post.stage.work import Pass, Rows, times
from gemma2_post.weights.keys import MergeArguments


@dataclass(kw_only=True)
class Recipe:
    """The keys of a merge."""

    merge: MergeArguments = part(MergeArguments)
    output_dir: str = key(help="Folder of the output.")
    release: ReleaseArguments | None = part(ReleaseArguments, is_optional=True, only_measures=True)


def main(stage: Stage, recipe: Recipe) -> None:
    """Merges; with selection prompts it also measures the points and releases one."""
    from gemma2_post.weights.points import move_up, open_merge

    args, front, engine, why = recipe.merge, None, {}, ""
    if recipe.release:
        from gemma2_post.evaluation import inputs  # slow imports that merging does not need
        from gemma2_post.evaluation.front import Front

        judge = inputs.load_judge(recipe.release.judging, stage.output_dir.with_name("judgments.jsonl"))
        front = Front(stage.output_dir, args.towards or args.init, args.names, recipe.release, judge)
    merge = open_merge(args, stage)
    merge.check_space(num_copies=front is not None)
    contract.begin_afresh(stage.output_dir, stage.fingerprint)
    if args.greedy:
        from gemma2_post.evaluation import soup

        assert front is not None, "checked"
        merge = soup.of_best(merge, args.greedy, front.measurement)
    points, metrics = merge.write()
    metrics |= {"kept": len(merge.args.names)} if args.greedy else {}
    if front:
        released = front.release(points)
        metrics |= released.metrics
        engine, why = front.measurement.engine, released.why
    elif sum(map(len, points.values())) == 1:
        move_up(points[args.interpolation][args.etas[0]])
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name)
    stage.finish(merge.facts | engine, metrics, why or numbers)


def check(recipe: Recipe, launcher: Launcher) -> None:
    args = recipe.merge
    if len(set(args.etas)) < len(args.etas):
        raise UserError(f"eta has {max(args.etas, key=args.etas.count):g} more than once; write it once")
    if args.interpolation in (args.compare_with or []):
        raise UserError(f"compare_with names {args.interpolation}, which is the interpolation itself; name another")
    _check_greedy(recipe)
    if launcher.num_processes > 1:
        raise UserError(
            "warp is one process; start it with accelerate_configs/single_gpu.yaml or cpu.yaml, and let the points of "
            "its front answer side by side with answer_processes"
        )
    if recipe.release:
        if args.adapter_only:
            raise UserError("adapter_only writes no models, and datasets has prompts for them; remove one")
        recipe.release.check(args.etas)


def _check_greedy(recipe: Recipe) -> None:
    by, release = recipe.merge.greedy, recipe.release
    if by is None:
        return
    if release is None:
        raise UserError(
            f"greedy is {by}, and there are no prompts to measure it on; name selection prompts in datasets"
        )
    known = ["reward", *release.measured.samples.grader_names]
    if by not in known:
        raise UserError(f"greedy is {by}; write {' or '.join(known)}, or name it in graders")


def decisive(values: dict[str, object]) -> dict[str, object]:
    """With `greedy`, also what usually only measures: it decides which policies are merged."""
    found = {name for name, each in keys_of(ReleaseArguments).items() if each.effect != Effect.NONE}
    return {name: value for name, value in values.items() if name in found} if values.get("greedy") else {}


def metrics(recipe: Recipe) -> set[str]:
    found = {"merged_norm", "mean_cosine", "mean_norm_kept"} | ({"compression_error"} if recipe.merge.rank else set())
    found |= {"kept"} if recipe.merge.greedy else set()
    if recipe.release is None:
        return found
    by_wins = {"win_rate", "reward_win_rate", "disagreement"} if recipe.release.release_by != "reward" else set()
    return found | {"eta"} | recipe.release.measured.metrics | by_wins


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    if checked.recipe.release is None:  # a few MB per core (`models/streaming.py`)
        return {"merging": {}}
    release = checked.recipe.release
    return measuring.measuring(checked, release.measured) | measuring.judging(
        checked, release.measured, release.judging
    )


POINTS_OF_A_RUN = 3
"""Points of a run beside the sweep: its end, its anchor, and one checkpoint."""


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    """Measuring the points; a merge reads and writes weights and computes next to nothing."""
    recipe = checked.recipe
    if recipe.release is None:
        return []
    points = sum(map(len, recipe.merge.sweeps.values())) + POINTS_OF_A_RUN * len(recipe.release.runs or [])
    answers = rows.answers_up_to(recipe.release.measured.answers.max_completion_length)
    found = times(points, measured.measuring(checked, recipe.release.measured, rows, answers))
    judged = len([eta for eta in recipe.merge.etas if eta])
    return found + measured.judging(checked, recipe.release.measured, recipe.release.judging, rows, judged)


def disk(checked: Checked[Recipe]) -> tuple[float, float]:
    args, config = checked.recipe.merge, checked.models["init"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    if args.adapter_only:
        return 0, 0
    points = len(args.etas) * (1 + len(args.compare_with or [])) + (checked.recipe.release is not None)
    return points * (cost.FP32 if args.save_dtype == "float32" else cost.BF16) * num_parameters(config), 0


COMMAND = Command(
    "warp",
    Recipe,
    main,
    metrics,
    check,
    decisive=decisive,
    needs_config=False,
    refused=REFUSED
    | {
        "group_by": "the numbers are not broken down by a column here; remove it",
        "safety_datasets": "points are compared, not checked for safety; remove it",
    },
    row_formats={"datasets": QUESTION},
    headline=[GRADER, "reward", "mean_cosine"],
    below_gate="look at front-reward.png: were the runs good enough, is kl_budget what you want?",
    pictures={
        "front-reward.png": "Reward over KL to the start: the merge, from the start to its end; the policies; their "
        "averages.",
        "front-wins.png": "Wins against the start within the sweep, by what releases a point and by the reward. Where "
        "do they disagree?",
        "front-*.png": "The same by a grader, which nothing here was trained or selected with. Do they agree?",
        "angles.png": "Angle between the policies' task vectors, by layer. At 90 degrees they share nothing.",
        "norms.png": "How far each policy moved, and how far the merge moves.",
    },
    needed_models=["init", "reward_model", "judge"],
    memory=memory,
    disk=disk,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
