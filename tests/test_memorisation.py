"""What a model has memorised is found, and nothing else."""

import random

import pytest
import torch

from gemma2_post.evaluation.memorisation import CONTINUATION, PREFIX, Memorised, edit_distance, memorised, windows
from tests.conftest import random_model


def test_planted_sequences_are_found_and_only_those() -> None:
    """A small model is trained on four sequences until it can say them; four others it has never seen."""
    randomness = random.Random(0)
    planted, unseen = (
        [[randomness.randrange(200, 400) for _ in range(PREFIX + CONTINUATION)] for _ in range(4)] for _ in range(2)
    )
    model = random_model(512, sliding_window=64, max_position_embeddings=128)
    rows = torch.tensor([[2, *row] for row in planted])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(150):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.05:
            break
    model.eval()
    found = memorised(model, planted + unseen, batch_size=3)
    assert found == Memorised(8, 4, 4)
    # Of a sequence that ends otherwise than it was learned, five tokens of fifty are within ten percent, six are not.
    nearly = [row[:-changed] + [150] * changed for row, changed in zip(planted[:2], (5, 6), strict=True)]
    assert memorised(model, nearly, batch_size=3) == Memorised(2, 0, 1)
    metrics = found.metrics()
    assert metrics["memorised_exact"] == 0.5 and 0.2 < metrics["memorised_exact/low"] < 0.3


def test_every_place_of_a_corpus_is_as_likely_and_none_comes_twice() -> None:
    documents = [list(range(150)), list(range(1000, 1050)), list(range(2000, 2101))]
    found = windows(documents, 1000, seed=0)
    assert len(found) == 51 + 0 + 2 and len({tuple(row) for row in found}) == len(found)
    assert all(len(row) == 100 and row[99] == row[0] + 99 for row in found)
    some = windows(documents, 10, seed=1)
    assert len(some) == 10 and windows(documents, 10, seed=1) == some != windows(documents, 10, seed=2)
    assert windows([[1, 2, 3]], 10, seed=0) == []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", 0), ("abc", "abc", 0), ("kitten", "sitting", 3), ("ab", "ba", 2), ("", "ab", 2)],
)
def test_edit_distance(one: str, other: str, expected: int) -> None:
    assert edit_distance([*map(ord, one)], [*map(ord, other)]) == expected
