"""Recipe files: strict YAML, one flat mapping; recipes in a folder can include the keys they share from one file.

Unlike YAML libraries, refuses duplicate keys and reads values as YAML 1.2 does (`no` is text, `2e-5` is a number).
"""

import copy
import re
from functools import cache
from pathlib import Path

import yaml

from gemma2_post.stage.errors import PlacedError

INCLUDE = "include"
"""Key that names a file in the same folder, whose keys apply unless the recipe sets them itself."""
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Old names of keys, which still work, with the present ones: transformers 5 has renamed them."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML loader with these rules."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise PlacedError(f"{self.name}: the key in line {line} is not text; write `key: value`")
            if key in lines:
                raise PlacedError(
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
        raise PlacedError(f"{path}: there is no such recipe; `ls recipes/*/` shows those that come with the project")
    values = _parse(Path(path).read_bytes(), str(path))
    if not isinstance(values, dict):
        raise PlacedError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def load_recipe(path: str | Path) -> dict[str, object]:
    """The keys of a stage's recipe: the keys of the file that it includes, overridden by its own."""
    values = load_yaml(path)
    included = values.pop(INCLUDE, None)
    values = renamed(values, path)
    if included is None:
        return values
    if not isinstance(included, str):
        raise PlacedError(f"{path}: include is {included!r}; write the name of one file beside the recipe")
    shared = Path(path).parent / included
    return renamed(load_yaml(shared), shared) | values


def renamed(values: dict[str, object], path: str | Path) -> dict[str, object]:
    """The keys of a file, each by its present name.

    Raises:
        UserError: A key is given by both names.
    """
    for old, new in RENAMED.items():
        if old in values and new in values:
            raise PlacedError(f"{path}: {old} is the old name of {new}, and both are given; keep {new}")
    return {RENAMED.get(name, name): value for name, value in values.items()}


def parse_value(text: str) -> object:
    """A value from the command line, read as YAML."""
    return _parse(text, f"command line: {text!r}")


def _parse(text: str | bytes, name: str) -> object:
    return copy.deepcopy(_parsed(text, name))


@cache  # a pipeline reads each recipe many times, and YAML is slow
def _parsed(text: str | bytes, name: str) -> object:
    try:
        loader = _StrictLoader(text)
        loader.name = name
        return loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlacedError(f"{name}: this is not valid YAML ({' '.join(str(error).split())})") from error
