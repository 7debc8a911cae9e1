"""Pages encoded in one launch, against the codecs in torch: the same bytes, or as small an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.machine_code import TARGETS
from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference.levels import decode_side
from hf_kvcache.kernels.reference.pack import unpack_bits
from hf_kvcache.kernels.triton import encode
from hf_kvcache.kernels.triton.compile_case import ARCHITECTURES
from hf_kvcache.storage.paged import PagedStorage
from tests.kernels.triton.calls import Random
from tests.kernels.triton.fixtures import bfloat16_dot  # noqa: F401 (an autouse fixture)
from tests.tolerances import assert_near

FLOAT = torch.float32
GUARD = 0xFF
#: Shares of codes that may differ from those of torch, by one level: sums of another order move a number over an edge.
#: Torch finds levels of a table in a grid of 512 cells a unit, so values within 1/1024 of an edge go either way.
TABLE_CODES, INTEGER_CODES = 0.03, 0.005
#: How much larger the mean squared error may be than in torch; of tiny pages, as here, one code shows in it.
ERROR = 0.01


class Pages(NamedTuple):
    """What is encoded: ``[b, heads, n * P, D]``, and a key mean ``[b * heads, D]`` or None."""

    keys: torch.Tensor
    values: torch.Tensor
    mean: torch.Tensor | None
    scale: torch.Tensor | None = None


def make_encoder(spec: str, dim: int, page: int, dtype: torch.dtype = FLOAT, **options: Any) -> PageEncoder:
    return PageEncoder(resolve(spec, **options), dim, dim, page, dtype)


def make_pages(encoder: PageEncoder, device: torch.device, dtype: torch.dtype = FLOAT) -> Pages:
    """Two pages of each of 2 x 2 heads, as a part of larger tensors in the order of a model's projections.

    Channels have sizes and means of their own. One page is a single number, one is beyond half precision's range, one
    below it.
    """
    random, page = Random(0), encoder.layout.page_size
    shape = (2, 2 * page + 3, 2, encoder.layout.sides["keys"].dim)
    x = [random.normal(*shape) * (0.3 * random.normal(shape[-1])).exp() + random.normal(shape[-1]) for _ in range(2)]
    for side in x:
        side[0, 2 : 2 + page, 0] = 0.5
        side[1, 2 + page : 2 + 2 * page, 0] *= 1e5 if dtype != torch.float16 else 10.0
        side[1, 2 : 2 + page, 1] *= 1e-7
    keys, values = (side.to(dtype).to(device).transpose(1, 2)[:, :, 2 : 2 + 2 * page] for side in x)
    mean = random.normal(4, shape[-1]).to(device) if encoder.centered else None
    scale = torch.exp2(random.normal(4, shape[-1]).round()).to(device) if encoder.balanced else None
    if scale is not None:
        scale[3] = 1  # the page below half precision's range is noise, whose codes depend on every rounding
    return Pages(keys, values, mean, scale)


def by_kernel(encoder: PageEncoder, pages: Pages) -> torch.Tensor:
    """The records by the kernel, in the middle of poisoned ones that must stay."""
    count = pages.keys.shape[0] * pages.keys.shape[1] * pages.keys.shape[2] // encoder.layout.page_size
    memory = torch.full((count + 2, encoder.layout.record_bytes), GUARD, dtype=torch.uint8, device=pages.keys.device)
    assert encode.supports_encoding(encoder.layout, encoder.methods, pages.keys, pages.values)
    encode.encode_pages(encoder.layout, encoder.methods, *pages, memory[1:-1])
    assert (memory[0] == GUARD).all() and (memory[-1] == GUARD).all()
    return memory[1:-1].cpu()


def cut(
    encoder: PageEncoder, pages: Pages
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The same as the reference takes it: ``[N, P, D]``, page by page and row by row, and mean and scale of each."""
    page = encoder.layout.page_size
    keys, values = (
        x.cpu().unflatten(2, (-1, page)).permute(2, 0, 1, 3, 4).flatten(0, 2) for x in (pages.keys, pages.values)
    )
    mean, scale = (None if t is None else t.cpu().repeat(2, 1) for t in (pages.mean, pages.scale))
    return keys, values, mean, scale


@pytest.mark.parametrize(
    ("spec", "dim", "page", "dtype", "options"),
    [
        pytest.param("int4", 40, 24, torch.float32, {}, marks=pytest.mark.slow),
        ("int3", 64, 24, torch.float16, {"group_size": 8}),
        pytest.param("int2", 72, 16, torch.bfloat16, {}, marks=pytest.mark.slow),
        pytest.param("int8", 64, 40, torch.float32, {"group_size": 4}, marks=pytest.mark.slow),
        ("int4", 32, 16, torch.float32, {"group_size": 16}),
        ("fp8", 72, 24, torch.bfloat16, {}),
        ("none", 40, 24, torch.float16, {}),
    ],
)
def test_the_same_bytes(
    spec: str, dim: int, page: int, dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    """Where nothing is summed, records are those of torch byte for byte, what lies between their fields included."""
    encoder = make_encoder(spec, dim, page, dtype, **options)
    pages = make_pages(encoder, device, dtype)
    assert torch.equal(by_kernel(encoder, pages), encoder.encode(*cut(encoder, pages)))


def codes_of(encoder: PageEncoder, side: str, records: torch.Tensor) -> torch.Tensor:
    fmt, codes = encoder.layout.sides[side], encoder.layout.view(records, f"{side}.codes")
    assert codes is not None
    return unpack_bits(codes, fmt.bits, torch.empty(*codes.shape[:2], fmt.dim))


def check_errors(encoder: PageEncoder, pages: Pages, records: torch.Tensor) -> None:
    """Records decode to what was encoded, with an error as in torch; few codes differ from torch's, and by one."""
    *vectors, mean, scale = cut(encoder, pages)
    expected = encoder.encode(*vectors, mean, scale)
    for side, x in zip(encoder.layout.sides, vectors, strict=True):
        fmt = encoder.layout.sides[side]
        matrix = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, x.device)
        exact = x.double() / scale.double()[:, None] if side == "keys" and scale is not None else x.double()
        exact = exact if matrix is None else exact @ matrix
        exact = exact - mean.double()[:, None] if side == "keys" and mean is not None else exact
        found, usual = (
            decode_side(encoder.layout, side, r, torch.full(exact.shape, torch.nan, dtype=torch.float64))
            for r in (records, expected)
        )
        # A page at a time: they differ in size. Tokens that are all alike leave only half precision's rounding of zero
        # points, and the codes of noise.
        error, usual_error, size = (y.square().mean((1, 2)) for y in (found - exact, usual - exact, exact))
        assert (error <= usual_error * (1 + ERROR) + size * 1e-6).all(), (side, error, usual_error)
        moved = (codes_of(encoder, side, records) - codes_of(encoder, side, expected)).abs()
        ordinary = exact.std(1).amin(1) > 1e-4
        assert ordinary.sum() >= len(x) // 2
        assert moved[ordinary].max() <= 1, side
        assert (moved[ordinary] > 0).double().mean() < (TABLE_CODES if fmt.level == "table" else INTEGER_CODES), side


@pytest.mark.parametrize(
    ("spec", "dim", "page", "dtype", "options"),
    [
        ("unbiased4", 80, 24, torch.bfloat16, {}),
        pytest.param("unbiased3", 64, 32, torch.float32, {}, marks=pytest.mark.slow),
        pytest.param("unbiased2", 72, 24, torch.float16, {}, marks=pytest.mark.slow),
        ("unbiased1", 64, 16, torch.float32, {}),
        ("rotated8", 80, 24, torch.float16, {}),
        ("rotated4", 64, 16, torch.float32, {"key_axis": "token", "group_size": 16}),
        ("turboquant3", 40, 16, torch.bfloat16, {"center": True}),
        pytest.param("kvarn4", 64, 24, torch.float32, {}, marks=pytest.mark.slow),
    ],
)
def test_the_same_error(
    spec: str, dim: int, page: int, dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    encoder = make_encoder(spec, dim, page, dtype, **options)
    pages = make_pages(encoder, device, dtype)
    check_errors(encoder, pages, by_kernel(encoder, pages))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_rotation_in_half_precision(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product as GPUs do it: signs in 16 bits, vectors in float32 in three parts. 8 bits show an error of 1e-3."""
    if device.type == "cpu":
        monkeypatch.setattr(encode, "architecture_of", lambda device: "sm90")
    encoder = make_encoder("rotated8", 40, 16, dtype)
    pages = make_pages(encoder, device, dtype)
    check_errors(encoder, pages, by_kernel(encoder, pages))


def test_records_by_their_addresses(device: torch.device) -> None:
    """Records that lie anywhere, in an order of their own, are those that lie side by side; others stay."""
    encoder = make_encoder("unbiased3", 32, 16)
    pages = make_pages(encoder, device)
    memory = torch.full((24, encoder.layout.record_bytes), GUARD, dtype=torch.uint8, device=device)
    places = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:8]
    addresses = memory.data_ptr() + places * encoder.layout.record_bytes
    encode.encode_pages(encoder.layout, encoder.methods, *pages, addresses.to(device))
    assert torch.equal(memory.cpu()[places], by_kernel(encoder, pages))
    others = torch.ones(24, dtype=torch.bool)
    others[places] = False
    assert (memory.cpu()[others] == GUARD).all()


@pytest.mark.slow
def test_far_apart(device: torch.device) -> None:
    """Sequences, heads and tokens may be further apart than 32 bits count."""
    encoder = make_encoder("int8", 16, 8, torch.bfloat16)
    memory = torch.empty(2**32 + 2**12, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((1, 2, 16, 16), (1, 2**32 - 2**30, 2**26, 1))
    x.copy_(Random(0).normal(*x.shape))
    pages = Pages(x, x, None)
    assert torch.equal(by_kernel(encoder, pages), encoder.encode(*cut(encoder, pages)))


@pytest.mark.parametrize(("dim", "tokens"), [(80, 300), (40, 1)])
def test_key_mean(dim: int, tokens: int, device: torch.device) -> None:
    """The mean of keys that are a part of a larger tensor, of more tokens than a program sums, and of one."""
    fmt = SideFormat(dim, 4, rotation="hadamard")
    keys = Random(1).normal(2, tokens + 5, 3, dim).to(device).transpose(1, 2)[:, :, 2 : 2 + tokens] + 3
    mean = torch.full((2, 3, dim), torch.nan, device=device)
    scale = torch.exp2(Random(2).normal(2, 3, dim).round()).to(device) if dim == 80 else None
    encode.key_mean(fmt, keys, scale, mean)
    matrix = rotation_matrix(dim, "hadamard", torch.float64, torch.device("cpu"))
    assert matrix is not None
    exact = keys.cpu().double().mean(2) / (1 if scale is None else scale.cpu().double())
    assert_near(mean.cpu(), (exact @ matrix).float())


def filled(spec: str, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """States of a storage: after a padded prompt, and after tokens that fill pages in memory with holes."""
    random, shape = Random(2), (2, 2, 40, 32)
    keys, values = (random.normal(*shape).to(device) for _ in range(2))
    storage = PagedStorage(make_encoder(spec, 32, 16), keys, values, 2, 4)
    valid = np.ones((2, 40), bool)
    valid[1, :7] = False
    storage.append_block(keys, values, 0, valid)
    yield storage.state()
    between = storage.pool.allocate(9)
    storage.pool.release(between[::2])
    for position in range(40, 60):
        key, value = (random.normal(2, 2, 1, 32).to(device) for _ in range(2))
        storage.append_one(key, value, position, None)
        storage.pack_due()
    yield storage.state()


@pytest.mark.parametrize("spec", ["int4", "unbiased4"])
def test_storage(spec: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage holds what it holds without kernels, padded rows and single page events included."""
    expected = list(filled(spec, torch.device("cpu")))
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "triton")
    for state, wanted in zip(filled(spec, device), expected, strict=True):
        assert state.keys() == wanted.keys()
        for name, tensor in state.items():
            if spec == "int4" or name != "records":
                torch.testing.assert_close(tensor.cpu(), wanted[name], rtol=1e-5, atol=1e-6)
            else:
                assert (tensor.cpu() == wanted[name]).double().mean() > 0.9, name


@pytest.mark.parametrize(("spec", "dim"), [("unbiased4", 256), ("int4", 256), ("int4", 160)])
def test_tiles_that_shared_memory_does_not_hold(spec: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of 128 tokens as wide as Gemma's goes through 128 KiB of shared memory, which not all GPUs have."""
    x = torch.zeros(1, 1, 128, dim, dtype=torch.bfloat16)
    encoder = make_encoder(spec, dim, 128, torch.bfloat16)
    for arch in ARCHITECTURES:
        monkeypatch.setattr(encode, "architecture_of", lambda device, arch=arch: arch)
        fits = TARGETS[arch].program_shared >= 4 * 128 * 256
        assert encode.supports_encoding(encoder.layout, encoder.methods, x, x) == fits, arch
        half = make_encoder(spec, dim, 64, torch.bfloat16)
        assert encode.supports_encoding(half.layout, half.methods, x, x), arch


def test_what_is_left_to_torch(device: torch.device) -> None:
    """Levels that are not symmetric, groups that cross the segments of a row, and float64."""
    x = torch.zeros(1, 1, 16, 48, device=device)
    cases = [
        (make_encoder("int4", 48, 16, group_size=16), FLOAT, False),  # groups of 16 of 24 channels
        (make_encoder("int4", 48, 16, group_size=8), FLOAT, True),
        (make_encoder("int4", 48, 16), torch.float64, False),
    ]
    for encoder, dtype, expected in cases:
        found = encode.supports_encoding(encoder.layout, encoder.methods, x.to(dtype), x.to(dtype))
        assert found == expected, encoder.codec
    fmt = SideFormat(48, 2, "table", group=48, zero=False, table=(-2.0, -1.0, 0.5, 2.0))
    assert not encode._KNOWN["norm"](fmt, 16)
