"""Dropping tokens of a storage, head by head, and packing the kept tokens that leave the dense buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_kvcache.storage.gathering import gather_tokens, is_tokenwise
from hf_kvcache.storage.paged import PagedStorage
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.utils.autocast import without_autocast


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


def keep_only(held: TokenView, keep: np.ndarray, tail: int | None = None) -> None:
    """Drop every token that ``keep`` does not name; of the others, all but the newest ``tail`` are then in pages.

    Pages that lose nothing stay as they are. The kept tokens of other pages are moved into new pages without decoding
    them. Where tokens share a scale, they stay among those of their page; else tokens of several pages are merged, as
    soon as that saves a page a head.

    Args:
        held: the sequences and their tokens.
        keep: bool ``[b, Hkv, T]``; of the sinks and the newest ``tail`` tokens it must name all.
        tail: newest tokens that stay in full precision; the storage's ``tail_length`` by default.
    """
    with without_autocast(held.storage.device):
        _keep_only(held, keep, held.storage.tail_length if tail is None else tail)


def _keep_only(held: TokenView, keep: np.ndarray, tail: int) -> None:
    storage = held.storage
    used, sinks = held.used, min(held.used, storage.sink_length)
    stop = max(sinks, used - tail)
    keep = keep & held.exists
    in_pages = held.slots >= used
    leaving = keep & ~in_pages & (held.slots >= sinks) & (held.slots < stop)
    new = _packed(storage, held, leaving)
    rows, columns = storage.table.rows_of(held.rows), held.columns
    if columns and not (keep == held.exists)[in_pages].all():
        kept = _kept_places(storage, held, keep & in_pages, columns)
        _replace(storage, rows, _thinned(storage, rows, columns, kept, new))
    elif new is not None:
        _replace(storage, rows, _side_by_side([_existing(storage, rows, columns), _stored(storage, new)]))
    if stop > sinks:
        storage.dense.drop_oldest(held.rows, stop - sinks)
    storage.dense.shrink()


def _packed(storage: PagedStorage, held: TokenView, leaving: np.ndarray) -> PageRun | None:
    """Encode the tokens that leave the dense buffer, into pages that are not stored yet; None without tokens."""
    size, counts = storage.page_size, leaving.sum(-1)
    most = int(counts.max(initial=0))
    if most == 0:
        return None
    pages = -(-most // size)
    order = np.argsort(~leaving, axis=-1, kind="stable")[..., :most]
    # The last page is filled up with its last token, which changes no range that its tokens share.
    place = np.minimum(np.arange(pages * size), np.maximum(counts - 1, 0)[..., None])
    order = np.take_along_axis(order, place, -1)
    slots = np.minimum(np.take_along_axis(held.slots, order, -1), held.used - 1)
    index = torch.from_numpy(slots).to(storage.device).unsqueeze(-1)
    rows = torch.from_numpy(held.rows).to(storage.device)
    keys, values = (
        side[rows].gather(2, index.expand(-1, -1, -1, side.shape[-1]))
        for side in (storage.dense.keys, storage.dense.values)
    )
    if storage.key_mean is not None:
        weights = torch.from_numpy(np.arange(pages * size) < counts[..., None]).to(storage.device)
        mean = (keys.float() * weights.unsqueeze(-1)).sum(2) / weights.sum(2, keepdim=True).clamp_min(1)
        storage.writer.fix_key_mean(held.rows, storage.encoder.key_mean_of(mean))
    records = torch.cat([part for _, _, part in storage.writer.encode(held.rows, keys, values)])
    records = records.unflatten(0, (pages, -1)).transpose(0, 1)
    counts = np.clip(counts.reshape(-1, 1) - size * np.arange(pages), 0, size).astype(np.int32)
    positions = np.take_along_axis(held.positions, order, -1).reshape(len(counts), pages, size)
    return PageRun(np.where(counts > 0, 0, -1), counts, positions, records)


def _kept_places(storage: PagedStorage, held: TokenView, keep: np.ndarray, columns: int) -> np.ndarray:
    """``keep [b, Hkv, T]`` of tokens in pages by their place, bool ``[R, columns, P]``."""
    size = storage.page_size
    # One more place, for all that is not kept.
    places = np.zeros((*keep.shape[:2], columns * size + 1), bool)
    np.put_along_axis(places, np.where(keep, held.slots - held.used, columns * size), True, -1)
    return places[..., :-1].reshape(-1, columns, size)


def _thinned(storage: PagedStorage, rows: np.ndarray, columns: int, kept: np.ndarray, new: PageRun | None) -> PageRun:
    """The pages of ``rows`` with only the ``kept [R, columns, P]`` places, and the new ones behind them."""
    size, survive = storage.page_size, kept.sum(-1)
    added = np.zeros(len(rows), np.int64) if new is None else new.counts.sum(-1)
    apart = (survive > 0).sum(-1) + -(-added // size)
    together = -(-(survive.sum(-1) + added) // size)
    if is_tokenwise(storage.layout) and apart.sum() > together.sum() + len(rows):
        return _repacked(storage, rows, columns, kept, new)
    run = _compacted(storage, rows, columns, kept)
    return run if new is None else _side_by_side([run, _stored(storage, new)])


def _compacted(storage: PagedStorage, rows: np.ndarray, columns: int, kept: np.ndarray) -> PageRun:
    """Each page that loses some of its tokens becomes a new one with the others in front."""
    size = storage.page_size
    held = _existing(storage, rows, columns)
    survive = kept.sum(-1).astype(np.int32)
    order = np.argsort(~kept, axis=-1, kind="stable")
    positions = np.take_along_axis(held.positions, order, -1)
    ids = np.where(survive > 0, held.ids, -1)
    touched = (survive > 0) & (survive < held.counts)
    if touched.any():
        source = storage.pool.read(held.ids[touched])
        index = np.arange(len(source))[:, None] * size + order[touched]
        made = storage.pool.allocate(len(source))
        storage.pool.write(made, gather_tokens(storage.layout, source, torch.from_numpy(index).to(storage.device)))
        ids[touched] = made
        _note_positions(storage, made, survive[touched], positions[touched])
    return PageRun(ids, survive, positions)


def _repacked(storage: PagedStorage, rows: np.ndarray, columns: int, kept: np.ndarray, new: PageRun | None) -> PageRun:
    """All kept tokens, old and new, side by side in new pages."""
    size, old = storage.page_size, _existing(storage, rows, columns)
    ids = np.where(old.ids >= 0, old.ids, old.ids[old.ids >= 0][0])
    source = storage.pool.read(ids.flatten()).unflatten(0, ids.shape)
    all_kept, positions = kept, old.positions
    if new is not None:
        assert new.records is not None
        source = torch.cat([source, new.records], 1)
        all_kept = np.concatenate([kept, np.arange(size) < new.counts[:, :, None]], 1)
        positions = np.concatenate([positions, new.positions], 1)
    all_kept, positions = (x.reshape(len(rows), -1) for x in (all_kept, positions))
    total = all_kept.sum(-1)
    pages = -(-int(total.max(initial=0)) // size)
    order = np.argsort(~all_kept, axis=-1, kind="stable")
    place = np.minimum(np.arange(pages * size), np.maximum(total - 1, 0)[:, None])
    order = np.take_along_axis(order, place, -1)
    counts = np.clip(total[:, None] - size * np.arange(pages), 0, size).astype(np.int32)
    index = torch.from_numpy(order + np.arange(len(rows))[:, None] * all_kept.shape[1]).to(storage.device)
    made = gather_tokens(storage.layout, source.flatten(0, 1), index.reshape(-1, size)).unflatten(0, (len(rows), pages))
    positions = np.take_along_axis(positions, order, -1).reshape(len(rows), pages, size)
    return _stored(storage, PageRun(np.where(counts > 0, 0, -1), counts, positions, made))


def _stored(storage: PagedStorage, run: PageRun) -> PageRun:
    """Store the records of ``run`` in the pool; returns it with the ids of its pages."""
    assert run.records is not None
    # Column by column, so that the pages that are read together lie together.
    exist = (run.ids >= 0).T
    made = storage.pool.allocate(int(exist.sum()))
    storage.pool.write(made, run.records.transpose(0, 1)[torch.from_numpy(exist).to(storage.device)])
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
