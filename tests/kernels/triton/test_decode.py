"""A decoding step by Triton kernels against one softmax per query over the decoded tokens, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_kvcache.codecs import specs
from hf_kvcache.kernels.inputs import DenseTokens
from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton import decode
from hf_kvcache.kernels.workspace import scratch
from tests.choosing import chosen
from tests.kernels.test_decode_side import FORMATS, PAGE, random_side
from tests.kernels.triton.calls import (
    Call,
    Random,
    Shape,
    biased,
    call_with,
    check,
    expected,
    make_call,
    ragged,
    scattered,
)

BUFFERS = ("partial", "lse", "page_scores", "dense_scores")


def run(call: Call, sums: bool = False) -> None:
    """Check a call, with NaN in all memory that the kernels are to write, and that they leave their inputs alone."""
    for tag in BUFFERS:
        scratch(f"triton.{tag}", (1 << 16,), torch.float32, call.query.device).fill_(float("nan"))
    slabs = [] if call.pages is None else call.pages.slabs
    before = [x.clone() for x in (call.query, call.dense.keys, call.dense.values, *slabs)]
    assert decode.supports(call.query, call.pages, call.dense, call.visibility)
    result = decode.attend(*call.arguments, sums=sums)
    check(result, call)
    assert (result.dense_sums is not None) == sums
    for old, new in zip(before, (call.query, call.dense.keys, call.dense.values, *slabs), strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


#: Every codec, and every width of a code: what other widths of a codec read differently, another codec reads too.
ONE_EACH = {"int3", "rotated4", "rotated8", "kvarn2", "turboquant1", "turboquant3", "unbiased2", "unbiased4"}


@chosen("spec", specs(), fast=[(spec,) for spec in specs() if spec in ONE_EACH | {"fp8", "none", "bf16"}])
def test_codecs(spec: str, device: torch.device) -> None:
    """Every codec at every width, two query tokens, in several splits."""
    run(make_call(spec, Shape(length=2), device=device))


@pytest.mark.parametrize("number", range(len(FORMATS)))
def test_formats(number: int, device: torch.device) -> None:
    """Every kind of side on keys and on values, with groups, second scales and widths that are no powers of two."""
    formats = list(FORMATS.values())
    keys, values = formats[number], formats[(number + 5) % len(formats)]
    shape = Shape(1, 1, 3, 1, keys.dim, values.dim, PAGE, 2, 3)
    layout = PageLayout(keys, values, PAGE)
    rng = np.random.default_rng(number)
    records = np.zeros((2, layout.record_bytes), dtype=np.uint8)
    decoded: dict[str, list[list[list[float]]]] = {"keys": [], "values": []}
    for record in records:
        for side, fmt in layout.sides.items():
            fields, tokens = random_side(fmt, rng)
            decoded[side].append(tokens)
            for name, content in fields.items():
                offset = layout.fields[f"{side}.{name}"].offset
                record[offset : offset + len(content)] = np.frombuffer(content, np.uint8)
    call = call_with(layout, torch.from_numpy(records), None, shape, Random(number), device)
    by_hand = {side: torch.tensor(tokens, dtype=torch.float64)[None] for side, tokens in decoded.items()}
    # Values of tens and keys of hundreds: brought to the order of 1 that the tolerances are for.
    size = float(by_hand["keys"].square().mean().sqrt())
    call = replace(call, **by_hand, query=call.query / size)
    result = decode.attend(*call.arguments)
    magnitude = float(by_hand["values"].abs().max())
    scaled = replace(call, values=by_hand["values"] / magnitude, dense=_scaled(call.dense, magnitude))
    check(result._replace(output=result.output / magnitude), scaled)


def _scaled(dense: DenseTokens, magnitude: float) -> DenseTokens:
    return replace(dense, values=dense.values.double() / magnitude)


@pytest.mark.parametrize(
    ("spec", "key_dim", "value_dim"),
    [
        ("unbiased4", 80, 80),
        ("rotated3", 96, 64),
        ("unbiased2", 128, 96),
        ("kvarn4", 256, 128),
        ("unbiased3", 72, 256),
        ("fp8", 80, 16),
        ("none", 96, 80),
    ],
)
def test_widths(spec: str, key_dim: int, value_dim: int, device: torch.device) -> None:
    """Head dimensions that differ and that are no powers of two."""
    run(make_call(spec, Shape(key_dim=key_dim, value_dim=value_dim, columns=2), device=device))


@pytest.mark.parametrize(("group", "length"), [(1, 1), (3, 1), (4, 3), (8, 5), (3, 16)])
def test_queries_per_row(group: int, length: int, device: torch.device) -> None:
    """Query heads per KV head times query tokens: more and fewer than a program takes."""
    run(make_call("unbiased2", Shape(2, 1, group, length, columns=2, slots=length + 1), device=device))


@pytest.mark.parametrize("page_size", [8, 24, 64, 128])
def test_page_sizes(page_size: int, device: torch.device) -> None:
    """Pages that are longer and shorter than a block of tokens, and whose size is no power of two."""
    run(make_call("unbiased4", Shape(heads=1, page_size=page_size, columns=3), device=device))


@pytest.mark.parametrize(("columns", "slots"), [(1, 1), (2, 300), (7, 3), (13, 129)])
def test_tables_of_odd_lengths(columns: int, slots: int, device: torch.device) -> None:
    """Splits of pages and of full-precision tokens that are not equally long."""
    run(make_call("fp8", Shape(heads=1, columns=columns, slots=slots), device=device))


@pytest.mark.parametrize("spec", ["unbiased4", "rotated8", "int2", "fp8", "none"])
def test_ragged(spec: str, device: torch.device) -> None:
    """Pages that lost tokens, and rows without pages; unused places and records are never read."""
    run(ragged(make_call(spec, Shape(2, 2, 2, 2), device=device)), sums=True)


@chosen(
    "spec, group",
    ["unbiased4", "rotated8", "kvarn2", "fp8", "none"],
    [2, 9],
    fast=[("unbiased4", 2)],
)
def test_bias(spec: str, group: int, device: torch.device) -> None:
    """A bias per token, in pages of which one lost some of its tokens."""
    call = biased(ragged(make_call(spec, Shape(1, 1, group, columns=2), device=device)))
    run(replace(call, scoring=replace(call.scoring, softcap=2.0 if group == 2 else None)), sums=True)


def test_a_row_without_any_page(device: torch.device) -> None:
    """A row of a batch may hold nothing but its own token."""
    call = make_call("unbiased4", Shape(2, 1, 2), device=device)
    assert call.pages is not None
    call.pages.counts[1], call.pages.addresses[1] = 0, 0
    run(call, sums=True)


@chosen(
    "spread, window",
    [False, True],
    [1, 20, 37, 1000],
    fast=[(False, 1), (False, 20), (False, 37), (True, 37), (True, 1000)],
)
def test_sliding_window(spread: bool, window: int, device: torch.device) -> None:
    """Windows that end among the full-precision tokens, in a page and before all, tokens side by side and not."""
    call = make_call("rotated4", Shape(2, 1, 3, 3), device=device)
    call = ragged(scattered(call) if spread else call)
    run(replace(call, visibility=replace(call.visibility, window=window)))


@chosen("sinks, softcap", [False, True], [None, 2.0, 50.0], fast=[(False, 50.0), (True, None), (True, 2.0)])
def test_softcap_and_sink_logits(sinks: bool, softcap: float | None, device: torch.device) -> None:
    """Capped scores and logits that take probability away, with their attention sums."""
    shape = Shape(2, 2, 2, 2)
    call = make_call("unbiased3", shape, device=device)
    logits = Random(9).normal(shape.query_heads).to(device) if sinks else None
    run(replace(call, scoring=replace(call.scoring, softcap=softcap, sink_logits=logits)), sums=True)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_scores_far_from_zero(softcap: float | None, device: torch.device) -> None:
    """Scores of hundreds neither overflow nor lose their order, capped or not."""
    call = make_call("none", Shape(), device=device)
    query = call.query * 8
    dense = replace(call.dense, keys=call.dense.keys * 8)
    call = replace(call, query=query, dense=dense, pages=None, keys=call.keys[:, :0], values=call.values[:, :0])
    result = decode.attend(*replace(call, scoring=replace(call.scoring, softcap=softcap)).arguments)
    assert result.output.isfinite().all() and result.log_sum_exp.isfinite().all()
    if softcap is not None:
        assert (result.log_sum_exp <= softcap + 2).all()


@pytest.mark.parametrize("sums", [False, True])
def test_no_pages(sums: bool, device: torch.device) -> None:
    """Before anything is packed there are full-precision tokens alone."""
    call = make_call(None, Shape(2, 2, 3, 4, slots=9), device=device)
    run(call, sums)
    assert decode.attend(*call.arguments, sums=True).page_sums is None


def test_one_token(device: torch.device) -> None:
    """The very first token sees itself: its output is its value."""
    call = make_call(None, Shape(slots=1), device=device)
    run(call)
    output = decode.attend(*call.arguments).output
    assert torch.equal(output[0, 0, ::2], call.dense.values[0, :, 0])


def test_slots_without_a_token(device: torch.device) -> None:
    """Unused slots count for nothing, whatever they hold; without positions all other slots are seen."""
    call = make_call("unbiased4", Shape(2, 2, 2, 1, slots=7), device=device)
    unused = torch.zeros(2, 7, dtype=torch.bool, device=device)
    unused[0, 2:5], unused[1, :3] = True, True
    keys, values = call.dense.keys.clone(), call.dense.values.clone()
    keys[unused[:, None].expand(2, 2, 7)], values[unused[:, None].expand(2, 2, 7)] = float("nan"), float("inf")
    for positions in (call.dense.positions, None):
        dense = DenseTokens(keys, values, positions, unused)
        result = decode.attend(call.query, call.pages, dense, call.visibility, call.scoring, True)
        clean = DenseTokens(call.dense.keys, call.dense.values, positions, unused)
        check(result, replace(call, dense=clean))


@pytest.mark.parametrize("sinks", [False, True])
def test_queries_that_see_nothing(sinks: bool, device: torch.device) -> None:
    """Output 0 and log-sum-exp -inf or the sink logit, beside queries that see something."""
    call = make_call("unbiased2", Shape(2, 1, 2, 1, slots=3), device=device)
    assert call.pages is not None
    call.pages.counts[0], call.pages.addresses[0] = 0, 0
    unused = torch.zeros(2, 3, dtype=torch.bool, device=device)
    unused[0] = True
    logits = torch.tensor([0.3, -1.0], device=device) if sinks else None
    call = replace(call, dense=replace(call.dense, unused=unused))
    call = replace(call, scoring=replace(call.scoring, sink_logits=logits))
    run(call, sums=True)
    result = decode.attend(*call.arguments)
    assert not result.output[0].any()


DTYPES = [torch.float16, torch.bfloat16]
IN_16_BITS = ["unbiased4", "rotated8", "kvarn2", "int4", "fp8", "none"]


@chosen(
    "spec, dtype",
    IN_16_BITS,
    DTYPES,
    # The interpreter multiplies bfloat16 as float32: one codec and dense pages say what there is to say.
    fast=[*((spec, torch.float16) for spec in IN_16_BITS), ("kvarn2", torch.bfloat16), ("none", torch.bfloat16)],
)
def test_dtypes(spec: str, dtype: torch.dtype, device: torch.device) -> None:
    """Models in 16 bits: dot products in half precision, output in the model's dtype."""
    run(make_call(spec, Shape(2, 1, 2, 2, dtype=dtype), device=device))


@pytest.mark.parametrize("spec", ["rotated2", "rotated8", "kvarn2", "kvarn4"])
def test_rounding_gathers_in_no_channel(spec: str, device: torch.device) -> None:
    """The rotation back gathers what all channels share in the first one; the errors must not be among it."""
    shape = Shape(1, 4, 3, 4, 256, 256, columns=2, slots=4, dtype=torch.float16)
    call = make_call(spec, shape, 1, device)
    error = decode.attend(*call.arguments).output.double() - expected(call).output.to(device)
    by_channel = error.square().mean((0, 1, 2)).sqrt()
    assert by_channel[0] < 8 * by_channel.median()  # 10 to 17 times where codes keep their mean


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("size", [2.0**-12, 2.0**12])
def test_range_of_half_precision(side: str, size: float, device: torch.device) -> None:
    """Keys or values so large or small that products with their scales leave half precision's range."""
    shape = Shape(heads=1, dtype=torch.float16)
    call = make_call("rotated4", shape, device=device)
    assert call.pages is not None
    layout, slab = call.pages.layout, call.pages.slabs[0]
    for name in ("scale", "zero"):
        field = layout.view(slab, f"{side}.{name}")
        assert field is not None
        field.copy_((field.float() * size).clamp(-65504, 65504))
    records = slab[1::2]
    order = torch.from_numpy((call.pages.addresses.reshape(-1) - records.data_ptr()) // (2 * layout.record_bytes))
    call = call_with(layout, records[order.to(device)].cpu(), None, shape, Random(3), device)
    if side == "keys":
        run(replace(call, query=call.query / size) if size > 1 else call)
        return
    dense = replace(call.dense, values=call.dense.values * size)
    result = decode.attend(call.query, call.pages, dense, call.visibility, call.scoring)
    unit = replace(call, values=call.values / size)
    check(result._replace(output=(result.output.float() / size).half()), unit)


def test_strided_tensors(device: torch.device) -> None:
    """Queries, keys and values that are views into larger tensors, as models and buffers give them."""
    shape = Shape(2, 2, 2, 3, slots=6)
    call = make_call("unbiased4", shape, device=device)
    query = torch.full((2, 3, 4, 70), float("nan"), device=device)[..., :64].transpose(1, 2)
    query.copy_(call.query)
    buffers = torch.full((2, 2, 2, 11, 80), float("nan"), device=device)
    buffers[0, :, :, :6, :64], buffers[1, :, :, :6, :64] = call.dense.keys, call.dense.values
    at = torch.full((2, 11), -1, device=device)
    assert call.dense.positions is not None
    at[:, :6] = call.dense.positions
    dense = DenseTokens(buffers[0, :, :, :6, :64], buffers[1, :, :, :6, :64], at[:, :6])
    run(replace(call, query=query, dense=dense), sums=True)


def test_what_is_not_supported(device: torch.device) -> None:
    """Arbitrary masks, long blocks of queries, and widths and dtypes that the kernels do not have."""
    call = make_call("unbiased4", Shape(), device=device)
    masked = replace(call.visibility, mask=torch.ones(1, 1, 1, 60, dtype=torch.bool))
    assert not decode.supports(call.query, call.pages, call.dense, masked)
    for shape in (Shape(length=17, slots=20), Shape(key_dim=8), Shape(value_dim=512), Shape(dtype=torch.float64)):
        other = make_call(None, shape, device=device)
        assert not decode.supports(other.query, None, other.dense, other.visibility)


@pytest.mark.slow
@pytest.mark.parametrize("spec", specs())
def test_product(spec: str, device: torch.device) -> None:
    """Every codec with every width, ratio, number of query tokens, and dtype, ragged, with windows."""
    options = itertools.product([64, 80, 96, 128, 256], [1, 3, 8], [1, 4], [torch.float32, torch.float16], [None, 25])
    for number, (dim, group, length, dtype, window) in enumerate(options):
        shape = Shape(1, 2, group, length, dim, dim, 16, 3, length + 2, dtype)
        call = ragged(make_call(spec, shape, number, device))
        run(replace(call, visibility=replace(call.visibility, window=window)), sums=True)
