"""Merges by streaming: computes the inner products of each group of tensors, then its merge, slice by slice.

Only a few slices are in memory at a time, besides mapped pages of the inputs, which the system can reclaim. The second
pass over a group directly follows the first, so the disk is read once.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import cos, degrees
from typing import TypeVar

import torch
from tqdm import tqdm

from gemma2_post.models.streaming import ShardWriter, row_slices, scratch
from gemma2_post.stage.digests import num_cores
from gemma2_post.stage.errors import UserError
from gemma2_post.weights import interpolation
from gemma2_post.weights.inputs import Adapter, Model
from gemma2_post.weights.keys import Angles, Rule

Result = TypeVar("Result")
Slice = tuple[str, slice]
"""Rows of a tensor."""


@dataclass
class GroupReport:
    """What a merge did to one group of tensors, which share an angle."""

    group: str
    num_parameters: int
    norms: list[float]
    """Norms of the task vectors."""
    cosines: list[float | None]
    """Cosines of their pairs (0, 1), (0, 2), ..., (1, 2), ...; None if one of the two is zero."""
    angles: list[float | None]
    """Angles of the same pairs, in degrees."""
    coefficients: list[float]
    norm: float
    """Norm of the merged task vector, before eta."""
    norm_kept: float | None
    """`norm` / mean of `norms`: 1 for spherical interpolation of equally long task vectors."""


def _describe(init: Model, group: str, names: list[str], gram: torch.Tensor, weights: torch.Tensor) -> GroupReport:
    norms = gram.diagonal().sqrt()
    norm = float((weights @ gram @ weights).clamp(min=0).sqrt())
    angles = [interpolation.angle_between(gram, m, n) for m, n in combinations(range(len(gram)), 2)]
    return GroupReport(
        group,
        sum(init.weights[name].numel() for name in names),
        norms.tolist(),
        [None if angle is None else cos(angle) for angle in angles],
        [None if angle is None else degrees(angle) for angle in angles],
        weights.tolist(),
        norm,
        norm / float(norms.mean()) if norms.any() else None,
    )


LowRank = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""B (out, R) and A (R, in), fp32, by the name of the weight to which B A is added."""


def merge_models(
    init: Model,
    policies: list[Model],
    towards: Model,
    rule: Rule,
    angles: Angles,
    writers: dict[float, ShardWriter],
    device: torch.device,
) -> list[GroupReport]:
    """Writes each point (1 - eta) towards + eta (init + merged task vector) of a merge of whole models.

    Args:
        towards: The model towards which the points are interpolated; usually `init`.
        writers: Writers of the points, by eta.
        device: Device that computes.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in init.weights:
        groups[interpolation.group_of(name, angles)].append(name)
    read = [init, *policies]
    only_policy = policies[0] if len(policies) == 1 else None
    report = []
    with _Workers(read, num_passes=2) as workers:
        for group, names in groups.items():
            parts = _parts(init, names)
            gram = sum(workers.map(partial(_gram, init, policies, device), parts), torch.zeros(()))
            weights = interpolation.coefficients(gram, rule)
            report.append(_describe(init, group, names, gram, weights))
            merged = partial(_merged, init, policies, weights, device)
            _write(workers, parts, merged, init, towards, writers, only_policy)
    return report


def merge_adapters(
    init: Model, adapters: list[Adapter], rule: Rule, angles: Angles
) -> tuple[LowRank, list[GroupReport]]:
    """The exact merge as one adapter, whose rank is the sum of all ranks; see `low_rank_gram_matrix`."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in adapters[0].updates:
        groups[interpolation.group_of(name, angles)].append(name)
    merged, report = {}, []
    for group, names in groups.items():
        updates = {name: [adapter.updates[name] for adapter in adapters] for name in names}
        gram = sum((interpolation.low_rank_gram_matrix(each) for each in updates.values()), torch.zeros(()))
        weights = interpolation.coefficients(gram, rule)
        report.append(_describe(init, group, names, gram, weights))
        for name, each in updates.items():
            b = torch.cat([weight * b for weight, (b, _) in zip(weights.tolist(), each, strict=True)], dim=1)
            merged[name] = (b, torch.cat([a for _, a in each]))
    return merged, report


def compress_adapter(merged: LowRank, rank: int) -> tuple[LowRank, float]:
    """The adapter at a lower rank, and the relative error of the whole update in the Frobenius norm."""
    compressed: LowRank = {}
    lost, total = 0.0, 0.0
    for name, (b, a) in merged.items():
        low_b, low_a, lost_here = interpolation.compress(b, a, rank)
        compressed[name] = low_b, low_a
        lost += lost_here
        total += float(interpolation.low_rank_gram_matrix([(b, a)]))
    return compressed, (lost / total) ** 0.5 if total else 0.0


def write_with_adapter(
    init: Model, merged: LowRank, towards: Model, writers: dict[float, ShardWriter], device: torch.device
) -> None:
    """Writes each point (1 - eta) towards + eta (init + B A); B A is computed a few rows at a time."""
    on_device = {name: (b.to(device), a.to(device)) for name, (b, a) in merged.items()}
    with _Workers([init], num_passes=1) as workers:
        merged_here = partial(_with_adapter, init, on_device, device)
        _write(workers, _parts(init, init.weights), merged_here, init, towards, writers, only_policy=None)


# --- one slice ---


def _values(model: Model, part: Slice) -> torch.Tensor:
    name, rows = part
    return model.weights[name][rows].view(-1)


def _in_fp32(model: Model, part: Slice, use: str, device: torch.device) -> torch.Tensor:
    values = _values(model, part)
    return scratch(use, values.numel(), torch.float32, device).copy_(values)


def _task_vectors(policies: list[Model], part: Slice, base: torch.Tensor) -> torch.Tensor:
    """Task vectors (M, n), fp32, from the start's values (n,), fp32."""
    found = scratch("task_vectors", len(policies) * base.numel(), torch.float32, base.device)
    found = found.view(len(policies), base.numel())
    for row, policy in zip(found, policies, strict=True):
        row.copy_(_values(policy, part)).sub_(base)
    return found


def _gram(init: Model, policies: list[Model], device: torch.device, part: Slice) -> torch.Tensor:
    base = _in_fp32(init, part, "base", device)
    found = interpolation.gram_matrix(_task_vectors(policies, part, base))
    if not found.isfinite().all():
        for model in (init, *policies):
            if not _values(model, part).isfinite().all():
                raise UserError(f"{model.name} has NaN or infinite values in {part[0]}; name a model without any")
    return found


def _merged(
    init: Model, policies: list[Model], weights: torch.Tensor, device: torch.device, part: Slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The start's values and the merged task vector, both (n,) in fp32."""
    base = _in_fp32(init, part, "base", device)
    direction = scratch("direction", base.numel(), torch.float32, device)
    return base, interpolation.combine(_task_vectors(policies, part, base), weights, out=direction)


def _with_adapter(
    init: Model, merged: LowRank, device: torch.device, part: Slice
) -> tuple[torch.Tensor, torch.Tensor]:
    base = _in_fp32(init, part, "base", device)
    name, rows = part
    if name not in merged:
        return base, torch.zeros_like(base)
    b, a = merged[name]
    return base, (b[rows] @ a).view(-1)


def _write(
    workers: "_Workers",
    parts: list[Slice],
    merged: Callable[[Slice], tuple[torch.Tensor, torch.Tensor]],
    init: Model,
    towards: Model,
    writers: dict[float, ShardWriter],
    only_policy: Model | None,
) -> None:
    """Writes all points, slice by slice.

    Args:
        merged: Computes the start's values and the merged task vector, both (n,) in fp32.
        only_policy: The policy, if there is just one; the point at eta 1 is its exact copy.
    """

    def write(part: Slice) -> None:
        base, direction = merged(part)
        if towards is not init:
            origin = _in_fp32(towards, part, "origin", base.device)
            direction += base.sub_(origin)
            base = origin
        name, rows = part
        for eta, writer in writers.items():
            if eta == 0:
                point = base
            elif eta == 1 and only_policy:
                point = _values(only_policy, part)
            else:
                point = scratch("point", base.numel(), torch.float32, base.device)
                interpolation.liti(base, direction, eta, out=point)
            if not writer.write(name, rows.start * init.weights[name][0].numel(), point):
                raise UserError(
                    f"{name} is not finite at eta {eta:g}; an input has NaN or infinite values, or eta is too large"
                )

    for _ in workers.map(write, parts):
        pass


# --- all slices ---


def _parts(model: Model, names: Iterable[str]) -> list[Slice]:
    return [(name, rows) for name in names for rows in row_slices(model.weights[name].shape)]


class _Workers:
    """Maps functions over slices on all cores, under a progress bar of the bytes read."""

    def __init__(self, read: list[Model], num_passes: int):
        self.read = read
        num_bytes = sum(tensor.nbytes for model in read for tensor in model.weights.values())
        self.bar = tqdm(total=num_passes * num_bytes, unit="B", unit_scale=True, desc="merge")

    def __enter__(self) -> "_Workers":
        self.num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a slice is too small to split
        self.pool = ThreadPoolExecutor(num_cores())
        return self

    def map(self, function: Callable[[Slice], Result], parts: list[Slice]) -> Iterator[Result]:
        """The results for all slices, in order."""
        for part, result in zip(parts, self.pool.map(function, parts), strict=True):
            self.bar.update(sum(_values(model, part).nbytes for model in self.read))
            yield result

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.num_threads)
        self.bar.close()
