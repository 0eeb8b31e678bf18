"""The math of WARP's merges (arXiv 2406.16768): pure functions of tensors, no files.

A merge of M policies is `init + sum over m of c_m * d_m`, where `d_m = policy_m - init` are their task vectors. Every
rule computes the coefficients c from the task vectors' inner products alone: an (M, M) Gram matrix for each group of
tensors that shares an angle.
"""

import math
import re

import torch

from gemma2_post.weights.keys import Angles, Rule

PARALLEL = 1e-3
"""Radians. Vectors this close to 0 or 180 degrees count as (anti)parallel: rounding in fp32 inner products begins to
determine their angle, and at 0 degrees the two rules differ by less than 2e-7 anyway."""

BLOCK = 4096
"""Elements whose products are summed in fp32."""

_LAYER = re.compile(r"^(.*?\b(?:layers|layer|blocks|h)\.\d+)\.")


def group_of(name: str, angles: Angles) -> str:
    """The group of tensors with which a tensor shares its angle.

    "SLERP is applied layer by layer, each having a different angle" (section 3.2 and appendix B). The paper leaves
    open what to do with tensors outside the layers, embeddings and the final norm; here each is its own group.
    """
    if angles == "model":
        return "model"
    layer = _LAYER.match(name) if angles == "layer" else None
    return layer.group(1) if layer else name


def gram_matrix(task_vectors: torch.Tensor) -> torch.Tensor:
    """Inner products (M, M) of task vectors (M, n), float64 on the CPU; the products are taken in the vectors' dtype.

    Blocks are summed in float64: over a million elements, a single product in fp32 is off by 2e-5.
    """
    num_policies, size = task_vectors.shape
    whole, rest = task_vectors.split([size - size % BLOCK, size % BLOCK], dim=1)
    blocks = whole.view(num_policies, -1, BLOCK).transpose(0, 1)
    return (torch.bmm(blocks, blocks.mT).double().sum(0) + (rest @ rest.T).double()).cpu()


def low_rank_gram_matrix(updates: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Frobenius inner products (M, M) of updates B A, in float64, without forming any B A.

    <B1 A1, B2 A2> = trace(A1' B1' B2 A2) = sum of (B1' B2) * (A1 A2'), two matrices as small as the ranks.

    Args:
        updates: B (out, r) and A (r, in) of each policy; ranks may differ.
    """
    doubles = [(b.double(), a.double()) for b, a in updates]
    return torch.stack(
        [torch.stack([((b1.T @ b2) * (a1 @ a2.T)).sum() for b2, a2 in doubles]) for b1, a1 in doubles]
    ).cpu()


def coefficients(gram: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Coefficients c_m (M,), float64, of the merge of M policies with equal weights.

    Args:
        gram: Inner products (M, M) of their task vectors.
        rule: `slerp`, the paper's: one policy after the other (appendix B.3, equation 26); `spherical_mean`, the same
            for two policies, and symmetric in more; `linear`, c_m = 1 / M.
    """
    rules = {"slerp": successive_slerp, "spherical_mean": spherical_mean, "linear": linear_mean}
    return rules[rule](gram)


def linear_mean(gram: torch.Tensor) -> torch.Tensor:
    """Coefficients 1 / M (M,), float64."""
    return torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)


def slerp_coefficients(gram: torch.Tensor, weight: float) -> tuple[float, float]:
    """sin((1 - w) W) / sin(W) and sin(w W) / sin(W), with cos(W) = d1 d2 / (|d1| |d2|) (section 3.2).

    The task vectors are not normalized. Linear, 1 - w and w, if one of them is zero or the two are (anti)parallel.

    Args:
        gram: Inner products (2, 2) of the two task vectors.
        weight: w, the weight of the second: 0 gives the first, 1 the second.
    """
    angle = angle_between(gram, 0, 1)
    if angle is None or min(angle, math.pi - angle) < PARALLEL:
        return 1 - weight, weight
    return math.sin((1 - weight) * angle) / math.sin(angle), math.sin(weight * angle) / math.sin(angle)


def angle_between(gram: torch.Tensor, first: int, second: int) -> float | None:
    """The angle between two task vectors in radians; None if one of them is zero."""
    norms = float((gram[first, first] * gram[second, second]).sqrt())
    return math.acos(max(-1.0, min(1.0, float(gram[first, second]) / norms))) if norms else None


def successive_slerp(gram: torch.Tensor) -> torch.Tensor:
    """slerpm(1..M) = slerp(slerpm(1..M-1), policy M, weight 1/M) (appendix B.3, equation 26)."""
    found = torch.zeros(len(gram), dtype=torch.float64)
    found[0] = 1.0
    for m in range(1, len(gram)):
        so_far = found @ gram
        pair = torch.stack([torch.stack([so_far @ found, so_far[m]]), torch.stack([so_far[m], gram[m, m]])])
        earlier, latest = slerp_coefficients(pair, 1 / (m + 1))
        found *= earlier
        found[m] = latest
    return found


def spherical_mean(gram: torch.Tensor) -> torch.Tensor:
    """Weights of the Karcher mean of the directions d_m / |d_m|, for use on the unnormalized task vectors.

    The Karcher mean is the point of the unit sphere with the least mean squared angle to all directions, found from
    their normalized sum by steps along the mean tangent. For two policies the weights are `slerp_coefficients` at
    weight 1/2, regardless of norms. Linear if a task vector is zero or the directions have no unique mean.
    """
    norms = gram.diagonal().sqrt()
    if not bool((norms > 0).all()):
        return linear_mean(gram)
    cosines = gram / norms.outer(norms)
    weights = linear_mean(gram)
    length = (weights @ cosines @ weights).clamp(min=0).sqrt()
    if 2 * length < PARALLEL:  # for two, it is cos(W / 2)
        return linear_mean(gram)
    weights /= length
    for _ in range(1000):
        towards = (cosines @ weights).clamp(-1, 1)
        angles = torch.arccos(towards)
        if (angles > math.pi / 2).any():
            return linear_mean(gram)
        stretch = torch.where(angles > 1e-8, angles / torch.sin(angles), 1.0)
        tangent = (stretch - weights * (stretch @ towards)) / len(gram)
        length = (tangent @ cosines @ tangent).clamp(min=0).sqrt()
        if length < 1e-13:
            break
        weights = torch.cos(length) * weights + torch.sin(length) / length * tangent
    return weights


def combine(task_vectors: torch.Tensor, weights: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """sum over m of c_m * d_m: (n,) from (M, n), in the vectors' dtype."""
    first, *others = weights.tolist()
    found = torch.mul(task_vectors[0], first, out=out)
    for vector, weight in zip(task_vectors[1:], others, strict=True):
        found.add_(vector, alpha=weight)
    return found


def liti(init: torch.Tensor, direction: torch.Tensor, eta: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """(1 - eta) init + eta (init + direction): interpolation towards the initialization (section 3.3).

    Computed as init + eta * direction, so that a small direction loses no precision before the end.
    """
    return torch.add(init, direction, alpha=eta, out=out)


def compress(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """B and A of the best approximation of B A by a lower rank, and the squared Frobenius norm that it loses.

    Computed in float64 by the SVD of the small core of two QR decompositions; B and A share singular values evenly.

    Args:
        b: (out, R).
        a: (R, in).
        rank: Rank of the result, at most R.
    """
    q_left, r_left = torch.linalg.qr(b.double())
    q_right, r_right = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T)
    root = values[:rank].sqrt()
    return (
        (q_left @ u[:, :rank] * root).float(),
        (root[:, None] * (q_right @ v[:rank].T).T).float(),
        float(values[rank:].square().sum()),
    )
