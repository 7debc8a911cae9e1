"""The Triton kernels of absorbed latent attention, against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_kvcache.kernels.inputs import Attention
from hf_kvcache.kernels.latent_decode import latent_attend
from hf_kvcache.kernels.triton import decoded_pages
from hf_kvcache.kernels.triton import latent_configs as triton_configs
from hf_kvcache.kernels.triton import latent_decode as kernels
from hf_kvcache.kernels.workspace import scratch
from tests.choosing import chosen
from tests.kernels.cpu.cases import Call
from tests.kernels.test_latent_decode import CODECS, FEATURES, Shape, check, expected, make_call, make_case, masked, on
from tests.kernels.triton.fixtures import poisoned_outputs  # noqa: F401
from tests.tolerances import TOLERANCES

#: One row; rows that fill no tile, several sequences; more rows than a tile, queries of one tile that see different
#: tokens, and a rotary part that fills no dot product; no rotary part.
SHAPES = (Shape(16, 8, 8, 1, 1, 1), Shape(64, 16, 32, 5, 1, 2), Shape(32, 24, 24, 7, 5, 1), Shape(64, 0, 16, 4, 3, 2))


@pytest.fixture(autouse=True)
def several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the few tokens of a test into splits and parts, as a GPU would cut many."""
    monkeypatch.setattr(kernels, "_LEAST_TOKENS", 16)
    monkeypatch.setattr(decoded_pages, "SCRATCH_BYTES", 1 << 13)
    monkeypatch.setattr(decoded_pages, "LEAST_TOKENS", 1)


def run(call: Call, device: torch.device) -> Attention:
    """The result of the kernels, with NaN in all memory that they have to write; their inputs must not change."""
    there = on(call, device)
    for tag in ("partial", "lse"):
        scratch(f"triton.{tag}", (1 << 20,), torch.float32, device).fill_(float("nan"))
    assert kernels.supports(*there, sums=False)
    read = [there.query, there.dense.keys, there.dense.values, *([] if there.pages is None else there.pages.slabs)]
    before = [x.clone() for x in read]
    result = kernels.latent_attend(*there)
    for old, new in zip(before, read, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    assert result.page_sums is None and result.dense_sums is None and result.output.is_contiguous()
    return result


def verify(call: Call, device: torch.device) -> None:
    """Fail unless the kernels agree with float64, within the precision of their dot products."""
    dtype = call.query.dtype
    exact = dtype == torch.float32
    tolerances = None if exact else dict.fromkeys(("output", "log_sum_exp", "sums"), TOLERANCES[dtype])
    check(run(call, device), call, tolerances=tolerances)


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, device: torch.device) -> None:
    """Every codec of the latents, in several splits of full pages, with dot products in half precision."""
    shape, dtype = SHAPES[list(CODECS).index(codec) % len(SHAPES)], torch.float16
    verify(make_call(make_case(codec, shape, dtype, query_dtype=dtype, dense_dtype=dtype)), device)


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, device: torch.device) -> None:
    """Every feature in float32, with latents as codes or dense, and without pages."""
    number = list(FEATURES).index(feature)
    for codec, shape in (
        (("int4 rotated in groups", "int8 rotated", "bfloat16")[number % 3], Shape(32, 8, 16, 3, 2, 2)),
        (None, Shape(32, 8, 16, 3, 1 + number % 2, 2)),
    ):
        verify(make_call(make_case(codec, shape, torch.bfloat16, seed=1, **FEATURES[feature])), device)


@pytest.mark.parametrize("queries", [1, 6])
def test_two_sizes_of_row_tiles(queries: int, device: torch.device) -> None:
    """Coded latents are the second factor of scores where a program has 32 queries, and the first where it has 16."""
    dtype, shape = torch.float16, Shape(32, 8, 16, 5, queries)
    call = make_call(
        make_case("int4 rotated in groups", shape, dtype, ragged=True, query_dtype=dtype, dense_dtype=dtype)
    )
    assert call.pages is not None and triton_configs.reads(call.pages.layout, dtype, "cpu") == "codes"
    assert triton_configs.latent_config("cpu", 5 * queries, "codes").block_m == (16 if queries == 1 else 32)
    verify(call, device)


@chosen("codec", ["int8 rotated", "turboquant4"], fast=[("int8 rotated",)])
def test_many_queries_read_decoded_pages(codec: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision, part by part; queries that would leave its range, a window, pages that are not full."""
    monkeypatch.setattr(triton_configs, "MOST_READING_PAGES", 32)
    case = make_case(codec, Shape(32, 8, 16, 5, 7, 2), window=30, ragged=True, size=3e5, columns=5)
    call = make_call(replace(case, dense_dtype=torch.bfloat16, query_dtype=torch.bfloat16))
    call = call._replace(scoring=replace(call.scoring, scaling=1e-6))
    assert call.pages is not None
    monkeypatch.setattr(triton_configs, "reads", lambda *given: "codes")  # the interpreter has no bfloat16
    decoded = triton_configs.decoded_dtypes(call.pages.layout, 35, torch.bfloat16, "cpu")
    assert decoded == (torch.float16, torch.float16)
    verify(call, device)


@pytest.mark.parametrize("rotary", ["int8", "int4 rotated", "turboquant4", "fp8"])
def test_packed_rotary_keys(rotary: str, device: torch.device) -> None:
    """Rotary keys may be packed too, also those that a dot product is too wide for."""
    for rank, dim in ((32, 16), (16, 8)):
        stored: Any = CODECS[rotary]
        pair = CODECS["int8 rotated"]().format(rank, 16, torch.float32), stored().format(dim, 16, torch.float32)  # type: ignore[operator]
        base = make_case("int8", Shape(rank, dim, 16, 3, 2), ragged=True)
        verify(make_call(replace(base, formats=pair)), device)


@chosen(
    "sizes, additive",
    [(1, 1), (1, 3), (4, 3)],
    [False, True],
    fast=[((1, 1), True), ((1, 3), False), ((4, 3), False), ((4, 3), True)],
)
def test_masks(sizes: tuple[int, int], additive: bool, device: torch.device) -> None:
    """A mask decides what is seen, per head and query or for all; it may begin after the first tokens, or end early."""
    case = make_case("int4 rotated", Shape(16, 8, 16, queries=3, batch=2), ragged=True, scattered=True, unused=True)
    call = masked(make_call(case), *sizes, additive, start=23)
    mask = call.visibility.mask
    assert mask is not None
    verify(call._replace(visibility=replace(call.visibility, mask=mask[..., :-5])), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_additive_masks_add(dtype: torch.dtype, device: torch.device) -> None:
    """Entries of an additive mask other than its lowest number and -inf are added to the scores after the soft cap."""
    call = make_call(make_case(None, Shape(queries=2), softcap=3.0))
    mask = torch.linspace(-2, 2, 18).to(dtype).view(1, 1, 2, 9).clone()
    mask[0, 0, 0, 3], mask[0, 0, 1, 5] = torch.finfo(dtype).min, -torch.inf
    result = run(call._replace(visibility=replace(call.visibility, mask=mask)), device)
    keys = torch.cat([call.dense.keys, call.dense.values], -1)[0, 0].double()
    scores = 3 * torch.tanh(call.query[0].double() @ keys.T * call.scoring.scaling / 3) + mask[0].double()
    scores.masked_fill_(torch.arange(9) > torch.arange(7, 9)[:, None], -torch.inf)
    expected = scores.softmax(-1) @ call.dense.keys[0, 0].double()
    torch.testing.assert_close(result.output[0].cpu().double(), expected.transpose(0, 1), rtol=1e-5, atol=4e-6)
    torch.testing.assert_close(result.log_sum_exp[0].cpu().double(), scores.logsumexp(-1), rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("codec", ["int8", "int4 rotated in groups", None])
def test_nothing_to_see(codec: str | None, sinks: bool, device: torch.device) -> None:
    """A query that sees nothing has output 0 and log-sum-exp ``-inf``, or its sink logit."""
    call = make_call(make_case(codec, Shape(queries=2), columns=1, sinks=sinks, window=1))
    dense = replace(call.dense, unused=torch.ones(1, 9, dtype=torch.bool))
    call = call._replace(dense=dense)
    verify(call, device)
    assert not run(call, device).output.any()


def test_unused_slots_may_hold_anything(device: torch.device) -> None:
    """NaN and infinities where there is no token are not read, in views of a larger buffer full of NaN."""
    call = make_call(make_case("bfloat16", Shape(queries=2, batch=2), unused=True, slots=40))
    dense = call.dense
    assert dense.unused is not None and dense.unused.any()
    buffers = []
    for tokens, poison in ((dense.keys, float("nan")), (dense.values, float("inf"))):
        buffer = torch.full((2, 1, 64, tokens.shape[-1] + 8), float("nan"))
        buffer[:, :, 3:43, :-8] = tokens.masked_fill(dense.unused[:, None, :, None], poison)
        buffers.append(buffer[:, :, 3:43, :-8])
    result = run(call._replace(dense=replace(dense, keys=buffers[0], values=buffers[1])), device)
    check(result, call)


@chosen("columns, slots", [1, 2, 7], [1, 16, 300], fast=[(1, 1), (2, 16), (7, 1), (7, 300)])
def test_splits(columns: int, slots: int, device: torch.device) -> None:
    """Splits that are not equally long, as many as are merged at a time and more."""
    verify(make_call(make_case("fp8", Shape(16, 8, 16), columns=columns, slots=slots)), device)


@pytest.mark.parametrize("programs", [1, 100])
def test_programs_do_not_matter(programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One split of everything, and one for every tile: more than are merged at a time."""
    monkeypatch.setattr(kernels, "programs_wanted", lambda device: programs)
    verify(make_call(make_case("int8", Shape(16, 8, 16, 2, batch=2), columns=20, slots=320)), device)


def test_long_blocks_of_queries_are_cut(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of queries one by one, each with its own visibility, have the result of all at once."""
    monkeypatch.setattr(kernels, "_MOST_QUERIES", 9)
    call = make_call(make_case("int8", Shape(16, 8, 16, 4, 7), window=20))
    verify(masked(call, 1, 7), device)


@chosen(
    "codec, dtype",
    ["int4 rotated in groups", "int8 rotated", "fp8", "bfloat16", "float16", "float32"],
    [torch.float16, torch.bfloat16],
    fast=[
        ("int4 rotated in groups", torch.float16),
        ("int8 rotated", torch.bfloat16),
        ("fp8", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.bfloat16),
    ],
)
def test_half_precision(codec: str, dtype: torch.dtype, device: torch.device) -> None:
    """Models in 16 bits over pages of any kind: output in the model's dtype."""
    call = make_case(codec, Shape(64, 16, 16, 5, 2, 2), dtype, query_dtype=dtype, dense_dtype=dtype, ragged=True)
    verify(make_call(call), device)


@pytest.mark.parametrize("size", [2.0**-12, 2.0**12])
@pytest.mark.parametrize("codec", ["int8", "fp8", "turboquant4"])
def test_range_of_half_precision(codec: str, size: float, device: torch.device) -> None:
    """Token scales so large or small that their products with weights leave half precision's range."""
    call = make_call(make_case(codec, Shape(32, 8, 16), query_dtype=torch.float16, dense_dtype=torch.float16, slots=1))
    assert call.pages is not None
    for slab, name in itertools.product(call.pages.slabs, ("keys.scale", "keys.zero")):
        field = call.pages.layout.view(slab, name)
        if field is not None:
            field.copy_((field.float() * size).clamp(-65504, 65504))
    query, keys = call.query.clone(), (call.dense.keys.float() * size).half()
    query[..., :32] /= max(size, 1.0)
    call = call._replace(query=query, dense=replace(call.dense, keys=keys))
    output, wanted = run(call, device).output.cpu().double() / size, expected(call).output / size
    torch.testing.assert_close(output, wanted, rtol=4e-3, atol=4e-3)


def test_queries_far_from_one(device: torch.device) -> None:
    """Absorbed queries whose elements leave half precision's range where latents are codes."""
    call = make_call(make_case("int8 rotated", Shape(32, 8, 16), size=3e5))
    call = call._replace(query=call.query.bfloat16(), scoring=replace(call.scoring, scaling=1e-6))
    verify(call, device)


@pytest.mark.parametrize("codec", ["int4 rotated in groups", "turboquant4", "bfloat16"])
def test_the_widths_that_models_have(codec: str, device: torch.device) -> None:
    """Ranks of 512 and rotary keys of 64, rotated with signs and without."""
    dtype = torch.float16
    shape = Shape(512, 64, 16, 16, 1, 1)
    call = make_call(make_case(codec, shape, dtype, columns=1, query_dtype=dtype, dense_dtype=dtype, size=0.3))
    verify(call, device)


def test_dispatch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels do the calls that they support, and the reference does calls with attention sums."""
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "triton")
    seen = []
    attend = kernels.latent_attend
    monkeypatch.setattr(kernels, "latent_attend", lambda *given: seen.append(1) or attend(*given))
    call = on(make_call(make_case("int8", Shape())), device)
    assert latent_attend(*call).page_sums is None and seen == [1]
    assert latent_attend(*call, sums=True).page_sums is not None and seen == [1]


def test_what_is_left_to_the_reference() -> None:
    """Sums, ranks that are no power of two, wide rotary keys, other dtypes and strides, and calls without a query."""
    call = make_call(make_case("int8", Shape(32, 16, 16)))
    assert kernels.supports(*call, sums=False) and not kernels.supports(*call, sums=True)
    for shape in (Shape(48, 16), Shape(8, 16), Shape(1024, 16), Shape(32, 144)):
        assert not kernels.supports(*make_call(make_case("float32", shape)), sums=False)
    dense = call.dense
    turned = replace(dense, keys=dense.keys.transpose(2, 3).contiguous().transpose(2, 3))
    other = [
        call._replace(query=call.query.double()),
        call._replace(query=call.query[:, :, :0]),
        call._replace(dense=turned),
        call._replace(dense=replace(dense, values=dense.values.double())),
    ]
    assert not any(kernels.supports(*each, sums=False) for each in other)
    mask = torch.ones(1, 1, 100, 2, dtype=torch.bool).transpose(2, 3)[:, :, :1]
    assert not kernels.supports(*call._replace(visibility=replace(call.visibility, mask=mask)), sums=False)
    assert not kernels.supports_projection(call.query, call.query)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_product(codec: str, device: torch.device) -> None:
    """Every codec with every shape, dtype and feature."""
    for shape, feature in itertools.product(SHAPES, FEATURES):
        verify(make_call(make_case(codec, shape, torch.bfloat16, **FEATURES[feature])), device)
    for shape, dtype in itertools.product(SHAPES, (torch.float16, torch.bfloat16)):
        case = make_case(codec, shape, dtype, query_dtype=dtype, dense_dtype=dtype, ragged=True, window=30)
        verify(make_call(case), device)
