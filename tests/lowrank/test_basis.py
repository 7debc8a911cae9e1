"""The parts of a method: moments of groups and over distances, metrics."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.lowrank.basis_solvers import block_diagonal, least_error_basis
from hf_kvcache.lowrank.distances import average_over_distances
from hf_kvcache.lowrank.methods import resolve
from tests.eviction.rope_contexts import rope
from tests.lowrank.structured import make, moments_of


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_queries_over_distances(family: str) -> None:
    """They equal the mean over all pairs of a text of 20 tokens, pair by pair."""
    layer_rope = rope(family)
    dim = 2 * len(layer_rope.first)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, 7, dim, generator=generator)
    second = torch.stack([q.double().T @ q.double() for q in queries])
    expected, pairs = torch.zeros_like(second), 0
    for at in range(20):
        for key in range(at + 1):
            turned = layer_rope.rotate(queries, torch.full((7,), at - key)).double()
            expected += turned.mT @ turned
            pairs += 1
    scale = layer_rope.scale**2
    torch.testing.assert_close(
        average_over_distances(second, layer_rope, 20), expected / pairs / scale, rtol=1e-4, atol=1e-4
    )


def test_fewer_heads_side_by_side_are_blocks_of_more() -> None:
    layer = make(heads=4, ratio=1)
    for group in (1, 2, 4):
        for name in ("kq_svd", "palu"):
            method = resolve(name, group=group)
            first, second = (method.solve(moments_of(layer, together)).keys for together in (group, 4))
            torch.testing.assert_close(first.energy, second.energy)
    with pytest.raises(ValueError, match="group=4: the moments are of 2 heads"):
        resolve("palu", group=4).solve(moments_of(layer, 2))


def test_block_diagonal() -> None:
    blocks = torch.arange(16.0).view(4, 2, 2)
    wide = block_diagonal(blocks, 2)
    assert wide.shape == (2, 4, 4)
    assert torch.equal(wide[1, 2:, 2:], blocks[3]) and not wide[1, :2, 2:].any()


def test_a_metric_that_is_a_multiple_of_the_identity_changes_nothing() -> None:
    second = moments_of(make()).keys.grouped(1, 2, True)[0]
    plain = least_error_basis(second)
    scaled = least_error_basis(second, metric=1e6 * torch.eye(16, dtype=torch.float64).expand(2, -1, -1))
    torch.testing.assert_close(plain.energy, scaled.energy)
    torch.testing.assert_close(plain.down.abs(), scaled.down.abs(), rtol=1e-4, atol=1e-5)
