"""The data that the other stages learn from, without what models should not learn.

Reads any mixture that `sft`, `reward` or `rlhf` read: conversations, pairs, or prompts. Writes `train.parquet`, a data
set in the same form with the source of each row, and `removed.parquet`: every removed row, the rule that removed it,
and what the rule saw. Its rules, in this order: invalid rows; exact and near duplicates, and too many answers to one
prompt; what evaluation sets ask; what is said about people; assistants that say that they are somebody else; unsafe
answers, by a judge; low rewards, and shares of refusals and hedging.

The rows are worked on in parts; each finished part is a file in `progress/`, so an interrupted run goes on.

    python -m gemma2_post.curate --config recipes/tiny/curate.yaml
"""

from dataclasses import dataclass

from gemma2_post.curation.keys import RULES, CurationArguments, MixtureArguments
from gemma2_post.curation.kinds import ANY
from gemma2_post.stage import contract
from gemma2_post.stage.command import Checked, Command, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.recipe import key, part


@dataclass(kw_only=True)
class Recipe:
    """The keys of a curation."""

    output_dir: str = key(help="Folder of the output.")
    mixture: MixtureArguments = part(MixtureArguments)
    rules: CurationArguments = part(CurationArguments)


def main(stage: Stage, recipe: Recipe) -> None:
    """Reads the rows in parts, applies the rules in their order, and writes what is left."""
    from gemma2_post.curation import comparing, evaluation_sets, judging, reading, rows, sifting, writing
    from gemma2_post.curation.scoring import load_score, load_tokens
    from gemma2_post.evaluation.inputs import load_judge

    args, sources = recipe.rules, recipe.mixture.datasets
    columns = list(dict.fromkeys([*(recipe.mixture.columns or []), *filter(None, [args.duplicates.reward_column])]))
    kind = rows.find_kind(sources, columns, recipe.mixture.rows)
    outside = evaluation_sets.load(args.outside)
    judge = load_judge(args.judging, stage.output_dir.with_name("judgments.jsonl"))
    score, num_tokens = load_score(args.quality, kind), load_tokens(args.tokenizer)
    contract.begin_afresh(stage.output_dir, stage.fingerprint)
    folder = stage.output_dir / contract.PROGRESS
    mixture = reading.Mixture(
        recipe.mixture, kind, rows.names_of(sources), columns, args.duplicates.reward_column, folder
    )

    reading.read(mixture)
    repeated = comparing.repeated(mixture, args.duplicates)
    sifting.sift(mixture, repeated, sifting.sieve(args, outside))
    verdicts, num_unjudged = judging.unsafe(mixture, judge) if judge else ({}, 0)
    if args.quality.min_reward is not None:
        verdicts |= judging.low_rewards(mixture, args, verdicts, score)
    verdicts |= judging.beyond_share(mixture, args, verdicts, recipe.mixture.seed)
    verdicts |= writing.by_weight(mixture, verdicts)

    found = writing.write(mixture, verdicts, stage.output_dir, num_tokens)
    contract.write_json(stage.output_dir / contract.CURATION, found)
    contract.discard(folder)
    counts = writing.metrics(found) | ({"num_unjudged": num_unjudged} if judge else {})
    words = [f"{rule.replace('_', ' ')} {counts[f'removed_{rule}']}" for rule in RULES if counts[f"removed_{rule}"]]
    stage.finish({"rows": kind}, counts, f"{counts['num_kept']} of {counts['num_rows']} rows; {', '.join(words)}")


def check(recipe: Recipe, launcher: Launcher) -> None:
    recipe.rules.check()
    if launcher.num_processes > 1:
        raise UserError("curate uses all cores from one process; start it with accelerate_configs/single_gpu.yaml")


def metrics(recipe: Recipe) -> set[str]:
    counts = {"num_rows", "num_kept", "kept_share", "num_replaced", "num_refusal", "num_hedging"}
    return counts | {f"removed_{rule}" for rule in RULES} | ({"num_unjudged"} if recipe.rules.judging.judge else set())


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    return {"comparing": {}}


COMMAND = Command(
    "curate",
    Recipe,
    main,
    metrics,
    check,
    refused={"safety_datasets": "the judge checks the answers of datasets; remove it"},
    row_formats={"datasets": ANY},
    is_filter=True,
    headline=["num_kept"],
    needed_models=[],
    memory=memory,
)

if __name__ == "__main__":
    COMMAND.launch()
