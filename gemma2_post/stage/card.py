"""Model cards: the README.md of an output with weights, in two halves.

The first half says how the model was made, in the words of what made it. The second half has the stages behind the
model with what each measured; it is written when the stage ends, and again by the pipeline, which knows the gates. No
path of this machine is in a card.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma2_post.stage import contract
from gemma2_post.stage.errors import UserError

NAME = "README.md"
_TERMS = "https://ai.google.dev/gemma/terms"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SECOND_HALF = "\n## The chain\n"

Gates = Mapping[Path, Mapping[str, str]]
"""Bounds of metrics, by the folder of the stage that they hold for."""


def begin(folder: Path, title: str, base: str, tag: str, account: str) -> None:
    """Writes the first half of a card, in place of any other.

    Args:
        base: The model that this one was made from, as a recipe names it.
        tag: What kind of model it is, for the Hub.
        account: How it was made, in Markdown.
    """
    root = base
    while "base_model" in (done := _stage_file(Path(root))):
        root = done["base_model"]
    base_model = f"base_model: {root}\n" if shown(root) == root and "/" in root else ""
    text = f"""---
library_name: transformers
license: gemma
license_link: {_TERMS}
{base_model}tags: [gemma2, {tag}]
---

# {title}

{account}

The first model of its chain is `{shown(root)}`. Gemma is provided under and subject to the
[Gemma Terms of Use]({_TERMS}).
"""
    contract.write_text(folder / NAME, text)


def end(folder: Path, gates: Gates | None = None) -> None:
    """Writes the second half of the card of a finished stage, if the folder has a card."""
    if not (folder / NAME).is_file():
        return
    text = (folder / NAME).read_text(encoding="utf-8").partition(_SECOND_HALF)[0] + _SECOND_HALF
    bounds = {path.resolve(): each for path, each in (gates or {}).items()}
    for path, done in chain(folder).items():
        title = done["stage"] if path.name == done["stage"] else f"{done['stage']}: {path.name}"
        text += f"\n### {title}\n\n{_table(done['metrics'], bounds.get(path, {}))}"
    contract.write_text(folder / NAME, text)


def shown(path: str) -> str:
    """A model's name in a card: the name on the Hub, or the last folder of a path."""
    is_local = Path(path).exists() or not _HUB_NAME.fullmatch(path)
    return Path(path).resolve().name if is_local else path


def chain(folder: Path) -> dict[Path, dict[str, Any]]:
    """The stage files, by folder, of a finished stage and of all finished stages behind it, each after its inputs."""
    found: dict[Path, dict[str, Any]] = {}

    def add(each: Path) -> None:
        if each.resolve() not in found and (done := _stage_file(each)):
            for path in done["fingerprint"]["inputs"]:
                add(Path(path))
            found[each.resolve()] = done

    add(folder)
    return found


def _stage_file(folder: Path) -> dict[str, Any]:
    """The stage file of a finished stage; empty if there is none, or a damaged one: a card must not stop a stage."""
    with contextlib.suppress(UserError):
        return contract.read_done(folder) or {}
    return {}


def _table(metrics: Mapping[str, Any], bounds: Mapping[str, str]) -> str:
    """What a stage measured, without breakdowns such as `accuracy/names` that no gate is on."""
    lines = ["| measured | before | after | gate |", "|---|---|---|---|"]
    for name, value in metrics.items():
        is_shown = name in bounds or not ("/" in name or name.endswith("_before"))
        if is_shown and isinstance(value, contract.NUMBER):
            before = metrics.get(f"{name}_before")
            formatted = "" if before is None else f"{before:.4g}"
            lines.append(f"| {name} | {formatted} | {value:.4g} | {bounds.get(name, '')} |")
    return "\n".join(lines) + "\n"
