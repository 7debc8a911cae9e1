"""The choice of pages for the steps of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_kvcache.kernels.choose import (
    PreparedChoice,
    best_columns,
    choose,
    choose_across_heads,
    choose_by_mass,
    prepare_choice,
)
from hf_kvcache.kernels.inputs import ChoiceInputs, MassRule, Pages, Sharing
from hf_kvcache.sparse.base import Question, Selector
from hf_kvcache.sparse.budget import ReadBudget
from hf_kvcache.sparse.fetched import FetchedPages
from hf_kvcache.sparse.picked import PickedPages
from hf_kvcache.sparse.summaries import PageSummaries
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.resident import ResidentPages
from hf_kvcache.storage.transfers import to_device


@dataclass(frozen=True)
class SparseOptions:
    """How the layers of a cache read.

    Attributes:
        selector: scores the pages.
        budget: how many of them a step reads.
        dense_layers: number of first layers that read everything.
    """

    selector: Selector
    budget: ReadBudget
    dense_layers: int


@dataclass(frozen=True)
class Limits:
    """How many pages the rows of a table may read.

    Attributes:
        most: the largest of these numbers.
        width: how many columns are chosen of each row for one query, at most: ``most``, or more where heads share.
        everything: whether every row may read all of its pages.
        full: whether all rows may read ``most`` pages and have more, all of whose tokens count.
        rows: int64 ``[rows]`` on the device; None if the number is the same for all.
        missing: bool ``[rows, columns]`` on the device, True where a row has no page; None if all rows have equally
            many.
    """

    most: int
    width: int
    everything: bool
    full: bool
    rows: torch.Tensor | None
    missing: torch.Tensor | None


class PageReader:
    """Chooses which pages the steps of a layer read.

    Args:
        options: selector and budget.
        index: number of the layer in the model.
        storage: the layer's tokens.
        depth: of the layer among those that read by the budget, 0 to 1.
    """

    def __init__(self, options: SparseOptions, index: int, storage: PagedStorage, depth: float = 0.5) -> None:
        self.options, self.index, self.depth = options, index, depth
        self.summaries = PageSummaries(options.selector, storage) if options.selector.vectors else None
        self._begin(storage)

    def _begin(self, storage: PagedStorage) -> None:
        """Begin without a choice."""
        self.table = storage.table
        self._limits: dict[int, Limits] = {}
        self._version = -1
        self._picked: PickedPages | None = None
        # The latest prepared choice with what it writes to, the pages, and the layout and scaling of queries it is for.
        self._choice: tuple[PreparedChoice, PickedPages] | None = None
        self._chosen_from: Pages | None = None
        self._kind: tuple[Any, ...] = ()
        fetch = storage.reader.fetch
        #: Copies of pages on the device; None if it can read all pages where they lie.
        self.resident: ResidentPages | None = None
        if fetch is not None and not fetch.in_place:
            self.resident = ResidentPages(fetch.device, storage.layout.record_bytes)
        #: The columns that were chosen last, int64 ``[rows, n]``; None before the first choice.
        self.columns: torch.Tensor | None = None

    def fork(self, storage: PagedStorage) -> PageReader:
        """A reader for a fork of the storage."""
        other = object.__new__(PageReader)
        other.__dict__.update(self.__dict__)
        other.summaries = None if self.summaries is None else self.summaries.fork(storage)
        other._begin(storage)
        return other

    @property
    def bytes_per_page(self) -> int:
        """Bytes that a step reads of each page to choose."""
        return 0 if self.summaries is None else self.summaries.bytes_per_page

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are held beside the pages."""
        return [] if self.summaries is None else self.summaries.tensors

    def limits(self, storage: PagedStorage, pages: Pages) -> Limits:
        """How many pages each row may read; the same as long as the table does not change."""
        if self._version != storage.table.version:
            self._limits, self._picked, self._version = {}, None, storage.table.version
            self._choice = self._chosen_from = None
        found = self._limits.get(pages.columns)
        if found is None:
            found = self._limits[pages.columns] = self._made(pages)
        return found

    def pick(
        self,
        storage: PagedStorage,
        pages: Pages,
        limits: Limits,
        query: torch.Tensor,
        position: int,
        scaling: float,
    ) -> PickedPages:
        """The pages that the selector picks.

        Args:
            storage: the layer's tokens.
            pages: the pages, all of them or the first columns.
            limits: how many of them.
            query: ``[B, Hq, q, D]``.
            position: position of the first query.
            scaling: factor of the products of queries and keys.

        Returns:
            The pages that any of the queries picks. For one query it is the same object in every step, until the page
            table changes.
        """
        selector, length = self.options.selector, query.shape[2]
        if self.summaries is None:
            question = Question(pages.rows, pages.columns, length, position, self.index, query.device)
            return self.pick_best(pages, limits, selector.score(question))
        codes, scales = self.summaries.brought(storage, pages.columns)
        asking = query.detach().float().reshape(pages.rows, -1, length, query.shape[3])
        vectors, who = (codes, scales, self.summaries.spans), (limits.rows, limits.missing)
        sharing = self._sharing(storage, limits)
        if selector.reach is None:
            columns = choose(selector.ask(asking), *vectors, limits.most, *who)
        else:
            rule = MassRule(scaling, selector.reach, selector.band_of(query.shape[3]))
            if sharing is not None:
                columns = choose_across_heads(asking, rule, *vectors, *who, pages.heads, sharing)
            else:
                columns = choose_by_mass(asking, rule, *vectors, limits.most, *who)
        return self.read(pages, limits, columns)

    def pick_prepared(
        self, storage: PagedStorage, pages: Pages, limits: Limits, query: torch.Tensor, scaling: float
    ) -> PickedPages | None:
        """As :meth:`pick` for one token, by a call that is prepared once for each version of the table.

        Returns:
            None if there is no such call, or pages have to be fetched first.
        """
        kind = query.shape, query.stride(), query.dtype, scaling
        if self._chosen_from is not pages or self._kind != kind:
            # May be interrupted: only then is it the call for these pages and queries.
            self._choice = self._prepared(storage, pages, limits, query, scaling)
            self._chosen_from, self._kind = pages, kind
        if self._choice is None:
            return None
        choice, picked = self._choice
        self.columns = choice(query)
        return picked

    def _prepared(
        self, storage: PagedStorage, pages: Pages, limits: Limits, query: torch.Tensor, scaling: float
    ) -> tuple[PreparedChoice, PickedPages] | None:
        rule = self._rule(scaling, query.shape[3])
        if self.summaries is None or rule is None or len(pages.slabs[0]) == 0:
            return None
        codes, scales = self.summaries.brought(storage, pages.columns)
        picked = PickedPages(pages, limits.width, limits.full)
        choice = prepare_choice(
            ChoiceInputs(
                query,
                rule,
                codes,
                scales,
                self.summaries.spans,
                limits.rows,
                limits.missing,
                pages,
                picked.table,
                picked.counts,
                self._sharing(storage, limits),
            )
        )
        return None if choice is None else (choice, picked)

    def _rule(self, scaling: float, dim: int) -> tuple[float, ...] | MassRule | None:
        """How kernels can score pages as the selector does; None if they cannot."""
        selector = self.options.selector
        if selector.reach is not None:
            return MassRule(scaling, selector.reach, selector.band_of(dim))
        return selector.size_weights if type(selector).ask is Selector.ask else None

    def _sharing(self, storage: PagedStorage, limits: Limits) -> Sharing | None:
        """How KV heads share pages; None if they do not."""
        if self.summaries is None or not self.options.selector.across:
            return None
        # A copy: the buffer of full-precision tokens may be another one when a prepared choice is made again.
        sinks = storage.dense.keys[:, :, : storage.dense.sink_length].flatten(0, 1).float().contiguous()
        return Sharing(limits.most, sinks, storage.page_size // self.summaries.spans)

    def pick_best(self, pages: Pages, limits: Limits, scores: torch.Tensor) -> PickedPages:
        """The pages with the largest ``scores [rows, q, columns]``."""
        return self.read(pages, limits, best_columns(scores, limits.most, limits.rows, limits.missing))

    def read(self, pages: Pages, limits: Limits, columns: torch.Tensor, own: bool = True) -> PickedPages:
        """The pages in ``columns [rows, n]``.

        Args:
            pages: all pages. Of those that have no records, outside of the device, the chosen ones are fetched.
            limits: how many of them.
            columns: what was chosen.
            own: whether it was chosen among these very pages. Another layer may have chosen among more: pages that a
                draft has packed ahead.
        """
        self.columns = columns
        picked = self._picked
        full = own and limits.full and columns.shape[1] == limits.most
        outside = len(pages.slabs[0]) == 0
        kind = FetchedPages if outside else PickedPages
        if type(picked) is not kind or picked.columns != columns.shape[1] or picked.full != full:
            if outside:
                assert self.resident is not None
                picked = FetchedPages(pages, columns.shape[1], full, self.table, self.resident)
            else:
                picked = PickedPages(pages, columns.shape[1], full)
            if columns.shape[1] == limits.width:
                self._picked = picked
        picked.pick(pages, columns)
        return picked

    def spread(self, sums: torch.Tensor, pages: Pages) -> torch.Tensor:
        """Sums ``[B, Hq, n * P]`` of the pages that were read last, as sums of all ``pages``: 0 for the others."""
        columns = self.columns
        assert columns is not None
        size, batch = pages.layout.page_size, sums.shape[0]
        by_page = sums.unflatten(2, (-1, size)).reshape(pages.rows, -1, columns.shape[1], size)
        out = sums.new_zeros(*by_page.shape[:2], pages.columns + 1, size)
        places = columns.clamp(max=pages.columns)[:, None, :, None].expand(by_page.shape)
        out.scatter_add_(2, places, by_page)
        return out[:, :, :-1].reshape(batch, sums.shape[1], -1)

    def _made(self, pages: Pages) -> Limits:
        counts = pages.counts
        held = (counts > 0).sum(1)
        least = self.options.budget.pages(counts.sum(1, dtype="int64"), self.depth).clip(max=held)
        most, device = int(least.max(initial=0)), pages.device
        across = self.options.selector.across
        same, even = bool((least == most).all()), bool((held == pages.columns).all())
        missing = None if even else to_device(counts == 0, device)
        return Limits(
            most,
            width=min(pages.columns, 2 * most) if across else most,
            everything=bool((least == held).all()),
            full=same and even and pages.full and not across,
            rows=None if same else to_device(least, device),
            missing=missing,
        )
