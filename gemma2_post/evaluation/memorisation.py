"""How much of a corpus a model has memorized: given 50 tokens of it, does the model continue with the next 50?

As in the Gemma reports (arXiv 2403.08295, section 6.2; 2408.00118, section 7): greedy continuations of a uniform
sample of the corpus, matched exactly or approximately (an edit distance of at most 10%).
"""

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from gemma2_post.evaluation.pairs import wilson_interval
from gemma2_post.models.tokens import BOS, PAD

PREFIX, CONTINUATION = 50, 50
LARGEST_SHARE = 0.1
"""Largest edit distance of an approximate match, as a share of the continuation."""


@dataclass
class Memorised:
    """Numbers of memorized windows."""

    num_samples: int
    exact: int
    approximate: int
    """Approximate matches, including the exact ones."""

    def metrics(self) -> dict[str, float]:
        """Shares of the sample with their 95% Wilson intervals."""
        found: dict[str, float] = {}
        for name in ("exact", "approximate"):
            share = getattr(self, name) / self.num_samples
            low, high = wilson_interval(share, self.num_samples)
            found |= {f"memorised_{name}": share, f"memorised_{name}/low": low, f"memorised_{name}/high": high}
        return found


def windows(documents: list[list[int]], num_samples: int, seed: int) -> list[list[int]]:
    """Windows of prefix and continuation, drawn uniformly from all places in the corpus, without replacement.

    Args:
        documents: Token ids, without `<bos>`.
    """
    length = PREFIX + CONTINUATION
    counts = [max(0, len(document) - length + 1) for document in documents]
    places = random.Random(seed).sample(range(sum(counts)), min(num_samples, sum(counts)))
    found = []
    for place in sorted(places):
        for document, count in zip(documents, counts, strict=True):
            if place < count:
                found.append(document[place : place + length])
                break
            place -= count
    return found


def memorised(model: PreTrainedModel, rows: list[list[int]], batch_size: int) -> Memorised:
    """Counts the windows that a model continues word for word, or nearly so.

    Args:
        rows: Token ids from `windows`.
    """
    exact = approximate = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prefixes = torch.tensor([[BOS, *row[:PREFIX]] for row in batch], device=model.device)
        with torch.no_grad():
            generated = model.generate(
                input_ids=prefixes,
                attention_mask=torch.ones_like(prefixes),
                do_sample=False,
                max_new_tokens=CONTINUATION,
                eos_token_id=None,
                pad_token_id=PAD,
            )
        for row, ids in zip(batch, generated[:, PREFIX + 1 :].tolist(), strict=True):
            distance = edit_distance(ids, row[PREFIX:])
            exact += distance == 0
            approximate += distance <= LARGEST_SHARE * CONTINUATION
    return Memorised(len(rows), exact, approximate)


def edit_distance(one: list[int], other: list[int]) -> int:
    """The Levenshtein distance: the fewest insertions, deletions and substitutions between two sequences."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
