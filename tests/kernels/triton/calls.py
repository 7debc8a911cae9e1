"""Attention calls on random pages, and their expected results, token by token in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.reference.levels import decode_side
from hf_kvcache.kernels.visibility import Visibility
from tests.tolerances import TOLERANCES, assert_near


@dataclass
class Shape:
    """Sizes of a call: sequences, KV heads, query heads per KV head, query tokens, widths, and what is held."""

    batch: int = 1
    heads: int = 2
    group: int = 2
    length: int = 1
    key_dim: int = 64
    value_dim: int = 64
    page_size: int = 16
    columns: int = 3
    slots: int = 5
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def query_heads(self) -> int:
        return self.heads * self.group


@dataclass
class Call:
    """The arguments of an attention call, and the decoded pages ``[rows, columns, P, D]`` in float64, model's basis.

    ``bias [rows, columns, P]`` is added to the scores of the tokens in pages.
    """

    query: torch.Tensor
    pages: Pages | None
    dense: DenseTokens
    visibility: Visibility
    scoring: Scoring
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    slab: list[torch.Tensor] = field(default_factory=list)

    @property
    def arguments(self) -> tuple[torch.Tensor, Pages | None, DenseTokens, Visibility, Scoring]:
        return self.query, self.pages, self.dense, self.visibility, self.scoring


class Random:
    """A stream of random tensors."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)


def make_call(codec: str | Codec | None, shape: Shape, seed: int = 0, device: str | torch.device = "cpu") -> Call:
    """A call with full pages of a codec (none with None), tokens side by side, then the full-precision tokens."""
    random = Random(seed)
    encoder = None
    if codec is not None and shape.columns:
        encoder = PageEncoder(resolve(codec), shape.key_dim, shape.value_dim, shape.page_size, shape.dtype)
        count = (shape.rows * shape.columns, shape.page_size)
        key_mean = random.normal(shape.rows, shape.key_dim) / 2 if encoder.centered else None
        keys = random.normal(*count, shape.key_dim).to(shape.dtype)
        values = random.normal(*count, shape.value_dim).to(shape.dtype)
        key_scale = torch.exp2(random.normal(shape.rows, shape.key_dim).round()) if encoder.balanced else None
        per_page = [None if t is None else t.repeat_interleave(shape.columns, 0) for t in (key_mean, key_scale)]
        records = encoder.encode(keys, values, *per_page)
        return call_with(encoder.layout, records, key_mean, shape, random, device, key_scale)
    return call_with(None, None, None, shape, random, device)


def call_with(
    layout: PageLayout | None,
    records: torch.Tensor | None,
    key_mean: torch.Tensor | None,
    shape: Shape,
    random: Random,
    device: str | torch.device = "cpu",
    key_scale: torch.Tensor | None = None,
) -> Call:
    """A call with given records ``[rows * columns, record_bytes]``, row by row."""
    pages, columns = None, 0
    keys = torch.zeros(shape.rows, 0, shape.page_size, shape.key_dim, dtype=torch.float64)
    values = torch.zeros(shape.rows, 0, shape.page_size, shape.value_dim, dtype=torch.float64)
    if layout is not None and records is not None:
        columns = shape.columns
        pages = _pages(layout, records, key_mean, shape, device)
        pages.key_scale = None if key_scale is None else key_scale.to(device)
        keys, values = (
            _decoded(layout, side, records, key_mean if side == "keys" else None, shape) for side in ("keys", "values")
        )
        if key_scale is not None:
            keys = keys * key_scale.double()[:, None, None]
    packed = columns * shape.page_size
    seen = packed + shape.slots - shape.length
    new = {"dtype": shape.dtype, "device": device}
    positions = (packed + torch.arange(shape.slots)).expand(shape.batch, -1)
    dense = DenseTokens(
        random.normal(shape.batch, shape.heads, shape.slots, shape.key_dim).to(**new),
        random.normal(shape.batch, shape.heads, shape.slots, shape.value_dim).to(**new),
        positions.contiguous().to(device),
    )
    query = random.normal(shape.batch, shape.query_heads, shape.length, shape.key_dim).to(**new)
    visibility = Visibility(seen, shape.length, None, 0, True, None)
    return Call(query, pages, dense, visibility, Scoring(shape.key_dim**-0.5), keys, values)


def _pages(
    layout: PageLayout, records: torch.Tensor, key_mean: torch.Tensor | None, shape: Shape, device: str | torch.device
) -> Pages:
    """The records in a slab in another order, with bytes of 0xFF around and between them."""
    count = len(records)
    slab = torch.full((2 * count + 1, layout.record_bytes), 0xFF, dtype=torch.uint8)
    places = 1 + 2 * torch.randperm(count, generator=torch.Generator().manual_seed(count))
    slab[places] = records
    slab = slab.to(device)
    addresses = slab.data_ptr() + places.numpy() * layout.record_bytes
    return Pages(
        layout,
        [slab],
        addresses.reshape(shape.rows, shape.columns).astype(np.int64),
        np.full((shape.rows, shape.columns), shape.page_size, dtype=np.int32),
        np.broadcast_to(np.arange(shape.columns) * shape.page_size, (shape.rows, shape.columns)).astype(np.int64),
        {},
        None if key_mean is None else key_mean.to(device),
        shape.heads,
    )


def _decoded(
    layout: PageLayout, side: str, records: torch.Tensor, key_mean: torch.Tensor | None, shape: Shape
) -> torch.Tensor:
    fmt = layout.sides[side]
    out = torch.full((len(records), shape.page_size, fmt.dim), float("nan"), dtype=torch.float64)
    decoded = decode_side(layout, side, records, out).double().unflatten(0, (shape.rows, -1))
    if key_mean is not None:
        decoded = decoded + key_mean.double()[:, None, None]
    rotation = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, torch.device("cpu"))
    return decoded if rotation is None else decoded @ rotation.T


def biased(call: Call, seed: int = 0) -> Call:
    """The call with a bias for every token in pages, and NaN where there is none."""
    assert call.pages is not None
    pages, old = call.pages, call.pages.layout
    layout = PageLayout(*old.sides.values(), old.page_size, biased=True)
    bias = 2 * torch.randn(pages.rows, pages.columns, old.page_size, generator=torch.Generator().manual_seed(seed))
    bias = bias.half()
    unused = torch.from_numpy(np.arange(old.page_size) >= pages.counts[:, :, None])
    slab = pages.slabs[0].new_full((2 * pages.addresses.size + 1, layout.record_bytes), 0xFF)
    addresses = np.zeros_like(pages.addresses)
    for number, (row, column) in enumerate(np.argwhere(pages.addresses != 0).tolist()):
        place = (pages.addresses[row, column] - pages.slabs[0].data_ptr()) // old.record_bytes
        record = slab[2 * number + 1]
        record[: old.record_bytes] = pages.slabs[0][int(place)]
        stored = layout.view(record, "bias")
        assert stored is not None
        stored.copy_(bias[row, column].masked_fill(unused[row, column], torch.nan))
        addresses[row, column] = record.data_ptr()
    changed = replace(pages, layout=layout, slabs=[slab], addresses=addresses)
    return replace(call, pages=changed, bias=bias.double())


def ragged(call: Call, seed: int = 0) -> Call:
    """The call with pages that lost some of their tokens, and rows that have fewer pages."""
    assert call.pages is not None
    rng = np.random.default_rng(seed)
    counts, addresses = call.pages.counts.copy(), call.pages.addresses.copy()
    for row in range(counts.shape[0]):
        held = counts.shape[1] - row % counts.shape[1]
        counts[row, held:], addresses[row, held:] = 0, 0
        counts[row, held - 1] = rng.integers(1, call.pages.layout.page_size + 1)
    return replace(call, pages=replace(call.pages, counts=counts, addresses=addresses))


def scattered(call: Call, seed: int = 0) -> Call:
    """The call with gaps between the positions of the tokens of some pages, which all stay before the queries."""
    assert call.pages is not None
    rng = np.random.default_rng(seed)
    pages = call.pages
    span, size = pages.layout.page_size + 7, pages.layout.page_size
    first = np.broadcast_to(np.arange(pages.columns) * span, pages.first.shape).astype(np.int64)
    at = {}
    for row in range(pages.rows):
        for column in range(row % 2, pages.columns, 2):
            positions = np.sort(rng.choice(span, size, replace=False)) + first[row, column]
            first = first.copy()
            first[row, column] = positions[0]
            at[row, column] = positions
    shift = pages.columns * 7
    assert call.dense.positions is not None
    return replace(
        call,
        pages=replace(pages, first=first, scattered=at),
        dense=replace(call.dense, positions=call.dense.positions + shift),
        visibility=replace(call.visibility, start=call.visibility.start + shift),
    )


def expected(call: Call) -> Attention:
    """The expected result in float64: one softmax per query over all tokens that it sees."""
    batch, query_heads, length, _ = call.query.shape
    heads = call.dense.keys.shape[1]
    page_tokens = call.keys.shape[1] * call.keys.shape[2]
    slots = call.dense.keys.shape[2]
    output = torch.zeros(batch, length, query_heads, call.values.shape[-1], dtype=torch.float64)
    log_sum_exp = torch.full((batch, query_heads, length), -torch.inf, dtype=torch.float64)
    sums = torch.zeros(batch, query_heads, page_tokens + slots, dtype=torch.float64)
    for b in range(batch):
        for h in range(query_heads):
            head = h // (query_heads // heads)
            row = b * heads + head
            keys = torch.cat([call.keys[row].flatten(0, 1), call.dense.keys[b, head].double().cpu()])
            values = torch.cat([call.values[row].flatten(0, 1), call.dense.values[b, head].double().cpu()])
            for i in range(length):
                seen = torch.tensor(_page_tokens_seen(call, row, i) + _slots_seen(call, b, i), dtype=torch.bool)
                logits = keys[seen] @ call.query[b, h, i].double().cpu() * call.scoring.scaling
                if call.scoring.softcap is not None:
                    logits = call.scoring.softcap * torch.tanh(logits / call.scoring.softcap)
                if call.bias is not None:
                    bias = torch.cat([call.bias[row].flatten(), torch.zeros(slots, dtype=torch.float64)])
                    logits = logits + bias[seen]
                total = logits.logsumexp(0) if len(logits) else torch.tensor(-torch.inf, dtype=torch.float64)
                if call.scoring.sink_logits is not None:
                    total = torch.logaddexp(total, call.scoring.sink_logits[h].double().cpu())
                log_sum_exp[b, h, i] = total
                if len(logits):
                    weights = (logits - total).exp()
                    sums[b, h, seen] += weights
                    output[b, i, h] = weights @ values[seen]
    return Attention(output, log_sum_exp, sums[:, :, :page_tokens], sums[:, :, page_tokens:])


def _in_sight(call: Call, position: int, query: int) -> bool:
    at, window = call.visibility.start + query, call.visibility.window
    return (position <= at or not call.visibility.causal) and (window is None or position > at - window)


def _page_tokens_seen(call: Call, row: int, query: int) -> list[bool]:
    if call.pages is None:
        return []
    seen = []
    for column in range(call.pages.columns):
        positions = call.pages.scattered.get((row, column))
        for token in range(call.pages.layout.page_size):
            position = int(call.pages.first[row, column]) + token if positions is None else int(positions[token])
            seen.append(token < call.pages.counts[row, column] and _in_sight(call, position, query))
    return seen


def _slots_seen(call: Call, batch: int, query: int) -> list[bool]:
    dense, seen = call.dense, []
    for slot in range(dense.keys.shape[2]):
        empty = dense.unused is not None and bool(dense.unused[batch, slot])
        visible = dense.positions is None or _in_sight(call, int(dense.positions[batch, slot]), query)
        seen.append(not empty and visible)
    return seen


def check(actual: Attention, call: Call) -> None:
    """Fail unless output, log-sum-exp and, where given, the sums are right and as the contract shapes them."""
    wanted = expected(call)
    dtype = call.query.dtype
    assert actual.output.dtype == dtype and actual.log_sum_exp.dtype == torch.float32
    assert actual.output.shape == wanted.output.shape and actual.output.is_contiguous()
    assert_near(actual.output.cpu(), wanted.output)
    finite = wanted.log_sum_exp > -torch.inf
    assert torch.equal(actual.log_sum_exp.cpu() > -torch.inf, finite)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.log_sum_exp.cpu().double()[finite],
        wanted.log_sum_exp[finite],
        rtol=tolerance.relative,
        atol=4 * tolerance.absolute,
    )
    for sums, right in ((actual.page_sums, wanted.page_sums), (actual.dense_sums, wanted.dense_sums)):
        if sums is not None:
            assert right is not None and sums.dtype == torch.float32
            assert_near(sums.cpu(), right, dtype)
