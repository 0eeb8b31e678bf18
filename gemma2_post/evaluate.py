"""Evaluation: what models answer to held-out prompts, beside each other and against one of them.

Reads models, the one that RLHF began as (`init`), and what rewards answers; writes `models.json` (reward, KL to
`init`, stop rate, length, grades, and how often an answer wins over the `baseline`'s to the same prompt) and
`answers.jsonl`, to read. Prompts, seed and temperature are the same for all models.

    python -m gemma2_post.evaluate --config recipes/tiny/evaluate.yaml
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from gemma2_post.core import contract
from gemma2_post.core.command import Command, Stage
from gemma2_post.core.data import DataArguments
from gemma2_post.core.errors import UserError
from gemma2_post.core.launcher import Launcher
from gemma2_post.core.rewards import RewardFunctionArguments
from gemma2_post.evaluation import measure
from gemma2_post.evaluation.measure import AnswerArguments, Measurement, summarize
from gemma2_post.evaluation.samples import SampleArguments


@dataclass
class EvaluateArguments:
    output_dir: str = field(metadata={"help": "Folder of the output."})
    init: str = field(metadata={"help": "The model that RLHF began as; KL is measured to it."})
    models: list[str] = field(metadata={"help": "Folders of the models; the last is what metrics.json is about."})
    baseline: str = field(metadata={"help": "One of the models, whose answers the others' win or lose against."})
    base: str | None = field(
        default=None, metadata={"help": "The model that everything began as; measured beside them as `base`."}
    )


def main(
    stage: Stage,
    args: EvaluateArguments,
    answer_args: AnswerArguments,
    data_args: DataArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
) -> None:
    for path in args.models:
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{stage.where}: models names {path}, which holds no model; run the stage that makes it")
    measurement = Measurement(stage.where, args.init, answer_args, data_args, sample_args, reward_args)
    names = names_of(args)
    contract.begin_afresh(stage.output_dir, stage.fingerprint)
    answered = measurement.answer(list(names), stage.output_dir / contract.PROGRESS / "answers.jsonl")
    measurement.load_reward_model()
    values = {names[path]: measurement.values(answered[path]) for path in names}
    baseline = names[Path(args.baseline)]
    models = {
        name: summarize(each) | {f"win_rate_vs_{baseline}": win_rate(each["reward"], values[baseline]["reward"])}
        for name, each in values.items()
    }
    contract.write_json(stage.output_dir / "models.json", models)
    texts = {names[path]: [answer.text for answer in answered[path].answers] for path in names}
    rows = [
        {"prompt": prompt, "answers": {name: each[i] for name, each in texts.items()}}
        for i, prompt in enumerate(measurement.rows["prompt"])
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    contract.write_text(stage.output_dir / "answers.jsonl", lines)
    metrics = {
        name.replace("win_rate_vs_" + baseline, "win_rate"): each for name, each in [*models.values()][-1].items()
    }
    seconds = time.monotonic() - stage.began
    contract.finish(stage.output_dir, stage.name, stage.fingerprint, seconds, {}, metrics)
    print(f"{stage.output_dir}: done in {seconds:.0f} s")


def names_of(args: EvaluateArguments) -> dict[Path, str]:
    """The models by their folders, named by what they do not have in common: `sft`, `rlhf/policy-0`."""
    paths = [Path(path) for path in args.models]
    common = os.path.commonpath([path.parent for path in paths])
    names = {Path(args.base): "base"} if args.base else {}
    return names | {path: os.path.relpath(path, common) for path in paths}


def win_rate(rewards: list[float], baseline: list[float]) -> float:
    """Share of the prompts whose answer has the larger reward; a tie is half a win."""
    pairs = zip(rewards, baseline, strict=True)
    return mean(0.5 if reward == other else float(reward > other) for reward, other in pairs)


def check(
    where: str,
    launcher: Launcher | None,
    args: EvaluateArguments,
    answer_args: AnswerArguments,
    data_args: DataArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
) -> None:
    if (launcher.num_processes if launcher else int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"{where}: evaluate is one process; start it with accelerate_configs/single_gpu.yaml or cpu.yaml"
        )
    if not args.models:
        raise UserError(f"{where}: models is empty; name one or more folders")
    if args.baseline not in args.models:
        raise UserError(f"{where}: baseline is {args.baseline}, which is none of the models; add it to models")
    measure.check_arguments(where, answer_args, sample_args, reward_args)


def metrics(
    args: EvaluateArguments,
    answer_args: AnswerArguments,
    data_args: DataArguments,
    sample_args: SampleArguments,
    reward_args: RewardFunctionArguments,
) -> set[str]:
    return measure.MEASURES | {"win_rate"} | {path.rpartition(":")[2] for path in sample_args.graders or []}


COMMAND = Command("evaluate", main, [EvaluateArguments, *measure.ARGUMENTS], __doc__, metrics, check)

if __name__ == "__main__":
    COMMAND.launch()
