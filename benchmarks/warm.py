"""WARM in the tiny world: members, the mean of their scores, and the mean of their weights, with wrong labels.

    gemma2-post run recipes/tiny/pipeline.yaml --run_dir runs/base --until distill
    python benchmarks/warm.py --run runs/base --shares 0 0.1 0.25 --seeds 0

For each seed and share of flipped labels the script trains a score head, members that begin with it (in the order of
pairs, learning rate, and dropout of `MEMBERS`), and averages them. All are measured on held-out pairs, on the training
pairs whose labels were flipped (agreement with the wrong label), and on answers of the run's `distill` to other
prompts, the best of four against the worst by gold. With `--rlhf_share`, policies are trained on the mean of weights
with this share, and on the member that is most often right on held-out pairs; test prompts say what their gold is
along the way. Finished stages are skipped. Intervals are 95%: of one seed, by bootstrap over pairs; of several,
Student's t over seeds.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean

from fronts import Fronts, draw, stage, tables
from over_seeds import interval

from gemma2_post.tiny.data import preferences

MEMBERS = [{}, {"learning_rate": 5e-4}, {"lora_dropout": 0.1}, {"learning_rate": 5e-4, "lora_dropout": 0.1}]
RLOO = {"algorithm": "rloo", "num_generations": 4, "beta": 0.05, "anchor_mu": 0.01, "learning_rate": 1e-4}
SETS = {"": "held out", "_flipped": "agreement with flipped labels", "_shifted": "the policy's answers, by gold"}
WHO = {"member_accuracy": "members", "ensemble_accuracy": "mean of scores", "accuracy": "mean of weights"}


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_of_policy(arguments: argparse.Namespace, folder: Path) -> str:
    """Pairs of the policy's own answers, which no reward model has seen."""
    stage(
        "synthesize", "recipes/tiny/synthesize.yaml", folder, model_name_or_path=str(arguments.run / "distill"),
        datasets=[{"path": "gemma2_post.tiny.data:prompts", "split": "selection"}], num_answers=4, pairs=True,
        reward_model="gemma2_post.tiny.gold:gold",
    )  # fmt: skip
    return str(folder / "pairs")


def train(arguments: argparse.Namespace, seed: int, share: float, shifted: str) -> dict[str, float]:
    """Trains and averages the members; returns what `warm` has measured."""
    folder = arguments.run / "warm" / f"{share:g}-{seed}"
    rows = preferences("train")[: arguments.num_pairs]
    flipped = set(Random(seed).sample(range(len(rows)), round(share * len(rows))))
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    pairs = [
        {"prompt": row["prompt"]} | {side: row[swapped[side] if i in flipped else side] for side in swapped}
        for i, row in enumerate(rows)
    ]
    given = {
        "datasets": [{"path": write(folder / "train.jsonl", pairs)}], "columns": None, "policies": None,
        "graders": None, "noise_ceiling": None, "num_samples": 0, "num_train_epochs": arguments.num_epochs,
    }  # fmt: skip
    recipe = "recipes/tiny/reward.yaml"
    stage(
        "reward",
        recipe,
        folder / "head",
        **given
        | {"only_score_head": True, "learning_rate": arguments.head_rate, "num_train_epochs": arguments.head_epochs}
        | {"seed": seed},
    )
    members = []
    for i, changes in enumerate(MEMBERS[: arguments.num_members]):
        members.append(str(folder / f"member-{i}"))
        more = {"score_head": str(folder / "head"), "disable_dropout": False, "seed": 1000 * i + seed} | changes
        stage("reward", recipe, Path(members[-1]), **given | more)
    wrong = {"flipped_datasets": [{"path": write(folder / "flipped.jsonl", [pairs[i] for i in sorted(flipped)])}]}
    stage(
        "warm", "recipes/tiny/warm.yaml", folder / "warm", reward_models=members, columns=None, policies=None,
        graders=None, num_samples=0, shifted_datasets=[{"path": shifted}], **wrong if flipped else {},
    )  # fmt: skip
    return json.loads((folder / "warm" / "metrics.json").read_text())


def table(found: dict[float, list[dict[str, float]]]) -> None:
    """Prints the accuracies, and the gains of the mean of weights, of each share of flipped labels."""
    gains = {"gain_over_members": "over members", "gain_over_ensemble": "over mean of scores"}
    print(f"\n| flipped | measured on | {' | '.join(WHO.values())} | {' | '.join(gains.values())} |")
    print("|---" * 7 + "|")
    for share, seeds in found.items():
        for suffix, words in SETS.items():
            if f"accuracy{suffix}" not in seeds[0]:
                continue
            cells = [f"{mean(each[f'{who}{suffix}'] for each in seeds):.3f}" for who in WHO]
            for gain in gains:
                key, first = f"{gain}{suffix}", seeds[0]
                of_one = f"{first[key]:.3f} ({first[f'{key}/low']:.3f} to {first[f'{key}/high']:.3f})"
                cells.append(interval([each[key] for each in seeds]) if len(seeds) > 1 else of_one)
            print(f"| {share:.0%} | {words} | {' | '.join(cells)} |")


def rlhf(arguments: argparse.Namespace, found: list[dict[str, float]]) -> None:
    """Trains policies on a member and on the mean of the weights of each seed; prints and draws their fronts."""
    metrics = dict(zip(arguments.seeds, found, strict=True))

    def keys(seed: int, of_mean: bool) -> dict[str, object]:
        best = max(range(arguments.num_members), key=lambda i: metrics[seed][f"member_accuracy/member-{i}"])
        folder = arguments.run / "warm" / f"{arguments.rlhf_share:g}-{seed}"
        return RLOO | {"reward_model": str(folder / ("warm" if of_mean else f"member-{best}"))}

    arms = {"best member": partial(keys, of_mean=False), "mean of weights": partial(keys, of_mean=True)}
    folder = arguments.run / "warm" / f"rlhf-{arguments.rlhf_share:g}"
    policies = Fronts(arguments.run, folder, arms, arguments.seeds, arguments.max_steps, 240)
    policies.train()
    fronts = policies.measure()
    arguments.output.with_suffix(".rlhf.json").write_text(json.dumps(fronts, indent=1) + "\n")
    tables(fronts, arguments.kls)
    draw(fronts, arguments.output.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_members", type=int, default=3)
    parser.add_argument("--num_pairs", type=int, default=1500)
    parser.add_argument("--num_epochs", type=float, default=3.0)
    parser.add_argument("--head_rate", type=float, default=1e-2)
    parser.add_argument("--head_epochs", type=float, default=1.0)
    parser.add_argument("--rlhf_share", type=float)
    parser.add_argument("--max_steps", type=int, default=80)
    parser.add_argument("--kls", type=float, nargs="+", default=[0.25, 0.5, 1.0, 1.5])
    parser.add_argument("--output", type=Path, default=Path("runs/warm.json"))
    arguments = parser.parse_args()
    shifted = pairs_of_policy(arguments, arguments.run / "warm" / "answers")
    found: dict[float, list[dict[str, float]]] = {}
    for share in arguments.shares:
        found[share] = [train(arguments, seed, share, shifted) for seed in arguments.seeds]
        table(found)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.rlhf_share is not None:
        rlhf(arguments, found[arguments.rlhf_share])


if __name__ == "__main__":
    main()
