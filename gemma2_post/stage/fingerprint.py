"""What the output of a stage depends on, in parts, so that each kind of change has its own consequence.

- `recipe`, `inputs`: the keys and the contents that decide what the stage makes. A change makes it again.
- `measurements`: the keys and the contents that decide only what is measured of it. A change measures again.
- `code`, `versions`: this package's modules that the stage imports, and the libraries. A change is told, not acted on.

Nothing here imports torch, so checking whether a stage is up to date is instant.
"""

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from gemma2_post.stage import digests
from gemma2_post.stage.paths import Kind, Reference, references
from gemma2_post.stage.recipe import Effect, keys_of

Fingerprint = dict[str, dict[str, Any]]

PARTS = ("recipe", "inputs", "measurements", "code", "versions")
_OURS = "gemma2_post"
_CONTENT = "content of "
_UNSET = "unset"
_VERSIONS_THAT_MATTER = ["torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "deepspeed"]
_WITHOUT_EFFECT = {
    *("output_dir", "report_to", "run_name", "logging_steps", "logging_dir", "logging_first_step", "disable_tqdm"),
    *("save_steps", "save_strategy", "save_total_limit", "log_completions", "num_completions_to_print", "ddp_timeout"),
    *("dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "project"),
}
"""Keys of TRL's classes that do not affect the output; our own keys say so with `effect`."""
_MEASURING = {"per_device_eval_batch_size"}
"""Keys of TRL's classes that affect measurements only."""

_version = cache(metadata.version)  # reads files, and a pipeline asks once for each step


def fingerprint(
    recipe_class: type,
    main: Callable,
    values: dict[str, object],
    digest_of: Callable[[Reference], str | None],
    decisive: dict[str, object],
) -> Fingerprint:
    """What the output of a stage depends on, in `PARTS`; one of our keys at its default counts as unset.

    Args:
        main: The stage's main function; its module and that module's imports are the code.
        values: The keys of the recipe.
        digest_of: Returns the content hash of something local that a key names, or None if it does not exist.
        decisive: Keys, with their values, that decide the output here although they usually only measure, or although
            they are at their defaults.
    """
    keys = keys_of(recipe_class, of_libraries=False)
    effects = {name: keys[name].effect for name in keys}
    effects |= dict.fromkeys(_WITHOUT_EFFECT, Effect.NONE) | dict.fromkeys(_MEASURING, Effect.MEASUREMENTS)
    counted = {
        name: value
        for name, value in sorted((values | decisive).items())
        if name in decisive
        or (effects.get(name) != Effect.NONE and not (name in keys and value == keys[name].default))
    }
    measuring = {
        name: value
        for name, value in counted.items()
        if name not in decisive and effects.get(name) == Effect.MEASUREMENTS
    }
    recipe = {name: value for name, value in counted.items() if name not in measuring}
    inputs = _contents(list(references(recipe_class, recipe)), digest_of)
    measured = _contents(list(references(recipe_class, measuring)), digest_of)
    return {
        "recipe": recipe,
        "inputs": inputs,
        "measurements": measuring | {f"{_CONTENT}{name}": digest for name, digest in measured.items()},
        "code": {_OURS: f"{_version(_OURS)} {digests.of_code(Path(inspect.getfile(main)))}"},
        "versions": {name: _version(name) for name in _VERSIONS_THAT_MATTER},
    }


def _contents(named: list[Reference], digest_of: Callable[[Reference], str | None]) -> dict[str, Any]:
    """Content hashes by path; of what is on the Hub, by `name@revision`, the hash of each file."""
    by_path = {each.name: each for each in named}
    with ThreadPoolExecutor() as pool:
        found: dict[str, Any] = dict(zip(by_path, pool.map(digest_of, by_path.values()), strict=True))
    for each in named:
        if found[each.name] is None and each.kind in (Kind.MODEL, Kind.OTHER_MODEL, Kind.DATA):
            files = digests.of_hub(each.name, each.revision, is_dataset=each.kind == Kind.DATA)
            found[f"{each.name}@{each.revision or 'main'}"] = files
    return {path: digest for path, digest in found.items() if digest}


def keys_in(fingerprint: Fingerprint) -> dict[str, Any]:
    """The recipe's keys in a fingerprint, those that only measure included."""
    measuring = fingerprint["measurements"].items()
    return fingerprint["recipe"] | {key: value for key, value in measuring if not key.startswith(_CONTENT)}


# --- what differs ---


@dataclass(frozen=True)
class Differences:
    """What differs between two fingerprints, in words, by what follows from it."""

    output: list[str]
    """Something else would be made."""
    measurements: list[str]
    """The same would be made, and measured differently."""
    updates: list[str]
    """Code and versions; whether they matter is for the user to decide."""


def differences(old: Fingerprint, new: Fingerprint) -> Differences:
    """What differs between the fingerprint of something made earlier and what is wanted now.

    A folder or file that was moved, or is named by another path, is the same one: content and file names count.
    """
    is_same = partial(_is_same, _digests(old), _digests(new))
    found = {part: list(_different(old.get(part, {}), new[part], is_same)) for part in PARTS}
    return Differences(
        output=found["recipe"] + found["inputs"],
        measurements=found["measurements"],
        updates=found["code"] + found["versions"],
    )


def _digests(fingerprint: Fingerprint) -> dict[str, str]:
    """Content hashes of the files and folders that a fingerprint names; of the user's functions, the names count."""
    measured = fingerprint.get("measurements", {}).items()
    named = {key.removeprefix(_CONTENT): value for key, value in measured if key.startswith(_CONTENT)}
    named |= fingerprint.get("inputs", {})
    return {path: digest for path, digest in named.items() if isinstance(digest, str) and ":" not in path}


def _is_same(old: dict[str, str], new: dict[str, str], key: str, before: object, after: object) -> bool:
    """Whether values of a key, or contents of a path, are the same ones, whatever the paths are."""
    path = key.removeprefix(_CONTENT)
    if before == _UNSET and path in new:
        return new[path] in old.values()
    if after == _UNSET and path in old:
        return old[path] in new.values()
    return before == after or _by_content(before, old) == _by_content(after, new)


def _by_content(value: object, digests: dict[str, str]) -> object:
    """A value with the content hash in place of each path."""
    if isinstance(value, list):
        return [_by_content(each, digests) for each in value]
    if isinstance(value, dict):
        return {key: _by_content(each, digests) for key, each in value.items()}
    return digests.get(value, value) if isinstance(value, str) else value


def _different(
    old: dict[str, Any], new: dict[str, Any], is_same: Callable[[str, object, object], bool]
) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, _UNSET), new.get(key, _UNSET)
        if isinstance(before, dict) and isinstance(after, dict) and "@" in key:
            # Files on the Hub: what is not downloaded is not known offline.
            yield from (f"{key}: {file} changed" for file in before if before[file] != after.get(file, before[file]))
        elif not is_same(key, before, after):
            yield f"{key} {before} -> {after}"


def made_by(fingerprint: Fingerprint, updates: list[str]) -> str:
    """Who made something, as far as that differs from what is installed: `gemma2_post 0.1.0 and transformers 5.23.0`.

    Args:
        updates: What differs; see `Differences`.
    """
    names = [update.partition(" ")[0] for update in updates]
    versions = {**fingerprint["code"], **fingerprint["versions"]}
    return " and ".join(f"{name} {str(versions.get(name, '?')).partition(' ')[0]}" for name in names)
