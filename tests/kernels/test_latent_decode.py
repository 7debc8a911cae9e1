"""Absorbed latent attention against one query and head at a time in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from hf_kvcache.kernels.latent_decode import latent_decode, reference
from hf_kvcache.kernels.visibility import Visibility
from tests.tolerances import assert_near

#: Batch, heads, queries, tokens, latent width, rotary width.
SHAPES = [(1, 1, 1, 1, 16, 8), (2, 5, 1, 37, 32, 16), (1, 16, 2, 130, 64, 8), (3, 4, 16, 67, 16, 64)]


@dataclass
class Problem:
    """What one call takes."""

    query: torch.Tensor
    latents: torch.Tensor
    rotary_keys: torch.Tensor
    scaling: float
    visibility: Visibility | None = None
    positions: torch.Tensor | None = None
    unused: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same with tensors of another dtype."""
        tensors = (self.query.to(dtype), self.latents.to(dtype), self.rotary_keys.to(dtype))
        return Problem(*tensors, self.scaling, self.visibility, self.positions, self.unused)

    def arguments(self) -> tuple:
        return tuple(vars(self).values())


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    shape: tuple[int, int, int, int, int, int],
    window: int | None = None,
    padded: bool = False,
    mask: torch.Tensor | None = None,
) -> Problem:
    """Random tokens at ascending positions with holes; with padding, unused slots in front and inside."""
    batch, heads, length, tokens, rank, rotary = shape
    query = gaussian(1, batch, heads, length, rank + rotary).float()
    latents, keys = gaussian(2, batch, tokens, rank).float(), gaussian(3, batch, tokens, rotary).float()
    step = torch.randint(1, 3, (batch, tokens), generator=torch.Generator().manual_seed(4))
    positions = step.cumsum(1)
    unused = None
    if padded:
        unused = gaussian(5, batch, tokens) > 0.8
        unused[-1, : tokens // 3] = True
    start = int(positions.max()) + 1 - length
    visibility = Visibility(start, length, mask, 0, mask is None, window)
    return Problem(query, latents, keys, (rank + rotary) ** -0.5 * 2, visibility, positions, unused)


def latent_by_hand(given: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, q, H, r]`` and log-sum-exp ``[B, H, q]``, over the tokens that each query sees."""
    batch, heads, length, _ = given.query.shape
    rank = given.latents.shape[-1]
    keys = torch.cat([given.latents, given.rotary_keys], -1).double()
    output = torch.zeros(batch, length, heads, rank, dtype=torch.float64)
    log_sum_exp = torch.full((batch, heads, length), -torch.inf, dtype=torch.float64)
    for b, h, q in [(b, h, q) for b in range(batch) for h in range(heads) for q in range(length)]:
        seen = [t for t in range(keys.shape[1]) if _sees(given, b, h, q, t)]
        if seen:
            weights = (keys[b, seen] @ given.query[b, h, q].double() * given.scaling).exp()
            output[b, q, h] = weights @ keys[b, seen, :rank] / weights.sum()
            log_sum_exp[b, h, q] = weights.sum().log()
    return output, log_sum_exp


def _sees(given: Problem, b: int, h: int, q: int, t: int) -> bool:
    if given.unused is not None and given.unused[b, t]:
        return False
    if given.positions is None or given.visibility is None:
        return True
    visibility, at = given.visibility, int(given.positions[b, t])
    here = visibility.start + q
    if visibility.mask is not None:
        row = visibility.mask[b, h if visibility.mask.shape[1] > 1 else 0, q]
        return at < len(row) and bool(row[at])
    return at <= here and (visibility.window is None or at > here - visibility.window)


def check(result: tuple[torch.Tensor, torch.Tensor], given: Problem) -> None:
    """Fail unless the result is that by hand, in the tolerance of the query's dtype."""
    expected, expected_lse = latent_by_hand(given)
    assert result[0].dtype == given.query.dtype and result[1].dtype == torch.float32
    assert_near(result[0], expected)
    assert_near(result[1], expected_lse, given.query.dtype)


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_brute_force(
    shape: tuple, padded: bool, window: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causality, windows and unused slots, however many tokens are read at a time."""
    monkeypatch.setattr(reference, "CHUNK_TOKENS", chunk)
    given = problem(shape, window, padded)
    check(reference.latent_decode(*given.arguments()), given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision latents, chunk by chunk, as exactly as their own rounding lets them be."""
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 32)
    given = problem(SHAPES[2], padded=True).to(dtype)
    check(reference.latent_decode(*given.arguments()), given)


def test_masks() -> None:
    """A mask per head decides what is seen; additive masks say the same."""
    mask = gaussian(6, 2, 5, 3, 90) > 0.2
    mask[1, 2, 1] = False
    given = problem((2, 5, 3, 41, 16, 8), mask=mask)
    output, log_sum_exp = reference.latent_decode(*given.arguments())
    check((output, log_sum_exp), given)
    assert not output[1, 1, 2].any() and log_sum_exp[1, 2, 1] == -torch.inf
    assert given.visibility is not None
    given.visibility.mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert_near(reference.latent_decode(*given.arguments())[0], output)


def test_without_positions_all_is_seen() -> None:
    """Without positions the visibility is not asked, and unused slots still do not count."""
    given = problem(SHAPES[1], padded=True)
    given.positions = None
    check(latent_decode(*given.arguments()), given)
    given.unused = given.visibility = None
    check(latent_decode(*given.arguments()), given)


def test_no_tokens() -> None:
    """No token, or none that is used: output 0, log-sum-exp -inf."""
    empty = Problem(torch.ones(2, 3, 1, 24), torch.empty(2, 0, 16), torch.empty(2, 0, 8), 0.2)
    check(reference.latent_decode(*empty.arguments()), empty)
    nothing = problem(SHAPES[1])
    nothing.unused = torch.ones(2, 37, dtype=torch.bool)
    check(reference.latent_decode(*nothing.arguments()), nothing)


def test_positions_need_a_visibility() -> None:
    """Positions alone say nothing."""
    given = problem(SHAPES[1])
    given.visibility = None
    with pytest.raises(ValueError, match="without a visibility"):
        reference.latent_decode(*given.arguments())
