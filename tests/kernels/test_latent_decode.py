"""Absorbed latent attention against float64, over pages that are decoded from their bytes with numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from hf_kvcache.codecs.base import SideCodec
from hf_kvcache.codecs.fp8 import Float8Side
from hf_kvcache.codecs.integer import IntegerSide
from hf_kvcache.codecs.turboquant import TurboQuantSide
from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference import latent_decode as reference
from hf_kvcache.kernels.visibility import visible
from tests.kernels.cpu import cases, grid
from tests.kernels.cpu.brute_force import decode_record
from tests.kernels.cpu.cases import Call, Case
from tests.tolerances import TOLERANCES, Tolerance, assert_near, assert_within


class Shape(NamedTuple):
    """Sizes of a call; ``rank`` and ``rotary`` are the widths of latents and rotary keys."""

    rank: int = 64
    rotary: int = 16
    page_size: int = 32
    heads: int = 4
    queries: int = 1
    batch: int = 1


def dense_format(dim: int, dtype: torch.dtype = torch.float32) -> SideFormat:
    return SideFormat(dim, 8 * dtype.itemsize, level="dense", zero=False, dense_dtype=dtype)


#: How latents are stored, by a name.
CODECS: dict[str, Callable[[], SideCodec] | torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": partial(IntegerSide, 8, "token"),
    "int4": partial(IntegerSide, 4, "token"),
    "int8 rotated": partial(IntegerSide, 8, "token", None, "hadamard"),
    "int4 rotated": partial(IntegerSide, 4, "token", None, "hadamard"),
    "int4 rotated in groups": partial(IntegerSide, 4, "token", 16, "hadamard"),
    "int2 in groups": partial(IntegerSide, 2, "token", 8),
    "int3 in groups": partial(IntegerSide, 3, "token", 8),
    "int4 per channel": partial(IntegerSide, 4, "channel"),
    "int8 per channel in groups": partial(IntegerSide, 8, "channel", 8),
    "turboquant4": partial(TurboQuantSide, 4),
    "turboquant3": partial(TurboQuantSide, 3),
    "turboquant1": partial(TurboQuantSide, 1),
    "fp8": Float8Side,
}

#: What a call may bring along, beside pages that are all full.
#: Latents have no bias per token: an evicting cache of latents refuses to fit kept ones.
FEATURES = {name: given for name, given in grid.FEATURES.items() if "dense token" not in name and name != "bias"}

#: One row; widths that fill no vector; several sequences and queries; a rotary part of nothing.
SHAPES = (
    Shape(16, 8, 8, 1, 1, 1),
    Shape(64, 16, 32, 5, 1, 2),
    Shape(48, 24, 24, 16, 2, 1),
    Shape(64, 0, 16, 4, 3, 2),
    Shape(128, 64, 32, 4, 16, 3),
)


def formats(codec: str, shape: Shape, rotary_dtype: torch.dtype = torch.float32) -> tuple[SideFormat, SideFormat]:
    """Latents stored by a codec of :data:`CODECS`, rotary keys as they are."""
    stored = CODECS[codec]
    if isinstance(stored, torch.dtype):
        latents = dense_format(shape.rank, stored)
    else:
        latents = stored().format(shape.rank, shape.page_size, torch.float32)
    return latents, dense_format(shape.rotary, rotary_dtype)


def make_case(codec: str | None, shape: Shape, rotary_dtype: torch.dtype = torch.float32, **features: Any) -> Case:
    """A case with pages of a codec (None: without pages), and at least as many full-precision tokens as queries."""
    sizes = cases.Shape(shape.rank, shape.rotary, shape.page_size, shape.heads, shape.queries, shape.batch, 1)
    case = Case(None if codec is None else formats(codec, shape, rotary_dtype), sizes, **features)
    return replace(case, slots=max(case.slots, shape.queries))


def make_call(case: Case) -> Call:
    """The call; equal cases make equal calls. Keys are latents, values are rotary keys."""
    shape = case.shape
    # Ragged rows are one without pages and others: alone, a row has pages of which some are not full.
    alone = case.ragged and shape.batch == 1
    call = cases.make_call(replace(case, ragged=case.ragged and not alone))
    if alone and call.pages is not None:
        call.pages.counts[:] = 1 + np.arange(call.pages.columns) * 5 % shape.page_size
    if call.pages is not None:
        # A page table has no column that no row has a page in.
        call = call._replace(pages=call.pages.until(int((call.pages.counts > 0).any(0).sum())))
    query = np.random.default_rng(case.seed + 1).normal(
        size=(shape.batch, shape.queries, shape.group, shape.key_dim + shape.value_dim)
    )
    # As a model has it: tokens before heads in memory.
    return call._replace(query=torch.from_numpy(query * case.size).to(case.query_dtype).transpose(1, 2))


def masked(call: Call, heads: int, queries: int, additive: bool = False, start: int = 0) -> Call:
    """The call with a random mask ``[B, heads, queries, T]``, whose first column is of position ``start``."""
    width = call.visibility.start + call.visibility.length - start
    shape = (call.query.shape[0], heads, queries, width)
    seen = torch.from_numpy(np.random.default_rng(7).random(shape) < 0.7)
    mask = torch.zeros(shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    return call._replace(visibility=replace(call.visibility, mask=mask, mask_start=start))


def on(call: Call, device: torch.device) -> Call:
    """The call with everything on a device."""
    if device.type == "cpu":
        return call

    def there(holder: Any) -> Any:
        return replace(
            holder, **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(holder).items()}
        )

    pages = None if call.pages is None else _pages_on(call.pages, device)
    return Call(call.query.to(device), pages, there(call.dense), there(call.visibility), there(call.scoring))


def _pages_on(pages: Pages, device: torch.device) -> Pages:
    slabs = [slab.to(device) for slab in pages.slabs]
    addresses = np.zeros_like(pages.addresses)
    for old, new in zip(pages.slabs, slabs, strict=True):
        offset = pages.addresses - old.data_ptr()
        inside = (offset >= 0) & (offset < old.numel())
        addresses = np.where(inside, offset + new.data_ptr(), addresses)
    return replace(pages, slabs=slabs, addresses=addresses, prepared={})


def expected(call: Call) -> Attention:
    """The expected result in float64, one softmax per query over all tokens; attention sums are always computed."""
    batch, heads, length, width = call.query.shape
    rank = call.dense.keys.shape[-1]
    packed = 0 if call.pages is None else call.pages.columns * call.pages.layout.page_size
    output = np.zeros((batch, length, heads, rank))
    log_sum_exp = np.zeros((batch, heads, length))
    sums = np.zeros((batch, heads, packed + call.dense.keys.shape[2]))
    for b in range(batch):
        latents, rotary, seen = _tokens(call, b)
        keys = np.concatenate([latents, rotary], 1)
        assert keys.shape[1] == width
        for h in range(heads):
            sink = -np.inf if call.scoring.sink_logits is None else float(call.scoring.sink_logits[h])
            for i in range(length):
                scores = keys @ call.query[b, h, i].double().numpy() * call.scoring.scaling
                if call.scoring.softcap is not None:
                    scores = np.tanh(scores / call.scoring.softcap) * call.scoring.softcap
                scores[~seen[h, i]] = -np.inf
                log_sum_exp[b, h, i] = np.logaddexp.reduce([*scores, sink])
                if log_sum_exp[b, h, i] > -np.inf:
                    weights = np.exp(scores - log_sum_exp[b, h, i])
                    output[b, i, h] = weights @ latents
                    sums[b, h] += weights
    parts = output, log_sum_exp, sums[..., :packed], sums[..., packed:]
    return Attention(*(torch.from_numpy(part) for part in parts))


def _tokens(call: Call, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents ``[T, r]`` and rotary keys ``[T, dr]`` of a sequence (0: no token), and who sees them ``[H, q, T]``."""
    dense = call.dense
    slots = dense.keys.shape[2]
    held = np.ones(slots, dtype=bool) if dense.unused is None else ~dense.unused[b].numpy()
    parts = [] if call.pages is None else [_page(call.pages, b, column) for column in range(call.pages.columns)]
    latents = [*(p[0] for p in parts), dense.keys[b, 0].double().numpy()]
    rotary = [*(p[1] for p in parts), dense.values[b, 0].double().numpy()]
    seen = [_seen(call, b, positions) & there for _, _, positions, there in parts]
    if dense.positions is None:
        seen.append(np.broadcast_to(held, (*call.query.shape[1:3], slots)))
    else:
        seen.append(_seen(call, b, dense.positions[b].numpy()) & held)
    return np.concatenate(latents), np.concatenate(rotary), np.concatenate(seen, -1)


def _page(pages: Pages, row: int, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Latents, rotary keys, positions and which places hold a token of a page, ``[P, ...]``."""
    layout = pages.layout
    address, count = int(pages.addresses[row, column]), int(pages.counts[row, column])
    held = np.arange(layout.page_size) < (count if address else 0)
    positions = pages.first[row, column] + np.arange(layout.page_size)
    stored = pages.scattered.get((row, column))
    if stored is not None:
        positions[: len(stored)] = stored
    sides = []
    for side, fmt in layout.sides.items():
        vectors = np.zeros((layout.page_size, fmt.dim))
        if held.any() and fmt.dim:
            decoded = decode_record(layout, side, _record(pages, address))
            rotation = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, torch.device("cpu"))
            vectors[held] = decoded[held] if rotation is None else decoded[held] @ rotation.numpy().T
        sides.append(vectors)
    return sides[0], sides[1], positions, held


def _record(pages: Pages, address: int) -> np.ndarray:
    for slab in pages.slabs:
        index, rest = divmod(address - slab.data_ptr(), slab.shape[1])
        if 0 <= index < len(slab) and rest == 0:
            return slab[index].numpy()
    raise AssertionError("an address outside the slabs")


def _seen(call: Call, b: int, positions: np.ndarray) -> np.ndarray:
    """bool ``[H, q, n]``: which heads and queries of a sequence see tokens at ``positions [n]``."""
    visibility = call.visibility
    at = visibility.start + np.arange(visibility.length)[:, None]
    seen = np.ones((call.query.shape[1], len(at), len(positions)), dtype=bool)
    if visibility.causal:
        seen &= positions <= at
    if visibility.window is not None:
        seen &= positions > at - visibility.window
    if visibility.mask is not None:
        allowed = visible(visibility.mask)[b].numpy()
        column = positions - visibility.mask_start
        inside = (column >= 0) & (column < allowed.shape[-1])
        seen &= np.where(inside, allowed[..., np.where(inside, column, 0)], False)
    return seen


def check(
    actual: Attention, call: Call, wanted: Attention | None = None, tolerances: dict[str, Tolerance] | None = None
) -> None:
    """Fail unless a result is what float64 gives and of the shapes and dtypes of the contract.

    Args:
        actual: the result, on any device; its attention sums may be None.
        call: the call on the CPU.
        wanted: :func:`expected` of the call, if it is at hand.
        tolerances: of ``output``, ``log_sum_exp`` and ``sums``; those of float32 by default. An output may always be
            as far off as its own dtype lets it be.
    """
    wanted = wanted or expected(call)
    dtype = call.query.dtype
    tolerances = tolerances or dict.fromkeys(("output", "log_sum_exp", "sums"), TOLERANCES[torch.float32])
    assert actual.output.dtype == dtype and actual.log_sum_exp.dtype == torch.float32
    assert_within(actual.output.cpu(), wanted.output, max(tolerances["output"], TOLERANCES[dtype]))
    assert_within(actual.log_sum_exp.cpu(), wanted.log_sum_exp, tolerances["log_sum_exp"])
    for sums, right in ((actual.page_sums, wanted.page_sums), (actual.dense_sums, wanted.dense_sums)):
        if sums is not None:
            assert right is not None and sums.dtype == torch.float32
            assert_within(sums.cpu(), right, tolerances["sums"])


def run(case_or_call: Case | Call) -> Attention:
    """The reference's result, attention sums too."""
    call = make_call(case_or_call) if isinstance(case_or_call, Case) else case_or_call
    return reference.latent_attend(*call, sums=True)


def fits(codec: str, shape: Shape) -> bool:
    """Whether the codec's groups divide rows of this shape."""
    return shape.rank % 16 == 0 or "groups" not in codec


def covering(codec: str) -> list[Case]:
    """Two shapes with two features each, which differ from codec to codec."""
    index, names = list(CODECS).index(codec), list(FEATURES)
    shapes = [shape for shape in SHAPES if fits(codec, shape)]
    return [
        make_case(codec, shapes[(index + 2 * i) % len(shapes)], **FEATURES[names[(index + 3 * i + 7 * j) % len(names)]])
        for i in range(2)
        for j in range(2)
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str) -> None:
    """Every codec of the latents, with shapes and features in turn."""
    for case in covering(codec):
        call = make_call(case)
        check(run(call), call)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("codec", ["int4 rotated in groups", "bfloat16", None])
def test_features(codec: str | None, feature: str) -> None:
    """Every feature, for one query and for several; with pages and with full-precision tokens alone."""
    for shape in (Shape(queries=1, batch=2), Shape(32, 24, 16, 3, 5)):
        call = make_call(make_case(codec, shape, torch.bfloat16, seed=1, **FEATURES[feature]))
        check(run(call), call)


@pytest.mark.parametrize("chunk", [1, 40, 64])
def test_tokens_at_a_time(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of tokens that are read at a time changes the result only by rounding."""
    monkeypatch.setattr(reference, "CHUNK_TOKENS", chunk)
    call = make_call(make_case("int8", Shape(page_size=16, queries=2, batch=2), columns=9, ragged=True, window=100))
    check(run(call), call)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (1, 3), (4, 3)])
def test_masks(heads: int, queries: int, additive: bool) -> None:
    """A mask decides what is seen, per head and query or for all; it may begin after the first tokens."""
    case = make_case("int4 rotated", Shape(queries=3, batch=2), ragged=True, scattered=True, unused=True)
    for start in (0, 37):
        call = masked(make_call(case), heads, queries, additive, start)
        check(run(call), call)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("codec", ["int8", None])
def test_nothing_to_see(codec: str | None, sinks: bool) -> None:
    """A query that sees nothing has output 0, sums 0 and log-sum-exp ``-inf``, or its sink logit."""
    call = make_call(make_case(codec, Shape(queries=2), columns=1, sinks=sinks, window=1))
    dense = DenseTokens(call.dense.keys, call.dense.values, call.dense.positions, torch.ones(1, 9, dtype=torch.bool))
    call = call._replace(dense=dense)
    result = run(call)
    check(result, call)
    assert not result.output.any() and result.dense_sums is not None and not result.dense_sums.any()


def test_sums_only_on_request() -> None:
    """Without sums, output and log-sum-exp have the same bits."""
    call = make_call(make_case("int8", Shape(queries=3)))
    with_sums, without = run(call), reference.latent_attend(*call)
    assert without.page_sums is None and without.dense_sums is None
    assert torch.equal(without.output, with_sums.output)
    assert torch.equal(without.log_sum_exp, with_sums.log_sum_exp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_projections(dtype: torch.dtype) -> None:
    """Absorbing and expanding are sums over one dimension; the weights are two views of one projection."""
    query, latents, keys, values = projection_inputs(dtype, batch=2, heads=3, queries=4, nope=24, value=40, rank=48)
    check_projection(reference.absorb(query, keys), "bhqd,hdr->bhqr", query, keys)
    check_projection(reference.expand(latents, values), "bqhr,hvr->bqhv", latents, values)


def projection_inputs(
    dtype: torch.dtype, batch: int, heads: int, queries: int, nope: int, value: int, rank: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query ``[B, H, q, dn]``, weighted latents ``[B, q, H, r]``, and both weights as views of a ``kv_b_proj``."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape)).to(dtype)

    weight = (normal(heads * (nope + value), rank) / (nope * rank) ** 0.25).view(heads, nope + value, rank)
    # As a model has it: cut from the projected hidden states, tokens before heads in memory.
    query = normal(batch, queries, heads, nope + 8).transpose(1, 2)[..., :nope]
    return query, normal(batch, queries, heads, rank), weight[:, :nope], weight[:, nope:]


def check_projection(actual: torch.Tensor, equation: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    assert actual.dtype == x.dtype
    assert_near(actual, torch.einsum(equation, x.double(), weight.double()))
