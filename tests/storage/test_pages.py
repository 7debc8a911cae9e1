"""Life of a packed page: written once, shared, freed."""

from __future__ import annotations

import gc
import hashlib

import numpy as np
import pytest
import torch

from hf_kvcache.codecs import specs
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.memory import bytes_by_part
from hf_kvcache.storage.pruning import keep_only
from hf_kvcache.storage.token_view import TokenView
from tests.storage.list_model import make_storage, random_tokens, row_records


def packed(codec: str = "rotated4", batch: int = 2, length: int = 90) -> PagedStorage:
    storage = make_storage(codec, batch, page_size=8)
    storage.append_block(*random_tokens(0, batch, length), 0, None)
    return storage


def fingerprints(storage: PagedStorage) -> dict[int, str]:
    """A hash of the bytes of each page that the table holds."""
    ids = np.unique(storage.table.page_ids())
    records = storage.pool.read(ids)
    return {int(i): hashlib.sha256(r.numpy().tobytes()).hexdigest() for i, r in zip(ids, records, strict=True)}


@pytest.mark.parametrize("codec", specs())
def test_pages_never_change(codec: str) -> None:
    """No later operation changes a byte of a page for as long as the page is held."""
    storage = packed(codec)
    other = storage.fork()
    before = fingerprints(storage)
    steps = [
        lambda: storage.append_block(*random_tokens(1, storage.batch, 50), 90, None),
        lambda: storage.select(np.array([1, 0, 1])),
        lambda: storage.truncate_from(77),
        lambda: [storage.append_one(*random_tokens(i, 3, 1), 77 + i, None) for i in range(20)],
        lambda: storage.pack_ahead(2),
        lambda: storage.commit_ahead(),
        lambda: storage.append_block(*random_tokens(5, 3, 40), 97, np.random.default_rng(0).random((3, 40)) < 0.7),
        lambda: storage.drop_before(30),
    ]
    for step in steps:
        step()
        for held in (storage, other):
            now = fingerprints(held)
            assert {page: before[page] for page in now if page in before} == {p: now[p] for p in now if p in before}
            held.check()
    assert fingerprints(other) == before


def test_pages_are_one_object_until_they_change() -> None:
    """Prepared calls are told by the identity of ``pages()`` that they may go on, and reading changes nothing."""
    storage = packed()
    pages = storage.pages()
    assert pages is not None

    def look() -> None:
        storage.check()
        bytes_by_part(storage)
        storage.state()
        storage.fork()
        storage.tokens()

    unchanged = [
        look,
        lambda: storage.append_one(*random_tokens(1, 2, 1), 90, None),
        lambda: storage.truncate_from(90),
        lambda: storage.pack_due(),
        lambda: storage.drop_before(0),
    ]
    for step in unchanged:
        step()
        assert storage.pages() is pages

    def keep() -> torch.Tensor:
        held = TokenView.of(storage, np.arange(2))
        return held.exists & (held.positions != 24)

    changing = [
        lambda: storage.append_block(*random_tokens(2, 2, 20), 90, None),
        lambda: storage.truncate_from(40),
        lambda: storage.drop_before(20),
        lambda: storage.select(np.array([1, 0])),
        lambda: keep_only(TokenView.of(storage, np.arange(2)), keep()),
    ]
    for step in changing:
        before, version = storage.pages(), storage.table.version
        step()
        assert storage.pages() is not before and storage.table.version > version
    assert storage.fork().pages() is not storage.pages()


def test_forks_share_pages() -> None:
    """A fork costs no page, writes pages of its own, and gives its references back when it goes away."""
    storage = packed()
    ids, held = storage.table.page_ids(), storage.pool.held_pages
    fork = storage.fork()
    assert storage.pool.held_pages == held and (storage.pool.references(ids) == 2).all()
    fork.append_block(*random_tokens(1, 2, 80), 90, None)
    grown = storage.pool.held_pages
    assert grown == held + 2 * 2 * 10 and (storage.pool.references(ids) == 2).all()
    storage.check()
    fork.check()
    del fork
    gc.collect()
    assert storage.pool.held_pages == held and (storage.pool.references(ids) == 1).all()
    storage.check()


def test_the_fork_outlives_the_original() -> None:
    """Pages stay with whoever holds them, also if the storage that wrote them is gone."""
    storage = packed()
    fork = storage.fork()
    before = fingerprints(fork)
    del storage
    gc.collect()
    assert fingerprints(fork) == before
    fork.check()


def test_beams_share_pages() -> None:
    """Repeating sequences takes references and no page; dropping them frees what nobody holds."""
    storage = packed()
    columns, held = storage.table.columns, storage.pool.held_pages
    storage.select(np.array([0, 0, 1, 1, 1]))
    assert storage.pool.held_pages == held and storage.pool.references(storage.table.page_ids()).max() == 3
    storage.select(np.array([4]))
    used = storage.pool.held_pages - storage.pool.free_pages
    assert used == columns * storage.heads == len(storage.table.page_ids())
    storage.check()


def test_nothing_leaks() -> None:
    """Filling and emptying again and again neither keeps pages nor grows the pool."""
    storage = make_storage("rotated4", 2, page_size=8)
    for _ in range(5):
        storage.append_block(*random_tokens(0, 2, 200), 0, None)
        assert storage.pool.held_pages == 2 * 2 * storage.due(200)
        storage.truncate_from(0)
        storage.check()
        assert storage.pool.held_pages == storage.pool.free_pages == 0
    assert len(storage.pool.memory._slabs) == 1


def test_a_window_gives_slabs_back() -> None:
    """Decoding with a sliding window holds a bounded number of pages, however long it runs."""
    storage = make_storage("rotated4", 1, page_size=8, sinks=0, tail=8)
    held = []
    for position in range(600):
        storage.append_one(*random_tokens(position, 1, 1), position, None)
        storage.pack_due()
        storage.drop_before(position - 32)
        held.append(storage.pool.held_pages)
    storage.check()
    # 33 tokens touch at most 6 pages of each of the 2 heads.
    assert max(held) <= 2 * 6 and len(storage.pool.memory._slabs) <= 6


def test_pages_before_the_window_are_not_stored() -> None:
    """Of a long prompt, only the pages that the window can still see are packed, where they always were."""
    whole, windowed = (make_storage("rotated4", 1, page_size=8, sinks=0, tail=8) for _ in range(2))
    keys, values = random_tokens(0, 1, 200)
    whole.append_block(keys, values, 0, None)
    windowed.append_block(keys, values, 0, None, keep_from=150)
    whole.drop_before(150)
    assert windowed.tokens().tolist() == whole.tokens().tolist()
    assert torch.equal(row_records(windowed, 0), row_records(whole, 0))
    assert windowed.pool.held_pages == len(windowed.table.page_ids())
    windowed.check()


@pytest.mark.parametrize("codec", ["rotated4", "kvarn3", "turboquant2", "int2", "fp8", "none"])
def test_a_padded_row_packs_as_it_would_alone(codec: str) -> None:
    """Padding anywhere, in blocks and token by token, changes no byte of a row's pages."""
    rng = np.random.default_rng(1)
    lengths = (70, 1, 1, 1, 30, 1, 1)
    valid = [rng.random((3, length)) < 0.7 for length in lengths]
    for block in valid:
        block[2] = True
    valid[0][0] = np.arange(70) >= 23
    batch = make_storage(codec, 3, page_size=8)
    alone = [make_storage(codec, 1, page_size=8) for _ in range(3)]
    position, positions = 0, [0, 0, 0]
    for i, (length, real) in enumerate(zip(lengths, valid, strict=True)):
        keys, values = random_tokens(i, 3, length)
        if length == 1:
            batch.append_one(keys, values, position, real[:, 0])
            batch.pack_due()
        else:
            batch.append_block(keys, values, position, real)
        position += length
        for row, solo in enumerate(alone):
            kept = torch.from_numpy(np.flatnonzero(real[row]))
            for t in kept.tolist() if i % 2 else ():
                solo.append_one(
                    keys[row : row + 1, :, t : t + 1],
                    values[row : row + 1, :, t : t + 1],
                    positions[row],
                    None,
                )
                solo.pack_due()
                positions[row] += 1
            if i % 2 == 0 and len(kept):
                solo.append_block(keys[row : row + 1, :, kept], values[row : row + 1, :, kept], positions[row], None)
                positions[row] += len(kept)
    batch.check()
    for row, solo in enumerate(alone):
        assert solo.table.columns > 2
        assert torch.equal(row_records(batch, row), row_records(solo, 0))
        length = int(solo.dense.lengths[0])
        assert int(batch.dense.lengths[row]) == length
        assert torch.equal(batch.dense.keys[row, :, :length], solo.dense.keys[0, :, :length])


@pytest.mark.parametrize("codec", ["rotated4", "kvarn2"])
def test_saved_pages_are_the_same_bytes(codec: str) -> None:
    """Saving and loading packs nothing again: records, and how sequences share them, are as they were."""
    storage = packed(codec)
    storage.select(np.array([1, 0, 1]))
    loaded = make_storage(codec, 3, page_size=8)
    loaded.restore(storage.state())
    loaded.check()
    for row in range(3):
        assert torch.equal(row_records(loaded, row), row_records(storage, row))
    assert loaded.pool.held_pages == len(np.unique(storage.table.page_ids()))


@pytest.mark.parametrize("rolled_back", range(0, 30, 3))
def test_pages_ahead_are_kept_only_if_confirmed(rolled_back: int) -> None:
    """Pages encoded before their tokens are confirmed are the very pages of plain packing, or leave no trace."""
    keys, values = random_tokens(0, 1, 60)
    ahead, plain = (make_storage("rotated4", 1, page_size=8, sinks=2, tail=3) for _ in range(2))
    ahead.append_block(keys[:, :, :30], values[:, :, :30], 0, None)
    ahead.append_block(keys[:, :, 30:], values[:, :, 30:], 30, None, pack=False)
    columns = ahead.table.columns
    ahead.pack_ahead(3)
    ahead.check()
    assert ahead.table.columns == columns + 3 and ahead.tokens().tolist() == [60]
    ahead.truncate_from(60 - rolled_back)
    ahead.pack_due()
    ahead.check()
    plain.append_block(keys[:, :, : 60 - rolled_back], values[:, :, : 60 - rolled_back], 0, None)
    assert ahead.ahead == 0 and ahead.tokens().tolist() == [60 - rolled_back]
    assert torch.equal(row_records(ahead, 0), row_records(plain, 0))
    length = plain.dense.longest
    assert ahead.dense.longest == length
    assert ahead.dense.positions[0, :length].tolist() == plain.dense.positions[0, :length].tolist()


def test_positions_are_stored_only_where_needed() -> None:
    """A page whose tokens stand side by side stores no positions; one with a hole does, for each head."""
    storage = make_storage("rotated4", 2, page_size=8)
    valid = np.ones((2, 60), dtype=bool)
    valid[1, :5] = False
    storage.append_block(*random_tokens(0, 2, 60), 0, valid)
    assert storage.table.columns == 6 and not storage.pool.positions
    valid = np.ones((2, 40), dtype=bool)
    valid[1, 20] = False
    storage.append_block(*random_tokens(1, 2, 40), 60, valid)
    assert len(storage.pool.positions) == storage.heads
    for stored in storage.pool.positions.values():
        assert 80 not in stored and len(stored) == 8 and stored[0] < 80 < stored[-1]
    storage.truncate_from(75)
    assert not storage.pool.positions
    storage.check()
