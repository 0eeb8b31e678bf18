"""Applies the rules that see one row at a time to the rows of each part, on all cores."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from gemma2_post.curation import manners, personal_information, rows, self_identification
from gemma2_post.curation.comparing import Repeated
from gemma2_post.curation.decontamination import Asked, Outside
from gemma2_post.curation.keys import CurationArguments
from gemma2_post.curation.parts import work_on
from gemma2_post.curation.reading import Compared, Mixture
from gemma2_post.curation.removed import Removed, Verdict, as_json, table, write_table
from gemma2_post.data.near_duplicates import Sketches, load_sketches, save_sketches, sketch

MANNER, REPLACED = "_manner", "_replaced"
"""Columns of a sifted part: whether the last answer refuses or hedges, and the kinds of what was replaced."""
Row = dict[str, Any]
Place = tuple[str, int]
"""The source of a row, and its number there."""


@dataclass(frozen=True)
class Sieve:
    """What rows are held against."""

    args: CurationArguments
    outside: Outside
    countries: Sequence[str]
    patterns: list[re.Pattern[str]]


def sieve(args: CurationArguments, outside: Outside) -> Sieve:
    """The rules that the recipe switches on."""
    countries = args.personal.countries or personal_information.DEFAULT
    return Sieve(args, outside, countries, [re.compile(each) for each in args.personal.patterns or []])


def sift(mixture: Mixture, found: Repeated, rules: Sieve) -> None:
    """Writes, for each part, the rows that stay and those that are removed; parts that are there already are kept."""
    firsts = np.cumsum(
        [0, *(parquet.read_metadata(mixture.path(number, "rows")).num_rows for number in range(mixture.num_parts))]
    )
    places = _places(mixture, found, firsts)
    if rules.outside.prompts and rules.outside.max_edits is not None:
        path = mixture.folder / "outside"
        if not path.is_file():
            work_on(partial(_sketch_outside, path), [rules.outside.prompts], "reading evaluation sets")
        rules.outside.add_sketches(load_sketches(path))
    todo = [number for number in range(mixture.num_parts) if not mixture.path(number, "sifted").is_file()]
    work = partial(_sift_part, mixture, found, places, rules, firsts)
    work_on(work, todo, "applying rules", int(sum(firsts[each + 1] - firsts[each] for each in todo)))


def _places(mixture: Mixture, found: Repeated, firsts: np.ndarray) -> dict[int, Place]:
    """Where the rows are that others repeat."""
    numbers = np.unique([other for _, other, _ in found.values()]).astype(np.int64)
    places: dict[int, Place] = {}
    for part in np.unique(np.searchsorted(firsts, numbers, side="right") - 1) if len(numbers) else ():
        content = parquet.read_table(mixture.path(part, "rows"), columns=[rows.SOURCE, rows.NUMBER])
        own = numbers[(numbers >= firsts[part]) & (numbers < firsts[part + 1])]
        chosen = content.take(own - firsts[part]).to_pylist()
        for number, row in zip(own.tolist(), chosen, strict=True):
            places[number] = row[rows.SOURCE], row[rows.NUMBER]
    return places


def _sketch_outside(path: Path, prompts: Sequence[Asked]) -> int:
    save_sketches(path, sketch([[each.text] for each in prompts]))
    return len(prompts)


def _sift_part(
    mixture: Mixture, found: Repeated, places: dict[int, Place], rules: Sieve, firsts: np.ndarray, part: int
) -> int:
    content, first = mixture.rows_of(part), int(firsts[part])
    first_prompts = Compared.sketches(mixture.path(part, "compared"), "first")
    kept, removed = [], []
    for place, row in enumerate(content):
        verdict: Verdict | None = None
        if repeats := found.get(first + place):
            rule, other, value = repeats
            verdict = Verdict(rule, _words(rule, places[other], value), "", *places[other])
        else:
            verdict = _contaminated(rules.outside, row, first_prompts, place)
        changed = row
        for judge in () if verdict else (_personal, _pattern, _identity):
            changed, verdict = judge(rules, changed)
            if verdict:
                break
        if verdict:
            without = {name: value for name, value in row.items() if name not in (rows.SOURCE, rows.NUMBER)}
            removed.append(Removed(row[rows.SOURCE], row[rows.NUMBER], verdict, as_json(without)))
        else:
            answers = rows.said(changed).answers
            kept.append(changed | {MANNER: manners.manner(answers[-1]) if answers else None})
    write_table(mixture.path(part, "removed"), table(removed))
    write_table(mixture.path(part, "sifted"), rows.table(mixture.kind, kept))
    return len(content)


def _words(rule: str, other: Place, value: float) -> str:
    place = f"row {other[1]} of {other[0]}"
    if rule == "too_many_answers":
        return f"answers the prompt of {place}"
    return f"repeats {place}" + (f": {value:.0%} of the pairs of words" if rule == "near_duplicate" else "")


def _contaminated(outside: Outside, row: Row, first_prompts: Sketches, place: int) -> Verdict | None:
    said = rows.said(row)
    leak = outside.find(said.users, said.all_answers) or outside.find_near(first_prompts, place)
    return Verdict("contaminated", str(leak), leak.asked.text, leak.asked.name, leak.asked.number) if leak else None


Judge = Callable[[Sieve, Row], tuple[Row, Verdict | None]]


def _personal(rules: Sieve, row: Row) -> tuple[Row, Verdict | None]:
    """Removes or rewrites a row with personal information, by severity."""
    treatments = {
        "sensitive": rules.args.personal.sensitive_information,
        "personal": rules.args.personal.personal_information,
    }
    if not any(treatments.values()):
        return row, None
    replaced: list[str] = []
    findings = {text: personal_information.find(text, rules.countries) for text in set(rows.texts_of(row))}
    every = [finding for each in findings.values() for finding in each]
    for severity, treatment in treatments.items():
        seen = [f"{each.kind} {each.text!r}" for each in every if each.severity == severity]
        if treatment == "remove" and seen:
            return row, Verdict(f"{severity}_information", "; ".join(dict.fromkeys(seen)))
        if treatment == "replace":
            replaced += [each.kind for each in every if each.severity == severity]
    if not replaced:
        return row, None

    def without(text: str) -> str:
        chosen = [each for each in findings[text] if treatments[each.severity] == "replace"]
        return personal_information.replace(text, chosen)

    return rows.rewritten(row, without) | {REPLACED: replaced}, None


def _pattern(rules: Sieve, row: Row) -> tuple[Row, Verdict | None]:
    for pattern in rules.patterns:
        for text in rows.texts_of(row):
            if match := pattern.search(text):
                return row, Verdict("pattern", f"{pattern.pattern!r} matches {match.group()[:100]!r}")
    return row, None


def _identity(rules: Sieve, row: Row) -> tuple[Row, Verdict | None]:
    identity = rules.args.identity
    for text in rows.said(row).answers if identity.self_identification else ():
        if sentence := self_identification.find(text, identity.assistant_name, identity.assistant_maker):
            return row, Verdict("self_identification", sentence)
    return row, None
