"""J-BOND: the paper's reward, its gradient in TRL's trainer, and everything else as in RLOO."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[[dict[str, object]], Path]
Recipe = dict[str, object]


def jbond_recipe(recipe: Recipe, **values: object) -> Recipe:
    kept = {key: value for key, value in recipe.items() if key != "num_generations"}
    batch = {"global_batch_size": 12, "per_device_train_batch_size": 12}
    return kept | batch | {"algorithm": "jbond", "beta": 0.0} | values


def test_smoke(run_rlhf: Run, rlhf_recipe: Recipe) -> None:
    output = run_rlhf(jbond_recipe(rlhf_recipe, max_steps=3))
    print((output / "log.jsonl").read_text())
    print((output / "metrics.json").read_text())
