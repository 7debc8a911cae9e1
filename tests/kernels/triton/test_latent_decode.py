"""The Triton twin of absorbed latent attention, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_kvcache.kernels.latent_decode import triton as twin
from hf_kvcache.kernels.visibility import Visibility
from tests.kernels.test_latent_decode import Problem, check, latent_by_hand, problem
from tests.kernels.triton.fixtures import bfloat16_dot, poisoned_outputs  # noqa: F401
from tests.tolerances import assert_near

#: One row; rows that fill no tile; more rows than a tile, and queries of one tile that see different tokens.
SHAPES = [(1, 1, 1, 1, 16, 8), (2, 5, 1, 37, 32, 16), (1, 16, 3, 130, 64, 8), (2, 4, 16, 67, 16, 40)]


def on(given: Problem, device: torch.device) -> Problem:
    """The same on the device of the test."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(given).items()}
    return Problem(**moved)


def run(given: Problem, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    moved = on(given, device)
    assert twin.supports(moved.query, moved.latents, moved.rotary_keys, moved.visibility, moved.positions)
    output, log_sum_exp = twin.latent_decode(*moved.arguments())
    return output.cpu(), log_sum_exp.cpu()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_brute_force(shape: tuple, padded: bool, window: int | None, device: torch.device) -> None:
    """Causality, windows and unused slots, in several splits."""
    given = problem(shape, window, padded)
    check(run(given, device), given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    """Half-precision latents and weights, sums in float32."""
    given = problem(SHAPES[2], padded=True).to(dtype)
    check(run(given, device), given)


@pytest.mark.parametrize("multiprocessors", [1, 7, 200])
def test_splits_do_not_matter(multiprocessors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One split, a few, and as many as there are tiles (more than are merged at a time)."""
    given = problem((1, 2, 2, 700, 16, 8), padded=True)
    monkeypatch.setattr(twin, "_device", lambda device: (multiprocessors, 99 * 1024))
    check(run(given, device), given)


def test_views_of_a_larger_cache(device: torch.device) -> None:
    """Latents that are a part of a larger buffer full of NaN."""
    given = on(problem((2, 3, 2, 45, 32, 16), padded=True), device)
    assert given.unused is not None
    expected = latent_by_hand(on(given, torch.device("cpu")))
    for name in ("latents", "rotary_keys"):
        tokens = getattr(given, name)
        buffer = torch.full((2, 64, tokens.shape[-1]), float("nan"), device=device)
        buffer[:, 3:48] = tokens.masked_fill(given.unused.unsqueeze(-1), 0.0)
        setattr(given, name, buffer[:, 3:48])
    output, log_sum_exp = run(given, device)
    assert_near(output, expected[0])
    assert_near(log_sum_exp, expected[1])


def test_no_tokens(device: torch.device) -> None:
    """No token, or none that is used: output 0, log-sum-exp -inf."""
    empty = Problem(torch.ones(2, 3, 1, 24), torch.empty(2, 0, 16), torch.empty(2, 0, 8), 0.2)
    check(run(empty, device), empty)
    nothing = problem(SHAPES[1])
    nothing.unused = torch.ones(2, 37, dtype=torch.bool)
    check(run(nothing, device), nothing)


def test_what_is_left_to_the_reference() -> None:
    """Masks, mixed dtypes, widths that are no power of two, and calls without a query."""
    given = problem(SHAPES[1])
    query, latents, keys = given.query, given.latents, given.rotary_keys
    assert not twin.supports(query.bfloat16(), latents, keys, None, None)
    assert not twin.supports(query, latents[..., :24], keys, None, None)
    assert not twin.supports(query[:, :, :0], latents, keys, None, None)
    assert isinstance(given.visibility, Visibility)
    masked = replace(given.visibility, mask=torch.ones(2, 1, 1, 100, dtype=torch.bool))
    assert not twin.supports(query, latents, keys, masked, given.positions)
