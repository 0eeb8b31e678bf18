"""SFT data written by a teacher: prompts in, conversations out; and preference pairs of its answers.

Reads prompts (conversations lose the model's last turn) and a teacher: a Gemma 2 model, or any model behind an
OpenAI-compatible endpoint. Writes `data.jsonl`, a data set for `sft`: `messages`, the requested columns, and
`teacher` (which model wrote the answer and how it was sampled). An answer is kept if it ended by itself, is a valid
turn, is the best for its prompt (with a `reward_model`, or a `judge`, which grades each answer), and does not repeat
another row. With `pairs`, it also writes `pairs/`, a data set for `reward`: of the answers to each prompt that
ended by themselves, the best against the worst, with their scores.

Every answer is appended to `progress/answers.jsonl` when it arrives, so an interrupted run resumes.

    python -m gemma2_post.synthesize --config recipes/tiny/synthesize.yaml
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from gemma2_post.data.keys import DataArguments
from gemma2_post.data.rows import PROMPT
from gemma2_post.evaluation.keys import SynthesisArguments
from gemma2_post.evaluation.memory import judge_of
from gemma2_post.models import cost
from gemma2_post.models import work as passes
from gemma2_post.models.arguments import (
    MODEL_BOUNDS,
    REFUSED_KEYS,
    attention_of,
    check_model_arguments,
    check_prompt_length,
    complete_model_arguments,
)
from gemma2_post.stage import contract, digests
from gemma2_post.stage.command import Checked, Command, Parts, Stage
from gemma2_post.stage.errors import UserError
from gemma2_post.stage.launcher import Launcher
from gemma2_post.stage.recipe import key, part
from gemma2_post.stage.work import Pass, Rows

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig

    from gemma2_post.data.turns import Message
    from gemma2_post.evaluation.answering.teacher import Job

    Ask = Callable[[list[list[Message]], dict[Job, dict], Callable[[list[dict]], None]], None]

REFUSED = dict.fromkeys(
    ["held_out_datasets", "held_out_share"], "every prompt is answered; give sft the rows to hold out"
)


@dataclass(kw_only=True)
class Recipe:
    """The keys of a synthesis."""

    output_dir: str = key(help="Folder of the output.")
    synthesis: SynthesisArguments = part(SynthesisArguments)
    model: "ModelConfig" = part("trl:ModelConfig", bounds=MODEL_BOUNDS)
    data: DataArguments = part(DataArguments)

    @property
    def quantization(self) -> str | None:
        """4bit, 8bit or None."""
        return "4bit" if self.model.load_in_4bit else "8bit" if self.model.load_in_8bit else None


def main(stage: Stage, recipe: Recipe) -> None:
    """Asks the teacher, appends each answer to `progress/answers.jsonl`, and writes what is worth keeping."""
    from tqdm import tqdm

    from gemma2_post.data.selection import candidates_of, pairs_of, select, write_pairs, write_rows
    from gemma2_post.evaluation.answering.teacher import load_rewards
    from gemma2_post.evaluation.inputs import load_judge

    args = recipe.synthesis
    prompts, ask, revision = load_teacher(stage, recipe)
    judge = load_judge(args.judging, stage.output_dir.with_name("judgments.jsonl"))
    rewards_of = load_rewards(args, prompts, judge) if args.reward_model or judge else None

    teacher = {
        "model": recipe.model.model_name_or_path,
        "revision": revision,
        "quantization": recipe.quantization,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    contract.begin(stage.output_dir, stage.fingerprint)
    progress = stage.output_dir / contract.PROGRESS / "answers.jsonl"
    answers = resume(stage, args, prompts, teacher)
    num_earlier, began = sum(answer["num_tokens"] for answer in answers.values()), time.monotonic()
    with tqdm(total=len(prompts) * args.num_answers, initial=len(answers), unit="answer") as bar:

        def write(batch: list[dict]) -> None:
            contract.append_lines(progress, batch)
            answers.update({(answer["row"], answer["sample"]): answer for answer in batch})
            bar.update(len(answers) - bar.n)

        ask(list(prompts["prompt"]), dict(answers), write)
    num_tokens = sum(answer["num_tokens"] for answer in answers.values())
    seconds = time.monotonic() - began
    candidates = candidates_of(prompts, answers)
    kept, dropped = select(candidates, rewards_of)
    if not kept:
        raise UserError(
            f"none of the {len(answers)} answers can be kept ({dropped}); if they are cut, raise "
            "max_new_tokens, or choose a teacher that ends its turns"
        )
    write_rows(stage.output_dir / "data.jsonl", kept, teacher)
    counts = {"num_prompts": len(prompts), "num_answers": len(answers), **dropped, "num_kept": len(kept)}
    if args.pairs:
        counts["num_pairs"] = write_pairs(stage.output_dir / "pairs" / "data.jsonl", pairs_of(candidates), teacher)
    speed = {"mean_tokens": num_tokens / len(answers), "tokens_per_second": (num_tokens - num_earlier) / seconds}
    stage.finish({"teacher": teacher}, counts | speed, ", ".join(f"{name} {count}" for name, count in counts.items()))


def load_teacher(stage: Stage, recipe: Recipe) -> "tuple[Dataset, Ask, str | None]":
    """The prompts, the function that asks the teacher, and its revision on the Hub; loads no weights yet.

    Raises:
        UserError: The teacher cannot be reached, or prompts and answers do not fit.
    """
    from trl import ModelConfig

    from gemma2_post.data.mixture import load_rows
    from gemma2_post.data.preparation import drop_too_long
    from gemma2_post.evaluation.answering import endpoint
    from gemma2_post.evaluation.answering.teacher import ask_endpoint, ask_model, ask_vllm
    from gemma2_post.evaluation.answering.vllm_server import check_program
    from gemma2_post.models import reward_model
    from gemma2_post.models.tokenizer import load_config_and_tokenizer

    args, data_args = recipe.synthesis, recipe.data
    settings = data_args.max_invalid_share, args.seed, data_args.columns
    if args.endpoint:
        local = {each.name for each in dataclasses.fields(ModelConfig)} | {"batch_size", "max_prompt_length"}
        if without_effect := sorted(stage.fingerprint["recipe"].keys() & local - {"model_name_or_path"}):
            raise UserError(f"{without_effect[0]} has no effect with an endpoint; remove one of them")
        prompts = load_rows(data_args.datasets, *settings, row_format=PROMPT).dataset()
        client = endpoint.connect(args.endpoint, args.server, args.endpoint_retries)
        return prompts, partial(ask_endpoint, args, recipe.model.model_name_or_path, client), None
    config, tokenizer = load_config_and_tokenizer(recipe.model)
    readable, whose = config.max_position_embeddings, "the model's"
    if args.reward_model and ":" not in args.reward_model:
        sealed = reward_model.check(args.reward_model)["max_length"]
        readable, whose = min((readable, whose), (sealed, "the reward model's"))
    longest = check_prompt_length(args.max_prompt_length, "max_new_tokens", args.max_new_tokens, readable, whose)
    found = load_rows(data_args.datasets, *settings, row_format=PROMPT, tokenizer=tokenizer)
    prompts = drop_too_long(found, "max_prompt_length", longest, data_args.max_too_long_share).dataset()
    ask = partial(ask_model, args, recipe.model, tokenizer)
    if args.engine == "vllm":
        check_program(args.vllm_program)
        ask = partial(ask_vllm, args, recipe.model, tokenizer, stage.output_dir / contract.PROGRESS / "vllm.log")
    return prompts, ask, getattr(config, "_commit_hash", None)


def resume(
    stage: Stage, args: SynthesisArguments, prompts: "Dataset", teacher: dict[str, object]
) -> "dict[Job, dict]":
    """The answers that an interrupted run left behind, by row and sample.

    Raises:
        UserError: They were sampled from another teacher, for other prompts, or with other settings.
    """
    path = stage.output_dir / contract.PROGRESS / "answers.jsonl"
    path.parent.mkdir(exist_ok=True)
    sampling = teacher | {
        "model_digest": stage.fingerprint["inputs"].get(str(teacher["model"])),
        "endpoint": args.endpoint is not None,
        "num_answers": args.num_answers,
        "batch_size": args.batch_size,
        "prompts": digests.of_text(json.dumps(list(prompts["prompt"]))),
    }
    sampling |= {"engine": args.engine} if args.engine != "transformers" else {}  # older runs do not name it
    keys = {"row": int, "sample": int, "text": str, "finish_reason": object, "num_tokens": int}
    answers = {(answer["row"], answer["sample"]): answer for answer in contract.read_lines(path, keys)}
    earlier = contract.read_json(path.with_name("sampling.json"), {}) or {}
    if answers and earlier != sampling:
        changed = sorted(key for key in earlier.keys() | sampling.keys() if earlier.get(key) != sampling.get(key))
        changes = "; ".join(f"{key} {earlier.get(key)} -> {sampling.get(key)}" for key in changed)
        raise UserError(
            f"{path.parent} holds {len(answers)} answers that were sampled in another way ({changes}); go back "
            "to that, choose another output_dir, or move the folder away"
        )
    contract.write_json(path.with_name("sampling.json"), sampling)
    return answers


def check(recipe: Recipe, launcher: Launcher) -> None:
    args = recipe.synthesis
    if args.temperature == 0 and args.num_answers > 1:
        raise UserError(
            f"temperature {args.temperature:g} with num_answers {args.num_answers} gives no different "
            "answers; write a temperature above 0"
        )
    args.check_scores()
    args.check()
    if args.engine == "vllm" and (args.endpoint or recipe.quantization):
        raise UserError(
            f"engine is vllm, with {'an endpoint' if args.endpoint else 'a quantized teacher'}; remove one of them"
        )
    if args.answer_processes > 1 and (args.endpoint or args.engine == "vllm"):
        raise UserError("answer_processes is for a teacher that transformers runs here; remove it")
    if not args.endpoint:
        check_model_arguments(recipe.model)
    if launcher.num_processes > 1:
        raise UserError(
            "synthesize is one process; start it with accelerate_configs/single_gpu.yaml or cpu.yaml, and let copies "
            "of the teacher answer side by side with answer_processes"
        )


def complete(recipe: Recipe, launcher: Launcher) -> None:
    complete_model_arguments(recipe.model)


def metrics(recipe: Recipe) -> set[str]:
    dropped = ("refused", "unfinished", "invalid", "ungraded", "not_best", "exact_duplicate", "near_duplicate")
    counts = {"num_prompts", "num_answers", "num_kept", "num_pairs", *(f"dropped_{reason}" for reason in dropped)}
    return counts | {"mean_tokens", "tokens_per_second"}


def teacher_of(checked: Checked[Recipe]) -> passes.Model:
    """The local teacher."""
    model, config = checked.recipe.model, checked.models["model_name_or_path"]
    assert config is not None, "the planner asks only about models whose shapes it knows"
    itemsize = cost.BF16 if model.dtype == "bfloat16" else cost.FP32
    compute = cost.Compute(itemsize, attention_of(model), checked.launcher.use_cpu)
    return passes.Model(config, compute, checked.recipe.quantization)


def memory(checked: Checked[Recipe]) -> dict[str, Parts]:
    args, model = checked.recipe.synthesis, checked.recipe.model
    if args.endpoint:
        judge = checked.models.get("judge")
        return {"asking": {}} | judge_of(checked, args, judge.max_position_embeddings if judge else 0)
    teacher = teacher_of(checked)
    config, compute, on_cpu = teacher.config, teacher.compute, teacher.compute.on_cpu
    prompt = cost.longest_prompt([config], args.max_prompt_length, args.max_new_tokens)
    held = {"weights": cost.weights(config, compute.itemsize, checked.recipe.quantization, model.use_bnb_nested_quant)}
    if scorer := checked.models.get("reward_model"):
        held["reward model"] = cost.weights(scorer, cost.FP32 if on_cpu else cost.BF16)
    sampling = held | cost.sampling(config, args.batch_size, prompt, args.max_new_tokens, compute)
    return {"sampling": sampling} | judge_of(checked, args, prompt + args.max_new_tokens)


def decisive(values: dict[str, object]) -> dict[str, object]:
    """The columns, which are written beside the answers, and that a server answers, wherever it is."""
    columns = {"columns": values["columns"]} if values.get("columns") else {}
    return columns | ({"endpoint": "a server"} if values.get("endpoint") else {})


def work(checked: Checked[Recipe], rows: Rows) -> list[Pass]:
    """A local teacher's answers, and their rewards; an endpoint computes elsewhere, and a judge is not counted."""
    args = checked.recipe.synthesis
    if args.endpoint:
        return []
    teacher = teacher_of(checked)
    prompts = rows.prompts_up_to(cost.longest_prompt([teacher.config], args.max_prompt_length, args.max_new_tokens))
    answers, number = rows.answers_up_to(args.max_new_tokens), args.num_answers * rows.number
    is_served = args.engine == "vllm"
    rows_at_once = passes.CONCURRENT if is_served else args.batch_size
    found = passes.sampling(teacher, number, rows_at_once, prompts, answers, is_served)
    if scorer := checked.models.get("reward_model"):
        scoring = passes.Model(scorer, cost.Compute(cost.FP32 if teacher.compute.on_cpu else cost.BF16))
        found.append(passes.reading(scoring, number, args.batch_size, prompts.plus(answers)))
    return found


COMMAND = Command(
    "synthesize",
    Recipe,
    main,
    metrics,
    check,
    complete,
    decisive=decisive,
    refused=REFUSED_KEYS | REFUSED,
    row_formats={"datasets": PROMPT},
    headline=["num_kept"],
    needed_models=["model_name_or_path", "reward_model", "judge"],
    memory=memory,
    work=work,
)

if __name__ == "__main__":
    COMMAND.launch()
