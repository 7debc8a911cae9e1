"""The pool of pages by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.storage import IntegrityError, PagedStorage
from hf_kvcache.storage.pool import PagePool
from tests.storage.list_model import make_storage, random_tokens


class Holder:
    """References to pages, with a list in place of a table."""

    def __init__(self) -> None:
        self.pages: list[int] = []

    def page_ids(self) -> np.ndarray:
        return np.array(self.pages, dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_references_and_contents(data: st.DataObject) -> None:
    """Over random allocations, sharing and releases, counts and contents are those of a dictionary."""
    pool, holder = PagePool(16, torch.device("cpu")), Holder()
    pool.add_holder(holder)
    contents: dict[int, int] = {}
    for step in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["allocate", "retain", "release"]))
        if action == "allocate":
            ids = pool.allocate(data.draw(st.integers(1, 9)))
            assert (np.diff(ids) > 0).all() and not set(ids.tolist()) & set(holder.pages)
            order = np.array(data.draw(st.permutations(ids.tolist())))
            marks = (order * 7 + step) % 251
            pool.write(order, torch.from_numpy(marks.astype(np.uint8))[:, None].expand(-1, 16))
            contents |= dict(zip(order.tolist(), marks.tolist(), strict=True))
            holder.pages += ids.tolist()
        elif holder.pages:
            chosen = data.draw(st.lists(st.sampled_from(range(len(holder.pages))), unique=True, max_size=6))
            ids = np.array([holder.pages[i] for i in chosen], dtype=np.int64)
            if action == "retain":
                pool.retain(ids)
                holder.pages += ids.tolist()
            else:
                pool.release(ids)
                for page in ids.tolist():
                    holder.pages.remove(page)
        pool.check()
        used = sorted(set(holder.pages))
        assert pool.held_pages - pool.free_pages == len(used)
        assert dict(Counter(holder.pages)) == {page: int(pool.references(np.array([page]))[0]) for page in used}
        if used:
            order = np.array(data.draw(st.lists(st.sampled_from(used), min_size=1, max_size=12)))
            records = pool.read(order)
            assert records.shape == (len(order), 16)
            assert records.tolist() == [[contents[page]] * 16 for page in order.tolist()]
    pool.release(holder.page_ids())
    assert pool.held_pages == 0


def test_addresses() -> None:
    """The address of a page is that of its record in its slab."""
    pool = PagePool(32, torch.device("cpu"))
    ids = pool.allocate(6)
    pool.write(ids, torch.arange(6, dtype=torch.uint8)[:, None].expand(-1, 32))
    slab = pool.slabs()[0]
    later = pool.allocate(3)
    assert (pool.addresses(ids[[5, 2]]) - slab.data_ptr()).tolist() == [5 * 32, 2 * 32]
    assert pool.slabs()[1].data_ptr() == pool.addresses(later)[0]
    assert pool.read(ids[[3, 1]])[:, 0].tolist() == [3, 1]
    pool.release(np.concatenate([ids, later]))


def test_an_empty_slab_is_given_back_and_its_ids_used_again() -> None:
    """Freeing the last page of a slab frees its memory; a slab of that size takes its ids over."""
    pool = PagePool(16, torch.device("cpu"))
    first, second = pool.allocate(4), pool.allocate(3)
    pool.release(first[:3])
    assert (pool.held_pages, pool.free_pages) == (7, 3)
    pool.release(first[3:])
    assert (pool.held_pages, pool.free_pages) == (3, 0)
    again = pool.allocate(4)
    assert again.tolist() == first.tolist() and pool.held_pages == 7
    pool.release(np.concatenate([second, again]))


def test_looking_at_a_pool_releases_nothing() -> None:
    """Pages of a table that is gone count as free before the pool has taken them back, and looking does not do so."""
    pool = PagePool(16, torch.device("cpu"))
    kept, gone = pool.allocate(3), pool.allocate(2)
    holder = Holder()
    holder.pages = kept.tolist()
    pool.add_holder(holder)
    with pool._lock:  # as if another thread were at work
        pool.abandon(gone)
    for _ in range(2):
        assert (pool.held_pages, pool.free_pages) == (5, 2)
        assert pool.references(np.concatenate([kept, gone])).tolist() == [1, 1, 1, 0, 0]
        pool.check()
        assert len(pool._abandoned) == 1
    pool.retain(kept)  # the next change does
    assert not pool._abandoned and pool.held_pages == 3
    pool.release(kept.repeat(2))


def double_reference(storage: PagedStorage) -> None:
    storage.pool.retain(storage.table.page_ids()[:1])


def free_a_used_page(storage: PagedStorage) -> None:
    storage.pool._free = np.append(storage.pool._free, storage.table.page_ids()[:1])


def lose_a_page(storage: PagedStorage) -> None:
    storage.table._ids[0, -1] = -1


def misplace_a_page(storage: PagedStorage) -> None:
    storage.table._addresses[0, 0] += storage.layout.record_bytes


def swap_pages(storage: PagedStorage) -> None:
    storage.table._first[0, [0, 1]] = storage.table._first[0, [1, 0]]


def count_too_much(storage: PagedStorage) -> None:
    storage.table._counts[0, 0] = storage.page_size + 1


def swap_tail(storage: PagedStorage) -> None:
    storage.dense.positions[0, [3, 4]] = storage.dense.positions[0, [4, 3]]


def overlap(storage: PagedStorage) -> None:
    storage.dense.positions[0, : storage.dense.longest] = np.arange(storage.dense.longest)


def too_long(storage: PagedStorage) -> None:
    storage.dense.lengths[0] = storage.dense.capacity + 1


def positions_of_no_page(storage: PagedStorage) -> None:
    storage.pool.positions[int(storage.table.page_ids()[0])] = np.arange(8)
    storage.truncate_from(0)
    storage.pool.positions[0] = np.arange(8)


@pytest.mark.parametrize(
    "damage",
    [
        double_reference,
        free_a_used_page,
        lose_a_page,
        misplace_a_page,
        swap_pages,
        count_too_much,
        swap_tail,
        overlap,
        too_long,
        positions_of_no_page,
    ],
)
def test_damage_is_noticed(damage: Callable[[PagedStorage], None]) -> None:
    """Each way of breaking an invariant makes the check fail."""
    storage = make_storage("rotated4", 1, page_size=8)
    storage.append_block(*random_tokens(0, 1, 60), 0, None)
    storage.check()
    damage(storage)
    with pytest.raises(IntegrityError):
        storage.check()
    storage.table.__dict__.pop("_ids", None)  # nothing sound is left to give back
