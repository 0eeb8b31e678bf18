"""What a recipe's keys are, in words: for `--help`, and for the reference in the documentation."""

import dataclasses
import textwrap
from collections.abc import Mapping

from gemma2_post.stage.recipe import Key, describe, keys_of

WIDTH = 100


def describe_keys(recipe_class: type, refused: Mapping[str, str]) -> str:
    """Every key with its type, its default and its help, grouped by the class that declares it."""
    lines = []
    for title, keys in grouped(recipe_class, refused).items():
        lines.append(f"{title}:")
        for key in keys:
            lines += textwrap.wrap(
                f"--{key.name} {type_and_default(key)}", WIDTH, initial_indent="  ", subsequent_indent="    "
            )
            lines += textwrap.wrap(key.help, WIDTH, initial_indent="      ", subsequent_indent="      ")
        lines.append("")
    return "\n".join(lines)


def grouped(recipe_class: type, refused: Mapping[str, str]) -> dict[str, list[Key]]:
    """The keys that may be set, by a title for the class that declares them; the project's own come first."""
    groups: dict[str, list[Key]] = {}
    for key in keys_of(recipe_class).values():
        if key.name not in refused:
            groups.setdefault(_title(key.part, recipe_class), []).append(key)
    return dict(sorted(groups.items(), key=lambda group: " of " in group[0]))


def _title(part: type, recipe_class: type) -> str:
    library = part.__module__.partition(".")[0]
    if library in ("trl", "transformers"):
        return f"keys of {part.__name__} ({library})"
    documentation = (part.__doc__ or "").splitlines()
    is_written = documentation and not documentation[0].startswith(f"{part.__name__}(")
    return documentation[0].rstrip(".").lower() if is_written and part is not recipe_class else "keys of this stage"


def type_and_default(key: Key) -> str:
    """`(a whole number; default 64)`."""
    if key.default is dataclasses.MISSING:
        return f"({describe(key.hint)}; required)"
    return f"({describe(key.hint)}; default {spelled(key.default)})"


def spelled(value: object) -> str:
    """A value as YAML spells it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))
