"""User functions that a recipe names as `module:function`."""

import importlib
import inspect
from collections.abc import Callable

from gemma2_post.stage.errors import UserError


def is_function(path: str) -> bool:
    """Whether a path has the form `module:function`."""
    module, colon, name = path.partition(":")
    return bool(colon) and not name.startswith("//") and all(part.isidentifier() for part in module.split("."))


def load_function(path: str) -> Callable:
    """The function that a recipe names as `module:function`; a `UserError` if there is none."""
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{path}: there is no such function ({error}); write module:function") from error
    if not inspect.isfunction(function):
        raise UserError(f"{path}: is {type(function).__name__}, not a function; write module:function")
    return function


def load_grader(path: str, columns: list[str]) -> Callable[..., list[float]]:
    """A function that grades answers; called as TRL calls reward functions, with `completions` and these columns.

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
    return function
