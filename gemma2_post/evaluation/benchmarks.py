"""Academic benchmarks through lm-eval, with the number of examples of the Gemma 2 report (arXiv 2408.00118, table 13).

Models that chat are asked in the chat format, with one `<bos>`; the base model as it is.
"""

from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemma2_post.core.errors import UserError

PRESET = {"mmlu": 5, "gsm8k": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5}
"""Tasks and their numbers of examples, by the name `preset`."""
_METRICS = ["acc_norm", "acc", "exact_match"]
"""Which of a task's metrics is its number: the first that it has."""


def check(where: str, tasks: list[str], folder: str | None) -> None:
    """Refuses benchmarks that cannot be run."""
    if find_spec("lm_eval") is None:
        raise UserError(f"{where}: benchmarks need lm-eval; pip install 'gemma2_post[eval]'")
    if folder and not Path(folder).is_dir():
        raise UserError(f"{where}: benchmark_folder {folder} is no folder; give one with lm-eval tasks (.yaml)")
    if "preset" in tasks and len(tasks) > 1:
        raise UserError(f"{where}: benchmarks names preset and more; write [preset], or the tasks one by one")
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=folder).all_tasks
    unknown = [name for name in names_of(tasks) if name not in known]
    if unknown:
        raise UserError(
            f"{where}: benchmarks names {unknown[0]}, which lm-eval does not know; `lm-eval ls tasks` lists them"
        )


def names_of(tasks: list[str]) -> list[str]:
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
    """Each task's number and its standard error.

    Args:
        tasks: names of lm-eval's, of `folder`'s, or `preset` alone.
        folder: with further tasks as lm-eval's YAML; their data may be local files.
        limit: examples of each task; None for all.
        chats: whether the model is asked in the chat format.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=True)
    found: dict[str, float] = {}
    for name in names_of(tasks):
        results = simple_evaluate(
            wrapped,
            tasks=[name],
            num_fewshot=PRESET.get(name),
            limit=limit,
            apply_chat_template=chats,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )["results"][name]
        metric = next(each for kind in _METRICS for each in results if each.partition(",")[0] == kind)
        kind, _, how = metric.partition(",")
        found[f"benchmarks/{name}"] = results[metric]
        error = results.get(f"{kind}_stderr,{how}")
        if isinstance(error, float):
            found[f"benchmarks/{name}/standard_error"] = error
    return found
