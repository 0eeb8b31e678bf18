"""Academic benchmarks through lm-eval, with as many examples as in the Gemma 2 report (arXiv 2408.00118, table 13).

Chat models get questions in the chat format, with one `<bos>` and each example as a turn; the base model gets plain
text.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemma2_post.evaluation.keys import BenchmarkArguments
from gemma2_post.stage.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PRESET = {"mmlu": 5, "gsm8k": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5}
"""The tasks of `preset`, with their numbers of examples."""
_METRICS = ["acc_norm", "acc", "exact_match,flexible-extract", "exact_match"]
"""The metrics that can be a task's score: the first of these that it has, or else its first metric."""
_IFEVAL = "ifeval"
_PACKAGES = {_IFEVAL: ["langdetect", "immutabledict", "nltk"]}
"""What tasks need beyond lm-eval itself, by the beginning of their names."""


def check(args: BenchmarkArguments) -> None:
    """Refuses benchmarks that cannot be run."""
    tasks, folder = args.benchmarks or [], args.benchmark_folder
    if find_spec("lm_eval") is None:
        raise UserError("benchmarks need lm-eval; pip install 'gemma2_post[eval]'")
    if folder and not Path(folder).is_dir():
        raise UserError(f"benchmark_folder {folder} is no folder; give one with lm-eval tasks (.yaml)")
    if "preset" in tasks and len(tasks) > 1:
        raise UserError("benchmarks names preset and more; write [preset], or the tasks one by one")
    if tasks == ["preset"]:
        return
    known = {*task_manager(folder).all_subtasks, *task_manager(folder).all_groups}
    unknown = [name for name in tasks if name not in known]
    if unknown:
        raise UserError(f"benchmarks names {unknown[0]}, which lm-eval does not know; `lm-eval ls tasks` lists them")
    for start, packages in _PACKAGES.items():
        missing = [name for name in packages if find_spec(name) is None]
        if missing and any(name.startswith(start) for name in tasks):
            raise UserError(f"benchmarks: {start} needs {', '.join(missing)}; pip install 'lm-eval[{start}]'")
    if any(name.startswith(_IFEVAL) for name in tasks):
        _check_sentence_splitter()


@cache
def task_manager(folder: str | None) -> "TaskManager":
    """The manager of lm-eval's tasks and the folder's; it takes seconds to find them."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def names_of(tasks: list[str]) -> list[str]:
    """The tasks, with `preset` replaced by its own."""
    return list(PRESET) if tasks == ["preset"] else tasks


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    folder: str | None,
    limit: int | None,
    batch_size: int,
    chats: bool,
) -> dict[str, float]:
    """Each task's score, `benchmarks/NAME`, and all metrics that lm-eval has of it, `benchmarks/NAME/METRIC`.

    Each comes with its standard error, where lm-eval has one; `benchmarks/NAME/shots` is the number of examples.

    Args:
        tasks: Names of tasks of lm-eval or of `folder`, or `preset` alone.
        folder: Folder with additional tasks as lm-eval's YAML; their data may be local files.
        limit: Number of examples of each task; None for all.
        chats: Whether to ask the model in the chat format.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=True,
        softmax_dtype=torch.float32,  # in bf16, nearly equal likelihoods would be equal
    )
    found: dict[str, float] = {}
    for name in names_of(tasks):
        if name.startswith(_IFEVAL):
            import langdetect

            langdetect.DetectorFactory.seed = 0  # or the language of a short answer differs from run to run
        evaluated = simple_evaluate(
            wrapped,
            tasks=[name],
            num_fewshot=PRESET.get(name),
            limit=limit,
            apply_chat_template=chats,
            task_manager=task_manager(folder),
            log_samples=False,
            bootstrap_iters=1000,  # of metrics without a formula; 0 would leave out all standard errors
        )
        results = evaluated["results"][name]
        metrics = metrics_of(results)
        shots = {float(number) for number in evaluated["n-shot"].values()}
        if len(shots) == 1:  # a group may mix them
            found[f"benchmarks/{name}/shots"] = shots.pop()
        scored = {f"benchmarks/{name}": metrics[0]}
        scored |= {f"benchmarks/{name}/{each.removesuffix(',none')}": each for each in metrics}
        for key, metric in scored.items():
            kind, _, how = metric.partition(",")
            found[key] = results[metric]
            error = results.get(f"{kind}_stderr,{how}")
            if isinstance(error, float):
                found[f"{key}/standard_error"] = error
    return found


def metrics_of(results: dict[str, object]) -> list[str]:
    """The keys of a task's metrics in lm-eval's results, such as `acc,none` beside `acc_stderr,none`; its score is the
    first."""
    names = [each for each in results if "," in each and not each.partition(",")[0].endswith("_stderr")]
    preferred = [each for kind in _METRICS for each in names if kind in (each, each.partition(",")[0])]
    return [*dict.fromkeys([*preferred, *names])]


def load_data(args: BenchmarkArguments) -> None:
    """Reads, or downloads, the tasks' data before there is work to lose."""
    for name in names_of(args.benchmarks or []):
        try:
            task_manager(args.benchmark_folder).load([name])
        except ModuleNotFoundError as error:
            raise UserError(f"benchmarks: {name} needs the package {error.name}; install it") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"benchmarks: the data of {name} cannot be read ({' '.join(str(error).split())[:200]}); "
                "download it first, or give a task with local data as benchmark_folder"
            ) from error


def _check_sentence_splitter() -> None:
    """Refuses ifeval without nltk's punkt_tab: lm-eval goes on without it until a row, hours later, needs it."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise UserError(
            "benchmarks: ifeval needs nltk's punkt_tab, which is not here; run `python -m nltk.downloader punkt_tab`, "
            "or do so where there is a network and copy ~/nltk_data from there"
        ) from error
