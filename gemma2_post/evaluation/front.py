"""Reward against KL: a merge's points beside the runs that it is made of, and the point that is released.

Every model answers the same held-out prompts, at temperature 1 from the same seed. Reward is what training would have
given; KL is KL(model || start) of whole answers over the full vocabulary, in nats. Models are loaded one after the
other beside the start, the reward model when they are gone.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from gemma2_post.core import contract, data, gemma, rewards
from gemma2_post.core.command import Stage
from gemma2_post.core.data import DataArguments
from gemma2_post.core.errors import UserError
from gemma2_post.core.rewards import RewardFunctionArguments
from gemma2_post.evaluation.divergence import measure_divergence
from gemma2_post.evaluation.samples import Answer, SampleArguments, load_graders, sample_answers


@dataclass
class FrontArguments:
    runs: list[str] | None = field(
        default=None,
        metadata={"help": "Trained policies to draw beside the merge: their checkpoints, themselves, their anchors."},
    )
    kl_budget: float | None = field(
        default=None,
        metadata={"help": "Nats from the start; the point with the largest reward within them is released."},
    )
    max_completion_length: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts are dropped; None for what the answer leaves of the model."}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts that are answered at once."})
    seed: int = field(default=0, metadata={"help": "Of the sampling, and of a mixture of data sets."})


ARGUMENTS = [FrontArguments, DataArguments, SampleArguments, RewardFunctionArguments]


@dataclass
class Point:
    """A model on the plane of KL and reward."""

    series: str
    """What is drawn as one line."""
    path: Path
    position: float
    """Eta, or the training step."""


class Front:
    """Checked when it is made, before the merge; measures after it."""

    def __init__(
        self,
        stage: Stage,
        start: str,
        etas: list[float],
        args: FrontArguments,
        data_args: DataArguments,
        sample_args: SampleArguments,
        reward_args: RewardFunctionArguments,
    ):
        self.stage, self.start, self.args = stage, start, args
        where = stage.where
        if args.kl_budget is not None and not args.kl_budget >= 0:
            raise UserError(f"{where}: kl_budget is {args.kl_budget:g} nats; write 0 or more, or remove it")
        if args.kl_budget is not None and 0 not in etas:
            raise UserError(f"{where}: with a kl_budget, eta needs 0, which is always within it; add it")
        if sample_args.num_samples < 2 or args.batch_size < 1:
            raise UserError(f"{where}: num_samples must be 2 or more and batch_size 1 or more; raise them")
        config = gemma.load_config(where, start)
        self.tokenizer = gemma.load_tokenizer(where, start, config)
        self.score = rewards.ModelReward(where, reward_args, self.tokenizer) if reward_args.reward_model else None
        longest = gemma.check_prompt_length(
            where,
            args.max_prompt_length,
            "max_completion_length",
            args.max_completion_length,
            min(config.max_position_embeddings, self.score.max_length if self.score else 1 << 30),
        )
        rows = data.load_prompts(where, data_args.datasets, data_args.max_invalid_share, args.seed, data_args.columns)
        rows = data.drop_long_prompts(where, rows, self.tokenizer, longest, data_args.max_too_long_share)
        self.rows = rows.select(range(min(sample_args.num_samples, len(rows))))
        self.columns = {name: self.rows[name] for name in self.rows.column_names if name != "prompt"}
        self.graders = load_graders(where, sample_args, self.rows)
        self.functions = [self.score] if self.score else []
        self.functions += rewards.load_reward_functions(where, reward_args, self.rows.column_names)
        self.runs = [point for run in args.runs or [] for point in run_points(where, Path(run))]
        self.accelerator = Accelerator()
        disable_progress_bar()  # of loading each of many models

    def measure(self, merged: dict[str, dict[float, Path]]) -> tuple[Path, dict[str, float]]:
        """Measures every point, writes `front.json` and `front.png`; the released point and its numbers.

        Args:
            merged: folders of the sweeps by interpolation and eta; the first one's are what may be released.
        """
        points = [Point(rule, path, eta) for rule, sweep in merged.items() for eta, path in sweep.items()]
        points += self.runs
        answered = self._answer(points)
        if self.score:
            self.score.load(lambda model: model.to(self.accelerator.device).eval())
        entries = [self._entry(point, *answered[str(point.path)]) for point in points]
        entry_of = dict(zip((str(point.path) for point in points), entries, strict=True))
        sweep, budget = next(iter(merged.values())), self.args.kl_budget
        within = [
            path
            for eta, path in sweep.items()
            if budget is None or eta == 0 or entry_of[str(path)]["kl_to_init"] <= budget
        ]
        released = max(within, key=lambda path: entry_of[str(path)]["reward"])
        chosen = entry_of[str(released)]
        front = {"kl_budget": budget, "released": chosen, "points": entries}
        contract.write_json(self.stage.output_dir / "front.json", front)
        plot(entries, chosen, budget, self.stage.output_dir / "front.png")
        numbers = {name: value for name, value in chosen.items() if isinstance(value, float)}
        return released, {"eta": numbers.pop("position"), **numbers}

    def _answer(self, points: list[Point]) -> dict[str, tuple[list[Answer], list[float]]]:
        """The answers of each point and their KL; those of an interrupted run are read again."""
        path = self.stage.output_dir / contract.PROGRESS / "answers.jsonl"
        path.parent.mkdir(exist_ok=True)
        found = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with_answers = _parse(line)
            if with_answers:
                found[with_answers["point"]] = (
                    [Answer(**answer) for answer in with_answers["answers"]],
                    with_answers["kl"],
                )
        missing = [point for point in points if str(point.path) not in found]
        start = self._load(Path(self.start)) if missing else None
        for point in tqdm(missing, desc="front", unit="model"):
            model = self._load(point.path)
            answers = sample_answers(
                model,
                self.tokenizer,
                list(self.rows["prompt"]),
                self.args.max_completion_length,
                batch_size=self.args.batch_size,
                seed=self.args.seed,
            )
            found_here = measure_divergence(self.accelerator, model, start, answers, self.args.batch_size)
            kl = [each.forward for each in found_here]
            record = {"point": str(point.path), "answers": [vars(answer) for answer in answers], "kl": kl}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            found[str(point.path)] = (answers, kl)
        return found

    def _load(self, path: Path) -> PreTrainedModel:
        on_gpu = self.accelerator.device.type == "cuda"
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16 if on_gpu else torch.float32, attn_implementation="eager"
        )
        model.generation_config = gemma.generation_config()
        return model.to(self.accelerator.device).eval()

    def _entry(self, point: Point, answers: list[Answer], kl: list[float]) -> dict[str, object]:
        """Means over the prompts, and their standard errors."""
        by_function = rewards.values_of(
            self.functions, self.tokenizer, self.rows["prompt"], [answer.token_ids for answer in answers], self.columns
        )
        texts = [answer.text for answer in answers]
        values = {
            "kl_to_init": kl,
            "reward": [sum(each) for each in zip(*by_function.values(), strict=True)],
            **{name: grader(completions=texts, **self.columns) for name, grader in self.graders.items()},
            "stop_rate": [float(answer.stopped) for answer in answers],
            "mean_tokens": [float(answer.num_tokens) for answer in answers],
        }
        entry: dict[str, object] = {"series": point.series, "path": str(point.path), "position": float(point.position)}
        for name, each in values.items():
            entry[name] = mean(each)
            entry[f"{name}/standard_error"] = stdev(each) / sqrt(len(each))
        return entry


def _parse(line: str) -> dict[str, object] | None:
    """A line of answers; None for one that a kill has cut."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def run_points(where: str, run: Path) -> list[Point]:
    """A policy's checkpoints that hold weights, the policy itself, and its anchor."""
    if not (run / contract.DONE).is_file():
        raise UserError(f"{where}: runs names {run}, which is no finished policy; run rlhf to its end")
    name = f"{run.parent.name}/{run.name}"
    steps = {int(path.name.rpartition("-")[2]): path for path in run.glob("checkpoint-*")}
    points = [Point(name, path, step) for step, path in sorted(steps.items()) if any(path.glob("*.safetensors"))]
    *_, last = (run / "watch.jsonl").read_text(encoding="utf-8").splitlines()
    points.append(Point(name, run, json.loads(last)["step"]))
    if (run / "anchor").is_dir():
        points.append(Point(f"{name} anchor", run / "anchor", points[-1].position))
    return points


def plot(entries: list[dict[str, object]], released: dict[str, object], kl_budget: float | None, path: Path) -> None:
    """Reward, and gold where it is graded, over KL to the start; bars are standard errors over prompts."""
    names = ["reward", *(["gold"] if "gold" in entries[0] else [])]
    figure = Figure(figsize=(6.5 * len(names), 5), layout="constrained")
    series: dict[str, list[dict[str, object]]] = defaultdict(list)
    for entry in entries:
        series[entry["series"]].append(entry)
    sweeps = [name for name, points in series.items() if "eta-" in points[0]["path"]]
    runs = [name for name in series if name not in sweeps and not name.endswith(" anchor")]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for label, points in series.items():
            is_sweep, is_anchor = label in sweeps, label.endswith(" anchor")
            if is_sweep:
                colour, line = ("black", "-") if label == sweeps[0] else ("tab:red", "--")
            else:
                colour, line = f"C{runs.index(label.removesuffix(' anchor')) % 10}", "-"
            axes.errorbar(
                [point["kl_to_init"] for point in points],
                [point[name] for point in points],
                yerr=[point[f"{name}/standard_error"] for point in points] if is_sweep else None,
                marker="o" if is_sweep else "D" if is_anchor else ".",
                linewidth=2 if is_sweep else 1,
                alpha=1 if is_sweep else 0.6,
                capsize=2,
                label=label,
                color=colour,
                linestyle=line,
            )
        axes.plot(
            released["kl_to_init"], released[name], marker="*", markersize=18, color="gold", markeredgecolor="black",
            linestyle="none", label=f"released (eta {released['position']:g})", zorder=5,
        )  # fmt: skip
        if kl_budget is not None:
            axes.axvline(kl_budget, color="0.5", linestyle=":", label="KL budget")
        axes.set(xlabel="KL to the start, nats per answer", ylabel=name)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
