"""Types for keys that name models, data, functions or files; what a recipe reads follows from these types.

The fingerprint hashes what these keys name, `check` looks for it, the planner needs the shapes of its models, and a
pipeline uses these keys to pass on the outputs of earlier stages.
"""

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

from gemma2_post.stage.errors import UserError
from gemma2_post.stage.recipe import keys_of


class Kind(Enum):
    """What a key can name."""

    MODEL = "model"
    OTHER_MODEL = "model of any family"
    DATA = "data"
    FUNCTION = "function"
    FILE = "file"


ModelPath = Annotated[str, Kind.MODEL]
"""A model's folder or its name on the Hub."""
OtherModelPath = Annotated[str, Kind.OTHER_MODEL]
"""The folder of a model of any family, its name on the Hub, or, beside an `endpoint`, its name there."""
DataPath = Annotated[str, Kind.DATA]
"""A data set's file, its name on the Hub, or a `module:function` that creates it."""
FunctionPath = Annotated[str, Kind.FUNCTION]
"""A user's function, `module:function`."""
FilePath = Annotated[str, Kind.FILE]
"""A file or a folder."""

MEMBER = re.compile(r"(?:policy|member)-([0-9]+)")
"""Name of the folder of one of several models that one entry of a pipeline trains."""
_KEYS_OF_TRL = {"model_name_or_path": ModelPath, "teacher_model_name_or_path": ModelPath}
"""Types for those keys of TRL's classes that name something; TRL declares them as plain text."""


@dataclass(frozen=True)
class Reference:
    """Something that a recipe names with one of its keys."""

    key: str
    kind: Kind
    name: str
    revision: str | None = None


def model_keys(recipe_class: type) -> list[str]:
    """The keys of a recipe that can name models."""
    return [key for key, hint in _path_hints(recipe_class).items() if Kind.MODEL in _kinds(hint)]


def data_keys(recipe_class: type) -> list[str]:
    """The keys of a recipe that name sources of data."""
    return [
        key
        for key, hint in _path_hints(recipe_class).items()
        for part in _alternatives(hint)
        if is_dataclass(part) and Kind.DATA in _kinds(typing.get_type_hints(part, include_extras=True).get("path"))
    ]


def references(recipe_class: type, values: dict[str, object]) -> Iterator[Reference]:
    """Everything that a recipe names, in the order of its keys, except models behind an endpoint."""
    hints = _path_hints(recipe_class)
    for key, value in values.items():
        is_served = values.get("endpoint" if key == "model_name_or_path" else f"{key}_endpoint")
        if key in hints and not is_served:
            revision = values.get(key.replace("name_or_path", "revision")) if key.endswith("name_or_path") else None
            yield from _named(key, hints[key], value, revision)


def with_members(recipe_class: type, values: dict[str, object]) -> dict[str, object]:
    """The keys of a recipe; in lists of models, each folder of policies, or of members, is replaced by those in it."""
    found = dict(values)
    for key in model_keys(recipe_class):
        if isinstance(named := values.get(key), list):
            found[key] = [path for each in named for path in _members_in(each)]
    return found


def check_names(key: str, folders: list[str]) -> None:
    """Refuses folders of one name where what is measured is called by it."""
    names = [Path(folder).name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}: two folders have the same name, {name}; rename one")


def _members_in(name: object) -> list[object]:
    if isinstance(name, str) and Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        found = {path: match for path in Path(name).iterdir() if (match := MEMBER.fullmatch(path.name))}
        return [str(path) for path in sorted(found, key=lambda path: int(found[path][1]))] or [name]
    return [name]


def _path_hints(recipe_class: type) -> dict[str, object]:
    return _KEYS_OF_TRL | {name: key.hint for name, key in keys_of(recipe_class, of_libraries=False).items()}


def _named(key: str, hint: object, value: object, revision: object = None) -> Iterator[Reference]:
    if isinstance(value, list):
        for item in value:
            yield from _named(key, hint, item, revision)
    elif isinstance(value, dict):
        for part in _alternatives(hint):
            if is_dataclass(part):
                for name, inner in typing.get_type_hints(part, include_extras=True).items():
                    is_served = Kind.OTHER_MODEL in _kinds(inner) and value.get("endpoint")
                    if name in value and not is_served:
                        yield from _named(key, inner, value[name], value.get("revision"))
    elif isinstance(value, str) and (kinds := _kinds(hint)):
        is_function = Kind.FUNCTION in kinds and (len(kinds) == 1 or ":" in value)
        kind = Kind.FUNCTION if is_function else next(each for each in kinds if each != Kind.FUNCTION)
        yield Reference(key, kind, value, revision if isinstance(revision, str) else None)


def _kinds(hint: object) -> list[Kind]:
    """What a text of this type can name."""
    added = [part for each in _alternatives(hint) for part in getattr(each, "__metadata__", ())]
    return [part for part in added if isinstance(part, Kind)]


def _alternatives(hint: object) -> Iterator[object]:
    """The types in a union or of a list's items, recursively; otherwise the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType, list):
        for part in typing.get_args(hint):
            yield from _alternatives(part)
    else:
        yield hint
