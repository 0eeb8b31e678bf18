"""What WARP gains in the tiny world: its front compared with single runs, their averages and linear merges, by seed.

    for seed in 0 1 2; do
        gemma2-post run recipes/tiny/pipeline.yaml --until warp --run_dir runs/seed-$seed --seed $seed
    done
    python benchmarks/warp_front.py --runs runs/seed-0 runs/seed-1 runs/seed-2

In addition to each run's own front (the last iteration's), the script measures the front of the first iteration, and
a linear one with eta stretched until its task vectors are as long as the spherical ones. Finished measurements are
skipped. Then the script prints numbers for each claim of the WARP paper (arXiv 2406.16768), and draws all seeds in one
figure.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from math import cos, radians, sqrt
from pathlib import Path

import numpy
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

ETAS = [0, 0.1, 0.3, 0.5, 0.8, 1]
GRID = numpy.linspace(0.1, 1.1, 11)
"""KL values, in nats, at which fronts are compared."""
LOOKS = {
    "single runs": ("tab:blue", "-"),
    "their averages (EMA)": ("tab:cyan", "D"),
    "WARP, 1 iteration": ("black", "--"),
    "WARP, 2 iterations": ("black", "-"),
    "linear, 1 iteration": ("tab:red", "--"),
}

Points = list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/warp-front"))
    arguments = parser.parse_args()
    runs: list[Path] = arguments.runs
    for run in runs:
        measure(run, run / "warp-once", "slerp", ETAS, ["linear"])
        measure(run, run / "warp-stretched", "linear", [eta * stretch(run) for eta in ETAS], [])
    claims_about_task_vectors(runs)
    claims_about_merging(runs)
    claims_about_interpolation(runs)
    fronts = {name: [series_of(run)[name] for run in runs] for name in LOOKS}
    compare(fronts)
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(fronts, arguments.output / "front.png")
    (arguments.output / "front.json").write_text(json.dumps(fronts, indent=2) + "\n")


def measure(run: Path, output: Path, rule: str, etas: list[float], compare_with: list[str]) -> None:
    """Measures the front of the first iteration's policies, unless that is done."""
    if (output / "stage.json").is_file():
        return
    policies = [str(run / "rlhf" / f"policy-{m}") for m in range(2)]
    values = {
        "init": str(run / "sft"), "policies": policies, "runs": policies, "reward_model": str(run / "reward"),
        "output_dir": str(output), "interpolation": rule, "eta": etas, "compare_with": compare_with,
    }  # fmt: skip
    command = [sys.executable, "-m", "gemma2_post.warp", "--config", "recipes/tiny/warp.yaml"]
    subprocess.run(command + [f"--{key}={json.dumps(value)}" for key, value in values.items()], check=True)


def points_of(folder: Path) -> dict[str, Points]:
    """The measured points of a front, by series."""
    series = defaultdict(list)
    for point in json.loads((folder / "front.json").read_text())["points"]:
        series[point["series"]].append(point)
    return series


def groups_of(folder: Path) -> list[dict]:
    """The geometry of a merge (norms, cosines, angles), by parameter group."""
    return json.loads((folder / "merge.json").read_text())["groups"]


def stretch(run: Path) -> float:
    """Ratio of the norms of the spherical and the linear task vector, over the whole model."""
    groups = groups_of(run / "warp-once")
    linear = sum((a**2 + b**2 + 2 * a * b * group["cosines"][0]) / 4 for group in groups for a, b in [group["norms"]])
    return sqrt(sum(group["norm"] ** 2 for group in groups) / linear)


def series_of(run: Path) -> dict[str, list[Points]]:
    """The compared fronts by name: one line per policy, or a single line; each begins at the start."""
    once, twice = points_of(run / "warp-once"), points_of(run / "warp")
    start = once["slerp"][0]
    names = ["rlhf/policy-0", "rlhf/policy-1"]
    return {
        "single runs": [[start, *once[name]] for name in names],
        "their averages (EMA)": [once[f"{name} anchor"] for name in names],
        "WARP, 1 iteration": [once["slerp"]],
        "WARP, 2 iterations": [twice["slerp"]],
        "linear, 1 iteration": [[start, *once["linear"]]],
    }


# --- claims ---


def show(label: str, values: list[float]) -> None:
    """Prints the mean, the standard deviation and the single values."""
    mean = statistics.mean(values)
    spread = f" (s.d. {statistics.stdev(values):.3f})" if len(values) > 1 else ""
    print(f"  {label}: {mean:.3f}{spread}  [{', '.join(f'{value:.3f}' for value in values)}]")


def claims_about_task_vectors(runs: list[Path]) -> None:
    """Prints the angles and lengths of task vectors and of whole weights."""
    print("5. task vectors are orthogonal and equally long, whole weights are parallel")
    for name in ("warp-1", "warp"):
        groups = [groups_of(run / name) for run in runs]
        print(f" {'first' if name == 'warp-1' else 'last'} iteration, by group: cosine (seeds), 1/sqrt(d)")
        for of_seeds in zip(*groups, strict=True):
            cosines = [group["cosines"][0] for group in of_seeds]
            ratios = [group["norms"][0] / group["norms"][1] for group in of_seeds]
            show(f"{of_seeds[0]['group']} (d^-1/2 {of_seeds[0]['num_parameters'] ** -0.5:.4f})", cosines)
            show("    ratio of norms", ratios)
    whole = []
    for run in runs:
        first, second = (flat(run / "rlhf" / f"policy-{m}") for m in range(2))
        whole.append(float(torch.nn.functional.cosine_similarity(first, second, dim=0)))
    show("whole weights, cosine", whole)
    base = flat(Path("gemma2_post/tiny/models/base"))
    vectors = [flat(run / "sft") - base for run in runs]
    pairs = [(i, j) for i in range(len(runs)) for j in range(i)]
    if pairs:
        cosine = torch.nn.functional.cosine_similarity
        show("SFT of different seeds, cosine", [float(cosine(vectors[i], vectors[j], dim=0)) for i, j in pairs])


def flat(folder: Path) -> torch.Tensor:
    """All weights of a model as one float64 vector."""
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def claims_about_merging(runs: list[Path]) -> None:
    """Prints how merges differ from their two policies, and linear from spherical ones."""
    print("6, 7. the merge of two runs (eta 1) against the mean of the two")
    for name in ("reward", "gold", "kl_to_init"):
        for rule in ("slerp", "linear"):
            differences = []
            for run in runs:
                points = points_of(run / "warp-once")
                parents = [points[f"rlhf/policy-{m}"][-1][name] for m in range(2)]
                differences.append(points[rule][-1][name] - statistics.mean(parents))
            show(f"{name}, {rule} - mean of both", differences)
    better = [
        points["slerp"][-1]["reward"] - max(points[f"rlhf/policy-{m}"][-1]["reward"] for m in range(2))
        for points in (points_of(run / "warp-once") for run in runs)
    ]
    show("reward, slerp - better of both", better)
    kept = [
        statistics.mean(cos(radians(group["angles"][0]) / 2) for group in groups_of(run / "warp-once")) for run in runs
    ]
    show("norm that linear keeps (lemma 2), mean over groups", kept)
    ratios = []
    for run in runs:
        points = points_of(run / "warp-once")
        ratios.append(points["linear"][-1]["kl_to_init"] / points["slerp"][-1]["kl_to_init"])
    show("KL, linear / slerp at eta 1", ratios)
    print("8. linear with a stretched eta is slerp: difference at each eta")
    show("stretch", [stretch(run) for run in runs])
    for position in range(1, len(ETAS)):
        pairs = [
            (points_of(run / "warp-stretched")["linear"][position], points_of(run / "warp-once")["slerp"][position])
            for run in runs
        ]
        for name in ("kl_to_init", "reward"):
            show(f"eta {ETAS[position]:g}, {name}", [linear[name] - slerp[name] for linear, slerp in pairs])


def claims_about_interpolation(runs: list[Path]) -> None:
    """Prints the share of KL and gain that each eta has."""
    print("10. along eta KL is convex and reward concave; shares of what eta 1 has")
    for name, folder in (("first iteration", "warp-once"), ("last iteration", "warp")):
        sweeps = [points_of(run / folder)["slerp"] for run in runs]
        for position, eta in enumerate(ETAS[1:-1], start=1):
            show(
                f"{name}, eta {eta:g}: share of KL", [s[position]["kl_to_init"] / s[-1]["kl_to_init"] for s in sweeps]
            )
            for metric in ("reward", "gold"):
                shares = [(s[position][metric] - s[0][metric]) / (s[-1][metric] - s[0][metric]) for s in sweeps]
                show(f"{name}, eta {eta:g}: share of the gain in {metric}", shares)


def at_kl(points: Points, name: str) -> Callable[[float], float]:
    """A metric as a function of KL, linear between the points; NaN past the last one."""
    ordered = sorted(points, key=lambda point: point["kl_to_init"])
    xs, ys = [point["kl_to_init"] for point in ordered], [point[name] for point in ordered]
    return lambda kl: float(numpy.interp(kl, xs, ys)) if kl <= xs[-1] else float("nan")


def on_grid(lines: list[Points], name: str) -> list[float]:
    """The mean of a seed's lines at each KL of the grid; NaN past the end of any line."""
    return numpy.mean([[at_kl(line, name)(kl) for kl in GRID] for line in lines], axis=0).tolist()


def compare(fronts: dict[str, list[list[Points]]]) -> None:
    """Prints how much higher the fronts are than single runs at the same KL."""
    print("fronts at the KL where a single run ends: difference to its end, mean of both runs")
    for name in ("reward", "gold"):
        for label in ("WARP, 1 iteration", "WARP, 2 iterations", "linear, 1 iteration"):
            gains = []
            for lines, singles in zip(fronts[label], fronts["single runs"], strict=True):
                ends = [line[-1] for line in singles]
                reached = [min(end["kl_to_init"], max(p["kl_to_init"] for p in lines[0])) for end in ends]
                found = [at_kl(lines[0], name)(kl) - end[name] for kl, end in zip(reached, ends, strict=True)]
                gains.append(statistics.mean(found))
            show(f"{name}, {label}", gains)
    print("fronts: difference to the single runs at the same KL, mean over the grid of KL")
    for name in ("reward", "gold"):
        single = [on_grid(lines, name) for lines in fronts["single runs"]]
        for label, seeds in fronts.items():
            if label in ("single runs", "their averages (EMA)"):
                continue
            pairs = zip(seeds, single, strict=True)
            gains = [float(numpy.nanmean(numpy.subtract(on_grid(lines, name), other))) for lines, other in pairs]
            show(f"{name}, {label}", gains)
        averages = []
        for lines, averaged in zip(fronts["single runs"], fronts["their averages (EMA)"], strict=True):
            pairs = zip(lines, averaged, strict=True)
            averages.append(
                statistics.mean(point[name] - at_kl(line, name)(point["kl_to_init"]) for line, (point,) in pairs)
            )
        show(f"{name}, their averages (EMA)", averages)


def draw(fronts: dict[str, list[list[Points]]], path: Path) -> None:
    """Draws the mean over seeds at each KL, with a band of one standard deviation; averages are points with bars."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("reward", "gold"), strict=True):
        for label, seeds in fronts.items():
            colour, style = LOOKS[label]
            if style == "D":
                flat_points = [point for lines in seeds for (point,) in lines]
                xs, ys = ([point[key] for point in flat_points] for key in ("kl_to_init", name))
                axes.errorbar(
                    statistics.mean(xs), statistics.mean(ys), statistics.stdev(ys), statistics.stdev(xs), marker=style,
                    color=colour, linestyle="none", label=label, capsize=3,
                )  # fmt: skip
                continue
            values = numpy.array([on_grid(lines, name) for lines in seeds])
            mean, spread = values.mean(0), values.std(0, ddof=1)
            axes.plot(GRID, mean, color=colour, linestyle=style, marker=".", label=label)
            axes.fill_between(GRID, mean - spread, mean + spread, color=colour, alpha=0.12)
        axes.set(xlabel="KL to the start, nats per answer", ylabel=name)
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
