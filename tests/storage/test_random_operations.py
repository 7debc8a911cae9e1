"""Random sequences of operations on dense pages against plain lists."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.decode_step import PreparedDecoding
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.storage import PagedStorage
from tests.storage.list_model import (
    HEADS,
    KEY_DIM,
    ListModel,
    assert_holds,
    attention_by_lists,
    loose_tokens,
    make_storage,
    random_tokens,
)
from tests.storage.outside import target
from tests.tolerances import assert_near


class Sequences:
    """A storage, what it is to hold, and how many positions it has seen."""

    def __init__(self, storage: PagedStorage, model: ListModel, seen: int = 0) -> None:
        self.storage, self.model, self.seen = storage, model, seen
        #: What does plain decoding, by window: kept, so that it meets every change of the storage.
        self.steps = {window: PreparedDecoding(window) for window in (None, 9)}


class StorageMachine(RuleBasedStateMachine):
    """Runs operations on a family of forks; after each, every fork is sound and holds what its lists hold."""

    @initialize(
        batch=st.integers(1, 3),
        page_size=st.sampled_from([2, 4]),
        sinks=st.integers(0, 3),
        tail=st.integers(0, 5),
        outside=st.sampled_from([None, "files", "fetched"]),
    )
    def start(self, batch: int, page_size: int, sinks: int, tail: int, outside: str | None) -> None:
        self.outside = target(outside)
        storage = make_storage("none", batch, page_size, sinks, tail, outside=self.outside)
        self.forks = [Sequences(storage, ListModel(batch, page_size, sinks, tail))]
        self.current = self.forks[0]
        self.seed = 0

    def tokens(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seed += 1
        return random_tokens(self.seed, self.current.storage.batch, length)

    def valid(self, data: st.DataObject, length: int) -> np.ndarray:
        row = st.lists(st.booleans(), min_size=length, max_size=length)
        return np.array([data.draw(row) for _ in range(self.current.storage.batch)])

    @rule(padded=st.sampled_from([False, False, False, True]), data=st.data())
    def append_one(self, padded: bool, data: st.DataObject) -> None:
        now, (keys, values) = self.current, self.tokens(1)
        valid = self.valid(data, 1) if padded else None
        now.storage.append_one(keys, values, now.seen, None if valid is None else valid[:, 0])
        now.model.append(keys, values, now.seen, valid)
        now.seen += 1

    @precondition(lambda self: self.current.storage.ahead == 0)
    @rule(
        count=st.integers(1, 6),
        length=st.sampled_from([1, 1, 1, 2, 5, 16]),
        window=st.sampled_from([None, 9]),
        capped=st.booleans(),
    )
    def decode(self, count: int, length: int, window: int | None, capped: bool) -> None:
        now, softcap = self.current, 2.0 if capped else None
        for _ in range(count if length == 1 else 1):
            keys, values = self.tokens(length)
            query = random_tokens(self.seed + 5000, now.storage.batch, length, (KEY_DIM, 1), 3 * HEADS)[0]
            new = NewTokens(keys, values, now.seen)
            dense = now.storage.dense
            for row, used in enumerate(dense.lengths):
                for buffer in (dense.keys, dense.values):
                    buffer[row, :, used:] = torch.nan
            output = now.steps[window].attend(now.storage, new, query, Scoring(0.25, softcap))
            for buffer in (dense.keys, dense.values):
                buffer.nan_to_num_()
            assert new.stored == (output is not None)
            if output is None:  # no kernel does both at once here
                now.storage.append_block(keys, values, now.seen, None, pack=False)
            now.model.append(keys, values, now.seen, None)
            if output is not None:
                assert_near(output, attention_by_lists(now.model, query, now.seen, 0.25, True, window, softcap))
            now.seen += length
            now.storage.pack_due()
            now.model.pack_due()

    @rule(
        length=st.integers(1, 19),
        padded=st.sampled_from([False, False, False, True]),
        pack=st.booleans(),
        data=st.data(),
    )
    def append_block(self, length: int, padded: bool, pack: bool, data: st.DataObject) -> None:
        now, (keys, values) = self.current, self.tokens(length)
        valid = self.valid(data, length) if padded else None
        pack = pack and now.storage.ahead == 0  # a block is not packed while pages wait to be confirmed
        now.storage.append_block(keys, values, now.seen, valid, pack)
        now.model.append(keys, values, now.seen, valid)
        now.seen += length
        if pack:
            now.model.pack_due()

    @precondition(lambda self: self.current.storage.ahead == 0)
    @rule()
    def pack_due(self) -> None:
        self.current.storage.pack_due()
        self.current.model.pack_due()

    @precondition(lambda self: self.current.storage.dense.uniform_length is not None)
    @rule(data=st.data())
    def pack_ahead(self, data: st.DataObject) -> None:
        storage = self.current.storage
        room = (storage.dense.longest - storage.sink_length) // storage.page_size
        pages = data.draw(st.integers(0, max(room, 0)))
        storage.pack_ahead(pages)
        self.current.model.ahead = max(self.current.model.ahead, pages)

    @rule()
    def commit_ahead(self) -> None:
        self.current.storage.commit_ahead()
        self.current.model.flush()

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        now = self.current
        now.seen = data.draw(st.integers(max(0, now.seen - 12), now.seen))
        now.storage.truncate_from(now.seen)
        now.model.truncate_from(now.seen)

    @precondition(lambda self: self.current.storage.ahead == 0)
    @rule(data=st.data())
    def drop_before(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, self.current.seen))
        self.current.storage.drop_before(position)
        self.current.model.drop_before(position)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, self.current.storage.batch - 1), min_size=1, max_size=4))
        self.current.storage.select(np.array(rows))
        self.current.model.select(rows)

    @precondition(lambda self: len(self.forks) < 3)
    @rule()
    def fork(self) -> None:
        now = self.current
        held = now.storage.pool.held_pages
        self.forks.append(Sequences(now.storage.fork(), now.model.fork(), now.seen))
        assert now.storage.pool.held_pages == held

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        self.current = data.draw(st.sampled_from(self.forks))

    @rule()
    def save_and_load(self) -> None:
        now, old = self.current, self.current.storage
        sizes = old.batch, old.page_size, old.sink_length, old.tail_length
        now.storage = make_storage("none", *sizes, outside=self.outside)
        now.storage.restore(old.state())
        used = len(np.unique(old.table.page_ids()))
        assert now.storage.pool.held_pages - now.storage.pool.free_pages == used
        assert len(now.storage.pool.positions) <= len(old.pool.positions)

    @precondition(lambda self: len(self.forks) > 1)
    @rule()
    def forget_a_fork(self) -> None:
        self.forks.remove(self.current)
        self.current = self.forks[0]
        gc.collect()

    @precondition(lambda self: self.current.seen > 0)
    @rule(
        length=st.integers(1, 3),
        window=st.sampled_from([None, 1, 5, 14]),
        capped=st.booleans(),
        data=st.data(),
    )
    def attend(self, length: int, window: int | None, capped: bool, data: st.DataObject) -> None:
        now, storage = self.current, self.current.storage
        paged = [token.position for row in now.model.rows for page in row.pages for token in page]
        read_ahead = data.draw(st.integers(0, storage.ahead))
        for row in now.model.rows:
            stop = storage.sink_length + read_ahead * storage.page_size
            paged += [token.position for token in row.loose[storage.sink_length : stop] if read_ahead]
        start = max(now.seen - length, max(paged, default=-1) + 1)
        self.seed += 1
        query = random_tokens(self.seed, storage.batch, length, (KEY_DIM, 1), 3 * HEADS)[0]
        softcap = 2.0 if capped else None
        output = reference.attend(
            query,
            storage.pages(read_ahead),
            loose_tokens(storage, read_ahead),
            Visibility(start, length, None, 0, True, window),
            Scoring(0.25, softcap),
        ).output
        assert_near(output, attention_by_lists(now.model, query, start, 0.25, True, window, softcap))

    @invariant()
    def everything_is_as_listed(self) -> None:
        for fork in getattr(self, "forks", []):
            assert_holds(fork.storage, fork.model, fork.seen)

    def teardown(self) -> None:
        """Nothing is left in the pool once every fork has let go."""
        if hasattr(self, "forks"):
            pools = [fork.storage.pool for fork in self.forks]
            for fork in self.forks:
                fork.storage.table.truncate_from(0)
            gc.collect()
            for pool in pools:
                pool.check()
                assert pool.held_pages == 0 and pool.free_pages == 0 and not pool.positions


def _tested(examples: int) -> Any:
    """The machine as a test case, with so many runs, or as many as ``HF_KVCACHE_EXAMPLES`` says."""
    case = type(StorageMachine.TestCase)("TestCase", (StorageMachine.TestCase,), {})
    case.settings = settings(
        max_examples=int(os.environ.get("HF_KVCACHE_EXAMPLES", examples)),
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestStorage = _tested(25)
TestStorageLonger = pytest.mark.slow(_tested(100))
