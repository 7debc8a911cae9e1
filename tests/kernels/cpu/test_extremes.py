"""Numbers that are very large, very small, or all alike."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.kernels.page import PageLayout
from tests.choosing import chosen, pairwise
from tests.kernels.cpu import brute_force
from tests.kernels.cpu.cases import Call, Case, Shape, formats_of, make_call
from tests.kernels.cpu.comparing import attend, check, check_call
from tests.kernels.cpu.grid import make_case

CODECS = ["none", "int4", "int8", "fp8", "unbiased2", "kvarn4", "rotated4 per token"]


@chosen(
    "codec, size",
    CODECS,
    [1e-30, 1e-3, 200.0, 1e4],
    # Sums overflow or lose their order by codec; what is small does so whatever it is multiplied with.
    fast=[*((codec, 1e4) for codec in CODECS), ("none", 200.0), ("int4", 200.0), ("int8", 1e-30), ("unbiased2", 1e-3)],
)
def test_queries_of_any_size(isa: str, codec: str, size: float) -> None:
    """Scores of several hundred and more, whose errors are proportional to them."""
    check(make_case(codec, Shape(128, 64, 32, 3, 2), ragged=True, size=size), factor=max(1.0, 4 * size))


@pytest.mark.parametrize("codec", CODECS)
def test_queries_of_zeros(isa: str, codec: str) -> None:
    """All visible keys are equally probable."""
    call = make_call(make_case(codec, Shape(group=2, queries=2), columns=2, slots=11, causal=False))
    call = call._replace(query=torch.zeros_like(call.query))
    check_call(call, brute_force.attend(call))
    result = attend(call)
    assert result.page_sums is not None
    torch.testing.assert_close(result.page_sums, torch.full_like(result.page_sums, 2 / 75))


@pairwise("codec, side, scale", CODECS[1:], ["keys", "values"], [0.0, 2.0**-24, 2.0**-14, 65504.0])
def test_scales_at_the_ends_of_half_precision(isa: str, codec: str, side: str, scale: float) -> None:
    """Scales of zero, subnormal, the smallest and the largest, beside others of ordinary size."""
    call = make_call(make_case(codec, Shape(64, 72, 32, 2, 2)))
    assert call.pages is not None
    for slab in call.pages.slabs:
        stored = call.pages.layout.view(slab, f"{side}.scale")
        assert stored is not None
        stored.flatten(1)[:, ::3] = scale
    expected = brute_force.attend(call)
    largest = expected.log_sum_exp.abs().max() if side == "keys" else expected.output.abs().max()
    check_call(call, expected, factor=max(1.0, 4 * float(largest)))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("codec", ["int8", "unbiased4"])
def test_largest_sums(isa: str, codec: str, dim: int, sign: float) -> None:
    """The largest codes with queries and weights that are all alike bring the integer sums to their limits."""
    shape = Shape(dim, dim, 256)
    call = make_call(make_case(codec, shape, columns=1))
    fill(call, "codes", 0xFF)
    call = call._replace(query=torch.full_like(call.query, sign))
    check_call(call, brute_force.attend(call), factor=dim)


def fill(call: Call, field: str, byte: int) -> None:
    """Set every byte of a field of all pages, keys and values."""
    assert call.pages is not None
    for slab in call.pages.slabs:
        for side in ("keys", "values"):
            stored = call.pages.layout.view(slab, f"{side}.{field}")
            assert stored is not None
            stored.fill_(byte)


def test_equal_scales_bring_the_sums_to_their_limit(isa: str) -> None:
    """As above without scales that differ, so that every element of the scaled query is the largest."""
    shape = Shape(256, 256, 256)
    call = make_call(Case(formats_of("int8", shape), shape, columns=1))
    assert call.pages is not None
    for name in ("keys.codes", "values.codes", "keys.scale", "values.scale"):
        for slab in call.pages.slabs:
            stored = call.pages.layout.view(slab, name)
            assert stored is not None
            stored.fill_(255 if name.endswith("codes") else 2.0**-8)
    for sign in (-1.0, 1.0):
        alike = call._replace(query=torch.full_like(call.query, sign))
        check_call(alike, brute_force.attend(alike), factor=16)


def test_far_below_the_others(isa: str) -> None:
    """Full-precision keys whose scores lie hundreds below those in pages, and the other way round."""
    for shift in (-600.0, 600.0):
        call = make_call(make_case("int4", Shape(queries=2), slots=5))
        call.dense.keys.fill_(0.0)[..., 0] = shift * 8
        call.query.fill_(0.0)[..., 0] = 1.0
        expected = brute_force.attend(call)
        check_call(call, expected, factor=600)
        result = attend(call)
        assert result.page_sums is not None and result.dense_sums is not None
        away = result.page_sums if shift > 0 else result.dense_sums
        assert not away.any()


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_sink_logits_far_from_the_scores(isa: str, sink: float) -> None:
    """A sink logit that takes all the probability, or none of it."""
    call = make_call(make_case("unbiased3", Shape(group=2), sinks=True))
    assert call.scoring.sink_logits is not None
    call.scoring.sink_logits.fill_(sink)
    check_call(call, brute_force.attend(call))
    assert attend(call).output.any() == (sink < 0)


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 50.0])
def test_soft_capping_of_any_size(isa: str, softcap: float) -> None:
    """Caps far below the scores, where tanh is 1, and far above, where it changes little."""
    for size in (1e-3, 1.0, 100.0):
        check(make_case("fp8", Shape(group=2), softcap=softcap, size=size), factor=max(1.0, softcap))


def test_what_lies_behind_the_tokens(isa: str) -> None:
    """Codes and token-wise scales behind the last token of a page may hold anything, NaN too."""
    shape = Shape(64, 64, 32, 2)
    for codec in ("fp8", "int4", "kvarn4", "unbiased2", "none"):
        call = make_call(make_case(codec, shape, columns=2, seed=8))
        assert call.pages is not None
        call.pages.counts[:] = 19
        spoil(call.pages.layout, list(call.pages.slabs), 19)
        check_call(call, brute_force.attend(call))


def spoil(layout: PageLayout, slabs: list[torch.Tensor], count: int) -> None:
    """Fill with 0xFF, which is NaN as any float, what belongs to tokens from ``count`` on."""
    for field in layout.fields.values():
        if field.shape[0] != layout.page_size:
            continue
        for slab in slabs:
            raw = slab[:, field.offset : field.offset + field.nbytes]
            raw[:, field.nbytes // layout.page_size * count :] = 0xFF
