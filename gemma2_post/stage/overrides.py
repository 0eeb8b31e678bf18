"""Overrides of one recipe: the keys in which the members of an entry, or the candidates of a selection, differ."""

from itertools import product

Overrides = dict[str, object]
"""Keys of a recipe with other values."""


def in_words(overrides: Overrides) -> str:
    """Overrides as text: `learning_rate 0.0003, lora_r 16`; `as the recipe` for none."""
    return ", ".join(f"{key} {value}" for key, value in overrides.items()) or "as the recipe"


def of_grid(grid: dict[str, list[object]]) -> list[Overrides]:
    """Each combination of the values of a grid; the last key varies fastest."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
