"""User functions that a recipe names as `module:function`."""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from typing import Any

from gemma2_post.stage.errors import OneProcessError, UserError


def is_function(path: str) -> bool:
    """Whether a path has the form `module:function`."""
    module, colon, name = path.partition(":")
    return bool(colon) and not name.startswith("//") and all(part.isidentifier() for part in module.split("."))


def load_function(path: str) -> Callable:
    """The function that a recipe names as `module:function`.

    Raises:
        UserError: There is no such function, or its module cannot be imported.
    """
    if not is_function(path):
        raise UserError(f"{path}: there is no such function; write module:function")
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(raised(path, "importing its module", error)) from error
        raise UserError(f"{path}: there is no such function ({error}); write module:function") from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserError(raised(path, "importing its module", error)) from error
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"{path}: there is no such function (no {name!r} in {module_name}); write module:function")
    if not inspect.isfunction(function):
        raise UserError(f"{path}: is {type(function).__name__}, not a function; write module:function")
    return function


def load_grader(path: str, columns: list[str]) -> Callable[..., list[float]]:
    """A function that grades answers; called as TRL calls reward functions, with `completions` and these columns.

    What it returns is checked whenever it is called; see `checked`.

    Raises:
        UserError: There is no such function, or it does not accept these arguments.
    """
    function = load_function(path)
    try:
        inspect.signature(function).bind(completions=[], **{column: [] for column in columns})
    except TypeError as error:
        raise UserError(
            f"{path} cannot be called with completions and the columns {', '.join(columns) or '(none)'} "
            f"({error}); name what it needs in columns"
        ) from error
    return checked(path, function)


def checked(path: str, function: Callable) -> Callable[..., list[float]]:
    """The function under its own name; it must return a finite number for each of its `completions`.

    None and NaN are errors, too, which TRL would read as "cannot be scored".
    """

    def checked_call(**arguments: Any) -> list[float]:
        values, num_answers = call(path, function, **arguments), len(arguments["completions"])
        if not isinstance(values, list | tuple) or len(values) != num_answers:
            is_listed = isinstance(values, list | tuple)
            found = f"{len(values)} values" if is_listed else f"{type(values).__name__}, not a list"
            raise OneProcessError(f"{path} returned {found} for {num_answers} answers; return one each")
        return [finite(path, value) for value in values]

    checked_call.__name__ = path.rpartition(":")[2]
    return checked_call


def call(path: str, function: Callable, *arguments: Any, **named: Any) -> Any:
    """What a user's function returns; what it raises is a `UserError` with the place in its code."""
    try:
        return function(*arguments, **named)
    except Exception as error:  # the user's code may raise anything
        raise OneProcessError(raised(path, "calling it", error)) from error


def finite(path: str, value: Any) -> float:
    """A number that a user's function returned; a `UserError` if it is none, or NaN or infinite."""
    # An integer may be too large for a float, for which even math.isfinite raises.
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise OneProcessError(f"{path} returned {repr(value)[:100]}; return a finite number")
    return float(value)


def raised(path: str, doing: str, error: BaseException) -> str:
    """What a user's code raised, and where, for an error.

    Args:
        doing: What was done when it did.
    """
    if isinstance(error, SyntaxError):
        place, message = f"{error.filename}, line {error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames[1:] if not _is_of_library(frame.filename)] or frames[-1:]
        place, message = f"{own[-1].filename}, line {own[-1].lineno}", " ".join(str(error).split())
    return f"{path}: {doing} raised {type(error).__name__}: {message or 'nothing'} ({place}); correct the function"


def _is_of_library(file: str) -> bool:
    return file.startswith("<") or "site-packages" in file or file.startswith(os.path.dirname(os.__file__))
