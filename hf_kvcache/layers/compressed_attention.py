"""Attention over rows that are keys and values in one, part by part."""

from __future__ import annotations

import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.compressed import JointMask
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.storage.packed_rows import PackedRows

#: Number of entries that are read at once, which bounds the memory for what is unpacked.
_TILE = 4096


class PartialAttention:
    """A softmax over rows that come in parts, of queries ``[B, Hq, S, D]`` that all read the one KV head.

    Rows stay in the basis in which they are packed: the queries are rotated into it once, and the sum back once.

    Args:
        query: the queries, not scaled.
        scoring: scaling and sink logits.
    """

    def __init__(self, query: torch.Tensor, scoring: Scoring) -> None:
        self._query, self._scoring = query, scoring
        batch, heads, count, _ = query.shape
        self._largest = torch.full((batch, heads, count, 1), -torch.inf, dtype=torch.float32, device=query.device)
        self._weight = torch.zeros_like(self._largest)
        #: The weighted sums of rows in the model's basis and in a packed one, with what they are rotated by.
        self._sums: dict[bool, torch.Tensor] = {}
        self._rotated: tuple[PackedRows, torch.Tensor] | None = None

    def add(self, source: PackedRows, rows: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Attend to more rows.

        Args:
            source: where the rows come from.
            rows: in the basis in which they are packed, ``[B, n, D]`` for all queries, or ``[B, S, n, D]`` for each its
                own.
            mask: additive ``[B, 1 or Hq, S, n]``; None to show all.
        """
        batch, heads, count, dim = self._query.shape
        if not rows.shape[-2]:
            return
        own, query = rows.dim() == 4, self._in_basis_of(source)
        rows = rows.to(query.dtype)  # under autocast a compressor may return another dtype than the queries have
        # With rows of their own, the heads of a query are the rows of one product; else the queries of all heads are.
        query = query.transpose(1, 2) if own else query.reshape(batch, heads * count, dim)
        scores = torch.matmul(query, rows.transpose(-1, -2)).float() * self._scoring.scaling
        scores = scores.transpose(1, 2) if own else scores.view(batch, heads, count, -1)
        if mask is not None:
            scores = scores + mask
        largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        safe = largest.masked_fill(largest == -torch.inf, 0.0)  # nothing is shown yet
        weights = (scores - safe).exp_()
        shrink = (self._largest - safe).exp_()
        self._weight = self._weight * shrink + weights.sum(-1, keepdim=True)
        part = weights.to(rows.dtype)
        part = part.transpose(1, 2) if own else part.reshape(batch, heads * count, -1)
        summed = torch.matmul(part, rows).float()
        summed = summed.transpose(1, 2) if own else summed.view(batch, heads, count, dim)
        self._sums = {basis: earlier * shrink for basis, earlier in self._sums.items()}
        earlier = self._sums.get(source.rotated)
        self._sums[source.rotated] = summed if earlier is None else earlier + summed
        self._largest = largest

    def result(self) -> torch.Tensor:
        """The output ``[B, S, Hq, D]`` in the dtype of the queries."""
        total, share, sinks = self._weight, torch.ones_like(self._weight), self._scoring.sink_logits
        if sinks is not None:
            logits = sinks.float().view(1, -1, 1, 1)
            largest = torch.maximum(self._largest, logits)
            share = (self._largest - largest).exp_()
            total = total * share + (logits - largest).exp_()
        output = torch.zeros(self._query.shape, dtype=torch.float32, device=self._query.device)
        for rotated, summed in self._sums.items():
            if rotated:
                assert self._rotated is not None
                summed = self._rotated[0].to_packed_basis(summed, inverse=True)
            output = output + summed
        return (output * (share / total)).transpose(1, 2).to(self._query.dtype)

    def _in_basis_of(self, source: PackedRows) -> torch.Tensor:
        if not source.rotated:
            return self._query
        if self._rotated is None:  # all packed rows of a layer have the same width, and so the same basis
            self._rotated = source, source.to_packed_basis(self._query)
        return self._rotated[1]


def attend_compressed(
    call: AttentionCall, window: PackedRows, visible: tuple[int, int], entries: PackedRows | None
) -> torch.Tensor:
    """Attention ``[B, S, Hq, D]`` over the rows of a window and compressed entries.

    Args:
        call: the queries, and the mask over the window and the entries behind it.
        window: the rows of the newest tokens.
        visible: the position of the first of these that the mask has a column for, and the one behind the last.
        entries: the entries; None for a layer without.
    """
    query, mask, count = call.queries, call.mask, visible[1] - visible[0]
    attention, newest = PartialAttention(query, call.scoring), window.read(*visible, packed_basis=True)
    if isinstance(mask, JointMask):
        attention.add(window, newest, mask.window)
        assert entries is not None
        _add_chosen(attention, query.shape[2], mask, entries)
        return attention.result()
    attention.add(window, newest, None if mask is None else mask[..., :count])
    if entries is not None:
        _add_all(attention, None if mask is None else mask[..., count:], entries)
    return attention.result()


def _add_all(attention: PartialAttention, mask: torch.Tensor | None, entries: PackedRows) -> None:
    for start in range(0, entries.stop, _TILE):
        stop = min(start + _TILE, entries.stop)
        rows = entries.read(start, stop, packed_basis=True)
        attention.add(entries, rows, None if mask is None else mask[..., start:stop])


def _add_chosen(attention: PartialAttention, queries: int, mask: JointMask, entries: PackedRows) -> None:
    """Attend to the entries that the indexer has chosen. Only these are read, unless that is as many as there are."""
    positions = mask.chosen.positions
    if not entries.stop or positions is None:
        return
    if queries * positions.shape[3] >= entries.stop:
        _add_all(attention, mask.chosen.dense(), entries)
        return
    batch, _, _, chosen = positions.shape
    none = positions >= entries.stop  # what stands for no entry
    at = positions.clamp(max=entries.stop - 1).reshape(batch, queries * chosen)
    rows = entries.gather(at, packed_basis=True).view(batch, queries, chosen, -1)
    shown = torch.zeros(none.shape, dtype=torch.float32, device=none.device).masked_fill_(none, -torch.inf)
    attention.add(entries, rows, shown)
