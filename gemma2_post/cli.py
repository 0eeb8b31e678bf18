"""The `gemma2-post` command. Each subcommand imports what it needs when it is called, so that --help is quick."""

import argparse
from pathlib import Path
from typing import Any

from gemma2_post.stage.errors import UserError, reported


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gemma2-post", description="Post-training of Gemma 2, end to end.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True)
    for add in (_add_run, _add_check, _add_plan, _add_report, _add_chat, _add_schema):
        add(commands)
    arguments = vars(parser.parse_args())
    with reported():
        arguments.pop("call")(**arguments)


def run(
    pipeline: Path,
    until: str | None = None,
    overrides: dict[str, dict[str, object]] | None = None,
    run_dir: Path | None = None,
    seed: int | None = None,
    report: bool = False,
) -> None:
    """Runs a pipeline recipe, shows how far it is, and at the end where to look at what it made.

    Args:
        overrides: stage name to recipe keys that take the place of the recipe's.
        run_dir: in place of the pipeline's.
        seed: of every stage, in place of the recipes'.
        report: whether to print the report at the end.
    """
    from gemma2_post.pipeline.run import run
    from gemma2_post.pipeline.steps import load_pipeline
    from gemma2_post.report import report as reports
    from gemma2_post.report.terminal import View, terminal

    loaded, view = load_pipeline(pipeline, run_dir, seed, overrides), View(terminal())
    has_begun = run(loaded, until, view)
    view.finish(loaded.run_dir, has_begun)
    if report:
        reports.report(loaded.run_dir)
    elif has_begun:
        view.say(f"to look at: {reports.write(loaded.run_dir)[0]}")


def say_what_would_run(
    pipeline: Path,
    until: str | None = None,
    overrides: dict[str, dict[str, object]] | None = None,
    run_dir: Path | None = None,
    seed: int | None = None,
) -> None:
    """Says what `run` would do, and why."""
    from gemma2_post.pipeline.run import explain
    from gemma2_post.pipeline.steps import load_pipeline

    explain(load_pipeline(pipeline, run_dir, seed, overrides), until)


def check(pipelines: list[Path]) -> None:
    """Checks pipeline recipes, and says what each would run."""
    from gemma2_post.pipeline.steps import load_pipeline

    loaded = [load_pipeline(path) for path in pipelines]
    _quiet()  # the structure of all is fine; the libraries of the stages are slow to import
    from gemma2_post.pipeline import check

    for each in loaded:
        print(f"{each.path}: {check.report(check.check(each))}")


def plan(
    pipeline: Path,
    until: str | None = None,
    overrides: dict[str, dict[str, object]] | None = None,
    gpus: int | None = None,
    memory: float | None = None,
) -> None:
    """Shows memory and disk of each stage."""
    from gemma2_post.pipeline.steps import load_pipeline
    from gemma2_post.report.terminal import terminal

    loaded = load_pipeline(pipeline, overrides=overrides)
    loaded.steps(until)
    _quiet()
    from gemma2_post.pipeline.check import check
    from gemma2_post.planning.plan import show

    show(check(loaded, until), terminal(), gpus, memory)


def report(run_dir: Path) -> None:
    """Shows what a run has made."""
    from gemma2_post.report.report import report

    report(run_dir)


def chat(directory: str, prompt: str | None, load: str | None, temperature: float, max_new_tokens: int) -> None:
    """Talks to a model."""
    from gemma2_post.chat import chat

    chat(directory, prompt, load, temperature, max_new_tokens)


def schema(directory: Path, markdown: Path | None) -> None:
    """Writes the JSON Schemas of all recipes, and the reference of all keys."""
    _quiet()
    from gemma2_post.pipeline.schema import write_reference, write_schemas

    write_schemas(directory)
    if markdown:
        write_reference(markdown)


def parse_overrides(settings: list[str]) -> dict[str, dict[str, object]]:
    """`["sft.learning_rate=1e-4"]` becomes `{"sft": {"learning_rate": 0.0001}}`."""
    from gemma2_post.stage.recipe_file import parse_value

    overrides: dict[str, dict[str, object]] = {}
    for setting in settings:
        target, equals, value = setting.partition("=")
        stage, dot, key = target.partition(".")
        if not (equals and dot and stage and key):
            raise UserError(f"--set {setting}: expected STAGE.KEY=VALUE, for example sft.learning_rate=1e-4")
        overrides.setdefault(stage, {})[key] = parse_value(value)
    return overrides


def _quiet() -> None:
    """Keeps bitsandbytes from missing, when it is imported, a kernel for the CPU that nobody here needs."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# --- arguments ---

Commands = Any
"""What argparse returns for subcommands, which has no public name."""


def _add(commands: Commands, name: str, help: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help, allow_abbrev=False)


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", type=Path, help="for example recipes/tiny/pipeline.yaml")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument(
        "--set", metavar="STAGE.KEY=VALUE", action="append", default=[], help="override a recipe's key"
    )


def _add_run(commands: Commands) -> None:
    parser = _add(commands, "run", "run a pipeline recipe; stages that are up to date are skipped")
    _add_pipeline(parser)
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="write there instead of the recipe's run_dir")
    parser.add_argument("--seed", type=int, help="of every stage, in place of the recipes'")
    parser.add_argument("--report", action="store_true", help="print the report at the end")
    parser.add_argument("--explain", action="store_true", help="say what would run, and why, without running it")

    parser.set_defaults(call=_run_or_explain)


def _run_or_explain(set: list[str], explain: bool, report: bool, **others: Any) -> None:
    overrides = parse_overrides(set)
    if explain:
        say_what_would_run(overrides=overrides, **others)
    else:
        run(overrides=overrides, report=report, **others)


def _add_check(commands: Commands) -> None:
    parser = _add(commands, "check", "check a pipeline recipe without running it")
    parser.add_argument("pipelines", type=Path, nargs="+", help="for example recipes/tiny/pipeline.yaml")
    parser.set_defaults(call=check)


def _add_plan(commands: Commands) -> None:
    parser = _add(commands, "plan", "show memory and disk of each stage, without downloading anything")
    _add_pipeline(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="in place of the accelerate configs'")
    parser.add_argument("--memory", type=float, metavar="GB", help="of each GPU; says what does not fit")
    parser.set_defaults(call=lambda set, **others: plan(overrides=parse_overrides(set), **others))


def _add_report(commands: Commands) -> None:
    parser = _add(commands, "report", "show the models of a run side by side, and conversations to read")
    parser.add_argument("run_dir", type=Path, help="for example runs/tiny")
    parser.set_defaults(call=report)


def _add_chat(commands: Commands) -> None:
    parser = _add(commands, "chat", "talk to a model")
    parser.add_argument("directory", help="the output of a stage, or any Gemma 2 chat model")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--load", choices=["4bit", "8bit"], help="quantize the weights")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most likely answer")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.set_defaults(call=chat)


def _add_schema(commands: Commands) -> None:
    parser = _add(commands, "schema", "write a JSON Schema for each kind of recipe, for editors")
    parser.add_argument("directory", type=Path, nargs="?", default=Path("recipes/schema"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write a reference of all keys")
    parser.set_defaults(call=schema)


if __name__ == "__main__":
    main()
