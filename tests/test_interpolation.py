"""The maths of merging: the formulas in float64, identities, and what the paper's rule weighs."""

import math
from itertools import permutations

import pytest
import torch

from gemma2_post.weights.interpolation import (
    coefficients,
    combine,
    compress,
    gram_matrix,
    group_of,
    liti,
    low_rank_gram_matrix,
    slerp_coefficients,
    spherical_mean,
)


def random_vectors(num: int, size: int = 50, seed: int = 0, common: float = 0.5) -> torch.Tensor:
    """(num, size) in float64, of different lengths, with something in common."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num + 1, size, generator=generator, dtype=torch.float64)
    return (vectors[1:] + common * vectors[0]) * torch.linspace(0.5, 2, num, dtype=torch.float64)[:, None]


def merged(vectors: torch.Tensor, rule: str) -> torch.Tensor:
    return combine(vectors, coefficients(gram_matrix(vectors), rule))


def slerp(first: torch.Tensor, second: torch.Tensor, weight: float) -> torch.Tensor:
    """The formula, written out once more."""
    angle = torch.arccos(torch.nn.functional.cosine_similarity(first, second, dim=0))
    return (torch.sin((1 - weight) * angle) * first + torch.sin(weight * angle) * second) / torch.sin(angle)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_slerp_is_the_formula_on_the_task_vectors_as_they_are(weight: float) -> None:
    first, second = random_vectors(2)
    found = slerp_coefficients(gram_matrix(torch.stack([first, second])), weight)
    torch.testing.assert_close(found[0] * first + found[1] * second, slerp(first, second, weight), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("weight", "end"), [(0.0, (1.0, 0.0)), (1.0, (0.0, 1.0))])
def test_the_ends_of_slerp_are_its_policies(weight: float, end: tuple[float, float]) -> None:
    assert slerp_coefficients(gram_matrix(random_vectors(2)), weight) == end


@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.4, 0.999])
def test_slerp_keeps_the_norm_and_linear_loses_what_lemma_2_says(cosine: float) -> None:
    """|d| = l for both: slerp gives l (lemma 1), linear l cos(W / 2) (lemma 2), and they differ by that factor."""
    first = torch.tensor([3.0, 0.0], dtype=torch.float64)
    second = 3 * torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)
    pair = torch.stack([first, second])
    half = math.acos(cosine) / 2
    assert merged(pair, "slerp").norm() == pytest.approx(3, rel=1e-12)
    assert merged(pair, "linear").norm() == pytest.approx(3 * math.cos(half), rel=1e-12)
    torch.testing.assert_close(merged(pair, "slerp"), merged(pair, "linear") / math.cos(half), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("num", "expected"),
    [(3, [0.612, 0.612, 0.500]), (4, [0.566, 0.566, 0.462, 0.383]), (5, [0.538, 0.538, 0.439, 0.364, 0.309])],
)
def test_the_papers_successive_rule_weighs_orthogonal_policies_unequally(num: int, expected: list[float]) -> None:
    """Equation 26: with W = 90 degrees each step multiplies the earlier by cos(90 / m) and adds sin(90 / m)."""
    found = coefficients(torch.eye(num, dtype=torch.float64), "slerp")
    assert found.tolist() == pytest.approx(expected, abs=6e-4)
    assert found.norm() == pytest.approx(1)


@pytest.mark.parametrize("num", [3, 5])
def test_the_successive_rule_is_slerp_one_after_the_other(num: int) -> None:
    vectors = random_vectors(num)
    expected = vectors[0]
    for m in range(1, num):
        expected = slerp(expected, vectors[m], 1 / (m + 1))
    torch.testing.assert_close(merged(vectors, "slerp"), expected, rtol=1e-11, atol=0)


def test_the_spherical_mean_of_two_is_slerp_whatever_their_norms() -> None:
    vectors = random_vectors(2)
    torch.testing.assert_close(merged(vectors, "spherical_mean"), merged(vectors, "slerp"), rtol=1e-11, atol=0)


def test_the_spherical_mean_does_not_depend_on_the_order_and_slerp_does() -> None:
    vectors = random_vectors(3)
    by_rule = {
        rule: torch.stack([merged(vectors[list(order)], rule) for order in permutations(range(3))])
        for rule in ("spherical_mean", "slerp")
    }
    assert (by_rule["spherical_mean"] - by_rule["spherical_mean"][0]).abs().max() < 1e-10
    assert (by_rule["slerp"] - by_rule["slerp"][0]).abs().max() > 1e-3


def test_the_spherical_mean_is_where_the_tangents_to_all_directions_cancel() -> None:
    """The Karcher mean p: sum over m of (W_m / sin W_m) (u_m - cos(W_m) p) = 0, with cos W_m = p u_m and |p| = 1."""
    directions = torch.nn.functional.normalize(random_vectors(5), dim=1)
    mean = merged(directions, "spherical_mean")
    cosines = directions @ mean
    angles = torch.arccos(cosines)
    tangents = (angles / torch.sin(angles))[:, None] * (directions - cosines[:, None] * mean)
    assert mean.norm() == pytest.approx(1, rel=1e-12) and angles.min() > 0.1
    assert tangents.sum(0).norm() < 1e-10


def test_orthogonal_policies_have_equal_weights_in_the_spherical_mean() -> None:
    assert coefficients(torch.eye(5, dtype=torch.float64), "spherical_mean").tolist() == pytest.approx([5**-0.5] * 5)


@pytest.mark.parametrize("rule", ["slerp", "spherical_mean"])
@pytest.mark.parametrize("second", [[0.0, 0.0], [3.0, 4.0], [1.5, 2.0], [-3.0, -4.0], [-9.0, -12.0]], ids=str)
def test_zero_and_parallel_and_opposite_vectors_are_merged_linearly(rule: str, second: list[float]) -> None:
    """In fp32, where 9 = 3 * 3 is exact but cosines need not be."""
    pair = torch.tensor([[3.0, 4.0], second])
    torch.testing.assert_close(merged(pair, rule), pair.mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["slerp", "spherical_mean"])
def test_three_policies_of_which_none_or_one_has_moved_give_finite_weights(rule: str) -> None:
    """QLoRA leaves everything but q, k, v and o where it was: all task vectors are zero."""
    assert coefficients(torch.zeros(3, 3, dtype=torch.float64), rule).tolist() == pytest.approx([1 / 3] * 3)
    one = torch.zeros(3, 3, dtype=torch.float64)
    one[1, 1] = 4.0
    assert coefficients(one, rule).isfinite().all()


def test_directions_that_cancel_have_no_spherical_mean_and_are_merged_linearly() -> None:
    third = 2 * math.pi / 3
    vectors = torch.tensor([[math.cos(i * third), math.sin(i * third)] for i in range(3)], dtype=torch.float64)
    assert spherical_mean(gram_matrix(vectors)).tolist() == pytest.approx([1 / 3] * 3)


def test_one_policy_is_itself() -> None:
    assert coefficients(torch.tensor([[4.0]], dtype=torch.float64), "slerp").tolist() == [1.0]


def test_liti_goes_from_the_start_to_the_merge_and_beyond() -> None:
    """(1 - eta) init + eta (init + d)."""
    init, direction = random_vectors(2)
    assert torch.equal(liti(init, direction, 0.0), init)
    for eta in (-0.5, 0.3, 1.0, 1.5):
        torch.testing.assert_close(liti(init, direction, eta), (1 - eta) * init + eta * (init + direction))


def test_inner_products_of_long_vectors_are_as_good_as_those_of_short_ones() -> None:
    """Of a million and some elements, in fp32, relative to the norms."""
    vectors = 0.01 * torch.randn(3, (1 << 20) + 123, generator=torch.Generator().manual_seed(0))
    expected = vectors.double() @ vectors.double().T
    norms = expected.diagonal().sqrt()
    assert ((gram_matrix(vectors) - expected) / norms.outer(norms)).abs().max() < 1e-7


def test_inner_products_of_adapters_are_those_of_their_products() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [
        (torch.randn(30, rank, generator=generator), torch.randn(rank, 20, generator=generator)) for rank in (4, 7, 4)
    ]
    products = torch.stack([(b.double() @ a.double()).flatten() for b, a in updates])
    torch.testing.assert_close(low_rank_gram_matrix(updates), products @ products.T, rtol=1e-12, atol=0)


def test_compression_is_the_best_of_its_rank_and_says_what_it_loses() -> None:
    """Eckart and Young: the squared error is the sum of the squared singular values that are left out."""
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(30, 8, generator=generator), torch.randn(8, 20, generator=generator)
    values = torch.linalg.svdvals(b.double() @ a.double())
    small_b, small_a, lost = compress(b, a, 3)
    assert (small_b.shape, small_a.shape) == ((30, 3), (3, 20))
    assert lost == pytest.approx(float(values[3:].square().sum()), rel=1e-9)
    assert float((small_b @ small_a - b @ a).square().sum()) == pytest.approx(lost, rel=1e-4)
    assert compress(b, a, 8)[2] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "model.layers.11"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1"),
        ("transformer.h.3.mlp.c_fc.weight", "transformer.h.3"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_a_layer_shares_an_angle_and_embeddings_and_final_norm_have_their_own(name: str, group: str) -> None:
    assert group_of(name, "layer") == group
    assert (group_of(name, "tensor"), group_of(name, "model")) == (name, "model")
