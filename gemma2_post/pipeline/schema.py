"""JSON Schemas of all recipes, for editors, and a reference of their keys; both generated from the dataclasses."""

import dataclasses
import enum
import types
import typing
from dataclasses import MISSING
from pathlib import Path

from gemma2_post.pipeline.entries import PipelineRecipe, StageEntry, names_of_outputs
from gemma2_post.stage import contract
from gemma2_post.stage.command import Command
from gemma2_post.stage.recipe import Key, keys_of
from gemma2_post.stage.recipe_file import INCLUDE
from gemma2_post.stage.reference import allowed, grouped, is_of_library, spelled, type_and_default
from gemma2_post.stage.stages import STAGES, command_of

Schema = dict[str, typing.Any]

PIPELINE = "pipeline"
_DIALECT = "http://json-schema.org/draft-07/schema#"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", dict: "object"}


def write_schemas(directory: Path) -> None:
    """Writes `STAGE.json` for each stage, and `pipeline.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        contract.write_json(directory / f"{name}.json", schema_of(command_of(name)))
    contract.write_json(directory / f"{PIPELINE}.json", pipeline_schema())


def schema_of(command: Command) -> Schema:
    """Schema of a stage's recipe."""
    keys = keys_of(command.recipe)
    properties = {key.name: _property(key) for key in keys.values() if key.name not in command.refused}
    properties |= {
        name: {"not": {}, "description": f"Must not be set: {command.refused[name]}"}
        for name in keys
        if name in command.refused
    }
    properties[INCLUDE] = {
        "type": "string",
        "description": "A file beside the recipe with keys that several recipes share.",
    }
    parts = [
        field.metadata["part"] for field in dataclasses.fields(command.recipe) if field.metadata.get("is_optional")
    ]
    optional = {name for part in parts for name in keys_of(part)}
    needed = [key.name for key in keys.values() if key.default is MISSING and key.name not in optional]
    return _mapping(f"gemma2_post: {command.name}", properties) | {
        "anyOf": [{"required": [*dict.fromkeys([*needed, "output_dir"])]}, {"required": [INCLUDE]}]
    }


def pipeline_schema() -> Schema:
    """Schema of a pipeline recipe; the stages' keys that name models may name earlier stages."""
    reference = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "The earlier stage, or stages, whose output this key of its recipe names.",
    }
    entry = {key.name: _property(key) for key in keys_of(StageEntry).values() if key.name != "reads"}
    references = dict.fromkeys(names_of_outputs(), reference)
    references["policies"] = {
        "anyOf": [*reference["anyOf"], *entry["members"]["anyOf"]],
        "description": f"{reference['description']} For rlhf: its members.",
    }
    entries = _mapping("a stage", entry | references) | {"required": ["recipe"]}
    properties = {key.name: _property(key) for key in keys_of(PipelineRecipe).values()}
    properties["stages"] = {"type": "object", "additionalProperties": entries, "minProperties": 1}
    return _mapping("gemma2_post: a pipeline", properties) | {"required": list(properties)}


def _mapping(title: str, properties: dict[str, Schema]) -> Schema:
    schema = {"$schema": _DIALECT, "title": title, "type": "object"}
    return schema | {"properties": properties, "additionalProperties": False}


def _property(key: Key) -> Schema:
    found = _of_type(key.hint) | key.bounds.schema
    if key.help:
        found["description"] = key.help
    if key.default is not MISSING and isinstance(key.default, str | int | float | bool):
        found["default"] = getattr(key.default, "value", key.default)
    return found


def _of_type(hint: object) -> Schema:
    """Schema of a key's values, from its type."""
    if typing.get_origin(hint) is typing.Annotated:
        return _of_type(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {"anyOf": [_of_type(option) for option in typing.get_args(hint)]}
    if typing.get_origin(hint) is typing.Literal:
        return {"enum": list(typing.get_args(hint))}
    if typing.get_origin(hint) is list:
        return {"type": "array", "items": _of_type(typing.get_args(hint)[0])}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        fields = keys_of(hint)
        needed = [key.name for key in fields.values() if key.default is MISSING]
        return _mapping(hint.__name__, {key.name: _property(key) for key in fields.values()}) | {"required": needed}
    kind = _TYPES.get(typing.get_origin(hint) or hint)  # type: ignore[arg-type]  # any other type allows everything
    return {"type": kind} if kind else {}


# --- the reference ---


def write_reference(path: Path) -> None:
    """Writes a Markdown page of all keys: each stage's own, then those of the libraries' classes, each class once."""
    lines = [
        "# Keys of the recipes",
        "",
        "Generated by `gemma2-post schema --markdown docs/reference.md`. A recipe of a stage may have the keys of its",
        "own section and those of the library classes that it names.",
    ]
    of_libraries: dict[str, dict[str, list[Key]]] = {}
    for name in STAGES:
        command = command_of(name)
        groups = grouped(command.recipe, command.refused)
        own = {title: keys for title, keys in groups.items() if not is_of_library(keys[0])}
        others = [keys for keys in groups.values() if is_of_library(keys[0])]
        for keys in others:
            of_libraries.setdefault(keys[0].part.__name__, {})[name] = keys
        classes = ", ".join(f"`{keys[0].part.__name__}`" for keys in others)
        lines += ["", f"## {name}", "", command.documentation.split("\n\n")[0], ""]
        lines += [f"In addition: the keys of {classes}.", ""] if classes else []
        for title, keys in own.items():
            lines += _table(f"### {title}", keys)
    shared = _shared([keys for each in of_libraries.values() for keys in each.values() if len(each) == 1])
    lines += ["", "## Keys of libraries", ""]
    lines += _table("### In every training stage", shared)
    for title, by_stage in of_libraries.items():
        keys = list({key.name: key for each in by_stage.values() for key in each}.values())
        lines += _table(f"### {title}", [key for key in keys if key.name not in {each.name for each in shared}])
    contract.write_text(path, "\n".join(lines).rstrip() + "\n")


def _shared(classes: list[list[Key]]) -> list[Key]:
    """The keys that have the same meaning in all of these classes."""
    first, *others = [{key.name: key for key in keys} for keys in classes]

    def is_in(other: dict[str, Key], key: Key) -> bool:
        return key.name in other and type_and_default(other[key.name]) == type_and_default(key)

    return [key for key in first.values() if all(is_in(other, key) for other in others)]


def _table(title: str, keys: list[Key]) -> list[str]:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    def default(key: Key) -> str:
        return "required" if key.default is MISSING else f"`{cell(spelled(key.default))}`"

    rows = [f"| `{key.name}` | {cell(allowed(key))} | {default(key)} | {cell(key.help)} |" for key in keys]
    return [title, "", "| key | type | default | |", "|---|---|---|---|", *rows, ""]
