"""Clipped ranges, row by row in plain Python, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.base import Encoded
from hf_kvcache.codecs.integer import IntegerSide
from tests.codecs.pages_of import gaussian, make_encoder, relative_error, round_trip


def range_of(row: list[float], bits: int, clip: float) -> tuple[float, float]:
    """Lowest and highest level that a row should have."""
    low, high = min(row), max(row)
    magnitudes = sorted(abs(x) for x in row)
    limit = magnitudes[min(int(clip * len(row)), len(row) - 1)]
    half_step = (high - low) / (2**bits - 1) / 2
    return min(max(low, -limit), low + half_step), max(min(high, limit), high - half_step)


def levels(encoded: Encoded, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest level of each row, ``[N, P]``."""
    assert encoded.scale is not None and encoded.zero is not None
    zero, scale = encoded.zero.float()[..., 0], encoded.scale.float()[..., 0]
    return zero, zero + (2**bits - 1) * scale


@pytest.mark.parametrize("dim", [8, 64, 72])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ranges_by_hand(bits: int, dim: int) -> None:
    codec = resolve("clipped", bits)
    x = gaussian(bits, 2, 16, dim)
    x[0, 3] += 50
    x[0, 4] -= 50
    x[1, 5, 1] = 1000
    x[1, 6] = -3.5
    for side, clip in ((codec.keys, 0.96), (codec.values, 0.92)):
        low, high = levels(side.encode(x), bits)
        for page in range(2):
            for token in range(16):
                expected = range_of(x[page, token].tolist(), bits, clip)
                found = float(low[page, token]), float(high[page, token])
                # Scale and zero are in half precision, and a scale is at least 2^-14.
                assert found == pytest.approx(expected, rel=2e-3, abs=2e-3 + (2**bits - 1) * 2.0**-14)


def test_without_clipping_it_is_the_integer_codec() -> None:
    x = gaussian(0, 2, 16, 64)
    codec = resolve("clipped2", key_clip=1, value_clip=1.0, group_size=32)
    for side in (codec.keys, codec.values):
        for found, expected in zip(side.encode(x), IntegerSide(2, "token", 32).encode(x), strict=True):
            assert (found is None) == (expected is None) and (found is None or torch.equal(found, expected))


def test_groups_are_clipped_by_themselves() -> None:
    x = gaussian(0, 2, 16, 64)
    together = resolve("clipped2", group_size=32).values.encode(x)
    apart = [resolve("clipped2").values.encode(half.contiguous()) for half in x.split(32, 2)]
    assert torch.equal(together.codes, torch.cat([part.codes for part in apart], 2))


@pytest.mark.parametrize("bits", [2, 3])
def test_rows_like_rotated_ones_lose_less(bits: int) -> None:
    """Of normal rows of 64 and 128 channels, a clipped range with few levels loses less, the more so the fewer."""
    for dim in (64, 128):
        x = gaussian(1, 8, 64, dim)
        errors = {
            clip: relative_error(
                round_trip(make_encoder(resolve("clipped", bits, value_clip=clip), dim), x, x)["values"], x
            )
            for clip in (0.92, 1.0)
        }
        assert errors[0.92] < (0.9 if bits == 2 else 1.0) * errors[1.0]


@pytest.mark.parametrize("clip", [0.1, 0.5, 0.92])
def test_outliers_are_no_worse_off_than_without_clipping(clip: float) -> None:
    """With any clipping, the error of no element exceeds half a step of the whole range."""
    x = gaussian(2, 4, 64, 64) * torch.logspace(-2, 2, 64)
    for bits in (2, 4):
        codec = resolve("clipped", bits, key_clip=clip, value_clip=clip)
        for side, found in round_trip(make_encoder(codec, 64), x, x).items():
            half_step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1) / 2
            off = (found - x).abs().amax(-1)
            assert (off <= half_step + 2e-3 * x.abs().amax(-1)).all(), side


@pytest.mark.parametrize(
    "options", [{"key_clip": 0}, {"key_clip": 1.5}, {"value_clip": -0.1}, {"value_clip": True}, {"key_clip": "most"}]
)
def test_shares_out_of_range(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}; accepted: above 0 and up to 1"):
        resolve("clipped2", **options)


def test_it_is_made_for_two_bits() -> None:
    codec = resolve("clipped")
    assert (codec.key_bits, codec.value_bits) == (2, 2)
    # The kernels would encode without clipping.
    assert codec.keys.method is None and codec.values.method is None and IntegerSide.method == "integer"
