"""Absorbed latent attention by the CPU kernels against float64, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_kvcache.kernels import latent_decode
from hf_kvcache.kernels.cpu import latent_decode as native
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.dispatch import VARIABLE
from hf_kvcache.kernels.inputs import Attention, DenseTokens
from tests.choosing import chosen
from tests.kernels.cpu.cases import Call, Case
from tests.kernels.test_latent_decode import (
    CODECS,
    FEATURES,
    SHAPES,
    Shape,
    check,
    check_projection,
    expected,
    fits,
    make_call,
    make_case,
    masked,
    projection_inputs,
)
from tests.tolerances import TOLERANCES, Tolerance

GUARD = 64
CANARY = 12345.0

#: Wide enough for tiles, whole and in part; the widths of DeepSeek-V2; no multiple of a tile's tokens or of its rows.
WIDE = (
    Shape(512, 64, 128, 16, 1, 1),
    Shape(64, 32, 64, 5, 3, 2),
    Shape(192, 40, 40, 16, 5, 1),
    Shape(128, 0, 72, 24, 2, 1),
)

#: Weights that are the sum of two bfloat16 are off by 2^-16 at most, of which a half-precision output sees nothing; the
#: log-sum-exp is that of scores whose rotated queries are cut in the same way.
_SPLIT_IN_TWO = {
    "output": TOLERANCES[torch.float32],
    "log_sum_exp": Tolerance(2e-5, 3e-5),
    "sums": TOLERANCES[torch.float32],
}


def attend(call: Call) -> Attention:
    assert native.supports(*call)
    return native.latent_attend(*call)


def check_call(call: Call, wanted: Attention) -> None:
    """Half-precision queries are cut in two parts on the tile unit, float32 ones are not cut at all."""
    cut = library.isa() == "avx512-amx" and call.query.dtype != torch.float32
    check(attend(call), call, wanted, _SPLIT_IN_TWO if cut else None)


def check_everywhere(call: Call) -> None:
    """:func:`check_call` with each instruction set, whose name a failure carries."""
    wanted, before = expected(call), library.isa()
    try:
        for isa in library.available_isas():
            library.set_isa(isa)
            try:
                check_call(call, wanted)
            except AssertionError as error:
                raise AssertionError(isa) from error
    finally:
        library.set_isa(before)


def covering(codec: str) -> list[Case]:
    """Three shapes with two features each, which differ from codec to codec, and one of the wide shapes."""
    index, names = list(CODECS).index(codec), list(FEATURES)
    shapes = [shape for shape in (*SHAPES, *WIDE[1:]) if fits(codec, shape)]
    return [
        make_case(codec, shapes[(index + 3 * i) % len(shapes)], **FEATURES[names[(index + 3 * i + 7 * j) % len(names)]])
        for i, j in itertools.product(range(3), range(2))
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, loaded: None) -> None:
    """Every codec, with shapes and features in turn, and with DeepSeek-V2's widths."""
    for case in (*covering(codec), make_case(codec, WIDE[0], torch.bfloat16)):
        check_everywhere(make_call(case))


@chosen(
    "codec, feature",
    ["int4 rotated", "bfloat16", "float32", None],
    FEATURES,
    # Pages that are coded and pages that are dense; a tile unit takes the latter in 16 bits.
    fast=[(codec, feature) for codec in ("int4 rotated", "bfloat16") for feature in FEATURES]
    + [("float32", "everything"), ("float32", "ragged"), (None, "everything"), (None, "unused slots")],
)
def test_features(codec: str | None, feature: str, loaded: None) -> None:
    """Every feature, for one query and for several, with pages and with full-precision tokens alone."""
    for shape in (Shape(64, 32, 64, 16, 1, 2), Shape(48, 24, 24, 3, 5)):
        check_everywhere(make_call(make_case(codec, shape, torch.bfloat16, seed=1, **FEATURES[feature])))


@pytest.mark.slow
@pytest.mark.parametrize("shape", (*SHAPES, *WIDE), ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_all_combinations(codec: str, shape: Shape, loaded: None) -> None:
    if not fits(codec, shape):
        pytest.skip("the groups do not divide rows of this shape")
    for feature in FEATURES:
        check_everywhere(make_call(make_case(codec, shape, seed=2, **FEATURES[feature])))


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(isa: str, query_dtype: torch.dtype, dense_dtype: torch.dtype) -> None:
    """Queries and full-precision tokens of any dtype, whose numbers fill no tile and no chunk."""
    for codec, slots in itertools.product(("bfloat16", "int8 rotated"), (1, 16, 33, 130)):
        case = make_case(codec, WIDE[1], query_dtype=query_dtype, dense_dtype=dense_dtype, slots=slots)
        call = make_call(case)
        check_call(call, expected(call))


@chosen(
    "heads, queries",
    [1, 3, 16, 17, 40, 70],
    [1, 2, 16],
    fast=[(1, 1), (1, 2), (3, 1), (3, 16), (16, 1), (17, 1), (17, 2), (40, 1), (70, 2)],
)
def test_any_number_of_rows(isa: str, heads: int, queries: int) -> None:
    """Queries are computed 16 at a time, and up to 64 of them for a chunk of tokens."""
    for codec in ("bfloat16", "float32"):
        call = make_call(make_case(codec, Shape(64, 32, 32, heads, queries), columns=2, slots=17, window=60))
        check_call(call, expected(call))


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 104, 105, 106, 10_000])
def test_windows(isa: str, window: int) -> None:
    """Windows from the query alone to more than all tokens; pages hold 96 tokens, and nine others follow."""
    for ragged in (False, True):
        shape = Shape(queries=6, batch=2)
        call = make_call(make_case("int4", shape, window=window, seed=3, ragged=ragged, scattered=not ragged))
        check_call(call, expected(call))


@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (1, 3), (4, 3), (4, 1)])
def test_masks(isa: str, heads: int, queries: int) -> None:
    """A boolean mask, per head and query or for all, which may begin after the first tokens and hide whole pages."""
    for codec, start in itertools.product(("bfloat16", "int4", None), (0, 5)):
        case = make_case(codec, Shape(queries=3, batch=2), torch.bfloat16, ragged=True, scattered=True, unused=True)
        call = masked(make_call(case), heads, queries, start=start)
        check_call(call, expected(call))
        assert call.visibility.mask is not None
        call.visibility.mask[..., 20:] = False
        check_call(call, expected(call))


def test_mask_of_one_row_for_all(isa: str) -> None:
    """A mask that is expanded has strides of 0; one that is cut from a wider one has gaps."""
    call = masked(make_call(make_case("int8", Shape(queries=3, batch=2), ragged=True)), 1, 3)
    mask = call.visibility.mask
    assert mask is not None
    wide = torch.ones(2, 1, 3, mask.shape[3] + 5, dtype=torch.bool)
    wide[..., : mask.shape[3]] = mask
    for view in (mask[:1].expand(2, 4, 3, -1), wide[..., : mask.shape[3]]):
        same = call._replace(visibility=replace(call.visibility, mask=view))
        check_call(same, expected(same))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("codec", ["int8", "float32", None])
def test_nothing_to_see(isa: str, codec: str | None, sinks: bool) -> None:
    """A query that sees nothing has output 0 and log-sum-exp ``-inf``, or its sink logit."""
    call = make_call(make_case(codec, Shape(queries=2), columns=1, sinks=sinks, window=1))
    unused = torch.ones(1, call.dense.keys.shape[2], dtype=torch.bool)
    call = call._replace(dense=DenseTokens(call.dense.keys, call.dense.values, call.dense.positions, unused))
    result = attend(call)
    assert not result.output.any()
    wanted = torch.full((1, 4, 2), -torch.inf)
    if call.scoring.sink_logits is not None:
        wanted = call.scoring.sink_logits.view(1, 4, 1).expand(1, 4, 2)
    assert torch.equal(result.log_sum_exp, wanted)


@contextmanager
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """New tensors are NaN between guards of a known number; gives the tensors with their guards ``[n]``."""
    buffers: list[torch.Tensor] = []

    def empty(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        assert device == "cpu"
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * GUARD,), CANARY, dtype=dtype)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + count].fill_(torch.nan).view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield buffers


def check_guards(buffers: list[torch.Tensor]) -> None:
    for buffer in buffers:
        canary = torch.tensor(CANARY, dtype=buffer.dtype)
        assert (buffer[:GUARD] == canary).all() and (buffer[-GUARD:] == canary).all()
        assert not buffer.isnan().any()


@pytest.mark.parametrize("codec", ["int4 rotated", "fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_output_and_nothing_else(
    isa: str, codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs full of NaN are overwritten; the memory around them and the inputs do not change."""
    case = make_case(codec, WIDE[1], ragged=True, unused=True, sinks=True, query_dtype=dtype, slots=21, seed=4)
    call = make_call(case)
    wanted = expected(call)
    assert call.pages is not None
    inputs = [call.query, call.dense.keys, call.dense.values, *call.pages.slabs]
    before = [tensor.clone() for tensor in inputs]
    with guarded_outputs(monkeypatch) as buffers:
        check_call(call, wanted)
    assert len(buffers) == 2
    check_guards(buffers)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("codec", ["int4 rotated", "bfloat16", "float32"])
def test_threads_agree(isa: str, codec: str, threads: None) -> None:
    """The number of threads changes results by rounding alone; for each number the bits are always the same."""
    call = make_call(make_case(codec, Shape(128, 32, 64, 16, 2), columns=13, slots=300, ragged=True))
    wanted = expected(call)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        check_call(call, wanted)
        first = attend(call)
        for _ in range(3):
            again = attend(call)
            assert torch.equal(again.output, first.output) and torch.equal(again.log_sum_exp, first.log_sum_exp)


def test_slice_of_the_pages(isa: str) -> None:
    """The first columns of pages, after a call on all of them."""
    call = make_call(make_case("int4", Shape(), columns=5, scattered=True))
    check_call(call, expected(call))
    assert call.pages is not None
    shorter = call._replace(pages=call.pages.until(2))
    check_call(shorter, expected(shorter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 16, 1, 128, 128, 512), (2, 3, 4, 24, 40, 48), (1, 1, 16, 7, 33, 16)])
def test_projections(
    isa: str, sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One vector and several, widths that fill no vector, in outputs full of NaN; also with three threads."""
    query, latents, keys, values = projection_inputs(dtype, *sizes)
    assert native.supports_projection(query, keys) and native.supports_projection(latents, values)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with guarded_outputs(monkeypatch) as buffers:
                absorbed, expanded = native.absorb(query, keys), native.expand(latents, values)
            check_guards(buffers)
            check_projection(absorbed, "bhqd,hdr->bhqr", query, keys)
            check_projection(expanded, "bqhr,hvr->bqhv", latents, values)
    finally:
        torch.set_num_threads(before)


def not_supported(change: Callable[[Call], Call]) -> bool:
    return not native.supports(*change(make_call(make_case("int4", Shape(queries=2)))))


def test_what_is_left_to_the_reference() -> None:
    """Sums, additive masks, odd widths, many queries, doubles, and vectors in pieces."""
    assert not native.supports(*make_call(make_case("int4", Shape())), sums=True)
    assert not_supported(lambda call: masked(call, 1, 1, additive=True))
    assert not_supported(lambda call: call._replace(query=call.query.double()))
    assert not_supported(lambda call: call._replace(query=call.query.repeat(1, 1, 17, 1)))
    assert not_supported(lambda call: call._replace(query=call.query.transpose(-1, -2).contiguous().transpose(-1, -2)))
    for rank, rotary in ((24, 16), (1040, 16), (64, 12)):
        assert not native.supports(*make_call(make_case(None, Shape(rank, rotary))))
    dense = make_call(make_case(None, Shape())).dense
    assert not_supported(lambda call: call._replace(dense=DenseTokens(dense.keys, dense.values.bfloat16())))
    query, latents, keys, values = projection_inputs(torch.float32, 2, 3, 4, 24, 40, 48)
    assert not native.supports_projection(query.bfloat16(), keys)
    assert not native.supports_projection(query.repeat(3, 1, 1, 1), keys)
    assert not native.supports_projection(latents[..., :40], values[..., :40])
    assert not native.supports_projection(query, keys.transpose(1, 2).contiguous().transpose(1, 2))


def test_it_is_chosen(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the kernels do what they support, unless the reference is asked for."""
    calls: list[str] = []

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls.append(name)
            return original(*given)

        return call

    for name in ("latent_attend", "absorb", "expand"):
        monkeypatch.setattr(native, name, noted(name, getattr(native, name)))
    query, latents, keys, values = projection_inputs(torch.float32, 1, 4, 1, 24, 40, 48)

    def step() -> None:
        latent_decode.absorb(query, keys)
        latent_decode.latent_attend(*make_call(make_case("int4", Shape())))
        latent_decode.expand(latents, values)

    monkeypatch.setenv(VARIABLE, "reference")
    step()
    assert not calls
    monkeypatch.delenv(VARIABLE)
    step()
    assert calls == ["absorb", "latent_attend", "expand"]
