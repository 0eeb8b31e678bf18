"""How long a pipeline takes: tokens, FLOPs and hours of each stage on a named GPU or on this machine's processor.

An estimate with a range: a machine at its best and at its worst (`planning/machines.py`), for what the stages say that
they compute. What it assumes stands in the output.
"""

from dataclasses import dataclass
from math import sqrt

from rich.table import Table

from gemma2_post.planning import machines
from gemma2_post.planning.memory import Job
from gemma2_post.planning.rows import FIRST_ROWS, Count, counter, rows_of_job
from gemma2_post.stage.work import Lengths, Pass, UnknownRows


@dataclass(frozen=True)
class Estimate:
    """What a stage computes and how long that takes; of all its runs, one after another."""

    job: Job
    num_runs: int
    """Number of identical runs, such as policies."""
    passes: list[Pass] | None
    """The passes of one process in one run; None if the shape of a model or the number of rows is not known."""
    gpu: str

    @property
    def devices(self) -> int:
        """Number of devices that one run occupies."""
        checked = self.job.checked
        return checked.launcher.num_processes if self.job.trains else checked.num_gpus

    @property
    def processes(self) -> int:
        """Number of processes, each of which computes the passes."""
        return self.job.checked.launcher.num_processes

    @property
    def tokens(self) -> float:
        """Tokens that all processes of all runs read."""
        return self.num_runs * self.processes * sum(each.count * each.tokens for each in self.passes or [])

    @property
    def generated(self) -> float:
        """Tokens that they sample."""
        return self.num_runs * self.processes * sum(each.count * each.generated for each in self.passes or [])

    @property
    def flops(self) -> float:
        """Their floating-point operations."""
        return self.num_runs * self.processes * sum(each.count * each.flops for each in self.passes or [])

    @property
    def seconds(self) -> tuple[float, float]:
        """Duration of all runs, at best and at worst."""
        on_cpu, passes = self.job.checked.launcher.use_cpu, self.passes or []
        found = []
        for i in range(2):
            start = machines.CPU_START_SECONDS[i] if on_cpu else machines.START_SECONDS[i]
            of = machines.speeds_of_processor if on_cpu else lambda each: machines.speeds_of(self.gpu)
            found.append(self.num_runs * (start + sum(of(each)[i].seconds(each) for each in passes)))
        return found[0], found[1]

    @property
    def device_seconds(self) -> float:
        """The middle of the range, for all devices."""
        best, worst = self.seconds
        return self.devices * sqrt(best * worst)


def estimate(jobs: list[tuple[Job, int]], gpu: str) -> list[Estimate]:
    """The estimates of jobs, each with its number of runs."""
    count, answers = counter([job for job, _ in jobs]), None
    found = []
    for job, num_runs in jobs:
        passes, answers = _passes(job, count, answers)
        found.append(Estimate(job, num_runs, passes, gpu))
    return found


def _passes(job: Job, count: Count, answers: Lengths | None) -> tuple[list[Pass] | None, Lengths | None]:
    """The passes of a job, and the lengths of answers for the jobs after it."""
    rows = rows_of_job(job, count, answers)
    if job.unknown:
        return None, rows.answers
    try:
        return job.command.work(job.checked, rows), rows.answers
    except UnknownRows:
        return None, rows.answers


# --- to read ---


def table(estimates: list[Estimate]) -> Table:
    """Tokens, FLOPs, time and its share of all, for each stage."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "tokens read", "sampled", "PFLOPs", "time", "share"):
        found.add_column(name, justify="left" if name == "stage" else "right")
    total = sum(each.device_seconds for each in estimates if each.passes is not None)
    for each in estimates:
        name = each.job.label + (f" ({each.num_runs} runs)" if each.num_runs > 1 else "")
        if each.passes is None:
            found.add_row(name, "?", "?", "?", "?", "?")
            continue
        sizes = _count(each.tokens), _count(each.generated), _digits(each.flops / 1e15)
        found.add_row(name, *sizes, duration(*each.seconds), f"{each.device_seconds / total:.0%}")
    return found


def summary(estimates: list[Estimate]) -> list[str]:
    """The whole chain, what dominates it, what is not known, and what all of it assumes."""
    known = [each for each in estimates if each.passes is not None]
    unknown = [each for each in estimates if each.passes is None]
    on_gpu = [each for each in known if not each.job.checked.launcher.use_cpu]
    on_cpu = [each for each in known if each.job.checked.launcher.use_cpu]
    lines = []
    if known:
        without = f" without {', '.join(each.job.label for each in unknown)}" if unknown else ""
        totals = []
        if on_gpu:
            best, worst = (sum(each.devices * each.seconds[i] for each in on_gpu) / 3600 for i in range(2))
            totals.append(f"{_digits(best)} to {_digits(worst)} GPU-hours on {known[0].gpu}")
        if on_cpu:
            best, worst = (sum(each.seconds[i] for each in on_cpu) for i in range(2))
            totals.append(f"{duration(best, worst)} on this machine's processor")
        longest = max(known, key=lambda each: each.device_seconds)
        share = longest.device_seconds / sum(each.device_seconds for each in known)
        name = longest.job.label.partition(" policy ")[0]
        lines.append(f"in all{without}: {' and '.join(totals)}; {name} takes most, {share:.0%}")
    steps = [each.job.command.name for each in unknown if not each.job.unknown]
    if steps:
        sets = " ".join(f"--set {name}.max_steps=N" for name in steps)
        lines.append(f"?: the number of rows on the Hub is not known without a download; give {sets}")
    return [*lines, *assumptions(bool(on_gpu), bool(on_cpu), estimates[0].gpu)]


def assumptions(on_gpu: bool, on_cpu: bool, gpu: str) -> list[str]:
    """What the hours assume, in sentences."""
    lines = []
    if on_gpu and gpu not in machines.GPUS:
        lines.append(
            f"{gpu} has the speed that a selftest measured; the GPU may be {machines.SPREAD:g} times as fast or slow"
        )
    elif on_gpu:
        flops, bandwidth = machines.GPUS[gpu]
        (most, least), (fast, slow) = machines.FLOPS_SHARES, machines.BANDWIDTH_SHARES
        few, many = (1e3 * each for each in machines.LAYER_SECONDS)
        lines.append(
            f"assumed, not measured: {least:.0%} to {most:.0%} of {gpu}'s {flops / 1e12:.0f} TFLOP/s, {slow:.0%} to "
            f"{fast:.0%} of its {bandwidth / 1e12:.3g} TB/s, {few:g} to {many:g} ms to start a layer"
        )
    if on_cpu:
        lines.append(f"this machine's processor was measured now; it may be {machines.SPREAD:g} times as fast or slow")
    lines.append(
        f"lengths: those of the first {FIRST_ROWS} rows; of rows on the Hub, all up to the limit alike; answers are "
        "as long as in the data of an earlier stage, those of a base model as long as they may be"
    )
    lines.append(
        "runs of a stage are added up; not counted: communication between GPUs, checkpoints, benchmarks, "
        "safety_datasets, runs that a kl_budget ends"
    )
    return lines


def duration(best: float, worst: float) -> str:
    """A range of seconds in the unit that suits its end: `1.5 to 4.2 h`."""
    size, unit = (3600, "h") if worst >= 7200 else (60, "min") if worst >= 120 else (1, "s")
    return f"{_digits(best / size)} to {_digits(worst / size)} {unit}"


def _digits(number: float) -> str:
    """A number with two digits, or as a whole number."""
    return f"{number:.2g}" if number < 100 else f"{number:,.0f}"


def _count(number: float) -> str:
    """A number of tokens: 1.2 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
