"""The scale and the mean of keys by the kernels, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_kvcache.kernels.cpu import encode as native
from hf_kvcache.kernels.cpu import key_scale as scales
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference.hadamard import rotation_matrix
from hf_kvcache.storage.key_basis import key_scale

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def vectors(heads: int, length: int, dim: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """``[2, heads, length, dim]`` with means and sizes of their own, as a part of larger memory full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.full((2, length + 3, heads, dim + 5), torch.nan, dtype=dtype)
    size = torch.randn(heads, dim, generator=generator).mul(2).exp()
    x = (torch.randn(2, length, heads, dim, generator=generator) + torch.randn(heads, dim, generator=generator)) * size
    held[:, 1:-2, :, 2:-3] = x.to(dtype)
    return held[:, 1:-2, :, 2:-3].transpose(1, 2)


def exponents(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The exponents of the scales before they are rounded and bounded, float64 ``[B, Hkv, D]``."""
    query, keys = query.double(), keys.double()
    power = query.square().mean(2).unflatten(1, (keys.shape[1], -1)).mean(2)
    variance = keys.var(2, correction=0)
    log = [(x + 1e-6 * x.mean(-1, keepdim=True)).log2() for x in (variance, power)]
    exponent = (log[0] - log[1]) / 4
    return exponent - exponent.mean(-1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(isa: str, dtype: torch.dtype) -> None:
    """Powers of two next to the ratio of deviations, for any width, length, and number of query heads."""
    for dim, length, group in itertools.product((8, 72, 128), (8, 300), (1, 3)):
        query, keys = vectors(2 * group, length, dim, dtype, 0), vectors(2, length, dim, dtype, 1)
        assert scales.supports(query, keys, 0, None)
        found = scales.key_scale(query, keys, 0, None)
        wanted = exponents(query, keys).clamp(-4, 4)
        if dtype == torch.float16:
            lowest = (keys.double().square().mean(2).log2() / 2 - 12).ceil()
            wanted = torch.maximum(wanted, lowest).clamp(-4, 4)
        assert torch.equal(found.log2(), found.log2().round())
        assert (found.log2().double() - wanted).abs().max() <= 0.5 + 1e-3, (dim, length, group)


def test_no_mean_in_an_unknown_format(loaded: None) -> None:
    """Levels off the grid are left to torch, as pages of them are."""
    fmt = SideFormat(64, 2, level="table", group=64, zero=False, table=(-1.0, -0.301, 0.302, 1.0))
    assert not native.supports_mean(fmt, torch.zeros(1, 1, 8, 64))


def test_scale_of_strange_keys(isa: str) -> None:
    """Keys that are all alike, zero, or not finite have finite scales; so have queries that are zero."""
    normal = torch.randn(1, 2, 20, 24)
    for keys in (torch.zeros(1, 1, 20, 24), torch.ones(1, 1, 20, 24), torch.full((1, 1, 20, 24), torch.nan)):
        for query in (normal, torch.zeros_like(normal)):
            scale = scales.key_scale(query, keys, 0, None)
            assert ((scale >= 1 / 16) & (scale <= 16)).all()
    assert torch.equal(scales.key_scale(normal, torch.full((1, 1, 20, 24), torch.nan), 0, None), torch.ones(1, 1, 24))


def test_the_cache_uses_it(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the sinks, as torch does it, up to sums in another order."""
    query, keys = vectors(6, 60, 72, torch.float32, 0), vectors(2, 60, 72, torch.float32, 1)
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "native")
    found = key_scale(query, keys, None, 4)
    assert torch.equal(found, scales.key_scale(query, keys, 4, None))
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "reference")
    assert (found != key_scale(query, keys, None, 4)).double().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean(isa: str, dtype: torch.dtype) -> None:
    """The rotated mean of keys divided by their scale."""
    for dim, length, scaled in itertools.product((8, 72, 128), (1, 300), (False, True)):
        fmt = SideFormat(dim, 4, axis="channel", group=8, rotation="signed_hadamard")
        keys = vectors(2, length, dim, dtype, 1)
        assert native.supports_mean(fmt, keys)
        scale = torch.exp2(torch.randint(-4, 5, (2, 2, dim)).float()) if scaled else None
        mean = torch.full((2, 2, dim), torch.nan)
        native.key_mean(fmt, keys, scale, mean)
        matrix = rotation_matrix(dim, fmt.rotation, torch.float64, keys.device)
        assert matrix is not None
        wanted = (keys.double().mean(2) / (1 if scale is None else scale.double())) @ matrix
        assert (mean - wanted).abs().max() <= 1e-6 * wanted.abs().max(), (dim, length, scaled)
