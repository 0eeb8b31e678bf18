"""On-policy distillation compared with SFT on the teacher's answers: the same student, steps and batch, by seed.

    python benchmarks/on_policy.py --seeds 0 1 2        # about half an hour on two cores; prints a table

GKD (arXiv 2306.13649) claims that a student trained on its own answers is closer to the teacher on its own answers.
Each seed makes its own student with recipes/tiny/sft.yaml; the teacher's answers come from
recipes/tiny/synthesize.yaml. SFT gets several learning rates, so it does not lose for lack of tuning. The `distill`
stage measures all models, on 240 held-out prompts and over the whole vocabulary: its own output after training, the
SFT models before the first step.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

STEPS, BATCH = 150, 32
COLUMNS = ["kl_student_teacher_per_token", "kl_student_teacher", "kl_teacher_student_per_token", "gold", "stop_rate"]


def stage(name: str, recipe: str, output_dir: Path, **values: object) -> Path:
    """Runs a stage in its own process; returns its output folder."""
    command = [sys.executable, "-m", f"gemma2_post.{name}", "--config", f"recipes/tiny/{recipe}.yaml"]
    command += [f"--{key}={json.dumps(value)}" for key, value in (values | {"output_dir": str(output_dir)}).items()]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stderr[-2000:]}")
    return output_dir


def report(label: str, seed: int, metrics: dict[str, float], suffix: str = "") -> None:
    """Prints a row of the table."""
    print(f"{label:24} {seed:4} " + " ".join(f"{metrics[name + suffix]:14.4f}" for name in COLUMNS), flush=True)


def metrics_of(directory: Path) -> dict[str, float]:
    """The metrics of a stage's output."""
    return json.loads((directory / "metrics.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--distill_rates", type=float, nargs="+", default=[2e-4])
    parser.add_argument("--sft_rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--directory", type=Path, default=Path("runs/tiny/on-policy"))
    arguments = parser.parse_args()

    print(f"{'':24} seed " + " ".join(f"{name[-14:]:>14}" for name in COLUMNS))
    answers = stage("synthesize", "synthesize", arguments.directory / "synthesize") / "data.jsonl"
    for seed in arguments.seeds:
        folder = arguments.directory / str(seed)
        student = str(stage("sft", "sft", folder / "sft", seed=seed))
        for rate in arguments.distill_rates:
            made = stage(
                "distill",
                "distill",
                folder / f"distill-{rate:g}",
                model_name_or_path=student,
                seed=seed,
                learning_rate=rate,
                max_steps=STEPS,
                global_batch_size=BATCH,
            )
            if rate == arguments.distill_rates[0]:
                report("the student", seed, metrics_of(made), "_before")
            report(f"distill {rate:g}", seed, metrics_of(made))
        for rate in arguments.sft_rates:
            tuned = stage(
                "sft",
                "sft-full",
                folder / f"sft-on-answers-{rate:g}",
                model_name_or_path=student,
                datasets=[{"path": str(answers)}],
                seed=seed,
                learning_rate=rate,
                max_steps=STEPS,
                global_batch_size=BATCH,
                warmup_steps=10,
            )
            probe = stage(
                "distill",
                "distill",
                folder / f"probe-{rate:g}",
                model_name_or_path=str(tuned),
                seed=seed,
                max_steps=1,
                warmup_steps=0,
            )
            report(f"SFT on answers {rate:g}", seed, metrics_of(probe), "_before")


if __name__ == "__main__":
    main()
