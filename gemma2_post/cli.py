"""The `gemma2-post` command. Each subcommand imports what it needs when it is called, so --help is quick."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma2_post.stage.errors import UserError, reported
from gemma2_post.stage.quiet import silence_libraries

Overrides = dict[str, dict[str, object]]
"""Recipe keys by stage, which replace the recipe's."""


def main() -> None:
    """Runs the subcommand that the command line names."""
    arguments = vars(_parser().parse_args())
    with reported():
        if "overrides" in arguments:
            arguments["overrides"] = parse_overrides(arguments["overrides"])
        arguments.pop("call")(**arguments)


def run(
    pipeline: Path,
    until: str | None = None,
    overrides: Overrides | None = None,
    run_dir: Path | None = None,
    seed: int | None = None,
    report: bool = False,
    explain: bool = False,
    rerun: Sequence[str] = (),
    keep: Sequence[str] = (),
    fresh: Sequence[str] = (),
) -> None:
    """Runs a pipeline recipe, shows its progress, and at the end where to find the results.

    Args:
        until: The last stage to run.
        run_dir: Replaces the pipeline's.
        seed: Seed of every stage; replaces the recipes'.
        report: Whether to print the report at the end.
        explain: Whether to say only what would run, and why.
        rerun: Stages to make again, whatever is there.
        keep: Finished stages to keep, whatever has changed.
        fresh: Stages to start over, also where an unfinished run could go on.
    """
    from gemma2_post.pipeline import run as runs
    from gemma2_post.pipeline.decisions import Choice, choices_of
    from gemma2_post.pipeline.loading import load_pipeline
    from gemma2_post.report import report as reports
    from gemma2_post.report.terminal import View, terminal

    loaded = load_pipeline(pipeline, run_dir, seed, overrides)
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) and (rerun or fresh):
        print(
            "Slurm has requeued this job, so it goes on: --rerun and --fresh were followed the first time", flush=True
        )
        rerun, fresh = (), ()
    choices = choices_of(loaded, {Choice.RERUN: [*rerun], Choice.KEEP: [*keep], Choice.FRESH: [*fresh]})
    if explain:
        return runs.explain(loaded, until, choices)
    view = View(terminal())
    has_begun = runs.run(loaded, until, view, choices)
    view.finish(loaded.run_dir, has_begun)
    if report:
        reports.report(loaded.run_dir)
    elif has_begun:
        view.say(f"to look at: {reports.write(loaded.run_dir)[0]}")


def select(
    recipe: Path,
    launch: str | None = None,
    run_dir: Path | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
) -> None:
    """Trains the candidates of a selection, chooses one, and shows the table; what is up to date is skipped.

    Args:
        launch: Accelerate config of the candidates and the selection; without it, one for a GPU or for a CPU, as the
            candidates' recipe says.
        run_dir: Folder of the run; without it, one beside the recipe's.
        seed: Seed of the candidates and the selection; replaces the recipes'.
        settings: Keys of the selection's recipe, `by=judge`, with other values.
    """
    from gemma2_post.pipeline import run as runs
    from gemma2_post.pipeline.loading import load_selection
    from gemma2_post.report import report as reports
    from gemma2_post.report.terminal import View, terminal

    keys = parse_overrides([f"select.{setting}" for setting in settings]).get("select", {})
    loaded = load_selection(recipe, launch, run_dir, seed, keys)
    view = View(terminal())
    view.finish(loaded.run_dir, runs.run(loaded, None, view, {}))
    reports.report(loaded.run_dir)


def check(pipelines: list[Path]) -> None:
    """Checks pipeline recipes, and prints what each would run."""
    from gemma2_post.pipeline.loading import load_pipeline

    loaded = [load_pipeline(path) for path in pipelines]
    silence_libraries()
    from gemma2_post.pipeline import check

    for each in loaded:
        print(f"{each.path}: {check.report(check.check(each))}")


def clean(run_dir: Path | None = None, yes: bool = False) -> None:
    """Lists the outputs of a run that newer ones have replaced, or without a run all prepared data.

    Args:
        yes: Whether to delete them.
    """
    from gemma2_post.pipeline.clean import clean

    clean(run_dir, yes)


def plan(
    pipeline: Path,
    until: str | None = None,
    overrides: Overrides | None = None,
    gpus: int | None = None,
    memory: float | None = None,
    gpu: str = "H100",
) -> None:
    """Shows the memory, disk and time that each stage needs.

    Args:
        gpus: Number of GPUs; replaces the accelerate configs'.
        memory: Memory of each GPU in GB; the plan then says what does not fit.
        gpu: The kind of GPU.

    Raises:
        UserError: Its speed is not known.
    """
    from gemma2_post.pipeline.loading import load_pipeline
    from gemma2_post.report.terminal import terminal

    loaded = load_pipeline(pipeline, overrides=overrides)
    loaded.steps(until)
    silence_libraries()
    from gemma2_post.pipeline.check import check
    from gemma2_post.planning.machines import check_gpu
    from gemma2_post.planning.plan import show

    check_gpu(gpu)
    show(check(loaded, until), terminal(), gpus, memory, gpu)


def prepare(pipeline: Path, until: str | None = None, overrides: Overrides | None = None) -> None:
    """Reads, checks and tokenizes the data of all stages, which then start with it at once."""
    from gemma2_post.pipeline.loading import load_pipeline

    loaded = load_pipeline(pipeline, overrides=overrides)
    silence_libraries()
    from gemma2_post.pipeline.check import check
    from gemma2_post.pipeline.prepare import prepare

    prepare(check(loaded, until))


def report(run_dir: Path) -> None:
    """Shows the results of a run."""
    from gemma2_post.report.report import report

    report(run_dir)


def status(run_dir: Path, follow: bool = False) -> None:
    """Shows what a run does now.

    Args:
        follow: Whether to keep it on the screen until the run ends.
    """
    from gemma2_post.report.status import show
    from gemma2_post.report.terminal import terminal

    show(run_dir, terminal(), follow)


def selftest(launch: Path | None, json: Path) -> None:
    """Tests this machine; ends with exit status 1 if something fails.

    Args:
        launch: Accelerate config to test the stages with.
        json: File for the results.
    """
    silence_libraries()
    from gemma2_post.report.terminal import terminal
    from gemma2_post.selftest.run import selftest

    if not selftest(launch, json, terminal()):
        raise SystemExit(1)


def chat(directory: str, prompt: str | None, load: str | None, temperature: float, max_new_tokens: int | None) -> None:
    """Talks to a model."""
    silence_libraries()
    from gemma2_post.chat import chat

    chat(directory, prompt, load, temperature, max_new_tokens)


def export(directory: str, to: str, weight_type: str | None, output: Path | None) -> None:
    """Writes a model for llama.cpp or Ollama, or says how vLLM serves it."""
    silence_libraries()
    from gemma2_post.export.export import export

    export(directory, to, weight_type, output)


def push(directory: Path, repository: str, public: bool) -> None:
    """Uploads a model to the Hugging Face Hub.

    Args:
        public: Whether everyone can see a repository that is made for it.
    """
    silence_libraries()
    from gemma2_post.export.push import push

    push(directory, repository, public)


def judge_check(
    pairs: str,
    judge: str,
    judge_endpoint: str | None,
    api_key_variable: str | None,
    judge_load_in: Any,
    judge_vllm_program: str | None,
    judge_max_tokens: int,
    concurrency: int,
    limit: int | None,
    json: Path,
) -> None:
    """Measures a judge on pairs that people have labeled.

    Args:
        limit: The first so many pairs.
        json: File for the results.
    """
    silence_libraries()
    from gemma2_post.evaluation.keys import EndpointArguments, JudgeArguments
    from gemma2_post.judge_check import judge_check

    endpoint = EndpointArguments(api_key_variable, concurrency)
    judge_check(
        pairs,
        JudgeArguments(
            judge=judge,
            judge_load_in=judge_load_in,
            judge_engine="vllm" if judge_vllm_program else "transformers",
            judge_vllm_program=judge_vllm_program or "vllm",
            judge_endpoint=judge_endpoint,
            endpoint=endpoint,
            judge_max_tokens=judge_max_tokens,
        ),
        limit,
        json,
    )


def schema(directory: Path, markdown: Path | None) -> None:
    """Writes the JSON Schemas of all recipes to a folder, and the reference of all keys to a Markdown file."""
    silence_libraries()
    from gemma2_post.pipeline.schema import write_reference, write_schemas

    write_schemas(directory)
    if markdown:
        write_reference(markdown)


def parse_overrides(settings: list[str]) -> Overrides:
    """`["sft.learning_rate=1e-4"]` becomes `{"sft": {"learning_rate": 0.0001}}`.

    Raises:
        UserError: A setting is not STAGE.KEY=VALUE.
    """
    from gemma2_post.stage.recipe_file import RENAMED, parse_value

    overrides: Overrides = {}
    for setting in settings:
        target, equals, value = setting.partition("=")
        stage, dot, key = target.partition(".")
        if not (equals and dot and stage and key and value.strip()):
            raise UserError(f"--set {setting}: expected STAGE.KEY=VALUE, for example sft.learning_rate=1e-4")
        key = RENAMED.get(key, key)
        if key in overrides.get(stage, {}):
            raise UserError(f"--set {setting}: {target} is set twice; keep one of them")
        overrides.setdefault(stage, {})[key] = parse_value(value)
    return overrides


def _parser() -> argparse.ArgumentParser:
    """The command's arguments; `call` is the function of the subcommand, the others are that function's parameters."""
    of_pipeline = argparse.ArgumentParser(add_help=False)
    of_pipeline.add_argument("pipeline", type=Path, help="for example recipes/tiny/pipeline.yaml")
    of_pipeline.add_argument("--until", metavar="STAGE", help="stop after this stage")
    settings: dict[str, Any] = {"dest": "overrides", "metavar": "STAGE.KEY=VALUE", "action": "append", "default": []}
    of_pipeline.add_argument("--set", help="override a recipe's key", **settings)

    parser = argparse.ArgumentParser(
        prog="gemma2-post", description="Post-training of Gemma 2, end to end.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True)

    def command(call: Callable[..., None], help: str, *parents: argparse.ArgumentParser) -> Callable[..., Any]:
        added = commands.add_parser(call.__name__.replace("_", "-"), help=help, parents=parents, allow_abbrev=False)
        added.set_defaults(call=call)
        return added.add_argument

    add = command(run, "run a pipeline recipe; stages that are up to date are skipped", of_pipeline)
    add("--run_dir", type=Path, metavar="DIR", help="write there instead of the recipe's run_dir")
    add("--seed", type=int, help="seed of every stage, in place of the recipes'")
    add("--report", action="store_true", help="print the report at the end")
    add("--explain", action="store_true", help="say what would run, and why, without running it")
    several: dict[str, Any] = {"metavar": "STAGE", "action": "append", "default": []}
    add("--rerun", help="make this stage again, although it is finished", **several)
    add("--keep", help="keep this finished stage, whatever has changed", **several)
    add("--fresh", help="start this stage over, although an unfinished run could go on", **several)

    add = command(select, "train candidates that differ in some keys, compare their answers, choose one")
    add("recipe", type=Path, help="for example recipes/tiny/select.yaml")
    add("--launch", metavar="CONFIG", help="accelerate config; default: one GPU, or one CPU if the recipe says so")
    add("--run_dir", type=Path, metavar="DIR", help="write there; default: beside the recipe's, as runs/tiny-select")
    add("--seed", type=int, help="seed of the candidates and the selection, in place of the recipes'")
    add(
        "--set", dest="settings", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe"
    )

    add = command(clean, "list what newer outputs of a run have replaced, or prepared data, and delete it")
    add("run_dir", type=Path, nargs="?", help="for example runs/tiny; without it: the prepared data of all runs")
    add("--yes", action="store_true", help="delete it")

    add = command(check, "check a pipeline recipe without running it")
    add("pipelines", type=Path, nargs="+", help="for example recipes/tiny/pipeline.yaml")

    add = command(plan, "show memory, disk and time of each stage, without downloading anything", of_pipeline)
    add("--gpus", type=int, metavar="N", help="number of GPUs, in place of the accelerate configs'")
    add("--memory", type=float, metavar="GB", help="memory of each GPU; says what does not fit")
    add(
        "--gpu",
        default="H100",
        metavar="NAME",
        help="the GPU of the hours: H100 (default), H200, A100, L4, 'RTX 4090', or the selftest.json of a machine",
    )

    command(prepare, "read, check and tokenize the data ahead of the run, without a GPU", of_pipeline)

    add = command(report, "show the models of a run side by side, and conversations to read")
    add("run_dir", type=Path, help="for example runs/tiny")

    add = command(
        status, "show what a run does now: how far it is, how fast, what it measured; also from another machine"
    )
    add("run_dir", type=Path, help="for example runs/tiny")
    add("--follow", action="store_true", help="keep it on the screen until the run ends, or until Ctrl-C")

    add = command(selftest, "test this machine: versions, numerics, every training stage, speed; run it first")
    add("--launch", type=Path, metavar="CONFIG", help="accelerate config of the stages; default: one GPU, or one CPU")
    add("--json", type=Path, default=Path("selftest.json"), metavar="FILE", help="write the results there")

    add = command(chat, "talk to a model")
    add("directory", help="the output of a stage, or any Gemma 2 chat model")
    add("--prompt", metavar="TEXT", help="answer this and exit")
    add("--load", choices=["4bit", "8bit"], help="quantize the weights")
    add("--temperature", type=float, default=0.0, help="0 (default): the most likely answer")
    add("--max_new_tokens", type=int, help="longest answer; default: 512, or half of what the model can read")

    add = command(export, "write a model for llama.cpp or Ollama, checked against it, or say how vLLM serves it")
    add("directory", help="the output of a stage, or any Gemma 2 chat model in a folder")
    add("--to", choices=["gguf", "ollama", "vllm"], required=True, help="the program, or llama.cpp's kind of file")
    types = ["bf16", "f16", "q8_0", "f32"]
    add("--type", dest="weight_type", choices=types, help="the type of the weights in a GGUF file; default: bf16")
    add("--output", type=Path, metavar="PATH", help="the file or folder to write; default: beside the model's folder")

    add = command(push, "upload a model with its tokenizer and card to the Hugging Face Hub")
    add("directory", type=Path, help="the output of a stage, or a run, of which the last model is uploaded")
    add("repository", metavar="USER/NAME", help="the repository; made if it is not there yet, private")
    add("--public", action="store_true", help="everyone can see a repository that is made")

    add = command(judge_check, "ask a judge about pairs that people have labeled: agreement, biases, cost")
    add("pairs", help="LLMBar's, Auto-J's, JudgeBench's, or Chatbot Arena's layout, or preference pairs: a file")
    add("--judge", required=True, help="a model's folder or name, or its name at the endpoint")
    add("--judge_endpoint", metavar="URL", help="base URL of an OpenAI-compatible server")
    add("--api_key_variable", metavar="NAME", help="environment variable with the endpoint's key")
    add("--judge_load_in", choices=["4bit", "8bit"], help="quantize a local judge")
    add("--judge_vllm_program", metavar="PROGRAM", help="run a local judge by vLLM: its program")
    add("--judge_max_tokens", type=int, default=4096, metavar="N", help="longest reply; default: 4096")
    add("--concurrency", type=int, default=8, metavar="N", help="requests at a time; default: 8")
    add("--limit", type=int, metavar="N", help="only the first pairs")
    add("--json", type=Path, default=Path("judge-check.json"), metavar="FILE", help="write the results there")

    add = command(schema, "write a JSON Schema for each kind of recipe, for editors")
    add("directory", type=Path, nargs="?", default=Path("recipes/schema"))
    add("--markdown", type=Path, metavar="FILE", help="also write a reference of all keys")
    return parser


if __name__ == "__main__":
    main()
