"""Layers whose decode steps read the pages that a selector picks, and no others. All tokens stay stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.attention import MOST_DECODED_QUERIES
from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.sparse.picked import PickedPages
from hf_kvcache.sparse.reader import Limits, PageReader
from hf_kvcache.storage import PagedStorage
from hf_kvcache.utils.autocast import without_autocast


@dataclass(frozen=True)
class LatestRead:
    """What the latest attention of a layer read.

    Attributes:
        pages: the pages.
        tokens: full-precision tokens, in all sequences.
        summaries: bytes of the summaries by which pages were chosen.
    """

    pages: Pages | None
    tokens: int
    summaries: int


class SparseReads(KVCacheLayer):
    """A layer in which few queries read sinks, tail and the picked pages.

    Up to 16 new tokens at once read the union of what each of them picks. More of them, such as a prompt behind a
    cache that holds tokens, read everything; so does a call with a mask that says more than causality and padding.

    Attributes:
        leader_index: number of the layer whose choice this layer reads; None if it chooses itself.
        leader: that layer; the cache sets it before every update.
        dense: whether the layer reads everything.
        depth: of the layer among those that read by the budget, 0 for the first and 1 for the last.
    """

    leader_index: int | None = None
    leader: SparseReads | None = None
    dense = False
    depth = 0.5
    prepares_blocks = False

    def clear(self) -> None:
        super().clear()
        self._reader: PageReader | None = None
        self.latest_read: LatestRead | None = None

    def reader(self, storage: PagedStorage) -> PageReader:
        """The choice of pages over ``storage``."""
        reader, options = self._reader, self.options.sparse
        if reader is None or reader.table is not storage.table:
            assert options is not None
            reader = self._reader = PageReader(options, self.index, storage, self.depth)
        return reader

    def step(self, new: NewTokens, storage: PagedStorage, call: AttentionCall) -> torch.Tensor | None:
        query = call.query
        if self.prepared is None or query is None:
            return None
        read = pages = self.pages_of(storage, storage.ahead)
        if pages is not None and not self.dense:
            limits = self.reader(storage).limits(storage, pages)
            if not limits.everything:
                if self._measures():
                    return None  # pages are chosen by what attention over all of them finds
                read = self._picked(storage, pages, limits, query, new.position, call.scoring.scaling)
        if read is pages:
            read = pages = storage.pages()  # all of them, fetched where they have to be
        output = self.prepared.attend(storage, new, query, call.scoring, pages=read)
        if output is not None:
            self._note(storage, pages, read)
        return output

    def read(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        pages: Pages | None,
        dense: DenseTokens,
        visibility: Visibility,
        sums: bool = False,
    ) -> Attention:
        storage = self.storage
        assert storage is not None
        few = query.shape[2] <= MOST_DECODED_QUERIES and visibility.mask is None
        limits = None
        if pages is not None and few and not self.dense:
            limits = self.reader(storage).limits(storage, pages)
        if pages is not None and (limits is None or limits.everything or self._measures()):
            # All of them, and fetched where they have to be.
            pages = storage.pages(storage.ahead - storage.table.columns + pages.columns)
        if pages is None or limits is None or limits.everything:
            self._note(storage, pages, pages, dense)
            return super().read(call, query, pages, dense, visibility, sums)
        if self._measures():
            return self._read_measured(call, query, pages, limits, dense, visibility, sums)
        picked = self._picked(storage, pages, limits, query, visibility.start, call.scoring.scaling)
        self._note(storage, pages, picked, dense)
        return self._read_picked(call, query, pages, picked, dense, visibility, sums)

    def pages_of(self, storage: PagedStorage, ahead: int) -> Pages | None:
        return storage.pages(ahead, fetch=self.dense)

    # -- offloading -----------------------------------------------------------------------------------------------

    def offload(self) -> None:
        super().offload()
        if self._reader is not None and self._reader.resident is not None:
            self._reader.resident.clear()

    def prefetch(self) -> None:
        """Begin to fetch pages, if the next token reads all of them. What it picks else is not known."""
        self._check_offloads("prefetch()")
        if self._reads_all(1):
            super().prefetch()

    def fetch_ahead(self, tokens: int) -> None:
        if self._reads_all(tokens):
            super().fetch_ahead(tokens)

    # -- internals ------------------------------------------------------------------------------------------------

    def _reads_all(self, tokens: int) -> bool:
        """Whether so many new tokens read all pages, under a mask that says nothing but causality and padding."""
        if self.dense or tokens > MOST_DECODED_QUERIES or self._measures():
            return True
        pages = None if self.storage is None else self.storage.pages(self.storage.ahead, fetch=False)
        return self.storage is None or pages is None or self.reader(self.storage).limits(self.storage, pages).everything

    def _measures(self) -> bool:
        """Whether this layer chooses pages by their attention probabilities."""
        assert self.options.sparse is not None
        return self.options.sparse.selector.exact and self.leader is None

    def _picked(
        self,
        storage: PagedStorage,
        pages: Pages,
        limits: Limits,
        query: torch.Tensor,
        position: int,
        scaling: float,
    ) -> PickedPages:
        """The pages that the selector picks, or that the leader has picked."""
        reader, leader = self.reader(storage), self.leader
        if leader is None and query.shape[2] == 1:
            picked = reader.pick_prepared(storage, pages, limits, query, scaling)
            if picked is not None:
                return picked
        with without_autocast(query.device):
            if leader is None:
                return reader.pick(storage, pages, limits, query, position, scaling)
            assert leader.storage is not None
            columns = leader.reader(leader.storage).columns
            assert columns is not None
            return reader.read(pages, limits, columns, own=False)

    def _read_measured(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        pages: Pages,
        limits: Limits,
        dense: DenseTokens,
        visibility: Visibility,
        sums: bool,
    ) -> Attention:
        """Attention of a layer that attends to everything to see which pages matter.

        An anchor gives this attention; the oracle then attends to what it has picked.
        """
        storage, options = self.storage, self.options.sparse
        assert storage is not None and options is not None
        everything = super().read(call, query, pages, dense, visibility, True)
        measured = [everything] if query.shape[2] == 1 else self._one_by_one(call, query, pages, dense, visibility)
        found = [one.page_sums for one in measured if one.page_sums is not None]
        # [B, Hq, columns * P] each -> [B * Hkv, q, columns], the sum over the heads of a group and a page's tokens
        by_head = torch.stack(found, 2).unflatten(3, (pages.columns, -1)).sum(4)
        scores = by_head.unflatten(1, (pages.heads, -1)).sum(2).flatten(0, 1)
        reader = self.reader(storage)
        picked = reader.pick_best(pages, limits, scores)
        if options.selector.shared:
            self._note(storage, pages, pages, dense)
            return everything if sums else everything._replace(page_sums=None, dense_sums=None)
        self._note(storage, pages, picked, dense)
        return self._read_picked(call, query, pages, picked, dense, visibility, sums)

    def _one_by_one(
        self, call: AttentionCall, query: torch.Tensor, pages: Pages, dense: DenseTokens, visibility: Visibility
    ) -> list[Attention]:
        """The attention of each query, with sums of its own."""
        parts = [slice(i, i + 1) for i in range(query.shape[2])]
        return [
            super(SparseReads, self).read(call, query[:, :, part], pages, dense, visibility.part(part), True)
            for part in parts
        ]

    def _read_picked(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        pages: Pages,
        picked: PickedPages,
        dense: DenseTokens,
        visibility: Visibility,
        sums: bool,
    ) -> Attention:
        """Attention over picked pages; the sums of pages that were not read are 0."""
        storage = self.storage
        assert storage is not None
        reader = self.reader(storage)
        faster = implementation("decode", query.device)
        if faster is None or not faster.supports(query, picked, dense, visibility):
            picked.to_host()
        result = super().read(call, query, picked, dense, visibility, sums)
        if result.page_sums is None:
            return result
        return result._replace(page_sums=reader.spread(result.page_sums, pages))

    def _note(
        self, storage: PagedStorage, pages: Pages | None, read: Pages | None, dense: DenseTokens | None = None
    ) -> None:
        """Note what an attention reads: the pages ``read`` of all ``pages``."""
        tokens = storage.dense.longest * storage.batch if dense is None else dense.keys.shape[0] * dense.keys.shape[2]
        chosen = pages is not None and read is not pages
        reader = self._reader
        summaries = 0
        if chosen and self.leader is None and reader is not None and pages is not None:
            summaries = reader.bytes_per_page * pages.rows * pages.columns
        self.latest_read = LatestRead(read, tokens, summaries)

    def _copy(self) -> Any:
        other = super()._copy()
        other.leader = other.latest_read = None
        other._reader = None
        if self._reader is not None and self.storage is not None and self._reader.table is self.storage.table:
            other._reader = self._reader.fork(other.storage)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_reader": None, "leader": None, "latest_read": None}

    # -- reports --------------------------------------------------------------------------------------------------

    def summary_tensors(self) -> list[torch.Tensor]:
        """What is kept of the pages to choose by."""
        return [] if self._reader is None else self._reader.tensors

    def resident_bytes(self) -> tuple[int, int]:
        """Bytes of the memory for picked pages from outside of the device, and bytes copied there so far."""
        resident = None if self._reader is None else self._reader.resident
        return (0, 0) if resident is None else (resident.nbytes, resident.copied)

    def bytes_read(self) -> dict[str, int]:
        """The bytes that the latest attention over stored tokens read, by part; 0 before there was one."""
        read, storage = self.latest_read, self.storage
        if read is None or storage is None:
            return dict.fromkeys(("pages", "tokens", "summaries"), 0)
        pages = 0 if read.pages is None else read.pages.cells() * read.pages.layout.record_bytes
        slot = storage.heads * sum(storage.encoder.widths.values()) * storage.dtype.itemsize
        return {"pages": pages, "tokens": read.tokens * slot, "summaries": read.summaries}


class SparseLayer(SparseReads):
    """A layer that keeps every token, and reads some of its pages."""


class SparseEvictingLayer(SparseReads, EvictingLayer):
    """A layer that evicts tokens, and reads some of the pages of those that it keeps."""

    prepares_sums = False  # a step reads some of the keys
