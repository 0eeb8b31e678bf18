"""What merging gains in the tiny world over baselines that cost as much: fronts on test prompts, by seed.

    for seed in 0 1 2 3 4; do
        gemma2-post run recipes/tiny/pipeline.yaml --run_dir runs/seed-$seed --seed $seed
    done
    python benchmarks/equal_cost.py --runs runs/seed-{0,1,2,3,4}

Each run holds M policies from one start. Beside their merges, the script trains what the same number of sampled
answers buys otherwise: one run of M times the steps, one of M times the batch at half the rate (the best that a search
over rates found), and one student that learns from answers of all M policies. Points of a sweep are chosen by their
reward on the selection prompts; everything in the tables is measured on the test prompts. Finished stages are skipped.
Intervals are 95%, Student's t over seeds, of differences within a seed.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from math import cos, radians, sqrt
from pathlib import Path
from statistics import mean

import numpy
import yaml
from matplotlib.figure import Figure
from over_seeds import interval

from gemma2_post.tiny.data import prompts

ETAS = [0.3, 0.5, 0.75, 1.0]
SWEEPS = ["slerp of all", "linear of all", "slerp of two", "LITI of one", "LITI of the large batch"]
RUNS = ["large batch", "many steps"]
ENDS = [*RUNS, *(f"{run}, EMA" for run in RUNS), "distilled"]
COLOURS = {name: f"C{number % 10}" for number, name in enumerate([*SWEEPS, *ENDS])}

METRICS = ["gold", "accuracy", "reward", "kl_to_init"]

Point = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--num_samples", type=int, default=480)
    parser.add_argument("--output", type=Path, default=Path("runs/equal-cost"))
    arguments = parser.parse_args()
    seeds = [Seed(run, arguments.num_samples) for run in arguments.runs]
    for seed in seeds:
        seed.make()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {str(seed.run): {"test": seed.points("test"), "selection": seed.points("selection")} for seed in seeds}
    (arguments.output / "points.json").write_text(json.dumps(results, indent=1) + "\n")
    table(seeds)
    claims(seeds)
    draw(seeds, arguments.output / "fronts.png")


class Seed:
    """The models of one seed, and what was measured of them."""

    def __init__(self, run: Path, num_samples: int):
        self.run, self.folder, self.num_samples = run, run / "equal-cost", num_samples
        self.policies = sorted((run / "rlhf").glob("policy-*"))
        done = json.loads((self.policies[0] / "stage.json").read_text())
        self.trained = done["fingerprint"]["recipe"]
        self.start, self.seed = self.trained["model_name_or_path"], self.trained.get("seed", 0)
        self.reward_model = self.trained["reward_model"]

    def make(self) -> None:
        """Trains and merges what is missing, and measures all of it."""
        many = len(self.policies)
        steps, batch = self.trained["max_steps"], self.trained["global_batch_size"]
        large = {"global_batch_size": many * batch, "per_device_train_batch_size": many * batch}
        self.rlhf("large batch", **large, learning_rate=self.trained["learning_rate"] / 2)
        self.rlhf("many steps", max_steps=many * steps, watch_steps=steps)
        self.distilled(steps * batch)
        self.merge("slerp of all", "slerp", self.policies)
        self.merge("linear of all", "linear", self.policies)
        self.merge("slerp of two", "slerp", self.policies[:2])
        self.merge("linear of two, stretched", "linear", self.policies[:2], self.stretch())
        self.merge("LITI of one", "linear", self.policies[:1])
        self.merge("LITI of the large batch", "linear", [self.folder / "large batch" / "policy-0"])
        self.measure("selection", self.num_samples // 2)
        self.measure("test", self.num_samples)

    def stage(self, name: str, recipe: str | None, output: str, **values: object) -> Path:
        """Runs a stage of ours, unless its output is there."""
        folder = self.folder / output
        command = [sys.executable, "-m", f"gemma2_post.{name}"]
        command += ["--config", f"recipes/tiny/{recipe}.yaml"] if recipe else []
        command += [f"--{key}={json.dumps(value)}" for key, value in (values | {"output_dir": str(folder)}).items()]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-3000:]}")
        print(f"{folder}: done", flush=True)
        return folder

    def rlhf(self, output: str, **values: object) -> None:
        """One policy of M times the cost, with another seed than the M policies."""
        paths = {"model_name_or_path": self.start, "reward_model": self.reward_model}
        self.stage("rlhf", "rlhf", output, **paths, seed=self.seed + 100, **values)

    def merge(self, output: str, rule: str, policies: list[Path], stretch: float = 1.0) -> None:
        """A sweep from the start to the merge."""
        etas, names = [eta * stretch for eta in ETAS], [str(policy) for policy in policies]
        values = {"init": self.start, "policies": names, "eta": etas, "interpolation": rule, "save_dtype": "float32"}
        self.stage("warp", None, output, **values)

    def distilled(self, num_answers: int) -> None:
        """The start, fine-tuned on as many answers of each policy as that policy was trained on."""
        self.folder.mkdir(exist_ok=True)
        rows = prompts("train")[:num_answers]
        asked = self.folder / "prompts.jsonl"
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers = []
        for policy in self.policies:
            source = {"path": str(asked)}
            made = self.stage(
                "synthesize", "synthesize", f"answers/{policy.name}", model_name_or_path=str(policy), datasets=[source]
            )
            answers.append({"path": str(made / "data.jsonl")})
        student = {"model_name_or_path": self.start, "datasets": answers, "seed": self.seed}
        self.stage("sft", "sft-full", "distilled", **student)

    def stretch(self) -> float:
        """Ratio of the norms of the spherical and the linear task vector of two policies, over the whole model."""
        groups = self.groups("slerp of two")
        pairs = [(*group["norms"], group["cosines"][0]) for group in groups]
        linear = sum((a**2 + b**2 + 2 * a * b * cosine) / 4 for a, b, cosine in pairs)
        return sqrt(sum(group["norm"] ** 2 for group in groups) / linear)

    def groups(self, name: str) -> list[dict]:
        """The geometry of a merge, by parameter group."""
        return json.loads((self.folder / name / "merge.json").read_text())["groups"]

    def models(self) -> dict[str, Path]:
        """All models by name; points of a sweep are `NAME eta`."""
        found = {"start": Path(self.start)}
        for number, policy in enumerate(self.policies):
            found |= {f"policy {number}": policy, f"policy {number}, EMA": policy / "anchor"}
        for name in RUNS:
            found |= {name: self.folder / name / "policy-0", f"{name}, EMA": self.folder / name / "policy-0/anchor"}
        found["distilled"] = self.folder / "distilled"
        for name in [*SWEEPS, "linear of two, stretched"]:
            found |= {f"{name} {eta:g}": path for eta, path in zip(ETAS, self.sweep(name), strict=True)}
        return found

    def sweep(self, name: str) -> list[Path]:
        """The folders of a sweep, in the order of eta."""
        return sorted((self.folder / name).glob("eta-*"), key=lambda path: float(path.name.removeprefix("eta-")))

    def measured(self, split: str) -> dict[str, Path]:
        """The models that answer the prompts of a split: on the selection prompts only those that are chosen among."""
        return {name: path for name, path in self.models().items() if split == "test" or name not in ENDS}

    def measure(self, split: str, num_samples: int) -> None:
        """Their answers."""
        recipe = yaml.safe_load(Path("recipes/tiny/evaluate.yaml").read_text())
        source = recipe["datasets"][0] | {"split": split}
        models = [str(path) for path in self.measured(split).values()]
        values = {
            "init": self.start, "models": models, "baseline": self.start, "reward_model": self.reward_model,
            "datasets": [source], "num_samples": num_samples, "base": None,
        }  # fmt: skip
        self.stage("evaluate", "evaluate", split, **values)

    @cache  # noqa: B019 - a few objects that live as long as the script
    def points(self, split: str) -> dict[str, Point]:
        """Reward, gold, accuracy and KL of each model, by name."""
        measured = list(json.loads((self.folder / split / "models.json").read_text()).values())
        return dict(zip(self.measured(split), measured, strict=True))

    def front(self, name: str, metric: str) -> Callable[[float], float]:
        """A sweep's metric as a function of KL, linear between its points and the start; NaN past the last one."""
        points = [self.points("test")["start"], *(self.points("test")[f"{name} {eta:g}"] for eta in ETAS)]
        points.sort(key=lambda point: point["kl_to_init"])
        xs, ys = [point["kl_to_init"] for point in points], [point[metric] for point in points]
        return lambda kl: float(numpy.interp(kl, xs, ys)) if kl <= xs[-1] else float("nan")

    def chosen(self, names: list[str]) -> Point:
        """The test measurements of the one of these models with the highest reward on the selection prompts."""
        best = max(names, key=lambda name: self.points("selection")[name]["reward"])
        return self.points("test")[best]


def arms(seed: Seed) -> dict[str, Point]:
    """What is compared at equal cost: each the point that the reward on selection prompts chooses."""
    test = seed.points("test")
    policies = [f"policy {number}" for number in range(len(seed.policies))]
    found = {
        "a policy (mean)": {key: mean(test[name][key] for name in policies) for key in METRICS},
        "best of M": seed.chosen(policies),
        "its EMA (mean)": {key: mean(test[f"{name}, EMA"][key] for name in policies) for key in METRICS},
    }
    found |= {name: seed.chosen([f"{name} {eta:g}" for eta in ETAS]) for name in SWEEPS}
    return {"start": test["start"]} | found | {name: test[name] for name in ENDS}


def table(seeds: list[Seed]) -> None:
    """Prints what each arm reaches, and how much lower its gold is than that of the merge of all policies."""
    by_seed = [arms(seed) for seed in seeds]
    print(
        "\n| | gold | accuracy | reward | KL to the start | the merge of all has more gold | at this KL |\n"
        + "|---" * 7
        + "|"
    )
    for name in by_seed[0]:
        means = [mean(each[name][key] for each in by_seed) for key in METRICS]
        more = [each["slerp of all"]["gold"] - each[name]["gold"] for each in by_seed]
        at_kl = [
            seed.front("slerp of all", "gold")(each[name]["kl_to_init"]) - each[name]["gold"]
            for seed, each in zip(seeds, by_seed, strict=True)
        ]
        numbers = " | ".join(f"{number:.3f}" for number in means)
        reached = [value for value in at_kl if value == value]
        print(f"| {name} | {numbers} | {interval(more)} | {interval(reached) if reached else 'not reached'} |")


def claims(seeds: list[Seed]) -> None:
    """Prints the numbers for the claims of the WARP paper (arXiv 2406.16768) that this data bears on."""
    tests = [seed.points("test") for seed in seeds]
    print("\n5. task vectors: cosine between policies, ratio of norms (mean over groups and pairs)")
    groups = [seed.groups("slerp of all") for seed in seeds]
    print("  cosine", interval([mean(mean(each["cosines"]) for each in of) for of in groups]))
    print(
        "  smallest / largest norm", interval([mean(min(g["norms"]) / max(g["norms"]) for g in of) for of in groups])
    )
    print("6, 7. two policies: the merge at eta 1 less the mean of the two")
    for metric in ("reward", "gold", "kl_to_init"):
        parents = [mean(test[f"policy {number}"][metric] for number in (0, 1)) for test in tests]
        merged = [test["slerp of two 1"][metric] for test in tests]
        print(f"  {metric}, slerp", interval([a - b for a, b in zip(merged, parents, strict=True)]))
    kept = [mean(cos(radians(group["angles"][0]) / 2) for group in seed.groups("slerp of two")) for seed in seeds]
    print("  norm that a linear merge keeps (lemma 2)", interval(kept))
    ratios = [test["linear of all 1"]["kl_to_init"] / test["slerp of all 1"]["kl_to_init"] for test in tests]
    print("  KL of the linear merge of all / of the spherical one", interval(ratios))
    print("8. the stretched linear merge less the spherical one, at each eta")
    for eta in ETAS:
        for metric in ("gold", "reward", "kl_to_init"):
            pairs = [(test[f"linear of two, stretched {eta:g}"], test[f"slerp of two {eta:g}"]) for test in tests]
            print(f"  eta {eta:g}, {metric}", interval([linear[metric] - slerp[metric] for linear, slerp in pairs]))
    print("10. shares of the KL and of the gain at eta 1, along the way back (LITI)")
    for name in ("slerp of all", "LITI of one"):
        for eta in ETAS[:-1]:
            for metric in ("kl_to_init", "reward", "gold"):
                shares = [_share(test, name, eta, metric) for test in tests]
                print(f"  {name}, eta {eta:g}, {metric}", interval(shares))
    print("11. more policies: gold of the front of all less that of two, and of one, at the KL of the point of all")
    for name in ("slerp of two", "LITI of one", "LITI of the large batch"):
        for metric in ("reward", "gold"):
            found = []
            for seed in seeds:
                point = arms(seed)["slerp of all"]
                found.append(point[metric] - seed.front(name, metric)(point["kl_to_init"]))
            found = [value for value in found if value == value]
            print(f"  {metric}, over {name}", interval(found) if found else "not reached")


def _share(test: dict[str, Point], name: str, eta: float, metric: str) -> float:
    start, end = test["start"][metric], test[f"{name} 1"][metric]
    return (test[f"{name} {eta:g}"][metric] - start) / (end - start)


def draw(seeds: list[Seed], path: Path) -> None:
    """Draws reward and gold over KL: sweeps as lines with a band of one standard deviation, others as points."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    longest = max(point["kl_to_init"] for seed in seeds for point in seed.points("test").values())
    grid = numpy.linspace(0, longest, 40)
    for axes, metric in zip(figure.subplots(1, 2), ("reward", "gold"), strict=True):
        for name in SWEEPS:
            fronts = [seed.front(name, metric) for seed in seeds]
            values = numpy.array([[front(kl) for kl in grid] for front in fronts])
            average, spread = values.mean(0), values.std(0)
            axes.plot(grid, average, label=name, color=COLOURS[name])
            axes.fill_between(grid, average - spread, average + spread, alpha=0.12, color=COLOURS[name])
        for name in ENDS:
            xs, ys = ([seed.points("test")[name][key] for seed in seeds] for key in ("kl_to_init", metric))
            axes.plot(xs, ys, "D" if name.endswith("EMA") else "o", label=name, color=COLOURS[name])
        singles = [each for seed in seeds for name, each in seed.points("test").items() if name.startswith("policy")]
        axes.plot([p["kl_to_init"] for p in singles], [p[metric] for p in singles], ".", color="0.6", label="policies")
        axes.set(xlabel="KL to the start, nats per answer", ylabel=metric)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
