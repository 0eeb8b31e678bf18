"""The keys of a recipe in words, for `--help` and the reference in the documentation."""

import dataclasses
import textwrap
from collections.abc import Mapping

from gemma2_post.stage.recipe import Key, describe, keys_of

WIDTH = 100


def wrapped(text: str) -> str:
    """A module's docstring in `WIDTH` columns; indented paragraphs, which show commands, stay as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(each if each.startswith(" ") else textwrap.fill(each, WIDTH) for each in paragraphs)


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
    """The allowed keys, grouped by a title for the class that declares them; the project's own come first."""
    groups: dict[str, list[Key]] = {}
    for key in sorted(keys_of(recipe_class).values(), key=is_of_library):
        if key.name not in refused:
            groups.setdefault(_title(key, recipe_class), []).append(key)
    return groups


def is_of_library(key: Key) -> bool:
    """Whether a library's class declares the key."""
    return key.part.__module__.partition(".")[0] in ("trl", "transformers")


def _title(key: Key, recipe_class: type) -> str:
    if is_of_library(key):
        return f"Keys of {key.part.__name__} ({key.part.__module__.partition('.')[0]})"
    if issubclass(recipe_class, key.part):
        return "Keys of this stage"
    return (key.part.__doc__ or key.part.__name__).splitlines()[0].rstrip(".")


def type_and_default(key: Key) -> str:
    """`(a whole number; default 64)`."""
    if key.default is dataclasses.MISSING:
        return f"({allowed(key)}; required)"
    return f"({allowed(key)}; default {spelled(key.default)})"


def allowed(key: Key) -> str:
    """The type of a key and its range: `a whole number, 1 or more`."""
    return f"{describe(key.hint)}, {key.bounds.words}" if key.bounds.words else describe(key.hint)


def spelled(value: object) -> str:
    """A value as YAML spells it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))
