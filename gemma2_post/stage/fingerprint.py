"""What the output of a stage depends on: the recipe's keys, the contents of its inputs, the code, library versions.

Nothing here imports torch, so checking whether a stage is up to date is instant.
"""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path

from gemma2_post.stage import digests
from gemma2_post.stage.paths import Kind, Reference, references
from gemma2_post.stage.recipe import keys_of

Fingerprint = dict[str, dict[str, object]]

_VERSIONS_THAT_MATTER = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "deepspeed"]
_WITHOUT_EFFECT = {"output_dir", "report_to", "run_name", "logging_steps", "disable_tqdm", "logging_dir", "project"}
"""Keys of TRL's classes that do not affect the output; our own keys say so with `has_effect=False`."""

_version = cache(metadata.version)  # reads files, and a pipeline asks once for each step


def fingerprint(
    recipe_class: type, main: Callable, values: dict[str, object], digest_of: Callable[[str], str | None]
) -> Fingerprint:
    """What the output of a stage depends on, in parts; one of our keys at its default counts as unset.

    Args:
        main: The stage's main function; its module and that module's imports are the code.
        values: The keys of the recipe.
        digest_of: Returns the content hash of something local, or None if it does not exist.
    """
    keys = keys_of(recipe_class, of_libraries=False)
    decisive = {
        name: value
        for name, value in sorted(values.items())
        if name not in _WITHOUT_EFFECT
        and not (name in keys and (not keys[name].has_effect or value == keys[name].default))
    }
    return {
        "recipe": decisive,
        "inputs": _inputs(list(references(recipe_class, decisive)), digest_of),
        "code": {"gemma2_post": digests.of_code(Path(inspect.getfile(main)))},
        "versions": {name: _version(name) for name in _VERSIONS_THAT_MATTER},
    }


def _inputs(named: list[Reference], digest_of: Callable[[str], str | None]) -> dict[str, object]:
    """Content hashes by path, and commits of what is on the Hub by `name@revision`."""
    paths = list(dict.fromkeys(each.name for each in named))
    with ThreadPoolExecutor() as pool:
        found = dict(zip(paths, pool.map(digest_of, paths), strict=True))
    for each in named:
        if found[each.name] is None and each.kind in (Kind.MODEL, Kind.DATA):
            commit = digests.of_hub(each.name, each.revision, is_dataset=each.kind == Kind.DATA)
            found[f"{each.name}@{each.revision or 'main'}"] = commit
    return {path: digest for path, digest in found.items() if digest}


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """What changed between two fingerprints, in words."""
    return [
        f"{key} {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for before, after in ((old.get(part, {}), new[part]) for part in new)
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
