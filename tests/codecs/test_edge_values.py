"""Pages of unusual values are decoded to finite numbers close to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_kvcache.codecs import specs
from tests.choosing import pairwise
from tests.codecs.pages_of import gaussian, make_encoder, name_of, relative_error, rotated, round_trip

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def outlier_channel(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., :5], 100 * x[..., 5:6], x[..., 6:]], -1)


def outlier_token(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, :5], 100 * x[:, 5:6], x[:, 6:]], 1)


#: Pages made from Gaussian ones.
UNUSUAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "huge": lambda x: 1e4 * x.clamp(-3, 3),
    "constant": lambda x: torch.full_like(x, -3.7),
    "constant per channel": lambda x: x[:, :1].expand_as(x),
    "constant per token": lambda x: x[..., :1].expand_as(x),
    "one token only": lambda x: torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1),
    "two values": lambda x: 7 * x.sign(),
    "far from zero": lambda x: x + 500,
    "an outlier channel": outlier_channel,
    "an outlier token": outlier_token,
}


@pairwise("spec, kind, dtype", specs(), UNUSUAL, DTYPES, of=lambda spec, kind, dtype: (name_of(spec), kind, dtype))
def test_unusual_pages(spec: str, kind: str, dtype: torch.dtype) -> None:
    """No page decodes to NaN or infinity, or is further off than its number of levels allows."""
    dims = {"keys": 96, "values": 64}
    encoder = make_encoder(spec, 96, 64, 16, dtype)
    x = {side: UNUSUAL[kind](gaussian(dim, 2, 16, dim)).to(dtype) for side, dim in dims.items()}
    for side, result in round_trip(encoder, x["keys"], x["values"]).items():
        exact, fmt = rotated(encoder, side, x[side]), encoder.layout.sides[side]
        assert result.isfinite().all()
        if fmt.level == "table":  # at most twice as long as the original, and no more than a right angle away
            assert relative_error(result, exact) < 1.001
        elif fmt.level == "integer":
            # Half a step of the widest range there is; twice that where scales of two axes multiply.
            half_step = float(exact.amax() - exact.amin()) / (2**fmt.bits - 1) / 2 * (2 if fmt.other else 1)
            assert float((result - exact).abs().max()) <= half_step + 2e-3 * float(exact.abs().max())
        else:
            assert relative_error(result, exact) < 0.04


@pairwise("spec, dtype", specs(), DTYPES, of=lambda spec, dtype: (name_of(spec), dtype))
def test_zero_pages(spec: str, dtype: torch.dtype) -> None:
    """Zeros decode to exactly zero."""
    encoder = make_encoder(spec, 80, page_size=16, dtype=dtype)
    zeros = torch.zeros(2, 16, 80, dtype=dtype)
    for result in round_trip(encoder, zeros, zeros).values():
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("spec", specs())
def test_tiny_values(spec: str) -> None:
    """Values below what half precision scales resolve are off by no more than half the smallest scale."""
    encoder = make_encoder(spec, 64, page_size=16)
    x = 1e-6 * gaussian(0, 2, 16, 64)
    for side, result in round_trip(encoder, x, x).items():
        assert float((result - rotated(encoder, side, x)).abs().max()) <= 2.0**-15


@pairwise(
    "spec, dtype",
    [spec for spec in specs() if spec != "none"],
    [torch.float16, torch.bfloat16],
    of=lambda spec, dtype: (name_of(spec), dtype),
)
def test_narrow_dtypes_are_encoded_in_float32(spec: str, dtype: torch.dtype) -> None:
    """A page in half precision gives the record of the same numbers in float32."""
    x, y = gaussian(0, 2, 16, 64).to(dtype), gaussian(1, 2, 16, 64).to(dtype)
    narrow = make_encoder(spec, 64, page_size=16, dtype=dtype).encode(x, y, None)
    assert torch.equal(narrow, make_encoder(spec, 64, page_size=16).encode(x.float(), y.float(), None))
