"""Calls of the attention kernels: random pages of any format, and every option of a call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_kvcache.codecs import resolve
from hf_kvcache.kernels.inputs import DenseTokens, Pages, Scoring
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.visibility import Visibility

#: Columns that the page arrays have beyond those of the call, with addresses that must not be followed.
SPARE_COLUMNS = 3


class Call(NamedTuple):
    """The arguments of ``attend``, without ``sums``."""

    query: torch.Tensor
    pages: Pages | None
    dense: DenseTokens
    visibility: Visibility
    scoring: Scoring


class Shape(NamedTuple):
    """Sizes of a call."""

    key_dim: int = 64
    value_dim: int = 64
    page_size: int = 32
    group: int = 1
    queries: int = 1
    batch: int = 1
    heads: int = 2


@dataclass(frozen=True)
class Case:
    """What a call is made of.

    Attributes:
        formats: of keys and values in pages; None for no pages.
        shape: sizes; the widths are those of the formats.
        columns: pages of a row at most.
        slots: full-precision tokens.
        ragged: whether rows differ in pages, and pages in tokens; the first row then has none.
        window: how many tokens a query sees, or None.
        causal: whether queries see no later token.
        softcap: logit soft-capping, or None.
        sinks: whether query heads have sink logits.
        unused: whether some slots hold no token.
        positions: whether full-precision tokens have positions.
        scattered: whether positions in pages have gaps.
        biased: whether pages hold a bias per token, which is NaN where there is no token.
        strided: whether query, keys and values are views with strides of their own.
        query_dtype: dtype of the query.
        dense_dtype: dtype of full-precision tokens.
        size: standard deviation of the query's elements.
        seed: of everything random.
    """

    formats: tuple[SideFormat, SideFormat] | None
    shape: Shape = Shape()  # noqa: RUF009
    columns: int = 3
    slots: int = 9
    ragged: bool = False
    window: int | None = None
    causal: bool = True
    softcap: float | None = None
    sinks: bool = False
    unused: bool = False
    positions: bool = True
    scattered: bool = False
    biased: bool = False
    strided: bool = False
    query_dtype: torch.dtype = torch.float32
    dense_dtype: torch.dtype = torch.float32
    size: float = 1.0
    seed: int = 0


def formats_of(
    spec: str, shape: Shape, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[SideFormat, SideFormat]:
    """The formats of a codec for vectors and pages of these sizes."""
    codec = resolve(spec, **options)
    return (
        codec.keys.format(shape.key_dim, shape.page_size, dtype),
        codec.values.format(shape.value_dim, shape.page_size, dtype),
    )


def make_call(case: Case) -> Call:
    """The call; equal cases make equal calls."""
    rng = np.random.default_rng(case.seed)
    shape = case.shape
    pages = None if case.formats is None else random_pages(case, rng)
    past = 0 if pages is None else 1 + int(_last_positions(pages).max(initial=-1))
    query = _normal(rng, (shape.batch, shape.heads * shape.group, shape.queries, shape.key_dim), case.strided)
    keys, values = (
        _normal(rng, (shape.batch, shape.heads, case.slots, dim), case.strided).to(case.dense_dtype)
        for dim in (shape.key_dim, shape.value_dim)
    )
    positions = torch.arange(past, past + case.slots).expand(shape.batch, -1) if case.positions else None
    unused = torch.from_numpy(rng.random((shape.batch, case.slots)) < 0.3) if case.unused else None
    sinks = torch.from_numpy(rng.normal(size=shape.heads * shape.group)).float() if case.sinks else None
    start = past + case.slots - shape.queries
    return Call(
        (query * case.size).to(case.query_dtype),
        pages,
        DenseTokens(keys, values, positions, unused),
        Visibility(start, shape.queries, None, 0, case.causal, case.window),
        Scoring(shape.key_dim**-0.5, case.softcap, sinks),
    )


def _normal(rng: np.random.Generator, shape: tuple[int, int, int, int], strided: bool) -> torch.Tensor:
    """Normal numbers ``[B, H, n, D]``; ``strided``: cut from ``[B, n, H, D]`` of more tokens, heads and channels."""
    batch, heads, length, dim = shape
    if not strided:
        return torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    wide = torch.from_numpy(rng.normal(size=(batch, length + 2, heads + 1, dim + 3)).astype(np.float32))
    return wide[:, 1:-1, :heads, 1 : dim + 1].transpose(1, 2)


def _last_positions(pages: Pages) -> np.ndarray:
    """Position of the last token of each page ``[pages that there are]``."""
    cells = np.argwhere(pages.counts > 0)
    return np.array(
        [
            pages.scattered[r, c][-1] if (r, c) in pages.scattered else pages.first[r, c] + pages.counts[r, c] - 1
            for r, c in cells.tolist()
        ],
        dtype=np.int64,
    )


def random_pages(case: Case, rng: np.random.Generator) -> Pages:
    """Pages of random content, in two slabs and in random order; the arrays are views of wider ones."""
    assert case.formats is not None
    shape = case.shape
    layout = PageLayout(*case.formats, shape.page_size, case.biased)
    rows, columns = shape.batch * shape.heads, case.columns
    counts = np.full((rows, columns + SPARE_COLUMNS), 1 << 20, dtype=np.int32)
    counts[:, :columns] = _counts(case, rng)
    slabs = [torch.from_numpy(random_records(layout, 1 + rows * columns // 2, rng)) for _ in range(2)]
    free = np.concatenate([slab.data_ptr() + np.arange(len(slab)) * layout.record_bytes for slab in slabs])
    addresses = np.full_like(counts, 8, dtype=np.int64)
    addresses[:, :columns] = np.where(
        counts[:, :columns] > 0, rng.permutation(free)[: rows * columns].reshape(rows, -1), 0
    )
    first = np.full_like(counts, -1, dtype=np.int64)
    scattered = {}
    for row in range(rows):
        gaps = rng.integers(0, 3, columns * shape.page_size) if case.scattered else 0
        places = np.arange(columns * shape.page_size) + np.cumsum(gaps)
        for column in range(columns):
            held = places[column * shape.page_size :][: counts[row, column]].copy()
            first[row, column] = held[0] if len(held) else 0
            if len(held) and held[-1] - held[0] >= len(held):
                scattered[row, column] = held
    key_mean = torch.from_numpy(rng.normal(size=(rows, shape.key_dim))).float() if case.formats[0].centered else None
    scale = None
    if case.formats[0].balanced:
        scale = torch.from_numpy(2.0 ** rng.integers(-2, 1, size=(rows, shape.key_dim))).float()
    used = np.s_[:, :columns]
    if case.biased:
        _add_biases(layout, slabs, addresses[used], counts[used], rng)
    return Pages(layout, slabs, addresses[used], counts[used], first[used], scattered, key_mean, shape.heads, scale)


def _add_biases(
    layout: PageLayout, slabs: list[torch.Tensor], addresses: np.ndarray, counts: np.ndarray, rng: np.random.Generator
) -> None:
    """Give every token a bias of its own, and places without one NaN."""
    for slab in slabs:
        bias = layout.view(slab, "bias")
        assert bias is not None
        bias.fill_(torch.nan)
        first = slab.data_ptr()
        for address, count in zip(addresses.flat, counts.flat, strict=True):
            if first <= address < first + slab.numel():
                drawn = torch.from_numpy(2 * rng.normal(size=int(count)))
                bias[(int(address) - first) // layout.record_bytes, : int(count)] = drawn.half()


def _counts(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each page ``[rows, columns]``."""
    rows, page_size = case.shape.batch * case.shape.heads, case.shape.page_size
    counts = np.full((rows, case.columns), page_size)
    if not case.ragged:
        return counts
    some = rng.random(counts.shape) < 0.5
    counts[some] = rng.integers(1, page_size + 1, some.sum())
    pages = rng.integers(0, case.columns + 1, rows)
    pages[0] = 0
    counts[np.arange(case.columns) >= pages[:, None]] = 0
    return counts


def random_records(layout: PageLayout, count: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 ``[count, record_bytes]``: pages whose elements are about N(0, 1); the bytes between fields are 0xFF."""
    records = np.full((count, layout.record_bytes), 0xFF, dtype=np.uint8)
    for side, fmt in layout.sides.items():
        for part, content in _side(fmt, layout.page_size, count, rng).items():
            field = layout.fields[f"{side}.{part}"]
            assert content.nbytes == count * field.nbytes
            records[:, field.offset : field.offset + field.nbytes] = content.view(np.uint8).reshape(count, -1)
    return records


def _side(fmt: SideFormat, page_size: int, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The fields of one side of ``count`` pages."""
    if fmt.level == "dense":
        dense = torch.from_numpy(rng.normal(size=(count, page_size, fmt.dim))).to(fmt.dense_dtype)
        # Flat: vectors of no width (latents without a rotary part) have strides that cannot be viewed as bytes.
        return {"codes": dense.flatten(1).view(torch.uint8).numpy()}
    codes = rng.integers(0, 256, (count, page_size, fmt.dim * fmt.bits // 8), dtype=np.uint8)
    mean, deviation = _moments(fmt)
    scale = rng.uniform(0.7, 1.4, (count, *fmt.scale_shape(page_size))) / deviation
    fields = {"codes": np.where(codes & 0x7F == 0x7F, 0, codes) if fmt.level == "float8" else codes, "scale": scale}
    if fmt.zero:
        # An offset that a token's channels share would be gathered in one channel by the rotation back.
        spread = 0.5 if fmt.axis == "channel" else 0.5 * fmt.dim**-0.5
        fields["zero"] = rng.normal(-mean * scale, spread)
    if fmt.other:
        fields["other"] = rng.uniform(0.7, 1.4, (count, *fmt.other_shape(page_size)))
    return {name: x if name == "codes" else x.astype(np.float16) for name, x in fields.items()}


def _moments(fmt: SideFormat) -> tuple[float, float]:
    """Mean and standard deviation of the level of a random code."""
    if fmt.level == "float8":
        return 0.0, 110.0
    levels = fmt.table if fmt.level == "table" else tuple(range(1 << fmt.bits))
    mean = sum(levels) / len(levels)
    return mean, math.sqrt(sum((level - mean) ** 2 for level in levels) / len(levels))
