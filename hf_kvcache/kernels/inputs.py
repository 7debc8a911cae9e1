"""The arguments and results of the attention kernels: pages, full-precision tokens, scoring, and prepared calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_kvcache.kernels.device_table import DeviceTable, ResidentTable, to_device
from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.workspace import scratch


@dataclass
class Pages:
    """The pages of a layer, row by row; a row is a KV head of a sequence, ``row = sequence * Hkv + head``.

    The arrays are on the host and may be views of larger arrays, whose rows are further apart than ``columns``. The
    tokens of a page are in the order of their positions, and so are the pages of a row: positions ascend along a row.

    Attributes:
        layout: what the bytes of a record mean.
        slabs: the uint8 tensors ``[n, record_bytes]`` that hold the records.
        addresses: int64 ``[rows, columns]``, the byte address of each record; 0 where a row has no page.
        counts: int32 ``[rows, columns]``, how many tokens of each page count, from the first one on; 0 without a page.
        first: int64 ``[rows, columns]``, original position of each page's first token.
        scattered: positions ``[P]`` of the pages whose positions have gaps, by ``(row, column)``.
        key_mean: float32 ``[rows, Dk]``, the mean that was subtracted from the rotated keys; None if there is none.
        heads: number of KV heads.
        key_scale: float32 ``[rows, Dk]``, powers of two by which the keys were divided before their rotation; None if
            they were not.
        prepared: what a backend has computed of these pages for later calls, by the name of the backend.
    """

    layout: PageLayout
    slabs: Sequence[torch.Tensor]
    addresses: np.ndarray
    counts: np.ndarray
    first: np.ndarray
    scattered: dict[tuple[int, int], np.ndarray]
    key_mean: torch.Tensor | None
    heads: int
    key_scale: torch.Tensor | None = None
    prepared: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    # The table on the device, and the version of it that these pages are. Pages made from others have one of their own.
    _resident: ResidentTable | None = field(default=None, init=False, repr=False, compare=False)
    _version: int = field(default=-1, init=False, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return self.addresses.shape[0]

    @property
    def columns(self) -> int:
        return self.addresses.shape[1]

    @property
    def device(self) -> torch.device:
        return self.slabs[0].device

    @cached_property
    def full(self) -> bool:
        """Whether every row has a page in every column, and all tokens of these pages count."""
        return bool((self.counts == self.layout.page_size).all())

    def cells(self) -> int:
        """The number of pages in all rows."""
        return int(np.count_nonzero(self.addresses))

    def scale_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries ``[B, Hq, q, Dk]`` or ``[rows, ..., Dk]``, not rotated yet, times what the keys were divided by."""
        if self.key_scale is None:
            return query
        by_row = query.reshape(self.rows, -1, query.shape[-1])
        return (by_row * self.key_scale.unsqueeze(1)).view(query.shape)

    def until(self, columns: int) -> Pages:
        """The pages of the first ``columns`` columns."""
        if columns >= self.columns:
            return self
        fewer = replace(
            self,
            addresses=self.addresses[:, :columns],
            counts=self.counts[:, :columns],
            first=self.first[:, :columns],
            scattered={at: p for at, p in self.scattered.items() if at[1] < columns},
            prepared={},
        )
        fewer._resident, fewer._version = self._resident, self._version
        return fewer

    def on_device(self, positions: bool = False) -> DeviceTable:
        """The table on the device of the pages. Only what has changed since an earlier call is sent there.

        It holds for work that is queued on the device before the table on the host changes again.

        Args:
            positions: whether the positions of all tokens are wanted too.
        """
        resident = self._resident
        if resident is None or resident.version != self._version:
            resident = ResidentTable()
            self.follow(resident)
        return resident.brought(self, positions)

    def follow(self, resident: ResidentTable) -> None:
        """Use a table on the device that follows the table of which these are the pages, for as long as it does."""
        self._resident, self._version = resident, resident.version

    def host_positions(self, start: int, stop: int) -> np.ndarray:
        """Original positions ``[rows, stop - start, P]``, int64; undefined behind the count of a page."""
        positions = self.first[:, start:stop, None] + np.arange(self.layout.page_size)
        for (row, column), stored in self.scattered.items():
            if start <= column < stop:
                positions[row, column - start, : len(stored)] = stored
        return positions

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """As :meth:`host_positions`, on the device of the pages."""
        return to_device(self.host_positions(start, stop), self.device)

    def unused(self, start: int, stop: int) -> torch.Tensor | None:
        """bool ``[rows, stop - start, P]``, True where there is no token; None if there is a token everywhere."""
        counts = self.counts[:, start:stop]
        if self.full or (counts == self.layout.page_size).all():
            return None
        return to_device(np.arange(self.layout.page_size) >= counts[:, :, None], self.device)

    def records(self, start: int, stop: int) -> torch.Tensor:
        """The records of some columns, uint8 ``[stop - start, rows, record_bytes]``.

        The result is valid until the next call on this thread. It is a view if the records lie side by side, else a
        copy. Where a row has no page, the result holds the bytes of some other page.
        """
        addresses = np.ascontiguousarray(self.addresses[:, start:stop].T).reshape(-1)
        missing = addresses == 0
        if missing.any():
            addresses = np.where(missing, addresses.max(), addresses)
        shape = (stop - start, self.rows, self.layout.record_bytes)
        bases = np.array([slab.data_ptr() for slab in self.slabs])
        order = np.argsort(bases)
        owner = order[np.searchsorted(bases[order], addresses, side="right") - 1]
        slots = (addresses - bases[owner]) // self.layout.record_bytes
        if (owner == owner[0]).all() and (np.diff(slots) == 1).all():
            return self.slabs[owner[0]][int(slots[0]) : int(slots[0]) + len(slots)].view(shape)
        out = scratch("pages", (len(slots), self.layout.record_bytes), torch.uint8, self.device)
        for index in np.unique(owner).tolist():
            where = to_device(np.flatnonzero(owner == index), self.device)
            picked = to_device(slots[owner == index], self.device)
            # Eight bytes at a time (records are aligned to 16): torch gathers element by element.
            out.view(torch.int64)[where] = self.slabs[index].view(torch.int64).index_select(0, picked)
        return out.view(shape)


@dataclass
class DenseTokens:
    """The full-precision tokens of one attention call.

    Attributes:
        keys: ``[B, Hkv, n, Dk]``; the last dimension is contiguous.
        values: ``[B, Hkv, n, Dv]``; the last dimension is contiguous.
        positions: int64 ``[B, n]``; None if every query sees every token.
        unused: bool ``[B, n]``, True where there is no token; None if all are tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor | None = None
    unused: torch.Tensor | None = None

    def until(self, slots: int) -> DenseTokens:
        """The tokens of the first ``slots`` slots."""
        return DenseTokens(
            self.keys[:, :, :slots],
            self.values[:, :, :slots],
            None if self.positions is None else self.positions[:, :slots],
            None if self.unused is None else self.unused[:, :slots],
        )


@dataclass
class Scoring:
    """How scores are made: ``softcap * tanh(q . k * scaling / softcap)``, and logits that only take probability away.

    Attributes:
        scaling: factor of the dot products.
        softcap: logit soft-capping (Gemma 2), or None.
        sink_logits: a learned logit per query head ``[Hq]`` in the softmax's denominator (gpt-oss), or None.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None

    @property
    def inner(self) -> float:
        """The factor of the query: with soft-capping, the capped scores are ``softcap * tanh`` of these."""
        return self.scaling if self.softcap is None else self.scaling / self.softcap


@dataclass(frozen=True)
class UpProjections:
    """The projections from latents to the keys and the values of each head, as views of the model's own weight.

    Attributes:
        keys: ``[H, dn, r]``.
        values: ``[H, dv, r]``.
    """

    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class Slots:
    """The buffer of full-precision tokens. A prepared call stores new tokens in the next slots of every sequence.

    Attributes:
        keys: ``[B, Hkv, slots, Dk]``, including the slots that are not in use yet.
        values: ``[B, Hkv, slots, Dv]``.
        positions: int64 ``[B, slots]`` on the host.
        lengths: int64 ``[B]`` on the host, the number of slots in use.
        positions_on_device: gives the positions on the device of the keys, int64 ``[B, slots]``. A call that asks for
            them writes the position of its token there too.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: np.ndarray
    lengths: np.ndarray
    positions_on_device: Callable[[], torch.Tensor]


@dataclass
class CallInputs:
    """What a prepared call is made for: the layout of n new tokens, and what stays the same for the tokens after them.

    Attributes:
        query: ``[B, Hq, n, Dk]``.
        keys: of the new tokens, ``[B, Hkv, n, Dk]``, or their latents. No sequence has padding here.
        values: of the new tokens, ``[B, Hkv, n, Dv]``, or their rotary keys.
        pages: the pages; None if there are none.
        slots: the buffer of full-precision tokens, of which every sequence has equally many unless ``ragged``.
        scoring: how scores are made.
        window: tokens a query sees (sliding windows); None for all.
        up: the up-projections, if latents are stored; None if keys and values are.
        ragged: whether sequences hold different numbers of tokens. Then tokens go to the first free slots of each.
        sums: float32 ``[B, Hkv, n]`` and ``[B, Hkv, m]``, with room for all slots and for all tokens in pages. A call
            adds the probability of each key to them, averaged over the query heads that read it. None if nobody wants
            them.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pages: Pages | None
    slots: Slots
    scoring: Scoring
    window: int | None
    up: UpProjections | None = None
    ragged: bool = False
    sums: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class MassRule:
    """How pages are scored by the attention that query heads are expected to pay to them.

    Of each part of a page there are two vectors, mean and standard deviation of its keys. ``band`` neighboring elements
    have one deviation together, the root of the sum of their variances. By these the scores of a query over the part
    have mean ``m = q . mean * scaling`` and standard deviation ``s = sqrt(q^2 . deviation^2) * scaling``, where ``q^2``
    has the mean of the squares of each band. The logarithm of its attention to the part, up to what all parts have in
    common, is taken to be ``m + s^2 / 2``, or ``m + reach * (s - reach / 2)`` where ``s`` is above ``reach``. So each
    query head has probabilities of pages. A page has the sum of them over the query heads of a row.

    A model's soft-capping is left out of the estimate.

    Attributes:
        scaling: factor of the products of queries and keys.
        reach: above 0.
        band: divides the width of a head.
    """

    scaling: float
    reach: float
    band: int = 1


@dataclass(frozen=True)
class Sharing:
    """That the KV heads of a sequence share the pages that they may read.

    The pages with the largest scores of all heads are chosen, of one head at most twice as many as it brings. Scores
    are comparable, since probabilities are those among pages and sinks: a head that attends to the sinks mostly has
    small ones.

    Attributes:
        count: how many pages a row brings to those that the heads share, unless it has a limit of its own.
        sinks: float32 ``[rows, n, D]``, elements side by side, the keys of the sinks, of which there may be none.
        tokens: of a part of a page.
    """

    count: int
    sinks: torch.Tensor
    tokens: int


@dataclass
class ChoiceInputs:
    """What a prepared choice of pages is made for: the layout of queries, and what stays the same from step to step.

    Attributes:
        query: ``[B, Hq, 1, D]``.
        rule: how pages are scored: one number for each of the one or two vectors of a part of a page, or a rule for
            their attention. In the first case a vector meets the sum of the queries of a row, plus the number times the
            sum of their absolute values; the products of the vectors are added.
        codes: int8 ``[rows, columns * spans, W]``, the vectors of each part of a page side by side.
        scales: float16 ``[rows, columns * spans]``, above 0.
        spans: parts of a page.
        limits: int64 ``[rows]``, how many pages a row may have, or brings where heads share; None if it is the same
            number for all: as many as there is room for, or ``sharing.count``.
        missing: bool ``[rows, columns]``, True where a row has no page; None if there is a page everywhere.
        pages: all pages.
        table: int64 ``[3, rows, n]``, where the chosen columns of the table of ``pages`` are written, in their order:
            addresses, counts and first positions; 0 where nothing is chosen.
        counts: int32 ``[rows, n]`` on the host, the counts once more. On a GPU it is not written.
        sharing: that KV heads share the pages, whose rule is then one for their attention, and for which ``n`` is twice
            ``sharing.count``, or the number of columns if that is less; None if each head has its own.
    """

    query: torch.Tensor
    rule: tuple[float, ...] | MassRule
    codes: torch.Tensor
    scales: torch.Tensor
    spans: int
    limits: torch.Tensor | None
    missing: torch.Tensor | None
    pages: Pages
    table: torch.Tensor
    counts: np.ndarray
    sharing: Sharing | None = None


class Attention(NamedTuple):
    """The result of attention.

    Attributes:
        output: ``[B, q, Hq, Dv]`` in the dtype of the query.
        log_sum_exp: float32 ``[B, Hq, q]``, of the scores of all visible keys, sink logits included.
        page_sums: float32 ``[B, Hq, columns * P]`` on request: the probability of each key, summed over the queries;
            0 where there is no token.
        dense_sums: float32 ``[B, Hq, n]`` on request.
    """

    output: torch.Tensor
    log_sum_exp: torch.Tensor
    page_sums: torch.Tensor | None = None
    dense_sums: torch.Tensor | None = None
