"""Strict recipes: one flat YAML whose keys are the fields of a few dataclasses, with `--key value` on top.

`read` needs neither torch nor TRL, so that "up to date" can be said at once; `build` checks every key and every type
and makes the dataclasses. Both refuse what `TrlParser` lets pass: duplicate keys, abbreviations, wrong types.
"""

import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml

from gemma2_post.core.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and reads `2e-5` as a number and `no` as text, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise UserError(f"{self.name}: the key in line {line} is not text; write `key: value`")
            if key in lines:
                raise UserError(
                    f"{self.name}: {key} is given twice, in lines {lines[key]} and {line}; keep one of them"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


_YAML_1_1_ONLY = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "timestamp")}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _YAML_1_1_ONLY]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(path: str | Path) -> dict[str, object]:
    """The mapping in a YAML file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such recipe; `ls recipes/*/` shows those that come with the project")
    values = _parse(Path(path).read_bytes(), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def parse_value(text: str) -> object:
    """A value from the command line, read as YAML."""
    return _parse(text, f"command line: {text!r}")


def _parse(text: str | bytes, name: str) -> object:
    try:
        loader = _StrictLoader(text)
        loader.name = name
        return loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: this is not valid YAML ({' '.join(str(error).split())})") from error


def read(arguments: Sequence[str], needs_config: bool = True) -> tuple[str, dict[str, object]]:
    """Reads `--config FILE [--key value ...]`: the file's name and the merged keys, not yet checked.

    Several values after a key are a list: `--eta 0 0.3 1`.

    Args:
        needs_config: whether there must be a file; without one, the command line is what errors name.
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
        if not texts:
            raise UserError(f"command line: --{key} has no value; write --{key} VALUE")
        if key in values or (key == "config" and config):
            raise UserError(f"command line: --{key} is given twice; keep one of them")
        if key == "config":
            if len(texts) > 1:
                raise UserError(f"command line: {texts[1]!r} belongs to no key; write --key value")
            config = texts[0]
        else:
            read_values = [parse_value(text) for text in texts]
            values[key] = read_values if len(texts) > 1 else read_values[0]
    if config is None and needs_config:
        raise UserError("command line: --config is missing; write --config recipes/tiny/sft.yaml, for example")
    return (config, load_yaml(config) | values) if config else ("command line", values)


def build(where: str, values: dict[str, object], classes: Sequence[type], refused: dict[str, str]) -> tuple:
    """The dataclasses filled from `values`.

    Args:
        where: what an error names first, usually the recipe's file.
        values: key to value; each key is a field of one of the classes.
        classes: dataclasses without common field names.
        refused: fields that exist but must not be set, with the reason.
    """
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    fields = {field.name: field for cls in classes for field in dataclasses.fields(cls) if field.init}
    fitted: dict[str, object] = {}
    refuse(where, values, refused)
    for key, value in values.items():
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), [name for name in fields if name not in refused], n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help for the keys"
            raise UserError(f"{where}: unknown key {key} (value {value!r}); {hint}")
        fitted[key] = _fitted(f"{where}: {key}", value, hints[key])
    missing = [
        name
        for name, field in fields.items()
        if name not in fitted and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing; add `{missing[0]}: VALUE`")
    built = []
    for cls in classes:
        names = fitted.keys() & {field.name for field in dataclasses.fields(cls)}
        try:
            built.append(cls(**{name: fitted[name] for name in names}))
        except (ValueError, TypeError, ImportError) as error:  # from the checks of transformers' and TRL's own classes
            raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    return tuple(built)


def refuse(where: str, values: dict[str, object], refused: dict[str, str]) -> None:
    """Raises if a key is set that must not be, with the reason."""
    for key in values:
        if key in refused:
            raise UserError(f"{where}: {key} must not be set: {refused[key]}")


def _fitted(where: str, value: object, hint: object) -> object:
    """The value as the type hint wants it, or a `UserError`."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(where, value, [hint], {})[0]
    if typing.get_origin(hint) is list and isinstance(value, list):
        (item,) = typing.get_args(hint)
        return [_fitted(f"{where}[{i}]", element, item) for i, element in enumerate(value)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            if _fits(value, option):
                return _fitted(where, value, option)
    elif _fits(value, hint):
        return float(value) if hint is float else value
    raise UserError(f"{where} is {value!r} ({type(value).__name__}); write {_describe(hint)}")


def _fits(value: object, hint: object) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return value in [member.value for member in origin]
    return origin is typing.Any or (isinstance(origin, type) and isinstance(value, origin))


def _describe(hint: object) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if typing.get_origin(hint) is list:
        return f"a list, each item {_describe(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def describe_keys(classes: Sequence[type]) -> str:
    """One line per field, for --help."""
    lines = []
    for cls in classes:
        lines.append(f"\nkeys of {cls.__name__}:")
        for field in dataclasses.fields(cls):
            text = " ".join(str(field.metadata.get("help", "")).split())
            lines.append(f"  {field.name:34}{text[:110]}")
    return "\n".join(lines)
