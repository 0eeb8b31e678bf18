"""The command line of a stage: `--config FILE [--key value ...]`."""

from collections.abc import Callable, Sequence

from gemma2_post.stage.errors import UserError
from gemma2_post.stage.recipe_file import RENAMED, load_recipe, parse_value


def read(
    arguments: Sequence[str], needs_config: bool = True, is_boolean: Callable[[str], bool | None] = lambda key: False
) -> tuple[str, dict[str, object]]:
    """The place that errors name first (the recipe's file), and the merged keys, not yet checked.

    Several values after a key make a list: `--eta 0 0.3 1`. A boolean key needs no value: `--use_peft`, `--no_bf16`.

    Args:
        needs_config: Whether a file is required; without one, errors name the command line.
        is_boolean: Whether a key is true or false, None if there is no such key; called only for keys without a value.
    """
    values: dict[str, object] = {}
    config = None
    remaining = list(arguments)
    while remaining:
        flag = remaining.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"command line: {flag!r} belongs to no key; write --key value")
        key, equals, text = flag[2:].partition("=")
        texts = [text] if equals else []
        while not equals and remaining and not remaining[0].startswith("--"):
            texts.append(remaining.pop(0))
        read_values: list[object]
        if texts:
            read_values = [text if key == "config" else parse_value(text) for text in texts]
        elif key != "config" and is_boolean(key):
            read_values = [True]
        elif is_boolean(key.removeprefix("no_")):
            key, read_values = key.removeprefix("no_"), [False]
        elif key != "config" and is_boolean(key.removeprefix("no_")) is None:
            read_values = [True]  # the recipe refuses the key, and names a similar one
        else:
            raise UserError(f"command line: --{key} has no value; write --{key} VALUE")
        key = RENAMED.get(key, key)
        if key in values or (key == "config" and config):
            raise UserError(f"command line: --{key} is given twice; keep one of them")
        if key != "config":
            values[key] = read_values if len(read_values) > 1 else read_values[0]
        elif len(texts) > 1:
            raise UserError(f"command line: {texts[1]!r} belongs to no key; write --key value")
        else:
            config = texts[0]
    if config is None and needs_config:
        raise UserError("command line: --config is missing; write --config recipes/tiny/sft.yaml, for example")
    return (config, load_recipe(config) | values) if config else ("command line", values)
