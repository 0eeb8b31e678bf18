"""A recipe is one typed value: a dataclass whose fields are keys, or parts that have their own keys.

A part is one of our dataclasses or one of TRL's config classes. In a file all keys are on one level, so no two parts
of a recipe share a key. `build` checks every key and every type. Library parts are given as text (`trl:SFTConfig`)
because importing one takes seconds; what a recipe names, and whether its output is up to date, is known without them.
"""

import dataclasses
import difflib
import enum
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from gemma2_post.stage.bounds import ANY, Bounds
from gemma2_post.stage.errors import UserError, located

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

_NAME_BYTES = 255


class Effect(enum.Enum):
    """What a change of a key changes."""

    OUTPUT = "output"
    """What the stage makes: weights or data."""
    MEASUREMENTS = "measurements"
    """Only what is measured of it."""
    NONE = "none"


def key(default: object = MISSING, help: str = "", effect: Effect = Effect.OUTPUT, bounds: Bounds = ANY) -> Any:
    """A field that is a key of the recipe.

    Args:
        default: The default value; without one, the key is required.
        help: What the key means, for `--help`, the schema and the reference.
        effect: What a change of it changes; see `stage/fingerprint.py`.
        bounds: The values that it may have.
    """
    return dataclasses.field(default=default, metadata={"help": help, "effect": effect, "bounds": bounds})


def part(
    kind: type | str,
    is_optional: bool = False,
    bounds: Mapping[str, Bounds] | None = None,
    only_measures: bool = False,
) -> Any:
    """A field whose keys are those of a dataclass.

    Args:
        kind: The dataclass, or `module:name` for one of a library's.
        is_optional: Whether the part is None unless one of its keys is given.
        bounds: The values that keys of a library's class may have, by key; names that it does not have are ignored.
        only_measures: Whether all of its keys affect measurements only, whatever they say themselves.
    """
    metadata = {"part": kind, "is_optional": is_optional, "bounds": bounds or {}, "only_measures": only_measures}
    return dataclasses.field(metadata=metadata)


@dataclass(frozen=True)
class Key:
    """A key of a recipe."""

    name: str
    hint: object
    """Its type."""
    default: object
    """`MISSING` if the key is required."""
    help: str
    effect: Effect
    part: type
    """The dataclass that declares it."""
    bounds: Bounds = ANY


def keys_of(recipe_class: type, of_libraries: bool = True) -> dict[str, Key]:
    """The keys of a recipe by name, in the order of its fields.

    Args:
        of_libraries: Whether to include the keys of libraries' classes, which must be imported for this.
    """
    return _keys_of(recipe_class, of_libraries)


@cache  # apart, because mypy does not take a class for hashable
def _keys_of(recipe_class: type, of_libraries: bool) -> dict[str, Key]:
    found: dict[str, Key] = {}
    hints = _hints(recipe_class)
    for field in dataclasses.fields(recipe_class):
        if (kind := field.metadata.get("part")) is not None:
            if of_libraries or isinstance(kind, type):
                bounds = field.metadata["bounds"]
                for name, key in keys_of(_loaded(kind), of_libraries).items():
                    key = dataclasses.replace(key, bounds=bounds.get(name, key.bounds))
                    if field.metadata["only_measures"] and key.effect == Effect.OUTPUT:
                        key = dataclasses.replace(key, effect=Effect.MEASUREMENTS)
                    found[name] = key
        elif field.init:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            text = " ".join(str(field.metadata.get("help", "")).split())
            effect = field.metadata.get("effect", Effect.OUTPUT)
            bounds = field.metadata.get("bounds", ANY)
            found[field.name] = Key(field.name, hints[field.name], default, text, effect, recipe_class, bounds)
    return found


def _hints(recipe_class: type) -> dict[str, object]:
    specs = [field.metadata.get("part") for field in dataclasses.fields(recipe_class)]
    unloaded = {spec.partition(":")[2]: object for spec in specs if isinstance(spec, str)}
    return typing.get_type_hints(recipe_class, localns=unloaded or None, include_extras=True)


def _loaded(kind: type | str) -> type:
    return kind if isinstance(kind, type) else pkgutil.resolve_name(kind)


# --- from values to a recipe and back ---


def build(recipe_class: type[R], values: dict[str, object], refused: Mapping[str, str] | None = None) -> R:
    """The recipe with these keys.

    Args:
        refused: Keys that exist but must not be set, with the reason.

    Raises:
        UserError: A key is unknown, refused or missing; a value has the wrong type, is out of bounds, or is refused by
            a library.
    """
    refused = refused or {}
    refuse(values, refused)
    keys = keys_of(recipe_class)
    fitted: dict[str, object] = {}
    for name, value in values.items():
        if name not in keys:
            nearest = difflib.get_close_matches(str(name), [each for each in keys if each not in refused], n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see --help for the keys"
            raise UserError(f"unknown key {name} (value {value!r}); {hint}")
        fitted[name] = _fitted(name, value, keys[name].hint)
        if problem := keys[name].bounds.problem(fitted[name]):
            raise UserError(f"{name} {problem}")
    for each in _needed(recipe_class, fitted):
        if each.name not in fitted and each.default is MISSING:
            raise UserError(f"{each.name} is missing; add `{each.name}: VALUE`")
    return _assembled(recipe_class, fitted)


def refuse(values: dict[str, object], refused: Mapping[str, str]) -> None:
    """Raises a `UserError` with the reason if a key is set that must not be."""
    for name in values:
        if name in refused:
            raise UserError(f"{name} must not be set: {refused[name]}")


def _is_left_out(field: dataclasses.Field, fitted: dict[str, object]) -> bool:
    return bool(field.metadata.get("is_optional")) and not fitted.keys() & keys_of(_loaded(field.metadata["part"]))


def _needed(recipe_class: type, fitted: dict[str, object]) -> Iterator[Key]:
    """The keys of all parts, except optional parts that are left out."""
    for field in dataclasses.fields(recipe_class):
        if (kind := field.metadata.get("part")) is None:
            if field.init:
                yield keys_of(recipe_class)[field.name]
        elif not _is_left_out(field, fitted):
            yield from _needed(_loaded(kind), fitted)


def _assembled(recipe_class: type[R], fitted: dict[str, object]) -> R:
    arguments: dict[str, object] = {}
    for field in dataclasses.fields(recipe_class):
        if (kind := field.metadata.get("part")) is not None:
            arguments[field.name] = None if _is_left_out(field, fitted) else _assembled(_loaded(kind), fitted)
        elif field.name in fitted:
            arguments[field.name] = fitted[field.name]
    try:
        return recipe_class(**arguments)
    except (
        ValueError,
        TypeError,
        ImportError,
        OSError,
    ) as error:  # from the checks of transformers' and TRL's classes
        raise UserError(" ".join(str(error).split())) from error


def values_of(recipe: Any) -> dict[str, Any]:
    """All keys of a recipe with their values, including defaults."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if "part" not in field.metadata:
            found[field.name] = value
        elif value is not None:
            found |= values_of(value)
    return found


def with_values(recipe: R, changes: dict[str, object]) -> R:
    """A copy of a recipe with other values for some keys, not checked again; ignores keys that it does not have."""
    copied: R = object.__new__(type(recipe))
    vars(copied).update(vars(recipe))
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if "part" in field.metadata and value is not None:
            setattr(copied, field.name, with_values(value, changes))
        elif field.name in changes:
            setattr(copied, field.name, changes[field.name])
    return copied


# --- one value ---


def _fitted(name: str, value: Any, hint: object) -> object:
    """The value converted to its type.

    Args:
        name: Name of the key, for errors; `datasets[0]` for an item of a list.
    """
    hint = _bare(hint)
    if isinstance(value, str) and (problem := _problem_of_text(value)):
        raise UserError(f"{name} {problem}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        with located(name):
            return build(hint, value)
    if typing.get_origin(hint) is list and isinstance(value, list):
        (item,) = typing.get_args(hint)
        return [_fitted(f"{name}[{i}]", element, item) for i, element in enumerate(value)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            if _fits(value, option):
                return _fitted(name, value, option)
    elif _fits(value, hint):
        return float(value) if hint is float else value
    raise UserError(f"{name} is {value!r} ({type(value).__name__}); write {describe(hint)}")


def _problem_of_text(text: str) -> str:
    """Why a text can be no name or path, in words that follow its key; empty if it can."""
    if "\0" in text:
        return "holds a NUL character; remove it"
    longest = max(map(len, text.encode(errors="surrogateescape").split(b"/")))
    return (
        f"has a name of {longest} bytes, and file systems take {_NAME_BYTES}; shorten it"
        if longest > _NAME_BYTES
        else ""
    )


def _bare(hint: object) -> object:
    """The type inside an `Annotated`; any other type as it is."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _fits(value: object, hint: object) -> bool:
    hint = _bare(hint)
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


def is_boolean(hint: object) -> bool:
    """Whether a key of this type is true or false (or none)."""
    return bool in (_bare(hint), *typing.get_args(hint))


def describe(hint: object) -> str:
    """A type in words: `a whole number`, `text`, `one of float32, bfloat16`."""
    hint = _bare(hint)
    names: dict[object, str] = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [describe(option) for option in typing.get_args(hint) if option is not type(None)]
        return " or ".join(dict.fromkeys(options))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if typing.get_origin(hint) is list:
        return f"a list, each item {describe(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return names.get(hint, getattr(hint, "__name__", str(hint)))
