"""The `gemma2-post` command. It imports what a subcommand needs when that is called, so that --help is quick."""

import argparse
from pathlib import Path

from gemma2_post.core.errors import UserError, reported


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gemma2-post", description="Post-training of Gemma 2, end to end.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run_parser = commands.add_parser(
        "run", help="run a pipeline recipe; what is up to date is skipped", allow_abbrev=False
    )
    run_parser.add_argument("pipeline", type=Path, help="for example recipes/tiny/pipeline.yaml")
    run_parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run_parser.add_argument(
        "--set", metavar="STAGE.KEY=VALUE", action="append", default=[], help="override a recipe's key"
    )

    run_parser.add_argument("--run_dir", type=Path, metavar="DIR", help="write there, not to the recipe's run_dir")
    run_parser.add_argument("--seed", type=int, help="of every stage, in place of the recipes'")

    run_parser.add_argument("--report", action="store_true", help="at the end show what came out of it")
    run_parser.add_argument("--explain", action="store_true", help="say what would run, and why, without running it")

    check_parser = commands.add_parser("check", help="check a pipeline recipe without running it", allow_abbrev=False)
    check_parser.add_argument("pipelines", type=Path, nargs="+", help="for example recipes/tiny/pipeline.yaml")

    plan_parser = commands.add_parser(
        "plan", help="memory and disk of each stage, without downloading anything", allow_abbrev=False
    )
    plan_parser.add_argument("pipeline", type=Path, help="for example recipes/gemma-2-9b/pipeline.yaml")
    plan_parser.add_argument("--gpus", type=int, metavar="N", help="in place of the accelerate configs'")
    plan_parser.add_argument("--memory", type=float, metavar="GB", help="of each GPU; says what would not fit")
    plan_parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    plan_parser.add_argument("--set", metavar="STAGE.KEY=VALUE", action="append", default=[], help="override a key")

    report_parser = commands.add_parser(
        "report", help="the models of a run beside each other, and conversations to read", allow_abbrev=False
    )
    report_parser.add_argument("run_dir", type=Path, help="for example runs/tiny")

    chat_parser = commands.add_parser("chat", help="talk to a model", allow_abbrev=False)
    chat_parser.add_argument("directory", help="the output of a stage, or any Gemma 2 chat model")
    chat_parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    chat_parser.add_argument("--load", choices=["4bit", "8bit"], help="quantise the weights")
    chat_parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most likely answer")
    chat_parser.add_argument("--max_new_tokens", type=int, default=512)

    arguments = parser.parse_args()
    with reported():
        if arguments.command == "run":
            from gemma2_post.pipeline.run import explain, run

            (explain if arguments.explain else run)(
                arguments.pipeline,
                arguments.until,
                parse_overrides(arguments.set),
                arguments.run_dir,
                arguments.seed,
            )
            if arguments.report and not arguments.explain:
                from gemma2_post.pipeline.report import report
                from gemma2_post.pipeline.steps import load_pipeline

                report(load_pipeline(arguments.pipeline, arguments.run_dir).run_dir)
        elif arguments.command in ("check", "plan"):
            import logging

            from gemma2_post.pipeline.steps import load_pipeline

            if arguments.command == "check":
                pipelines = [load_pipeline(path) for path in arguments.pipelines]
            else:
                pipelines = [load_pipeline(arguments.pipeline, overrides=parse_overrides(arguments.set))]
                pipelines[0].steps(arguments.until)
            # What is wrong with their structure has been said; the stages are slow to import.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported, it misses a kernel for the CPU
            from gemma2_post.pipeline import check, plan

            if arguments.command == "check":
                for pipeline in pipelines:
                    print(f"{pipeline.path}: {check.report(check.check(pipeline))}")
            else:
                plan.show(check.check(pipelines[0], arguments.until), arguments.gpus, arguments.memory)
        elif arguments.command == "report":
            from gemma2_post.pipeline.report import report

            report(arguments.run_dir)
        else:
            from gemma2_post.chat import chat

            chat(
                arguments.directory, arguments.prompt, arguments.load, arguments.temperature, arguments.max_new_tokens
            )


def parse_overrides(settings: list[str]) -> dict[str, dict[str, object]]:
    """`["sft.learning_rate=1e-4"]` becomes `{"sft": {"learning_rate": 0.0001}}`."""
    from gemma2_post.core.recipe import parse_value

    overrides: dict[str, dict[str, object]] = {}
    for setting in settings:
        target, equals, value = setting.partition("=")
        stage, dot, key = target.partition(".")
        if not (equals and dot and stage and key):
            raise UserError(f"--set {setting}: expected STAGE.KEY=VALUE, for example sft.learning_rate=1e-4")
        overrides.setdefault(stage, {})[key] = parse_value(value)
    return overrides


if __name__ == "__main__":
    main()
