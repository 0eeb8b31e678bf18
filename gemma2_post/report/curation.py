"""What a curation has removed and kept, formatted for readers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_post.report.files import Files
from gemma2_post.stage import contract

_KEYS: contract.Keys = {
    "rows": str, "sources": dict, "replaced": dict, "manners": dict, "mixture": dict, "examples": dict
}  # fmt: skip


@dataclass
class Curation:
    """A curation, as the page shows it."""

    name: str
    """Of its stage."""
    columns: list[str]
    """What is counted: rows, kept, and the rules that removed some."""
    counts: list[tuple[str, list[str]]]
    """For each source, and for all of them, the numbers in these columns."""
    facts: list[str]
    """Sentences about the mixture that is left."""
    examples: list[tuple[str, list[dict[str, Any]]]]
    """By rule: source, row, what was seen, the text, and what it matched."""


def read(name: str, folder: Path, files: Files) -> Curation | None:
    """The curation that a stage has made; None if its file is missing or damaged."""
    records = files.record(folder / contract.CURATION, _KEYS)
    if records is None:
        return None
    sources: dict[str, dict[str, int]] = records["sources"]
    total: dict[str, int] = {}
    for each in sources.values():
        for what, count in each.items():
            total[what] = total.get(what, 0) + count
    columns = ["kept", *(rule for rule in records["examples"] if rule in total)]
    counts = [
        (source, [f"{sum(each.values()):,}", *(f"{each.get(what, 0):,}" for what in columns)])
        for source, each in [*sources.items(), *([("all", total)] if len(sources) > 1 else [])]
    ]
    examples = [(rule.replace("_", " "), each) for rule, each in records["examples"].items()]
    return Curation(name, ["rows", *(each.replace("_", " ") for each in columns)], counts, _facts(records), examples)


def _facts(found: dict[str, Any]) -> list[str]:
    mixture, manners = found["mixture"], found["manners"]
    lengths = ", ".join(f"{percent}% have up to {length:,}" for percent, length in mixture["lengths"].items())
    facts = [f"Lengths in {mixture['unit']}: {lengths}."]
    facts.append(f"User turns: {_shares(mixture['turns'])}. Languages: {_shares(mixture['languages'])}.")
    if manners:
        facts.append("Last answers: " + ", ".join(f"{count:,} {manner}" for manner, count in manners.items()) + ".")
    if found["replaced"]:
        kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in found["replaced"].items())
        facts.append(f"Replaced by placeholders: {kinds}.")
    return facts


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
