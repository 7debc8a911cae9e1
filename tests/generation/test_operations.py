"""Random sequences of operations: after each, ``codec="none"`` equals DynamicCache, and the storage is intact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache import KVCache
from tests import families
from tests.running import ROUNDING, forward, full_cache, small_cache

_MOST_ROWS, _MOST_TOKENS = 4, 160

OPERATIONS = st.one_of(
    st.tuples(st.just("forward"), st.integers(1, 40)),
    st.tuples(st.just("forward"), st.integers(1, 3)),
    st.tuples(st.just("decode"), st.integers(1, 20)),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("reorder"), st.integers(0, 10**6)),
    st.tuples(st.just("select"), st.integers(0, 10**6)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("fork"), st.booleans()),
    st.tuples(st.just("reset"), st.none()),
)


class _Pair:
    """A KVCache and a DynamicCache that go through the same operations."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.ours: KVCache = small_cache(model)
        self.full: DynamicCache = full_cache(model)
        self.batch = 1
        self.draw = torch.Generator().manual_seed(0)

    def forward(self, length: int) -> None:
        length = min(length, _MOST_TOKENS - self.full.get_seq_length())
        if length <= 0:
            return
        ids = torch.randint(3, 99, (self.batch, length), generator=self.draw)
        logits = [forward(self.model, ids, cache) for cache in (self.ours, self.full)]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=ROUNDING)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.forward(1)

    def crop(self, part: float) -> None:
        remove = int(part * self.full.get_seq_length())
        self.ours.crop(-remove)
        if remove == self.full.get_seq_length():
            self.full = full_cache(self.model)
        else:
            self.full.crop(-remove)

    def _rows(self, seed: int, count: int) -> torch.Tensor:
        return torch.randint(0, self.batch, (count,), generator=torch.Generator().manual_seed(seed))

    def reorder(self, seed: int) -> None:
        rows = self._rows(seed, self.batch)
        for cache in (self.ours, self.full):
            if cache.get_seq_length():
                cache.reorder_cache(rows)

    def select(self, seed: int) -> None:
        if self.full.get_seq_length():
            rows = self._rows(seed, 1 + seed % self.batch)
            for cache in (self.ours, self.full):
                cache.batch_select_indices(rows)
            self.batch = len(rows)

    def repeat(self, times: int) -> None:
        if self.full.get_seq_length() and self.batch * times <= _MOST_ROWS:
            for cache in (self.ours, self.full):
                cache.batch_repeat_interleave(times)
            self.batch *= times

    def fork(self, go_on_with_the_fork: bool) -> None:
        other = self.ours.fork()
        if go_on_with_the_fork:
            self.ours, other = other, self.ours
        kept, full, rows = self.ours, self.full, self.batch
        # Operations on the other fork must have no effect here.
        self.ours, self.full = other, copy.deepcopy(self.full)
        self.decode(18)
        self.ours.integrity()
        self.ours, self.full, self.batch = kept, full, rows

    def reset(self, _: Any) -> None:
        self.ours.reset()
        self.full, self.batch = full_cache(self.model), 1


_MODEL = families.build("llama")


SETTINGS: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=20, **SETTINGS)
@given(st.lists(OPERATIONS, min_size=3, max_size=12))
def test_random_operations(operations: list[tuple[str, Any]]) -> None:
    """After any operations a KVCache continues like a DynamicCache that went through the same operations."""
    _run(operations)


@pytest.mark.slow
@settings(max_examples=150, **SETTINGS)
@given(st.lists(OPERATIONS, min_size=3, max_size=12))
def test_more_random_operations(operations: list[tuple[str, Any]]) -> None:
    _run(operations)


def _run(operations: list[tuple[str, Any]]) -> None:
    pair = _Pair(_MODEL)
    pair.forward(30)
    for name, argument in operations:
        getattr(pair, name)(argument)
        pair.ours.integrity()
        assert pair.ours.get_seq_length() == pair.full.get_seq_length()
        assert pair.ours.get_mask_sizes(1, 0) == pair.full.get_mask_sizes(1, 0)
    pair.decode(3)
