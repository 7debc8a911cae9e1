"""Row buffers against lists."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_kvcache.storage.row_buffer import RowBuffer


def same(buffer: RowBuffer, rows: list[int], start: int) -> None:
    assert (buffer.start, buffer.stop) == (start, start + len(rows))
    if buffer.batch > 0:
        held = buffer.rows(buffer.start, buffer.stop)
        assert held[0, :, 0].tolist() == rows and torch.equal(held[1, :, 1], -held[0, :, 0])


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_operations(seed: int) -> None:
    """Appends, drops at both ends and forks, whose copies change independently; views of rows stay what they were."""
    choose = random.Random(seed)
    kept: list[tuple[RowBuffer, list[int], int]] = [(RowBuffer(choose.choice([1, 4])), [], 0)]
    number = 0
    for _ in range(150):
        at = choose.randrange(len(kept))
        buffer, rows, start = kept[at]
        what = choose.choice(["append"] * 5 + ["drop", "truncate", "fork", "skip"])
        if what in ("append", "skip"):
            new = list(range(number, number := number + choose.choice([0, 1, 1, 3, 20])))
            one = torch.tensor(new, dtype=torch.float32)
            view = buffer.rows(buffer.start, buffer.stop) if buffer.batch > 0 else None
            before = None if view is None else view.clone()
            keep_from = choose.randrange(start, start + len(rows) + len(new) + 1) if what == "skip" else 0
            buffer.append(torch.stack([torch.stack([one, one], 1), torch.stack([-one, -one], 1)]), keep_from)
            assert view is None or torch.equal(view, before)
            dropped = max(keep_from - start, 0)
            rows, start = (rows + new)[dropped:], start + dropped
        elif what == "drop":
            dropped = choose.randrange(len(rows) + 1)
            buffer.drop_before(start + dropped)
            rows, start = rows[dropped:], start + dropped
        elif what == "truncate":
            rows = rows[: choose.randrange(max(len(rows) - 3, 0), len(rows) + 1)]
            buffer.truncate(start + len(rows))
        elif len(kept) < 4:
            kept.append((buffer.fork(), list(rows), start))
        kept[at] = buffer, rows, start
        for each in kept:
            same(*each)


def test_memory_follows_what_is_held() -> None:
    """Room is given back after a long append, and does not grow with the rows that have passed through."""
    buffer = RowBuffer(8)
    for count in (1000, *[1] * 500):
        buffer.append(torch.zeros(1, count, 4))
        buffer.drop_before(buffer.stop - 10)
        assert len(buffer) == min(10, buffer.stop) and buffer.used_bytes() == 160
        assert buffer.allocated_bytes() <= 16 * (2 * 10 + 2 * 8)


def test_rows_of_sequences() -> None:
    buffer = RowBuffer()
    buffer.append(torch.arange(6.0).view(3, 2, 1))
    buffer.select(np.array([2, 0, 0, 1]))
    assert buffer.rows(0, 2)[..., 0].tolist() == [[4, 5], [0, 1], [0, 1], [2, 3]]
