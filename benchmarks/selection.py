"""Whether `select` picks the candidate that is best on test prompts, in the tiny world; what a soup of them is worth.

For each seed, four candidates of sft (all weights, few steps) differ in their learning rate. They are compared on the
selection prompts, by the reward model of `make reward` and by gold; then all of them, their soup and their greedy
soup (by gold on the selection prompts) answer the test prompts. Everything runs in this process, by the stages' own
`main`.

python benchmarks/selection.py DIR runs/tiny/reward --seeds 0 1 2 3 4
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from gemma2_post.data.keys import DataArguments, Source
from gemma2_post.evaluation.judging.winrate import difference
from gemma2_post.evaluation.keys import AnswerArguments, MeasureArguments, RewardFunctionArguments, SampleArguments
from gemma2_post.evaluation.measure import Measurement, summarize
from gemma2_post.pipeline import processes
from gemma2_post.pipeline.loading import load_selection
from gemma2_post.stage import contract
from gemma2_post.stage.command import Command
from gemma2_post.stage.recipe_file import load_recipe
from gemma2_post.stage.stages import command_of

BASE = "gemma2_post/tiny/models/base"
LEARNING_RATES = [1e-4, 3e-4, 6e-4, 1.2e-3]
GOLD = "gemma2_post.tiny.gold:gold"
PROMPTS = "gemma2_post.tiny.data:prompts"
MEASURING = (
    *("datasets", "columns", "max_prompt_length", "max_completion_length", "graders", "num_samples", "batch_size"),
)
"""Keys of a selection that say how answers are measured."""


def run(command: Command, values: dict[str, object], file: Path) -> Path:
    """Runs a stage in this process, unless its output is there; returns that."""
    file.parent.mkdir(parents=True, exist_ok=True)
    contract.write_text(file, yaml.safe_dump(values))
    stage, recipe = command.parse(["--config", str(file)])
    if not (stage.output_dir / contract.DONE).is_file():
        command.run(stage, recipe)
    return stage.output_dir


def write_recipes(folder: Path, reward: Path, num_prompts: int, steps: int, batch: int) -> None:
    """The recipes of a seed: sft, and a selection among its learning rates by the reward and by gold."""
    sft = load_recipe("recipes/tiny/sft-full.yaml") | {"max_steps": steps, "global_batch_size": batch}
    for key in ("graders", "group_by", "held_out_datasets"):
        del sft[key]
    sft["held_out_share"] = 0.005  # measured twice for each candidate, and not used here
    sft |= {"per_device_train_batch_size": batch, "num_samples": 0, "warmup_steps": 5, "save_strategy": "no"}
    contract.write_text(folder / "sft.yaml", yaml.safe_dump(sft))
    select = {
        "select": "sft", "grid": {"learning_rate": LEARNING_RATES}, "by": "reward", "reward_model": str(reward),
        "datasets": [{"path": PROMPTS, "split": "selection"}], "columns": ["skill", "answer"],
        "max_prompt_length": 128, "max_completion_length": 64, "output_dir": str(folder / "run" / "select"),
        "graders": [GOLD], "num_samples": num_prompts, "batch_size": 240,
    }  # fmt: skip
    contract.write_text(folder / "select.yaml", yaml.safe_dump(select))


def of_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Trains the candidates of a seed, selects among them twice, and merges them."""
    pipeline = load_selection(folder / "select.yaml", None, folder / "run", seed, {})
    (_, members), (_, (selection,)) = pipeline.steps()
    for step in [*members, selection]:
        arguments = ["--config", str(step.config), *processes.assignments(step.values)]
        stage, recipe = step.command.parse(arguments)
        if not (stage.output_dir / contract.DONE).is_file():
            step.command.run(stage, recipe)
    by_gold = load_recipe(folder / "select.yaml") | selection.values
    by_gold |= {"by": "gold", "output_dir": str(folder / "run" / "select-by-gold")}
    run(command_of("select"), by_gold, folder / "by-gold.yaml")
    paths = [step.folder for step in members]
    merge = {
        "init": BASE, "policies": [str(path) for path in paths], "interpolation": "linear", "eta": 1.0,
        "save_dtype": "float32",
    }  # fmt: skip
    asked = {key: by_gold[key] for key in MEASURING} | {"greedy": "gold", "reward_functions": [GOLD]}
    soups = {
        name: run(command_of("warp"), merge | more | {"output_dir": str(folder / name)}, folder / f"{name}.yaml")
        for name, more in {"soup": {}, "greedy-soup": asked}.items()
    }
    chosen = {
        by: json.loads((folder / "run" / name / contract.CHOICE).read_text())
        for by, name in (("reward", "select"), ("gold", "select-by-gold"))
    }
    return {"paths": paths, "soups": soups, "chosen": chosen}


def on_test(folder: Path, models: dict[str, Path], num_prompts: int) -> dict[str, list[float]]:
    """The gold of each model's answers to test prompts."""
    measured = MeasureArguments(
        answers=AnswerArguments(max_completion_length=64, max_prompt_length=128, batch_size=240, seed=1),
        data=DataArguments(datasets=[Source(path=PROMPTS, split="test")], columns=["skill", "answer"]),
        samples=SampleArguments(graders=[GOLD], num_samples=num_prompts),
        rewards=RewardFunctionArguments(),
    )
    measurement = Measurement(str(next(iter(models.values()))), measured, folder / "test")
    answered = measurement.answer(list(models.values()))
    return {name: measurement.values(answered[path])["gold"] for name, path in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("reward", type=Path, help="a finished reward model of the tiny world")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=480, help="selection prompts, and as many test prompts")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    for seed in args.seeds:
        folder = args.folder / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        write_recipes(folder, args.reward, args.prompts, args.steps, args.batch)
        made = of_seed(folder, seed)
        names = {f"learning_rate {rate:g}": path for rate, path in zip(LEARNING_RATES, made["paths"], strict=True)}
        gold = on_test(folder, names | made["soups"], args.prompts)
        summaries = {name: summarize({"gold": values}) for name, values in gold.items()}
        ranked = sorted(names, key=lambda name: -summaries[name]["gold"])
        apart = difference(gold[ranked[0]], gold[ranked[1]])
        row = {
            "seed": seed,
            "test": {name: [each["gold"], each["gold/standard_error"]] for name, each in summaries.items()},
            "best": ranked[0],
            "over_the_second": [apart.mean, apart.standard_error],
            "chosen": {
                by: {key: choice[key] for key in ("overrides", "why", "candidates")}
                for by, choice in made["chosen"].items()
            },
        }
        contract.append_lines(args.folder / "seeds.jsonl", [row])
        print(json.dumps({key: value for key, value in row.items() if key != "chosen"}))
        for by, choice in made["chosen"].items():
            print(f"  by {by}: {choice['why']}", flush=True)


if __name__ == "__main__":
    main()
