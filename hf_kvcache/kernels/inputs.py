"""What the attention kernels take: pages, full-precision tokens, what queries may see, and how scores are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.workspace import scratch


@dataclass
class Pages:
    """The pages of a layer, row by row; a row is a KV head of a sequence, ``row = sequence * Hkv + head``.

    The arrays are on the host and may be views of larger ones (rows apart by more than ``columns``). A page's tokens
    stand in the order of their positions, and the pages of a row too, so positions ascend along a row.

    Attributes:
        layout: what the bytes of a record mean.
        slabs: uint8 ``[n, record_bytes]`` tensors in which the records lie.
        addresses: int64 ``[rows, columns]``, the byte address of each record; 0 where a row has no page.
        counts: int32 ``[rows, columns]``, tokens of each page that count (the first ones); 0 where there is no page.
        first: int64 ``[rows, columns]``, original position of each page's first token.
        scattered: positions ``[P]`` of the pages whose tokens do not stand side by side, by ``(row, column)``.
        key mean: float32 ``[rows, Dk]``, the mean that was taken out of the rotated keys; None if none was.
        heads: number of KV heads.
        prepared: what twins have made of these pages for the calls to come, by the twin's name.
    """

    layout: PageLayout
    slabs: Sequence[torch.Tensor]
    addresses: np.ndarray
    counts: np.ndarray
    first: np.ndarray
    scattered: dict[tuple[int, int], np.ndarray]
    key_mean: torch.Tensor | None
    heads: int
    prepared: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
        """Whether every place of every page holds a token that counts."""
        return bool((self.counts == self.layout.page_size).all())

    def until(self, columns: int) -> Pages:
        """The first so many columns."""
        if columns >= self.columns:
            return self
        return replace(
            self,
            addresses=self.addresses[:, :columns],
            counts=self.counts[:, :columns],
            first=self.first[:, :columns],
            scattered={at: p for at, p in self.scattered.items() if at[1] < columns},
            prepared={},
        )

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """Original positions ``[rows, stop - start, P]``, int64; undefined behind a page's count."""
        positions = self.first[:, start:stop, None] + np.arange(self.layout.page_size)
        for (row, column), stored in self.scattered.items():
            if start <= column < stop:
                positions[row, column - start, : len(stored)] = stored
        return torch.from_numpy(positions).to(self.device)

    def unused(self, start: int, stop: int) -> torch.Tensor | None:
        """bool ``[rows, stop - start, P]``, True where there is no token; None if there is one everywhere."""
        counts = self.counts[:, start:stop]
        if self.full or (counts == self.layout.page_size).all():
            return None
        return torch.from_numpy(np.arange(self.layout.page_size) >= counts[:, :, None]).to(self.device)

    def records(self, start: int, stop: int) -> torch.Tensor:
        """uint8 ``[stop - start, rows, record_bytes]``: a view where they lie side by side, else a gather.

        Where a row has no page, another one's bytes stand. Valid until the next call on this thread.
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
            where = torch.from_numpy(np.flatnonzero(owner == index)).to(self.device)
            picked = torch.from_numpy(slots[owner == index]).to(self.device)
            # Eight bytes at a time (records are aligned to 16): torch gathers elements, however small they are.
            out.view(torch.int64)[where] = self.slabs[index].view(torch.int64).index_select(0, picked)
        return out.view(shape)


@dataclass
class DenseTokens:
    """Full-precision tokens that take part in one attention call.

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
        """The first so many."""
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
    """What turns latents into the keys and values of each head, as views of the model's own weight.

    Attributes:
        keys: ``[H, dn, r]``.
        values: ``[H, dv, r]``.
    """

    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class Slots:
    """The buffer of full-precision tokens that a step puts one more token into: the next slot of every sequence.

    Attributes:
        keys: ``[B, Hkv, slots, Dk]``, the slots that are not in use yet too.
        values: ``[B, Hkv, slots, Dv]``.
        positions: int64 ``[B, slots]`` on the host.
        lengths: int64 ``[B]`` on the host, slots in use.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: np.ndarray
    lengths: np.ndarray


@dataclass
class CallInputs:
    """What a step of plain decoding is made for: a token, and what stays as it is for the tokens behind it.

    Attributes:
        query: ``[B, Hq, 1, Dk]``.
        keys: of the new token, ``[B, Hkv, 1, Dk]``, none of them padding; or its latents.
        values: of the new token, ``[B, Hkv, 1, Dv]``; or its rotary keys.
        pages: the pages; None if there are none.
        slots: where full-precision tokens lie, equally many in every sequence.
        scoring: how scores are made.
        window: tokens a query sees (sliding windows); None for all.
        up: what turns latents into keys and values; None if keys and values are stored.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pages: Pages | None
    slots: Slots
    scoring: Scoring
    window: int | None
    up: UpProjections | None = None


class Attention(NamedTuple):
    """What attention gives.

    Attributes:
        output: ``[B, q, Hq, Dv]`` in the dtype of the query.
        log_sum_exp: float32 ``[B, Hq, q]``, of the scores of all visible keys, sink logits included.
        page_sums: float32 ``[B, Hq, columns * P]`` on request: probability of each key, summed over the queries;
            0 where there is no token.
        dense_sums: float32 ``[B, Hq, n]`` on request.
    """

    output: torch.Tensor
    log_sum_exp: torch.Tensor
    page_sums: torch.Tensor | None = None
    dense_sums: torch.Tensor | None = None
