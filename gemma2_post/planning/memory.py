"""What a stage needs: peak memory, host memory, disk. Each stage says what its memory holds."""

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from gemma2_post.models.cost import BF16, ONEDNN_KERNELS
from gemma2_post.stage.command import Checked, Command, Parts
from gemma2_post.stage.disk import check_space, missing
from gemma2_post.stage.overrides import Overrides
from gemma2_post.training import memory as training
from gemma2_post.training.keys import TrainingRecipe


@dataclass
class Job:
    """One run of a stage that has been checked, and can be planned or started."""

    label: str
    config: Path | None
    """Its recipe; None if the pipeline has all its keys."""
    folder: Path
    """Folder of its output."""
    command: Command
    checked: Checked
    values: dict[str, object]
    """The keys of its recipe."""
    overrides: Overrides = field(default_factory=dict)
    """Of a member of an entry: the keys in which it differs from the recipe."""

    @property
    def trains(self) -> bool:
        """Whether it is a training stage."""
        return isinstance(self.checked.recipe, TrainingRecipe)

    @property
    def unknown(self) -> list[str]:
        """The keys of the models that determine its memory but whose shapes are unknown."""
        models = self.checked.models
        return [key for key in self.command.needed_models if key in models and models[key] is None]


def parts(job: Job, libraries: float = 0) -> Parts:
    """The parts of a stage's memory at its peak, in bytes: those of its largest phase.

    Args:
        libraries: Resident bytes of a process that has imported what a stage imports; counted on a CPU.
    """
    largest = max(job.command.memory(job.checked).values(), key=lambda phase: sum(phase.values()))
    largest = {name: size for name, size in largest.items() if size}
    if job.checked.launcher.use_cpu:
        largest |= {"Python and libraries": libraries}
        if job.trains and training.compute_of(job.checked).itemsize == BF16:
            largest |= {"oneDNN kernels": ONEDNN_KERNELS}
    return largest


def host(job: Job, libraries: float) -> float:
    """Host memory in bytes that the first process of a stage on a GPU needs; 0 on a CPU, whose memory is that already.

    At most: of weights that stay mapped from a file in bf16, the system takes the pages back when memory is short.
    """
    if job.checked.launcher.use_cpu:
        return 0
    return libraries + (training.host(job.checked) if job.trains else 0)


def check_disk(run_dir: Path, jobs: list[Job], replaced: Container[str] = ()) -> None:
    """Raises a `UserError` if the outputs and checkpoints do not fit on the disk; skips jobs with unknown shapes.

    Args:
        jobs: The jobs that will run.
        replaced: Labels of those whose present output is set aside, which frees nothing.
    """
    sizes = [(job, sum(job.command.disk(job.checked))) for job in jobs if not job.unknown]
    needed = sum(size if job.label in replaced else missing(job.folder, size) for job, size in sizes)
    check_space(run_dir, needed, is_shared=True)
