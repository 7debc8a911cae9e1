"""Attention by the CPU kernels against float64: every codec, size and feature, on every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.inputs import DenseTokens
from tests.choosing import chosen, pairwise
from tests.kernels.cpu.cases import Case, Shape, formats_of
from tests.kernels.cpu.comparing import attend, check, check_call, worked_out
from tests.kernels.cpu.grid import CODECS, FEATURES, SHAPES, fits, make_case


def covering(codec: str) -> list[tuple[Shape, str]]:
    """Three shapes that fit, each with two features, which differ from codec to codec."""
    index = list(CODECS).index(codec)
    shapes = [shape for shape in SHAPES if fits(codec, shape)]
    names = list(FEATURES)
    return [
        (shapes[(index + 5 * i) % len(shapes)], names[(index + 3 * i + 7 * j) % len(names)])
        for i, j in itertools.product(range(3), range(2))
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, loaded: None) -> None:
    """Every codec, with shapes and features in turn."""
    for shape, feature in covering(codec):
        check_everywhere(make_case(codec, shape, **FEATURES[feature]))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("codec", ["int4", "unbiased2", "none"])
def test_features(codec: str, feature: str, loaded: None) -> None:
    """Every feature, for one query and for several."""
    for shape in (Shape(64, 64, 32, 3, 1, 2, 2), Shape(64, 80, 24, 1, 5, 1, 2)):
        check_everywhere(make_case(codec, shape, seed=1, **FEATURES[feature]))


@pairwise(
    "codec, dims",
    CODECS,
    [(16, 32), (32, 16), (24, 48), (192, 192)],
    of=lambda codec, dims: (CODECS[codec][0].rstrip("0123456789"), dims),
)
def test_other_widths(codec: str, dims: tuple[int, int], loaded: None) -> None:
    """Heads narrower than a register, and wide ones that are no power of two, for few queries and more."""
    for group, queries in ((3, 1), (2, 3)):
        shape = Shape(*dims, 24, group, queries, 1, 2)
        if fits(codec, shape):
            check_everywhere(make_case(codec, shape, seed=3, ragged=True, columns=3))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_all_combinations(codec: str, shape: Shape, loaded: None) -> None:
    if not fits(codec, shape):
        pytest.skip("the groups do not divide pages and rows of this shape")
    for feature in FEATURES:
        check_everywhere(make_case(codec, shape, seed=2, **FEATURES[feature]))


def check_everywhere(case: Case) -> None:
    """:func:`check` with each instruction set, whose name a failure carries."""
    before = library.isa()
    try:
        for isa in library.available_isas():
            library.set_isa(isa)
            try:
                check(case)
            except AssertionError as error:
                raise AssertionError(f"{isa}: {case}") from error
    finally:
        library.set_isa(before)


@chosen(
    "queries, window",
    [1, 6],
    [1, 2, 31, 32, 33, 100, 104, 105, 106, 10_000],
    fast=[
        *((1, window) for window in (1, 31, 32, 33, 104, 105, 10_000)),
        *((6, window) for window in (1, 2, 100, 106)),
    ],
)
def test_windows(isa: str, queries: int, window: int) -> None:
    """Windows from the query alone to more than all tokens; pages hold 96 tokens, and nine others follow."""
    shape = Shape(queries=queries)
    check(Case(formats_of("int4", shape), shape, window=window, ragged=True, seed=3))
    check(Case(formats_of("int4", shape), shape, window=window, scattered=True, seed=3))


@chosen(
    "codec, queries",
    ["unbiased3", "int8"],
    range(1, 17),
    fast=[
        *(("unbiased3", queries) for queries in (1, 2, 4, 5, 7, 16)),
        *(("int8", queries) for queries in (1, 3, 4, 6, 9)),
    ],
)
def test_any_number_of_queries(isa: str, codec: str, queries: int) -> None:
    """Queries are computed four at a time, and then the remaining ones."""
    check(make_case(codec, Shape(64, 64, 32, 1, queries, 1, 1), slots=17))


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(isa: str, query_dtype: torch.dtype, dense_dtype: torch.dtype) -> None:
    """Query, full-precision tokens and dense pages of any dtype, with and without a rest of a vector."""
    for dim in (64, 72, 20):
        shape = Shape(dim, dim, group=2)
        formats = formats_of("none", shape, dtype=dense_dtype)
        check(Case(formats, shape, query_dtype=query_dtype, dense_dtype=dense_dtype))


@chosen(
    "codec, dim",
    ["none", "int8", "fp8"],
    [1, 12, 20, 36, 100],
    fast=[("none", 1), ("none", 36), ("int8", 1), ("int8", 12), ("int8", 100), ("fp8", 20), ("fp8", 36)],
)
def test_widths_that_fill_no_vector(isa: str, codec: str, dim: int) -> None:
    """Codecs that pack no bits take any width."""
    check(make_case(codec, Shape(dim, dim + 3, page_size=7, group=2, queries=2), ragged=True))


@pytest.mark.parametrize("page_size", [1, 5, 300])
def test_odd_page_sizes(isa: str, page_size: int) -> None:
    """Pages of one token, and longer than the integer sums can be."""
    for codec in ("int4", "int8", "kvarn3"):
        check(make_case(codec, Shape(64, 64, page_size, 2), ragged=True))


def test_no_channel_gathers_the_errors(isa: str) -> None:
    """Rounded weights err in the mean of all channels, which the rotation back would put in the first one."""
    call, expected = worked_out(make_case("rotated2", Shape(128, 128, 128, 4, 1, 1, 8)))
    errors = (attend(call, sums=False).output - expected.output).abs().flatten(0, -2).mean(0)
    assert errors.max() < max(3 * float(errors.median()), 2e-6)  # the second: what float32 rounds


@pytest.mark.parametrize("dim", [264, 512])
def test_wide_vectors(isa: str, dim: int) -> None:
    """Wider than the integer sums can be."""
    for codec in ("int4", "int8", "unbiased3"):
        check(make_case(codec, Shape(dim, dim, group=2)))


@pytest.mark.parametrize("slots", [1, 5, 128, 129])
def test_no_pages(isa: str, slots: int) -> None:
    """Full-precision tokens alone, with every other feature."""
    shape = Shape(72, 40, group=4, batch=2)
    check(Case(None, shape, slots=slots))
    check(Case(None, shape, slots=slots, window=3, softcap=1.0, sinks=True, strided=True, dense_dtype=torch.bfloat16))


def test_pages_without_columns(isa: str) -> None:
    """An empty page table."""
    check(make_case("int4", Shape(), columns=0))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("pages", [False, True])
def test_nothing_to_see(isa: str, pages: bool, sinks: bool) -> None:
    """A query that sees nothing has output 0, sums 0 and log-sum-exp ``-inf``, or its sink logit."""
    shape = Shape(group=2, queries=2)
    case = Case(formats_of("int4", shape) if pages else None, shape, columns=1, sinks=sinks, window=1)
    call, _ = worked_out(case)
    call = call._replace(dense=DenseTokens(*vars(call.dense).values()))
    call.dense.unused = torch.ones(shape.batch, case.slots, dtype=torch.bool)
    result = attend(call)
    assert not result.output.any() and result.dense_sums is not None and not result.dense_sums.any()
    assert result.page_sums is None or not result.page_sums.any()
    expected = torch.full((1, 4, 2), -torch.inf)
    if call.scoring.sink_logits is not None:
        expected = call.scoring.sink_logits.view(1, 4, 1).expand(1, 4, 2)
    assert torch.equal(result.log_sum_exp, expected)


def test_sums_add_up(isa: str) -> None:
    """The probabilities of a query head sum to its number of queries, and are zero where there is no token."""
    call, _ = worked_out(make_case("unbiased4", Shape(queries=3, group=2, batch=2), ragged=True, unused=True))
    result = attend(call)
    assert call.pages is not None and result.page_sums is not None and result.dense_sums is not None
    seeing = (result.log_sum_exp > -torch.inf).sum(2)
    torch.testing.assert_close(result.page_sums.sum(2) + result.dense_sums.sum(2), seeing.float())
    empty = call.pages.unused(0, call.pages.columns)
    assert empty is not None
    assert not result.page_sums.view(2, 2, 2, -1)[empty.flatten(1).view(2, 2, 1, -1).expand(-1, -1, 2, -1)].any()


def test_sums_change_nothing(isa: str) -> None:
    """Output and log-sum-exp are the same without attention sums, which are then None."""
    call, _ = worked_out(make_case("kvarn4", Shape(queries=3, group=2), ragged=True))
    with_sums, without = attend(call), attend(call, sums=False)
    assert without.page_sums is None and without.dense_sums is None
    assert torch.equal(with_sums.output, without.output) and torch.equal(with_sums.log_sum_exp, without.log_sum_exp)


def test_slice_of_the_pages(isa: str) -> None:
    """The first columns of pages, as sparse reads and rollbacks make them, after a call on all of them."""
    call, expected = worked_out(make_case("int4", Shape(), columns=5, scattered=True))
    check_call(call, expected)
    assert call.pages is not None
    shorter = call._replace(pages=call.pages.until(2))
    from tests.kernels.cpu import brute_force

    check_call(shorter, brute_force.attend(shorter))


def test_query_with_apart_elements(isa: str) -> None:
    """A query whose last dimension is not contiguous."""
    call, expected = worked_out(make_case("int4", Shape(queries=2)))
    query = call.query.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert query.stride(-1) != 1
    check_call(call._replace(query=query), expected)
