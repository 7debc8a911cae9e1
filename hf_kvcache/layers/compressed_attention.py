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

    Args:
        query: the queries, not scaled.
        scoring: scaling and sink logits.
    """

    def __init__(self, query: torch.Tensor, scoring: Scoring) -> None:
        self._query, self._scoring = query, scoring
        batch, heads, count, _ = query.shape
        self._largest = torch.full((batch, heads, count, 1), -torch.inf, dtype=torch.float32, device=query.device)
        self._weight = torch.zeros_like(self._largest)
        self._sum = torch.zeros(query.shape, dtype=torch.float32, device=query.device)

    def add(self, rows: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Attend to more rows.

        Args:
            rows: ``[B, n, D]`` for all queries, or ``[B, S, n, D]`` for each its own.
            mask: additive ``[B, 1 or Hq, S, n]``; None to show all.
        """
        batch, heads, count, dim = self._query.shape
        if not rows.shape[-2]:
            return
        own = rows.dim() == 4
        # With rows of their own, the heads of a query are the rows of one product; else the queries of all heads are.
        query = self._query.transpose(1, 2) if own else self._query.reshape(batch, heads * count, dim)
        scores = torch.matmul(query, rows.transpose(-1, -2)).float() * self._scoring.scaling
        scores = scores.transpose(1, 2) if own else scores.view(batch, heads, count, -1)
        if mask is not None:
            scores = scores + mask
        largest = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        safe = largest.masked_fill(largest == -torch.inf, 0.0)  # nothing is shown yet
        weights = (scores - safe).exp_()
        before = (self._largest - safe).exp_()
        self._weight = self._weight * before + weights.sum(-1, keepdim=True)
        part = weights.to(rows.dtype)
        part = part.transpose(1, 2) if own else part.reshape(batch, heads * count, -1)
        summed = torch.matmul(part, rows).float()
        summed = summed.transpose(1, 2) if own else summed.view(batch, heads, count, dim)
        self._sum = self._sum * before + summed
        self._largest = largest

    def result(self) -> torch.Tensor:
        """The output ``[B, S, Hq, D]`` in the dtype of the queries."""
        total, sinks = self._weight, self._scoring.sink_logits
        if sinks is not None:
            # exp(sink - largest) overflows only where every score is far below the sink; its share is then all.
            logits = sinks.float().view(1, -1, 1, 1)
            largest = torch.maximum(self._largest, logits)
            shrink = (self._largest - largest).exp_()
            total = total * shrink + (logits - largest).exp_()
            return (self._sum * (shrink / total)).transpose(1, 2).to(self._query.dtype)
        return (self._sum / total).transpose(1, 2).to(self._query.dtype)


def attend_compressed(call: AttentionCall, window: torch.Tensor, entries: PackedRows | None) -> torch.Tensor:
    """Attention ``[B, S, Hq, D]`` over the rows of a window and compressed entries.

    Args:
        call: the queries, and the mask over the window and the entries behind it.
        window: ``[B, n, D]``.
        entries: the entries; None for a layer without.
    """
    query, mask, count = call.queries, call.mask, window.shape[1]
    attention = PartialAttention(query, call.scoring)
    if isinstance(mask, JointMask):
        attention.add(window, mask.window)
        assert entries is not None
        _add_chosen(attention, query.shape[2], mask, entries)
        return attention.result()
    attention.add(window, None if mask is None else mask[..., :count])
    if entries is not None:
        _add_all(attention, None if mask is None else mask[..., count:], entries)
    return attention.result()


def _add_all(attention: PartialAttention, mask: torch.Tensor | None, entries: PackedRows) -> None:
    for start in range(0, entries.stop, _TILE):
        stop = min(start + _TILE, entries.stop)
        attention.add(entries.read(start, stop), None if mask is None else mask[..., start:stop])


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
    rows = entries.gather(positions.clamp(max=entries.stop - 1).reshape(batch, queries * chosen))
    shown = torch.zeros(none.shape, dtype=torch.float32, device=none.device).masked_fill_(none, -torch.inf)
    attention.add(rows.view(batch, queries, chosen, -1), shown)
