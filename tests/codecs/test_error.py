"""Errors of decoded pages, against the bounds of theory."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.codecs import resolve, specs
from hf_kvcache.kernels.hadamard import rotation_matrix
from tests.choosing import pairwise
from tests.codecs.pages_of import SIDES, decoded, gaussian, make_encoder, name_of, relative_error, rotated, round_trip

WIDTHS = [(64, 64), (80, 80), (96, 64), (128, 128), (256, 256)]
#: Mean squared errors of the Lloyd-Max quantizer of N(0, 1) (Max, 1960).
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def pages(side: str, dims: tuple[int, int], page_size: int, count: int = 3) -> torch.Tensor:
    """Gaussian pages whose channels and tokens differ in mean and spread."""
    dim = dims[SIDES.index(side)]
    x = gaussian(dim + page_size, count, page_size, dim)
    return x * gaussian(5, dim).exp() * (0.3 * gaussian(6, page_size, 1)).exp() + 2 * gaussian(7, dim)


def uniform_bound(x: torch.Tensor, bits: int, axis: int, group: int) -> torch.Tensor:
    """Half a step of the range of each group, and the errors of rounding its ends and its step to half precision."""
    grouped = x.unflatten(axis, (-1, group))
    low, high = grouped.amin(axis + 1, keepdim=True), grouped.amax(axis + 1, keepdim=True)
    half_step = (high - low) / (2**bits - 1) / 2
    rounding = 2.0**-11 * (low.abs() + (high - low)) + 2.0**-15
    return (half_step + rounding).expand(grouped.shape).flatten(axis, axis + 1)


@pairwise("name, bits, dims, page_size, group_size", ["int", "rotated"], [2, 3, 4, 8], WIDTHS, [16, 128], [None, 16])
def test_uniform(name: str, bits: int, dims: tuple[int, int], page_size: int, group_size: int | None) -> None:
    """No element is off by more than half the step of its group: keys along tokens, values along channels."""
    encoder = make_encoder(resolve(name, bits, group_size=group_size), *dims, page_size)
    given = {side: pages(side, dims, page_size) for side in SIDES}
    result = round_trip(encoder, given["keys"], given["values"])
    for side, axis in (("keys", 1), ("values", 2)):
        exact = rotated(encoder, side, given[side])
        error = (result[side] - exact).abs()
        assert (error <= uniform_bound(exact, bits, axis, group_size or exact.shape[axis])).all()
        # Rounding errors are spread evenly over a step: their root mean square is a half step over root 3.
        half_step = uniform_bound(exact, bits, axis, group_size or exact.shape[axis])
        if group_size is None and page_size > 16 and bits < 8:
            assert 0.45 < float((error / half_step).square().mean().sqrt()) < 0.61


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_turboquant_reaches_lloyd_max(bits: int, dim: int) -> None:
    """The error on Gaussian vectors is that of the best scalar quantizer, but for the norm's correction."""
    encoder = make_encoder(f"turboquant{bits}", dim, page_size=128)
    x = gaussian(bits, 16, 128, dim)
    for side, result in round_trip(encoder, x, x.flip(0)).items():
        exact = rotated(encoder, side, x if side == "keys" else x.flip(0))
        assert relative_error(result, exact) ** 2 == pytest.approx(LLOYD_MAX[bits], rel=0.15)


def test_turboquant_keeps_lengths() -> None:
    """The decoded vector is as long as the original, to the half precision of its norm."""
    encoder = make_encoder("turboquant2", 96, 64, page_size=64)
    keys, values = 30 * gaussian(0, 4, 64, 96), 0.01 * gaussian(1, 4, 64, 64)
    result = round_trip(encoder, keys, values)
    for side, exact in (("keys", keys), ("values", values)):
        torch.testing.assert_close(result[side].norm(dim=-1), exact.double().norm(dim=-1), rtol=2.0**-10, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_unbiased_keeps_dot_products(bits: int) -> None:
    """The dot product with the decoded vector is the squared length; poor approximations have a bounded error."""
    encoder = make_encoder(f"unbiased{bits}", 96, 64, page_size=64)
    given = {side: pages(side, (96, 64), 64) for side in SIDES}
    for side, result in round_trip(encoder, given["keys"], given["values"]).items():
        exact = rotated(encoder, side, given[side])
        cosine = torch.cosine_similarity(result, exact, dim=-1)
        good = cosine > 0.751
        assert good.double().mean() > (0.5 if bits == 1 else 0.99)
        dots, energy = (result * exact).sum(-1), exact.square().sum(-1)
        torch.testing.assert_close(dots[good], energy[good], rtol=2.0**-10, atol=1e-4)
        assert ((result - exact).norm(dim=-1) <= 1.001 * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("dims", WIDTHS)
def test_fp8(dims: tuple[int, int]) -> None:
    """Half a unit of three mantissa bits, or half the smallest step of the scale below the normal range."""
    encoder = make_encoder("fp8", *dims)
    given = {side: pages(side, dims, 64) for side in SIDES}
    for side, result in round_trip(encoder, given["keys"], given["values"]).items():
        exact = given[side].double()
        largest = exact.abs().amax(-1, keepdim=True)
        bound = 2.0**-4 * exact.abs() + 1.001 * 2.0**-10 * largest / 448 + 2.0**-11 * largest * (exact.abs() == largest)
        assert ((result - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_none_is_exact(dtype: torch.dtype) -> None:
    """Dense pages return their vectors bit for bit."""
    encoder = make_encoder("none", 96, 64, 16, dtype)
    given = {"keys": gaussian(0, 5, 16, 96).to(dtype), "values": gaussian(1, 5, 16, 64).to(dtype)}
    for side, result in round_trip(encoder, given["keys"], given["values"]).items():
        assert torch.equal(result, given[side].double())


def test_bf16_rounds_once() -> None:
    """Half a unit of eight mantissa bits, for vectors of any dtype."""
    given = {"keys": gaussian(0, 5, 16, 96), "values": gaussian(1, 5, 16, 64)}
    for side, result in round_trip(make_encoder("bf16", 96, 64, 16), given["keys"], given["values"]).items():
        assert torch.equal(result, given[side].bfloat16().double())


@pairwise("spec, dims", specs(), WIDTHS, of=lambda spec, dims: (name_of(spec), dims))
def test_gaussian_pages(spec: str, dims: tuple[int, int]) -> None:
    """On Gaussian data no codec is worse than a uniform quantizer over six standard deviations."""
    encoder = make_encoder(spec, *dims, page_size=128)
    x = {"keys": gaussian(0, 2, 128, dims[0]), "values": gaussian(1, 2, 128, dims[1])}
    for side, result in round_trip(encoder, x["keys"], x["values"]).items():
        fmt = encoder.layout.sides[side]
        uniform = 6 / (2**fmt.bits - 1) / 12**0.5
        bound = {"float8": 0.03, "dense": 2.0**-8}.get(fmt.level, uniform)
        assert relative_error(result, rotated(encoder, side, x[side])) < bound


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["rotated", "kvarn"])
def test_rotation_tames_an_outlier_channel(name: str, bits: int) -> None:
    """One channel 50 times as wide as the rest costs values rounded per token far less once it is spread."""
    x = gaussian(3, 4, 128, 64)
    x[:, :, 17] *= 50
    plain, spread = make_encoder(f"int{bits}", page_size=128), make_encoder(f"{name}{bits}", page_size=128)
    errors = {}
    for encoder in (plain, spread):
        exact = rotated(encoder, "values", x)
        errors[encoder] = relative_error(round_trip(encoder, x, x)["values"], exact)
    assert errors[spread] < 0.7 * errors[plain]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kvarn_evens_out_tokens(bits: int) -> None:
    """Tokens ten times as long as the rest hurt keys rounded per channel, kvarn less than half as much."""
    x = gaussian(4, 4, 128, 64)
    x[:, ::40] *= 10
    ordinary = torch.arange(128) % 40 != 0
    errors = {}
    for spec in (f"rotated{bits}", f"kvarn{bits}"):
        encoder = make_encoder(spec, page_size=128)
        exact = rotated(encoder, "keys", x)
        errors[spec] = relative_error(round_trip(encoder, x, x)["keys"][:, ordinary], exact[:, ordinary])
    assert errors[f"kvarn{bits}"] < 0.5 * errors[f"rotated{bits}"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kvarn_evens_out_channels(bits: int) -> None:
    """Rotated channels ten times as wide as the rest hurt values rounded per token, kvarn less than half as much."""
    y = gaussian(5, 4, 128, 64)
    y[:, :, ::20] *= 10
    ordinary = torch.arange(64) % 20 != 0
    rotation = rotation_matrix(64, "hadamard", torch.float32, y.device)
    assert rotation is not None
    x, errors = y @ rotation.T, {}
    for spec in (f"rotated{bits}", f"kvarn{bits}"):
        encoder = make_encoder(spec, page_size=128)
        exact = rotated(encoder, "values", x)
        errors[spec] = relative_error(round_trip(encoder, x, x)["values"][..., ordinary], exact[..., ordinary])
    assert errors[f"kvarn{bits}"] < 0.5 * errors[f"rotated{bits}"]


def test_centered_keys_are_stored_less_their_mean() -> None:
    """A mean given to the encoder is subtracted in the rotated basis, from the keys only, page by page."""
    encoder = make_encoder(resolve("rotated8", key_axis="token"), 64)
    assert encoder.centered
    keys, values = gaussian(0, 2, 64, 64) + 40, gaussian(1, 2, 64, 64)
    key_mean = rotated(encoder, "keys", keys).mean(1).float()
    records = encoder.encode(keys, values, key_mean)
    exact = rotated(encoder, "keys", keys) - key_mean.double().unsqueeze(1)
    assert relative_error(decoded(encoder, "keys", records), exact) < 0.01
    assert relative_error(decoded(encoder, "values", records), rotated(encoder, "values", values)) < 0.01
