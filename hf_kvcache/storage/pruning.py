"""Dropping tokens of a storage, head by head, and packing the kept tokens that leave the dense buffer.

What is kept is known on the device, and the page table, on the host, has to know some of it. So there are three steps.
The device lists what will lie in pages (:func:`plan`). The lists of all sequences are read back at once, which is the
only step that waits for the device (:func:`read_back`). Each plan is carried out (:func:`carry_out`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_kvcache.kernels.page import BIAS
from hf_kvcache.storage.gathering import gather_tokens, is_tokenwise
from hf_kvcache.storage.paged import PagedStorage
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.storage.transfers import front, rows_of, to_device, to_host
from hf_kvcache.utils.autocast import without_autocast


@dataclass(frozen=True)
class PrunePlan:
    """What will lie in the pages of some sequences, as the device knows it.

    Attributes:
        held: the sequences and their tokens.
        stop: dense slots before this one, and behind the sinks, are left.
        keep: bool ``[b, Hkv, T]``, the tokens that stay; None for all of them.
        places: int64 ``[b, n]``, the tokens that will lie in pages, as places in ``[Hkv * T]``, head by head and in
            order; zeros behind the last of them. None where every token stays.
        report: int64 ``[b, m]``, what the host has to know: how many tokens each head moves from the dense buffer into
            pages, how many each page keeps, and the positions of ``places``. None where every token stays.
    """

    held: TokenView
    stop: int
    keep: torch.Tensor | None
    places: torch.Tensor | None
    report: torch.Tensor | None


@dataclass(frozen=True)
class KeptTokens:
    """What will lie in the pages of ``R`` table rows, as the host knows it.

    Attributes:
        leaving: int64 ``[R]``, tokens that move from the dense buffer into pages.
        survive: int64 ``[R, columns]``, tokens that each page keeps.
        positions: int64 ``[b, n]``, of the sequences' tokens in pages, head by head: those of the pages, then those
            that leave the buffer. Where all tokens stay: of the latter only.
    """

    leaving: np.ndarray
    survive: np.ndarray
    positions: np.ndarray

    @property
    def first(self) -> np.ndarray:
        """int64 ``[R]``, where the tokens of each row begin in its sequence's part of ``positions``."""
        counts = (self.survive.sum(1) + self.leaving).reshape(len(self.positions), -1)
        return (counts.cumsum(1) - counts).reshape(-1)

    def most(self, planned: PrunePlan) -> int:
        """Tokens that the head keeps that keeps most, full-precision ones included."""
        return int(self._counts(planned).max(initial=0))

    def drops(self, planned: PrunePlan) -> bool:
        """Whether any token goes, of a plan that names those that stay."""
        return bool((self._counts(planned) < planned.held.counts.reshape(-1)).any())

    def _counts(self, planned: PrunePlan) -> np.ndarray:
        """int64 ``[R]``, tokens that each head keeps, full-precision ones included."""
        held = planned.held
        staying = held.used - planned.stop + min(held.used, held.storage.sink_length)
        return staying + self.survive.sum(1) + self.leaving


@dataclass
class PageRun:
    """Pages of some table rows, side by side.

    Attributes:
        ids: int64 ``[R, n]``, ``-1`` where there is no page.
        counts: int32 ``[R, n]``, tokens that count.
        positions: int64 ``[R, n, P]``, undefined behind the count.
        records: uint8 ``[R, n, record_bytes]`` of pages that are not stored yet; their ids are 0 until then.
    """

    ids: np.ndarray
    counts: np.ndarray
    positions: np.ndarray
    records: torch.Tensor | None = None


def keep_only(held: TokenView, keep: torch.Tensor, tail: int | None = None) -> None:
    """Drop every token that ``keep`` does not name; of the others, all but the newest ``tail`` are then in pages.

    Pages that lose nothing stay as they are. The kept tokens of other pages are moved into new pages without decoding
    them. Where tokens share a scale, they stay among those of their page; else tokens of several pages are merged, as
    soon as that saves a page a head.

    Args:
        held: the sequences and their tokens.
        keep: bool ``[b, Hkv, T]``; of the sinks and the newest ``tail`` tokens it must name all.
        tail: newest tokens that stay in full precision; the storage's ``tail_length`` by default.
    """
    planned = plan(held, keep, held.storage.tail_length if tail is None else tail, held.tokens)
    carry_out(planned, read_back([planned])[0])


def plan(held: TokenView, keep: torch.Tensor | None, tail: int, most: int) -> PrunePlan:
    """List the tokens that will lie in pages; waits for nothing.

    Args:
        held: the sequences and their tokens.
        keep: bool ``[b, Hkv, T]``, as in :func:`keep_only`; None to keep all tokens.
        tail: newest tokens that stay in full precision.
        most: at least as many as the tokens that any sequence keeps, divided by its heads.
    """
    used, sinks = held.used, min(held.used, held.storage.sink_length)
    stop = max(sinks, used - tail)
    if keep is None:
        return PrunePlan(held, stop, None, None, None)
    if not held.everywhere:
        keep = keep & held.exists
    slots, columns = held.slots, held.columns
    leaving = keep & (slots >= sinks) & (slots < stop)
    moved, parts = leaving, [leaving.sum(-1)]
    if columns:
        paged = keep & (slots >= used)
        moved = leaving | paged
        # Tokens of the dense buffer count into a column of their own.
        survive = torch.zeros(*keep.shape[:2], columns + 1, dtype=torch.int64, device=keep.device)
        parts.append(survive.scatter_add_(2, held.page, paged.long())[..., :-1].flatten(1))
    # Sinks and tail stay where they are.
    listed = max(min(most, held.tokens) - (used - stop + sinks), 0)
    places = front(moved.flatten(1), listed * keep.shape[1])
    parts.append(held.positions.flatten(1).gather(1, places))
    return PrunePlan(held, stop, keep, places, torch.cat(parts, 1))


def read_back(plans: Sequence[PrunePlan]) -> list[KeptTokens]:
    """What the host has to know of each plan. Waits for the device once, and not at all where every token stays."""
    reports = [planned.report for planned in plans if planned.report is not None]
    arrays: Iterator[np.ndarray] = iter(())
    if reports:
        read = to_host(reports[0].flatten() if len(reports) == 1 else torch.cat([x.flatten() for x in reports]))
        ends = np.cumsum([x.numel() for x in reports]).tolist()
        arrays = iter([read[end - x.numel() : end].reshape(x.shape) for end, x in zip(ends, reports, strict=True)])
    return [_all_kept(planned) if planned.report is None else _kept(planned, next(arrays)) for planned in plans]


def carry_out(planned: PrunePlan, kept: KeptTokens, bias: torch.Tensor | None = None) -> None:
    """Drop and pack what a plan says; waits for nothing.

    Args:
        planned: the plan.
        kept: what the host knows of it.
        bias: float16 ``[b, Hkv, slots]``, the bias with which each token of the dense buffer is packed; None for none.
    """
    with without_autocast(planned.held.storage.device):
        _carry_out(planned, kept, bias)


def _carry_out(planned: PrunePlan, kept: KeptTokens, bias: torch.Tensor | None) -> None:
    held, storage = planned.held, planned.held.storage
    rows, columns = storage.table.rows_of(held.rows), held.columns
    new = _packed(planned, kept, bias)
    if columns and planned.keep is not None and (kept.survive != storage.table.counts(rows, columns)).any():
        _replace(storage, rows, _thinned(planned, kept, rows, new))
    elif new is not None:
        _replace(storage, rows, _side_by_side([_existing(storage, rows, columns), _stored(storage, new)]))
    sinks = min(held.used, storage.sink_length)
    if planned.stop > sinks:
        storage.dense.drop_oldest(held.rows, planned.stop - sinks)
    storage.dense.shrink()


def _kept(planned: PrunePlan, read: np.ndarray) -> KeptTokens:
    """``read [b, m]`` is the report of the plan."""
    heads, columns = planned.held.storage.heads, planned.held.columns
    leaving, survive, positions = np.split(read, [heads, heads * (1 + columns)], 1)
    return KeptTokens(leaving.reshape(-1), survive.reshape(leaving.size, columns), positions)


def _all_kept(planned: PrunePlan) -> KeptTokens:
    held, storage = planned.held, planned.held.storage
    rows, sinks = storage.table.rows_of(held.rows), min(held.used, storage.sink_length)
    leaving = np.full(len(rows), planned.stop - sinks)
    positions = np.tile(storage.dense.positions[held.rows, sinks : planned.stop], (1, storage.heads))
    return KeptTokens(leaving, np.zeros((len(rows), 0), np.int64), positions)


def _consecutive(first: np.ndarray, counts: np.ndarray, length: int) -> np.ndarray:
    """``first [..., 1] + 0, 1, ...`` of that length, ``[..., length]``; behind the count its last number repeats."""
    return first[..., None] + np.minimum(np.arange(length), np.maximum(counts - 1, 0)[..., None])


def _of_sequences(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """``x [b, n]`` at ``index [R, ...]``, where the rows of a sequence lie side by side; 0 if there is nothing."""
    if x.shape[1] == 0:  # no token will lie in a page
        return np.zeros(index.shape, x.dtype)
    sequence = np.arange(len(index)).reshape(-1, *[1] * (index.ndim - 1)) // (len(index) // len(x))
    return x[sequence, np.minimum(index, x.shape[1] - 1)]


def _packed(planned: PrunePlan, kept: KeptTokens, bias: torch.Tensor | None) -> PageRun | None:
    """Encode the tokens that leave the dense buffer, into pages that are not stored yet; None without tokens."""
    held, storage, counts = planned.held, planned.held.storage, kept.leaving
    size, device, most = storage.page_size, storage.device, int(kept.leaving.max(initial=0))
    if most == 0:
        return None
    pages = -(-most // size)
    # The last page is filled up with its last token, which changes no range that its tokens share.
    place = _consecutive(kept.first + kept.survive.sum(1), counts, pages * size)
    shape = len(held.rows), storage.heads, -1
    if planned.places is None:
        slots = _consecutive(np.full(len(counts), storage.sink_length), counts, pages * size)
        index = to_device(slots.reshape(shape), device)
    else:
        token = _at(planned.places, place)
        index = held.slots.flatten(1).gather(1, token.flatten(1)).clamp_max(held.used - 1).reshape(shape)
    keys, values = (
        rows_of(side, held.rows).gather(2, index.unsqueeze(-1).expand(-1, -1, -1, side.shape[-1]))
        for side in (storage.dense.keys, storage.dense.values)
    )
    if storage.key_mean is not None:
        by_head = to_device(counts.reshape(*shape[:2], 1), device)
        weights = torch.arange(pages * size, device=device) < by_head
        storage.writer.basis.fix_mean(held.rows, keys, weights)
    records = torch.cat([part for _, _, part in storage.writer.encode(held.rows, keys, values)])
    records = records.unflatten(0, (pages, -1)).transpose(0, 1)
    if bias is not None:
        stored = storage.layout.view(records, BIAS)
        assert stored is not None
        stored.copy_(bias.gather(2, index).view(stored.shape))
    positions = _of_sequences(kept.positions, place).reshape(len(counts), pages, size)
    counts = np.clip(counts[:, None] - size * np.arange(pages), 0, size).astype(np.int32)
    return PageRun(np.where(counts > 0, 0, -1), counts, positions, records)


def _at(x: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    """``x [b, n]`` at ``index [R, m]``, where the rows of a sequence lie side by side: ``[b, R / b, m]``."""
    last = x.shape[1] - 1
    by_sequence = to_device(np.minimum(index, last).reshape(len(x), -1), x.device)
    return x.gather(1, by_sequence).unflatten(1, (len(index) // len(x), -1))


def _thinned(planned: PrunePlan, kept: KeptTokens, rows: np.ndarray, new: PageRun | None) -> PageRun:
    """The pages of ``rows`` with only the kept tokens, and the new ones behind them."""
    storage, survive = planned.held.storage, kept.survive
    size = storage.page_size
    apart = (survive > 0).sum(-1) + -(-kept.leaving // size)
    together = -(-(survive.sum(-1) + kept.leaving) // size)
    if is_tokenwise(storage.layout) and apart.sum() > together.sum() + len(rows):
        return _repacked(planned, kept, rows, new)
    run = _compacted(planned, kept, rows)
    return run if new is None else _side_by_side([run, _stored(storage, new)])


def _compacted(planned: PrunePlan, kept: KeptTokens, rows: np.ndarray) -> PageRun:
    """Each page that loses some of its tokens becomes a new one with the others in front."""
    storage, survive = planned.held.storage, kept.survive
    size, held = storage.page_size, _existing(storage, rows, planned.held.columns)
    ids = np.where(survive > 0, held.ids, -1)
    touched = (survive > 0) & (survive < held.counts)
    first = kept.first[:, None] + survive.cumsum(1) - survive
    positions = _of_sequences(kept.positions, _consecutive(first, survive, size))
    if touched.any():
        source = storage.pool.read(held.ids[touched])
        row, _ = np.nonzero(touched)
        place = _consecutive(first[touched], survive[touched], size)
        token = _of_rows(planned, row, place)
        # A slot in a page is ``used + column * P + place``.
        index = (token - planned.held.used) % size + size * torch.arange(len(source), device=token.device)[:, None]
        made = storage.pool.allocate(len(source))
        storage.pool.write(made, gather_tokens(storage.layout, source, index))
        ids[touched] = made
        _note_positions(storage, made, survive[touched], positions[touched])
    return PageRun(ids, survive.astype(np.int32), positions)


def _of_rows(planned: PrunePlan, row: np.ndarray, place: np.ndarray) -> torch.Tensor:
    """The slots ``[m, P]`` of the tokens ``place [m, P]`` of the plan's lists, of the table rows ``row [m]``."""
    assert planned.places is not None
    held = planned.held
    sequence = row // held.storage.heads
    listed = planned.places.shape[1]
    index = to_device(sequence[:, None] * listed + np.minimum(place, listed - 1), held.storage.device)
    slots = held.slots.flatten(1).gather(1, planned.places)
    return slots.flatten()[index]


def _repacked(planned: PrunePlan, kept: KeptTokens, rows: np.ndarray, new: PageRun | None) -> PageRun:
    """All kept tokens, old and new, side by side in new pages."""
    held, storage = planned.held, planned.held.storage
    size, columns, old = storage.page_size, held.columns, _existing(storage, rows, held.columns)
    ids = np.where(old.ids >= 0, old.ids, old.ids[old.ids >= 0][0])
    source = storage.pool.read(ids.flatten()).unflatten(0, ids.shape)
    if new is not None:
        assert new.records is not None
        source = torch.cat([source, new.records], 1)
    total = kept.survive.sum(1) + kept.leaving
    pages = -(-int(total.max(initial=0)) // size)
    place = _consecutive(kept.first, total, pages * size)
    slots = _of_rows(planned, np.arange(len(rows)), place)
    # Where a token lies among the records of its row: in its old page, or behind all of these in the new pages.
    survivors = kept.survive.sum(1)[:, None]
    behind = np.minimum(np.arange(pages * size), np.maximum(total - 1, 0)[:, None]) - survivors + columns * size
    index = torch.where(slots >= held.used, slots - held.used, to_device(behind, storage.device))
    index = index + torch.arange(len(rows), device=storage.device)[:, None] * (source.shape[1] * size)
    made = gather_tokens(storage.layout, source.flatten(0, 1), index.reshape(-1, size)).unflatten(0, (len(rows), pages))
    counts = np.clip(total[:, None] - size * np.arange(pages), 0, size).astype(np.int32)
    positions = _of_sequences(kept.positions, place).reshape(len(rows), pages, size)
    return _stored(storage, PageRun(np.where(counts > 0, 0, -1), counts, positions, made))


def _stored(storage: PagedStorage, run: PageRun) -> PageRun:
    """Store the records of ``run`` in the pool; returns it with the ids of its pages."""
    assert run.records is not None
    # Column by column, so that the pages that are read together lie together.
    exist = (run.ids >= 0).T
    made = storage.pool.allocate(int(exist.sum()))
    records = run.records.transpose(0, 1).flatten(0, 1)
    storage.pool.write(made, rows_of(records, np.flatnonzero(exist)))
    _note_positions(storage, made, run.counts.T[exist], run.positions.transpose(1, 0, 2)[exist])
    ids = np.full(exist.shape, -1, dtype=np.int64)
    ids[exist] = made
    return PageRun(ids.T.copy(), run.counts, run.positions)


def _note_positions(storage: PagedStorage, ids: np.ndarray, counts: np.ndarray, positions: np.ndarray) -> None:
    """Remember every position ``[n, P]`` of the pages whose tokens do not stand side by side."""
    last = np.take_along_axis(positions, counts[:, None].astype(np.int64) - 1, 1)[:, 0]
    for i in np.flatnonzero(last - positions[:, 0] != counts - 1).tolist():
        stored = positions[i].copy()
        # Nobody reads positions behind the last token, but searches need them to ascend.
        stored[counts[i] :] = stored[counts[i] - 1] + 1
        storage.pool.note_positions(int(ids[i]), stored)


def _existing(storage: PagedStorage, rows: np.ndarray, columns: int) -> PageRun:
    table = storage.table
    positions = table.positions(0, columns, storage.page_size, rows)
    return PageRun(table.ids(rows, columns), table.counts(rows, columns), positions)


def _side_by_side(runs: list[PageRun]) -> PageRun:
    ids, counts, positions = zip(*((run.ids, run.counts, run.positions) for run in runs), strict=True)
    return PageRun(np.concatenate(ids, 1), np.concatenate(counts, 1), np.concatenate(positions, 1))


def _replace(storage: PagedStorage, rows: np.ndarray, run: PageRun) -> None:
    """Replace the pages of ``rows`` by those of ``run``, closing its gaps."""
    missing = run.ids < 0
    columns = int((~missing).sum(1).max(initial=0))
    order = np.argsort(missing, axis=1, kind="stable")[:, :columns]
    ids, counts, first = (np.take_along_axis(x, order, 1) for x in (run.ids, run.counts, run.positions[:, :, 0]))
    gone = ids < 0
    storage.table.replace(rows, ids, np.where(gone, 0, counts), np.where(gone, 0, first))
