"""``encode_pages`` against the codecs in torch: the same bytes where nothing is rotated, else as small an error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels import dispatch
from hf_kvcache.kernels.cpu import encode as native
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.reference.hadamard import rotation_matrix
from hf_kvcache.kernels.reference.levels import decode_side

SIDES = ("keys", "values")
GUARD = 64
POISON = 0xAB
DIMS = (64, 72, 80, 96, 128)
PAGE_SIZES = (8, 24, 128)
#: Pages of so few tokens that a code which falls on the other side of an edge shows in the error.
TINY = 8
#: How far the mean squared error may lie from the torch path's; the worst measured: 0.6 %, and 1.4 % of tiny pages.
ERROR, ERROR_OF_TINY = 0.01, 0.03
#: The share of the codes' bytes that may differ. Levels of a table are found in torch by a grid of 512 cells a unit, so
#: values within 1/1024 of an edge go either way: 1.5 % at the most. Integers differ by float32's own rounding alone.
TABLE_BYTES, INTEGER_BYTES = 0.03, 0.005

#: Name, bits and options; ``group_size=-1`` stands for the largest group that pages and rows of any shape here have.
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"int{bits}": (f"int{bits}", {}) for bits in (2, 3, 4, 8)},
    **{f"int{bits} in groups": (f"int{bits}", {"group_size": -1}) for bits in (2, 3, 4, 8)},
    **{f"rotated{bits}": (f"rotated{bits}", {}) for bits in (2, 3, 4, 8)},
    **{f"rotated{bits} per token": (f"rotated{bits}", {"key_axis": "token"}) for bits in (2, 3, 4, 8)},
    **{
        f"rotated{bits} per token in groups": (f"rotated{bits}", {"key_axis": "token", "group_size": -1})
        for bits in (2, 3, 4, 8)
    },
    **{f"unbiased{bits}": (f"unbiased{bits}", {}) for bits in (1, 2, 3, 4)},
    **{f"turboquant{bits}": (f"turboquant{bits}", {}) for bits in (1, 2, 3, 4)},
    **{f"turboquant{bits} centered": (f"turboquant{bits}", {"center": True}) for bits in (1, 4)},
}
#: One of each method and axis.
SOME = ("int4", "int3 in groups", "rotated4", "rotated8 per token", "unbiased1", "unbiased4", "turboquant4 centered")
#: Those for values at the ends: with other widths too.
AT_THE_ENDS = (*SOME, "int8", "rotated2", "unbiased2", "turboquant1")


class Input(NamedTuple):
    """The input of one side of pages: ``x [N, P, D]``; ``key_mean`` and ``key_scale [N, D]`` or None."""

    x: torch.Tensor
    key_mean: torch.Tensor | None
    key_scale: torch.Tensor | None = None

    def part(self, pages: slice) -> Input:
        """Some of the pages."""
        return Input(*(None if t is None else t[pages] for t in self))  # type: ignore[arg-type]


def make_encoder(name: str, dim: int, page_size: int, dtype: torch.dtype = torch.float32) -> PageEncoder:
    """The encoder of a codec of :data:`CODECS`."""
    spec, options = CODECS[name]
    if options.get("group_size") == -1:
        options = options | {"group_size": 16 if dim % 16 == 0 and page_size % 16 == 0 else 8}
    return PageEncoder(resolve(spec, **options), dim, dim, page_size, dtype)


def make_input(encoder: PageEncoder, side: str, pages: int, seed: int = 0) -> Input:
    """Normal vectors of different lengths, with channels of different sizes and means."""
    fmt = encoder.layout.sides[side]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(pages, encoder.layout.page_size, fmt.dim) * (0.3 * normal(fmt.dim)).exp() + normal(fmt.dim)
    x *= (0.3 * normal(pages, encoder.layout.page_size, 1)).exp()
    scale = torch.exp2(torch.randint(-1, 2, (pages, fmt.dim), generator=generator).float()) if fmt.balanced else None
    return Input(x, normal(pages, fmt.dim) if fmt.centered else None, scale)


def encode(encoder: PageEncoder, side: str, given: Input, poison: int = POISON) -> torch.Tensor:
    """Records by the kernels, in memory that was full of ``poison``, between guards that must stay.

    The other side encodes the same vectors. Bytes between the fields are 0.
    """
    layout, x = encoder.layout, given.x.unsqueeze(1)
    assert native.supports_encoding(layout, encoder.methods, x, x)
    buffer = torch.full((len(given.x) * layout.record_bytes + 2 * GUARD,), poison, dtype=torch.uint8)
    records = buffer[GUARD:-GUARD].view(len(given.x), layout.record_bytes)
    basis = given.key_mean, given.key_scale
    native.encode_pages(layout, encoder.methods, x, x, *(basis if side == "keys" else (None, None)), records)
    assert (buffer[:GUARD] == poison).all() and (buffer[-GUARD:] == poison).all(), "bytes outside the records"
    assert not records[:, ~(of_side(encoder, "keys") | of_side(encoder, "values"))].any(), "bytes between fields"
    return records


def encode_in_torch(encoder: PageEncoder, side: str, given: Input, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Records by the codec itself; the other side encodes zeros."""
    other = torch.zeros(len(given.x), encoder.layout.page_size, encoder.layout.sides["keys"].dim)
    keys, values = (given.x, other) if side == "keys" else (other, given.x)
    with monkeypatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "reference")
        return encoder.encode(keys, values, given.key_mean, given.key_scale)


def of_side(encoder: PageEncoder, side: str) -> torch.Tensor:
    """bool ``[record_bytes]``: the bytes of a side's fields."""
    mask = torch.zeros(encoder.layout.record_bytes, dtype=torch.bool)
    for name, field in encoder.layout.fields.items():
        if name.startswith(side):
            mask[field.offset : field.offset + field.nbytes] = True
    return mask


def rotated(encoder: PageEncoder, side: str, given: Input) -> torch.Tensor:
    """The vectors that are rounded, in float64."""
    fmt = encoder.layout.sides[side]
    matrix = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, given.x.device)
    x = given.x.double() if given.key_scale is None else given.x.double() / given.key_scale.double()[:, None]
    x = x if matrix is None else x @ matrix
    return x if given.key_mean is None else x - given.key_mean.double()[:, None]


def decoded(encoder: PageEncoder, side: str, records: torch.Tensor) -> torch.Tensor:
    """The vectors of the records, in the same basis, in float64."""
    shape = (len(records), encoder.layout.page_size, encoder.layout.sides[side].dim)
    return decode_side(encoder.layout, side, records, torch.full(shape, torch.nan, dtype=torch.float64))


def squared_error(encoder: PageEncoder, side: str, given: Input, records: torch.Tensor) -> float:
    return float((decoded(encoder, side, records) - rotated(encoder, side, given)).square().mean())


def differing_codes(encoder: PageEncoder, side: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of the bytes of codes that differ."""
    codes_a, codes_b = (encoder.layout.view(records, f"{side}.codes") for records in (a, b))
    assert codes_a is not None and codes_b is not None
    return float((codes_a != codes_b).double().mean())


def instruction_sets() -> Iterator[str]:
    """Each instruction set of this CPU, in use while the loop is at it."""
    before = library.isa()
    try:
        for isa in library.available_isas():
            library.set_isa(isa)
            yield isa
    finally:
        library.set_isa(before)


@pytest.mark.parametrize("name", CODECS)
def test_codecs(name: str, loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every codec, width and page size: bytes where nothing is rotated, else errors; nothing beyond is written."""
    for dim, page_size, side in itertools.product(DIMS, PAGE_SIZES, SIDES):
        encoder = make_encoder(name, dim, page_size)
        given = make_input(encoder, side, 1 if page_size == 128 else 5)
        expected = encode_in_torch(encoder, side, given, monkeypatch)
        for isa in instruction_sets():
            try:
                check(encoder, side, given, expected)
            except AssertionError as error:
                raise AssertionError(f"{isa}: {side} of {name}, head_dim={dim}, page_size={page_size}") from error


def check(encoder: PageEncoder, side: str, given: Input, expected: torch.Tensor) -> None:
    """Assert that the instruction set in use encodes ``given`` as well as torch does."""
    actual = encode(encoder, side, given)
    fields = of_side(encoder, side)
    fmt = encoder.layout.sides[side]
    if fmt.rotation == "none":
        assert torch.equal(actual[:, fields], expected[:, fields])
        return
    differing = differing_codes(encoder, side, actual, expected)
    assert differing <= (TABLE_BYTES if fmt.level == "table" else INTEGER_BYTES), differing
    error, reference = (squared_error(encoder, side, given, records) for records in (actual, expected))
    allowed = ERROR_OF_TINY if encoder.layout.page_size == TINY else ERROR
    assert abs(error - reference) <= allowed * reference, error / reference


@pytest.mark.parametrize("name", CODECS)
def test_every_byte_of_the_fields_is_written(isa: str, name: str) -> None:
    """The fields do not depend on what the memory held before."""
    for dim, page_size, side in itertools.product((72, 128), (8, 24), SIDES):
        encoder = make_encoder(name, dim, page_size)
        given = make_input(encoder, side, 3)
        fields = of_side(encoder, side)
        first, second = (encode(encoder, side, given, poison)[:, fields] for poison in (POISON, 0x54))
        assert torch.equal(first, second)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("side", SIDES)
def test_unbiased(isa: str, side: str, bits: int) -> None:
    """``<x, x_hat> = <x, x>`` for every token whose approximation is not poor, up to the gain's half precision."""
    for dim, page_size in itertools.product(DIMS, PAGE_SIZES):
        encoder = make_encoder(f"unbiased{bits}", dim, page_size)
        given = make_input(encoder, side, 3)
        x, x_hat = rotated(encoder, side, given), decoded(encoder, side, encode(encoder, side, given))
        products, squares = (x * x_hat).sum(-1), x.square().sum(-1)
        good = products / (squares.sqrt() * x_hat.norm(dim=-1)) > 0.76
        assert good.double().mean() > 0.5
        torch.testing.assert_close(products[good], squares[good], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SOME)
def test_other_pages_and_threads_change_nothing(isa: str, name: str, threads: None) -> None:
    """A page alone, among others, and by any number of threads has the same bytes."""
    for dim, page_size, side in itertools.product((64, 80), (8, 24), SIDES):
        encoder = make_encoder(name, dim, page_size)
        given = make_input(encoder, side, 7)
        together = encode(encoder, side, given)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(encode(encoder, side, given), together)
        for i in range(len(given.x)):
            assert torch.equal(encode(encoder, side, given.part(slice(i, i + 1))), together[i : i + 1])


def test_no_pages(isa: str) -> None:
    """Nothing to encode writes nothing."""
    for name, side in itertools.product(SOME, SIDES):
        encoder = make_encoder(name, 64, 8)
        assert encode(encoder, side, make_input(encoder, side, 0)).shape == (0, encoder.layout.record_bytes)


def test_strided_input(isa: str) -> None:
    """Vectors that are not side by side, and a key mean in half precision."""
    for name, side in itertools.product(SOME, SIDES):
        encoder = make_encoder(name, 64, 24)
        given = make_input(encoder, side, 3)
        apart = given.x.transpose(1, 2).contiguous().transpose(1, 2)
        key_mean = None if given.key_mean is None else given.key_mean.half()
        expected = encode(encoder, side, given._replace(key_mean=None if key_mean is None else key_mean.float()))
        assert torch.equal(encode(encoder, side, given._replace(x=apart, key_mean=key_mean)), expected)


def test_where_pages_lie(isa: str) -> None:
    """Pages of several sequences and heads, which lie token by token, go to the addresses of their records."""
    for name in SOME:
        encoder = make_encoder(name, 80, 8)
        fmt, layout = encoder.layout.sides["keys"], encoder.layout
        held = torch.full((3, 2 * 8 + 5, 2, 2 * 80), torch.nan)
        held[:, 2:18] = torch.randn(3, 16, 2, 160, generator=torch.Generator().manual_seed(2))
        keys, values = (x[:, 2:18].transpose(1, 2) for x in held.split(80, 3))
        mean = torch.randn(6, 80) if fmt.centered else None
        scale = torch.exp2(torch.randint(-1, 2, (6, 80)).float()) if fmt.balanced else None
        # Page by page, and for each page row by row, in records that lie in any order.
        order = torch.randperm(12)
        records = torch.full((12, layout.record_bytes), POISON, dtype=torch.uint8)
        addresses = records.data_ptr() + order * layout.record_bytes
        native.encode_pages(layout, encoder.methods, keys, values, mean, scale, addresses)
        pages = [x.unflatten(2, (2, 8)).permute(2, 0, 1, 3, 4).reshape(12, 1, 8, 80) for x in (keys, values)]
        repeated = [None if t is None else t.repeat(2, 1) for t in (mean, scale)]
        expected = torch.full_like(records, 0x54)
        native.encode_pages(layout, encoder.methods, *pages, *repeated, expected)
        assert torch.equal(records[order], expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_without_rounding(isa: str, dtype: torch.dtype) -> None:
    """The codec ``none`` copies vectors as they are."""
    encoder = PageEncoder(resolve("none"), 72, 40, 8, dtype)
    keys, values = torch.randn(2, 3, 16, 72).to(dtype), torch.randn(2, 3, 16, 40).to(dtype)
    records = torch.full((12, encoder.layout.record_bytes), POISON, dtype=torch.uint8)
    encoder.write(keys, values, None, None, records)
    for side, x in (("keys", keys), ("values", values)):
        held = encoder.layout.view(records, f"{side}.codes")
        assert held is not None and torch.equal(held.view(2, 2, 3, 8, -1).permute(1, 2, 0, 3, 4).flatten(2, 3), x)


def edge_pages(page_size: int, dim: int) -> dict[str, torch.Tensor]:
    """Pages ``[P, D]`` of extreme values."""
    normal = torch.randn(page_size, dim, generator=torch.Generator().manual_seed(1))
    pages = {
        "zeros": torch.zeros(page_size, dim),
        "one value": torch.full((page_size, dim), -3.0),
        "constant channels": normal[:1].expand(page_size, -1).clone(),
        "constant tokens": normal[:, :1].expand(-1, dim).clone(),
        "one token that is not zero": torch.zeros(page_size, dim).index_copy_(0, torch.tensor([3]), normal[:1]),
        "denormals": normal * 1e-39,
        "below half precision": normal * 1e-9,
        "half precision's denormals": normal * 1e-5,
        "near the end of half precision": normal * 1.5e4,
    }
    for size in (1e4, 1e6, -1e6):
        page = normal.clone()
        page[2, 5] = size
        pages[f"an outlier of {size:g}"] = page
    return pages


@pytest.mark.parametrize("key_mean", [False, True])
@pytest.mark.parametrize("name", AT_THE_ENDS)
def test_edge_values(name: str, key_mean: bool, loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a number that is not finite, and an error like the torch path's, if not smaller."""
    for (dim, page_size), side in itertools.product(((64, 8), (80, 128)), SIDES):
        encoder = make_encoder(name, dim, page_size)
        if key_mean and not encoder.layout.sides[side].centered:
            continue
        for edge, page in edge_pages(page_size, dim).items():
            given = Input(page[None], None)
            if key_mean:
                given = given._replace(key_mean=rotated(encoder, side, given).mean(1).float())
            expected = encode_in_torch(encoder, side, given, monkeypatch)
            for isa in instruction_sets():
                try:
                    check_edge(encoder, side, given, expected)
                except AssertionError as error:
                    where = f"{isa}: {edge}, {side} of {name}, head_dim={dim}, page_size={page_size}"
                    raise AssertionError(where) from error


def check_edge(encoder: PageEncoder, side: str, given: Input, expected: torch.Tensor) -> None:
    """Assert that a page of extreme values is finite when decoded, and as near as with the torch path."""
    actual = encode(encoder, side, given)
    assert decoded(encoder, side, actual).isfinite().all()
    fmt = encoder.layout.sides[side]
    if fmt.rotation == "none":
        fields = of_side(encoder, side)
        assert torch.equal(actual[:, fields], expected[:, fields])
        return
    # Where channels are all but constant, the table codecs' steps are fitted to rounding noise, which differs.
    factor, share = (1.25, 5e-5) if fmt.level == "table" else (1.05, 4e-7)
    error, reference = (squared_error(encoder, side, given, records) for records in (actual, expected))
    assert error <= factor * reference + share * float(given.x.square().mean()), (error, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOME)
def test_half_precision_vectors(isa: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For vectors of any dtype the records are those of the same vectors in float32."""
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    encoder = make_encoder(name, 80, 24, dtype)
    keys, values = (make_input(encoder, side, 3, seed) for seed, side in enumerate(SIDES))
    assert encoder.writes_at_once(keys.x.to(dtype).unsqueeze(1), values.x.to(dtype).unsqueeze(1))
    records = encoder.encode(keys.x.to(dtype), values.x.to(dtype), keys.key_mean, keys.key_scale)
    for side, given in zip(SIDES, (keys, values), strict=True):
        fields = of_side(encoder, side)
        same = given._replace(x=given.x.to(dtype).float())
        in_float32 = make_encoder(name, 80, 24)
        assert torch.equal(records[:, fields], encode(in_float32, side, same)[:, fields])
        check(encoder, side, same, encode_in_torch(encoder, side, same, monkeypatch))
