"""The table on the device follows the one on the host, and no more is sent than has changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_kvcache.kernels import device_table
from hf_kvcache.kernels.inputs import Pages
from hf_kvcache.storage import PagedStorage, dense_buffer
from hf_kvcache.storage.pruning import keep_only
from hf_kvcache.storage.token_view import TokenView
from tests.storage.list_model import make_storage, random_tokens

PAGE = 8


def check(pages: Pages | None) -> None:
    """Fail unless the table on the device says what the arrays on the host say."""
    if pages is None:
        return
    found = pages.on_device(positions=True)
    assert found.table.shape[2] == found.capacity >= pages.columns and found.positions is not None
    for there, here in zip(found.table, (pages.addresses, pages.counts, pages.first), strict=True):
        assert np.array_equal(there[:, : pages.columns].numpy(), here)
    counted = np.arange(PAGE) < pages.counts[:, :, None]
    positions = found.positions[:, : pages.columns].numpy()
    assert np.array_equal(positions[counted], pages.host_positions(0, pages.columns)[counted])


def prune(storage: PagedStorage, seed: int) -> None:
    """Evict some tokens of each head at random."""
    held = TokenView.of(storage, np.arange(storage.batch))
    free = np.random.default_rng(seed).random(held.exists.shape) < 0.3
    edge = (held.positions < storage.sink_length) | (held.positions >= held.positions.max() - 12)
    keep_only(held, held.exists & (edge | ~free))


@pytest.mark.parametrize("seed", range(6))
def test_it_follows_every_change(seed: int) -> None:
    """Appends to some rows only, rollbacks, sliding, evictions, selections and forks, looked at now and then."""
    rng = np.random.default_rng(seed)
    storage, forks, length = make_storage("int8", 2, page_size=PAGE), [], 0
    for step in range(60):
        kind = rng.choice(["block", "ragged", "one", "back", "slide", "evict", "select", "fork", "ahead"])
        count = int(rng.integers(1, 30))
        if kind in ("block", "ragged"):
            valid = rng.random((storage.batch, count)) < 0.5 if kind == "ragged" else None
            storage.append_block(*random_tokens(step, storage.batch, count), length, valid)
            length += count
        elif kind == "one":
            storage.append_one(*random_tokens(step, storage.batch, 1), length, None)
            storage.pack_due()
            length += 1
        elif kind == "back":
            length = max(0, length - int(rng.integers(0, 12)))
            storage.truncate_from(length)
        elif kind == "slide":
            storage.drop_before(int(rng.integers(0, max(1, length // 2))))
        elif kind == "evict" and storage.table.columns and not storage.ahead:
            prune(storage, step)
        elif kind == "select":
            storage.select(rng.integers(0, storage.batch, int(rng.integers(1, 4))))
        elif kind == "fork":
            forks.append(storage.fork())
        elif kind == "ahead" and storage.dense.uniform_length is not None:
            storage.pack_ahead(int(storage.due(storage.dense.longest)))
            check(storage.pages(0))
            storage.commit_ahead()
        if rng.random() < 0.6:
            check(storage.pages())
        for fork in forks:
            check(fork.pages())


def test_only_what_changed_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = make_storage("int8", 2, page_size=PAGE)
    storage.append_block(*random_tokens(0, 2, 90), 0, None)
    sent: list[tuple[int, ...]] = []
    send = device_table.send
    monkeypatch.setattr(device_table, "send", lambda array, to: (sent.append(array.shape), send(array, to)))
    pages = storage.pages()
    assert pages is not None
    rows, columns = pages.rows, pages.columns
    for _ in range(3):
        address = pages.on_device().table.data_ptr()
    assert sent == [(3, rows, columns)]
    sent.clear()
    for position in range(90, 90 + 3 * PAGE):
        storage.append_one(*random_tokens(position, 2, 1), position, None)
        storage.pack_due()
        after = storage.pages()
        assert after is not None and after.on_device().table.data_ptr() == address
    assert sent == [(3, rows, 1)] * 3
    sent.clear()
    storage.drop_before(20)
    check(storage.pages())
    assert sent[0] == (3, rows, storage.table.columns)


def test_pages_of_an_earlier_version_have_a_table_of_their_own() -> None:
    storage = make_storage("int8", 1, page_size=PAGE)
    storage.append_block(*random_tokens(0, 1, 90), 0, None)
    old = storage.pages()
    assert old is not None
    check(old)
    storage.drop_before(30)
    new = storage.pages()
    check(old)
    check(new)
    assert new is not None and old.on_device().table is not new.on_device().table
    check(replace(new, counts=new.counts - 1))
    check(new)


def test_a_short_view_brings_its_columns_only() -> None:
    storage = make_storage("int8", 1, page_size=PAGE)
    storage.append_block(*random_tokens(0, 1, 90), 0, None)
    pages = storage.pages()
    assert pages is not None
    check(pages.until(3))
    check(pages)
    assert pages.until(3).on_device().table is pages.on_device().table


def test_a_table_made_under_inference_mode_can_change_outside_of_it() -> None:
    storage = make_storage("int8", 1, page_size=PAGE)
    storage.append_block(*random_tokens(0, 1, 60), 0, None)
    with torch.inference_mode():
        check(storage.pages())
    storage.append_block(*random_tokens(1, 1, 40), 60, None)
    check(storage.pages())


def test_positions_that_could_not_be_sent_are_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_storage("int8", 1, page_size=PAGE).dense
    dense.append_one(*random_tokens(0, 1, 1), 0, None)
    there = dense.positions_on_device()
    dense.append_one(*random_tokens(1, 1, 1), 5, None)

    def no_memory(array: np.ndarray, to: torch.Tensor) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(dense_buffer, "send", no_memory)
        with pytest.raises(MemoryError):
            dense.positions_on_device()
    assert dense.positions_on_device() is there and there[0, :2].tolist() == [0, 5]
