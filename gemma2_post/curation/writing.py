"""Writes what a curation has made: the data set, the removed rows, and what a report says of both."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from gemma2_post.curation import overview, personal_information, rows
from gemma2_post.curation.judging import Verdicts
from gemma2_post.curation.keys import RULES
from gemma2_post.curation.reading import Compared, Mixture, without_nulls
from gemma2_post.curation.removed import Removed, Verdict, Writer, as_json, removed_writer, table
from gemma2_post.curation.sifting import MANNER, REPLACED
from gemma2_post.stage.errors import UserError

DATA, REMOVED = "train.parquet", "removed.parquet"
_SAMPLE = 2000
"""Rows whose lengths and languages are looked at."""
_EXAMPLES = 5
"""Removed rows of each rule that the report shows."""
_LONGEST = 1000
"""Characters of a row in the report."""


def by_weight(mixture: Mixture, without: Verdicts) -> Verdicts:
    """The rows that the weights of the sources leave out: the largest mixture in these proportions remains."""
    weights = [source.weight for source in mixture.args.datasets]
    if not any(weights):
        return {}
    if not all(weights):
        raise UserError("datasets: give a weight above 0 to every source or to none")
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in mixture.names}
    for part in range(mixture.num_parts):
        sifted = mixture.path(part, "sifted")
        if parquet.read_metadata(sifted).num_rows:
            for place, name in enumerate(parquet.read_table(sifted, columns=[rows.SOURCE]).column(0).to_pylist()):
                if (part, place) not in without:
                    places[name].append((part, place))
    total = min(len(places[name]) / weight for name, weight in zip(mixture.names, weights, strict=True) if weight)
    random = np.random.default_rng(mixture.args.seed)
    found: Verdicts = {}
    for name, weight in zip(mixture.names, weights, strict=True):
        drawn = random.permutation(len(places[name]))[round(total * (weight or 0)) :]
        found |= {places[name][i]: Verdict("weight", f"more than weight {weight:g} of the mixture") for i in drawn}
    return found


def write(mixture: Mixture, verdicts: Verdicts, output_dir: Path, num_tokens: Callable[[str], int] | None) -> dict:
    """Writes the data set and the removed rows; returns what a report says of them.

    Args:
        verdicts: On rows that were left when all rules had been applied that see one row at a time.

    Raises:
        UserError: No row is left, or a kept column has values of different types.
    """
    schema = _schema(mixture)
    data, removed = Writer(output_dir / DATA, schema), removed_writer(output_dir / REMOVED)
    counts = {name: Counter[str]() for name in mixture.names}
    replaced, manners, sample = Counter[str](), Counter[str](), []
    examples: dict[str, list[dict[str, Any]]] = {rule: [] for rule in RULES}
    num_kept = 0
    random = np.random.default_rng(mixture.args.seed)
    for part in range(mixture.num_parts):
        name = mixture.names[int(Compared.load(mixture.path(part, "compared"), "source")["source"])]
        sifted = parquet.read_table(mixture.path(part, "sifted"))
        judged = {place: verdicts[part, place] for place in range(len(sifted)) if (part, place) in verdicts}
        for out in (
            parquet.read_table(mixture.path(part, "invalid")),
            parquet.read_table(mixture.path(part, "removed")),
            table([_removed(row, judged[i]) for i, row in enumerate(sifted.to_pylist()) if i in judged])
            if judged
            else None,
        ):
            if out is not None:
                removed.add(out)
                counts[name].update(out.column("rule").to_pylist())
                _add_examples(examples, out)
        kept = sifted.filter([i not in judged for i in range(len(sifted))]) if judged else sifted
        if not len(kept):
            continue
        counts[name]["kept"] += len(kept)
        num_kept += len(kept)
        manners.update(each for each in _column(kept, MANNER) if each)
        replaced.update(kind for kinds in _column(kept, REPLACED) for kind in kinds or ())
        # The rows with the smallest random numbers of all are a sample of all.
        sample += [(float(number), part, place) for place, number in enumerate(random.random(len(kept)))]
        sample = sorted(sample)[:_SAMPLE]
        data.add(kept.select([each for each in kept.column_names if not each.startswith("_")]))
    data.close()
    removed.close()
    if not num_kept:
        raise UserError(f"no row is left ({_in_words(counts)}); read {output_dir / REMOVED}, and relax a rule")
    return {
        "rows": mixture.kind,
        "sources": {name: dict(each) for name, each in counts.items()},
        "replaced": dict(replaced.most_common()),
        "manners": dict(manners),
        "mixture": overview.describe(_rows_at(mixture, sample, verdicts), num_tokens),
        "examples": {rule: _completed(mixture, each) for rule, each in examples.items() if each},
    }


def metrics(found: dict[str, Any]) -> dict[str, float]:
    """The counts by rule, and by rule and source."""
    by_source = {name: Counter(each) for name, each in found["sources"].items()}
    total: Counter[str] = sum(by_source.values(), Counter())
    counts: dict[str, float] = {"num_rows": total.total(), "num_kept": total["kept"]}
    counts["kept_share"] = total["kept"] / total.total()
    for rule in RULES:
        counts[f"removed_{rule}"] = total[rule]
        if total[rule]:
            counts |= {f"removed_{rule}/{name}": each[rule] for name, each in by_source.items() if each[rule]}
    counts["num_replaced"] = sum(found["replaced"].values())
    return counts | {f"num_{manner}": found["manners"].get(manner, 0) for manner in ("refusal", "hedging")}


def _in_words(counts: dict[str, Counter[str]]) -> str:
    total: Counter[str] = sum(counts.values(), Counter())
    return ", ".join(f"{rule} {count}" for rule, count in total.most_common())


def _schema(mixture: Mixture) -> pyarrow.Schema:
    """The columns of all parts, with types that hold the values of all of them."""
    found = pyarrow.schema([])
    for part in range(mixture.num_parts):
        own = parquet.read_schema(mixture.path(part, "sifted")).remove_metadata()
        own = pyarrow.schema([each for each in own if not each.name.startswith("_")])
        try:
            found = pyarrow.unify_schemas([found, own], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise UserError(
                f"columns: the sources do not fit together ({' '.join(str(error).split())[:200]}); write values of "
                "one type, or leave the column out"
            ) from error
    return found


def _column(content: pyarrow.Table, name: str) -> list[Any]:
    return content.column(name).to_pylist() if name in content.column_names else []


def _removed(row: dict[str, Any], verdict: Verdict) -> Removed:
    said = {name: value for name, value in without_nulls(row).items() if name[0] != "_"}
    return Removed(said.pop(rows.SOURCE), said.pop(rows.NUMBER), verdict, as_json(said))


def _rows_at(mixture: Mixture, sample: list[tuple[float, int, int]], verdicts: Verdicts) -> list[dict[str, Any]]:
    """Rows that are kept, by part and place among the kept ones."""
    found = []
    for part in sorted({part for _, part, _ in sample}):
        content = parquet.read_table(mixture.path(part, "sifted"))
        kept = [i for i in range(len(content)) if (part, i) not in verdicts]
        places = [kept[place] for _, other, place in sample if other == part]
        found += [without_nulls(row) for row in content.take(places).to_pylist()]
    return found


# --- examples ---


def _add_examples(examples: dict[str, list[dict[str, Any]]], out: pyarrow.Table) -> None:
    """Adds the first removed rows of each rule."""
    for place, rule in enumerate(out.column("rule").to_pylist()):
        if len(examples[rule]) < _EXAMPLES:
            examples[rule].append(out.slice(place, 1).to_pylist()[0])


def _completed(mixture: Mixture, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples as the report shows them: the texts, without what they say about people."""
    found = []
    for each in examples:
        other = each["other"]
        if not other and each["other_source"] in mixture.names:
            other = _text(json.dumps(_row_at(mixture, each["other_source"], each["other_row"])))
        found.append(
            {
                "source": each["source"],
                "row": each["source_row"],
                "seen": _shown(each["seen"]),
                "text": _shown(_text(each["row"])),
                "other": _shown(other),
            }
        )
    return found


def _row_at(mixture: Mixture, source: str, number: int) -> dict[str, Any]:
    """A valid row of a source."""
    for part in range(mixture.num_parts):
        content = parquet.read_table(mixture.path(part, "rows"))
        if len(content) and content.column(rows.SOURCE)[0].as_py() == source:
            numbers = content.column(rows.NUMBER).to_numpy()
            if numbers[0] <= number <= numbers[-1]:
                place = int(np.searchsorted(numbers, number))
                return without_nulls(content.slice(place, 1).to_pylist()[0])
    raise AssertionError(f"row {number} of {source} was read")


def _text(row: str) -> str:
    """What is said in a row, as text; of an invalid row its JSON."""
    content = json.loads(row)
    try:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in rows.said(content).turns)
    except (KeyError, TypeError):
        return row


def _shown(text: str) -> str:
    """A text for the report, which others may read: cut, and without what it says about people."""
    found = personal_information.replace(text, personal_information.find(text))
    return found if len(found) <= _LONGEST else f"{found[:_LONGEST]} ..."
