"""What appending a token allocates."""

from __future__ import annotations

import tracemalloc
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_kvcache.storage import PagedStorage
from tests.storage.list_model import make_storage, random_tokens


class LargestResult(TorchDispatchMode):
    """Records the largest memory that an operation newly allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return out


def held(storage: PagedStorage) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Address and bytes of the slabs, and of the dense buffer."""
    slabs = [(slab.data_ptr(), slab.nbytes) for slab in storage.pool.slabs()]
    return slabs, [(t.data_ptr(), t.untyped_storage().nbytes()) for t in (storage.dense.keys, storage.dense.values)]


def test_memory_changes_only_when_a_page_is_packed() -> None:
    """Slabs and the dense buffer stay where they are from token to token; packing only adds slabs."""
    storage = make_storage("rotated4", 2, page_size=8)
    storage.append_block(*random_tokens(0, 2, 100), 0, None)
    packings = 0
    for position in range(100, 150):
        slabs, dense = held(storage)
        columns = storage.table.columns
        storage.append_one(*random_tokens(position, 2, 1), position, None)
        storage.pack_due()
        new_slabs, new_dense = held(storage)
        assert new_dense == dense and new_slabs[: len(slabs)] == slabs
        if storage.table.columns == columns:
            assert new_slabs == slabs
        else:
            packings += 1
            record = storage.layout.record_bytes
            assert sum(n for _, n in new_slabs) == sum(n for _, n in slabs) + 2 * storage.heads * record
    assert packings == 7


def test_appending_costs_the_same_however_much_is_held() -> None:
    """Neither torch nor numpy allocates more for a token after 16,384 tokens than after 512."""
    # Python allocates for itself now and then: the least of three runs is the storage's own.
    short, long = (min(_cost(length) for _ in range(3)) for length in (512, 16384))
    assert long[0] <= short[0] <= 16 * 1024
    assert long[1] < 1.5 * short[1] + 4096


def _cost(length: int) -> tuple[int, int]:
    """The largest tensor, and the peak of what Python allocated, for 64 tokens and a page after ``length``.

    The page before has made the table grow, by half of its columns, which the next ones then use.
    """
    storage = make_storage("rotated4", 1, page_size=64, tail=64)
    storage.append_block(*random_tokens(0, 1, length), 0, None)
    token = random_tokens(1, 1, 1)
    for position in range(length, length + 64):
        storage.append_one(*token, position, None)
        storage.pack_due()
    tracemalloc.start()
    with LargestResult() as largest:
        for position in range(length + 64, length + 128):
            storage.append_one(*token, position, None)
            storage.pack_due()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return largest.nbytes, peak


def test_slack_stays_small() -> None:
    """Growing page by page holds hardly more pages than are used."""
    storage = make_storage("rotated4", 1, page_size=2, sinks=0, tail=0)
    keys, values = random_tokens(0, 1, 1200)
    for t in range(1200):
        storage.append_one(keys[:, :, t : t + 1], values[:, :, t : t + 1], t, None)
        storage.pack_due()
        assert storage.pool.free_pages <= storage.pool.held_pages / 32 + 2
    assert len(storage.pool.memory._slabs) < 400
    storage.check()
