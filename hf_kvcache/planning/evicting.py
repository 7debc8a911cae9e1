"""Layers that evict, on the ``meta`` device: nobody knows which tokens stay, but how many is arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_kvcache.cache.memory import tensor_bytes
from hf_kvcache.eviction.accumulated import AccumulatedAttention
from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.eviction.layer_selection import Choice, LayerSelection
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.layers.evicting_mla import EvictingLatentLayer
from hf_kvcache.planning.model import LayerCall, Shape
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.memory import bytes_by_part
from hf_kvcache.storage.pruning import KeptTokens, PrunePlan, read_back
from hf_kvcache.storage.token_view import TokenView


@dataclass(frozen=True)
class BlankSelection(LayerSelection):
    """Keeps as many tokens as a real one would.

    Attributes:
        kept: tokens that a head keeps on average.
    """

    kept: int = 0

    def quota(self, row: int) -> int:
        return self.kept

    def best(self, held: TokenView, quota: int, recent: int) -> torch.Tensor:
        return torch.empty(held.shape, dtype=torch.bool, device=held.storage.device)  # without values


class BlankEvictor(Evictor):
    """Drops as many tokens as a real evictor would, on the ``meta`` device.

    Where a real layer would read from the device which tokens stay, this one takes the first ones. So their pages store
    no positions.

    Args:
        layer: the layer.
        storage: its tokens, of one sequence.
        kept: tokens that a head keeps on average; None to drop and pack nothing.

    Attributes:
        leaving: tokens that each head moves into pages; None for equally many, or the split that takes most pages
            where heads compete.
    """

    def __init__(self, layer: EvictingLayer, storage: PagedStorage, kept: int | None) -> None:
        super().__init__(layer.eviction, layer.place, storage)
        self.kept = kept
        self.leaving: np.ndarray | None = None

    def selection(self) -> BlankSelection:
        return BlankSelection(self.options, self.place, self.pinned, self.observations, self.attending, self.kept or 0)

    def observe_first(
        self,
        storage: PagedStorage,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: np.ndarray | None,
    ) -> None:
        self.observations.accumulated = AccumulatedAttention.of(storage)
        self.observations.accumulated.add_rows(slice(None), keys.new_zeros(*keys.shape[:3], dtype=torch.float32))

    def evict(self, storage: PagedStorage, rows: np.ndarray, seen: int) -> None:
        if self.kept is not None:
            super().evict(storage, rows, seen)

    def compress(self, storage: PagedStorage, leaving: np.ndarray, seen: int) -> None:
        """Keep sinks, tail, and of the other tokens of each head as many as ``leaving [Hkv]`` says."""
        self.leaving = leaving
        held = TokenView.of(storage, np.zeros(1, np.int64))
        dense = min(held.used, storage.sink_length) + storage.tail_length
        choice = Choice(self.selection().best(held, 0, 0), dense - (-int(leaving.sum()) // len(leaving)))
        self._prune(storage, [self._change(held, choice)], seen)
        self.schedule.pending = False

    def held(self, storage: PagedStorage) -> int:
        """Bytes that the layer holds."""
        return sum(bytes_by_part(storage).values()) + tensor_bytes(self.tensors())

    def kept_tokens(self, plans: list[PrunePlan]) -> list[KeptTokens]:
        return [self._supposed(planned) if planned.report is not None else read_back([planned])[0] for planned in plans]

    def _supposed(self, planned: PrunePlan) -> KeptTokens:
        held, storage = planned.held, planned.held.storage
        assert planned.places is not None
        sinks, total = min(held.used, storage.sink_length), planned.places.shape[1]
        free = planned.stop - sinks
        if self.leaving is not None:
            leaving = self.leaving
        elif self.policy.head_floor is None:
            leaving = np.full(storage.heads, total // storage.heads, dtype=np.int64)
        else:
            leaving = widest_split(total, storage.heads, free, storage.page_size)
        positions = np.concatenate([sinks + np.arange(n) for n in leaving.tolist()])[None]
        return KeptTokens(leaving, np.zeros((storage.heads, 0), np.int64), positions)


def widest_split(total: int, heads: int, most: int, page: int) -> np.ndarray:
    """How many of ``total`` tokens each head holds where they fill the most pages.

    One head has then as many pages as any can have, or one page less.

    Args:
        total: tokens of all heads together, at most ``heads * most``.
        heads: number of heads.
        most: tokens that a head can hold.
        page: tokens of a page.

    Returns:
        int64 ``[heads]``, descending.
    """
    held = np.zeros(heads, np.int64)
    # A page takes one token to exist. A head whose last page has one token wastes most of it.
    for limit in (1, (most - 1) // page * page + 1, most):
        for head in range(heads):
            added = min(limit - int(held[head]), total - int(held.sum()))
            held[head] += max(added, 0)
    return held


def fill(layer: Any, calls: tuple[LayerCall, ...], query: Shape, tokens: int, kept: int | None) -> BlankEvictor:
    """Give a layer a prompt of one sequence, as a model would, and let it evict.

    Args:
        layer: an evicting layer without tokens.
        calls: what the model gives to it.
        query: the queries that read it.
        tokens: tokens of the prompt.
        kept: tokens that a head keeps on average; None to drop and pack nothing.

    Returns:
        The evictor of the layer.
    """
    layer.make_evictor = lambda storage: BlankEvictor(layer, storage, kept)
    asked, of_latents = query.blank(1, tokens), isinstance(layer, EvictingLatentLayer)
    if of_latents:
        # In latent space a query is as wide as the latent and the rotary key beside it.
        width = sum(state.sizes(1, 1)[3] for state in calls[0].arguments[:2])
        asked = asked.new_empty(*asked.shape[:3], width)
        layer.queries_for_policy = lambda query: query
    for call in calls:
        call.repeat(layer, 1, tokens)
    layer.note_attended(AttentionCall(asked, None, Scoring(1.0)))
    layer.flush()
    assert isinstance(layer.evictor, BlankEvictor)
    return layer.evictor
