"""Sequences of a batch are exchanged, left out and repeated in layers of transformers' own too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import families
from tests.running import ROUNDING, forward, full_cache, prompt, small_cache

CHANGES: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([-1, 0])), [2, 0]),
    "select by a mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, -1, 0])), [1, 2, 0]),
}


@pytest.mark.parametrize(
    "family", ["qwen3_next", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lfm2", "jamba"))]
)
def test_rows_of_recurrent_layers(family: str) -> None:
    """As if these sequences had been read alone."""
    model, ids = families.build(family), prompt(40, 3)
    cache = small_cache(model)
    for change, _ in CHANGES.values():
        change(cache)  # of an empty cache nothing is left out
    forward(model, ids, cache)
    for change, rows in CHANGES.values():
        held, expected, more = cache.fork(), full_cache(model), prompt(3, len(rows), seed=1)
        change(held)
        held.integrity()
        forward(model, ids[rows], expected)
        for token in more.split(1, 1):
            logits = forward(model, token, held), forward(model, token, expected)
            torch.testing.assert_close(*logits, rtol=0, atol=ROUNDING)
