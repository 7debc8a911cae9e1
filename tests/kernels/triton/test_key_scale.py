"""The scale of keys by kernels, against a loop over heads in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from hf_kvcache.kernels.reference.key_scale import key_scale as reference
from hf_kvcache.kernels.triton import key_scale as kernel
from tests.kernels.triton.fixtures import poisoned_outputs  # noqa: F401 (an autouse fixture)


def made(
    shape: tuple[int, int, int, int], group: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys in the order of a model's projections, with channels of very different sizes and means."""
    batch, heads, tokens, dim = shape
    random = torch.Generator().manual_seed(tokens)
    sides = []
    for count in (heads * group, heads):
        size = 4.0 ** torch.randint(-3, 4, (1, 1, count, dim), generator=random)
        x = torch.randn(batch, tokens, count, dim, generator=random) * size
        sides.append((x + 2 * size).to(dtype).to(device).transpose(1, 2))
    return sides[0], sides[1]


def expected(query: torch.Tensor, keys: torch.Tensor, counted: np.ndarray) -> torch.Tensor:
    """The exponents before they are rounded, float64 ``[B, H, D]``; 0 for a sequence with too few tokens."""
    batch, heads, _, dim = keys.shape
    group, found = query.shape[1] // heads, torch.zeros(batch, heads, dim, dtype=torch.float64)
    for row in range(batch):
        held = np.flatnonzero(counted[row])
        if len(held) < 8:
            continue
        for head in range(heads):
            own = query[row, group * head : group * (head + 1)][:, held].double().cpu()
            x = keys[row, head, held].double().cpu()
            parts = x.var(0, unbiased=False), own.square().mean((0, 1))
            spread, power = (part + 1e-6 * part.mean() + 1e-30 for part in parts)
            exponent = (spread / power).log2() / 4
            exponent = exponent - exponent.mean()
            if keys.dtype == torch.float16:
                exponent = torch.maximum(exponent, (x.square().mean(0).log2() / 2 - 12).ceil())
            found[row, head] = exponent.clamp(-4, 4)
    return found


slow = partial(pytest.param, marks=pytest.mark.slow)
#: Sequences, heads, tokens, width; query heads per KV head; dtype; the first token that counts.
CASES = [
    ((1, 1, 9, 16), 1, torch.float32, 1),
    ((2, 2, 270, 40), 3, torch.bfloat16, 4),
    ((1, 1, 4200, 16), 1, torch.float16, 0),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("shape", "group", "dtype", "first"), [CASES[0], *(slow(*case) for case in CASES[1:])])
def test_against_a_loop(
    shape: tuple[int, int, int, int], group: int, dtype: torch.dtype, first: int, padded: bool, device: torch.device
) -> None:
    """Odd sizes, GQA, more stretches than are loaded at a time, and NaN in all that does not count."""
    query, keys = made(shape, group, dtype, device)
    counted = np.ones((shape[0], shape[2]), dtype=bool)
    counted[:, :first] = False
    if padded:
        counted[0, : shape[2] // 3] = counted[0, -2] = False
        counted[-1, 8:] = shape[0] == 1  # of the last of two sequences 8 tokens less the first ones count: too few
    absent = torch.from_numpy(~counted)[:, None, :, None].to(device)
    query, keys = query.masked_fill(absent, torch.nan), keys.masked_fill(absent, torch.nan)
    there = torch.from_numpy(counted).to(device) if padded else None
    assert kernel.supports(query, keys, first, there)
    found = kernel.key_scale(query, keys, first, there)
    exponent, wanted = found.log2().cpu().double(), expected(query, keys, counted)
    assert (exponent == exponent.round()).all() and found.is_contiguous()
    torch.testing.assert_close(exponent, wanted, rtol=0, atol=0.51)  # rounded to the nearest, or at an edge either way
    assert torch.equal(found, reference(query, keys, first, there))
    assert torch.equal(found, kernel.key_scale(query, keys, first, there))
    if counted.sum(1).max() >= 8:
        assert len(exponent.unique()) > 3


@pytest.mark.parametrize("x", [torch.nan, *map(slow, (0.0, 1e18, torch.inf))])
def test_any_numbers_give_powers_of_two(x: float, device: torch.device) -> None:
    """As the reference: channels without variance, squares beyond the range, and numbers that are not finite."""
    query, keys = made((1, 2, 20, 16), 2, torch.float32, device)
    for poisoned in (query, keys):
        before = poisoned[..., 3].clone()
        poisoned[..., 3] = x
        found = kernel.key_scale(query, keys, 0, None)
        # The squares of 1e18 differ by their rounding only, which depends on the order of sums.
        assert x == 1e18 or torch.equal(found, reference(query, keys, 0, None))
        assert ((found.log2() % 1 == 0) & (found >= 1 / 16) & (found <= 16)).all()
        poisoned[..., 3] = before
