"""Dropping tokens from the storage, against plain lists: what is packed is packed once, and stays as it was."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.gathering import is_tokenwise
from hf_kvcache.storage.memory import bytes_by_part
from hf_kvcache.storage.pruning import keep_only
from hf_kvcache.storage.token_view import TokenView
from tests.storage.list_model import loose_tokens, random_tokens

PAGE, SINKS, TAIL, HEADS, DIM = 8, 2, 3, 2, 16
CODECS = {
    "none": ("none", {}),
    "rotated8": ("rotated", {"bits": 8, "key_axis": "token"}),
    "turboquant4": ("turboquant", {"bits": 4}),
    "int4": ("int", {"bits": 4}),
    "unbiased4": ("unbiased", {"bits": 4}),
    "kvarn3": ("kvarn", {"bits": 3}),
}


def make(codec: str, batch: int) -> PagedStorage:
    name, options = CODECS[codec]
    encoder = PageEncoder(resolve(name, **options), DIM, DIM, PAGE, torch.float32)
    like = torch.empty(batch, HEADS, 1, DIM)
    return PagedStorage(encoder, like, like, SINKS, TAIL)


@dataclass
class Token:
    """A token of one head: its position, its key and value, and how these were decoded when first seen packed."""

    position: int
    key: torch.Tensor
    value: torch.Tensor
    packed: tuple[torch.Tensor, torch.Tensor] | None = None


class Lists:
    """What each head of each sequence is to hold, oldest first."""

    def __init__(self, batch: int) -> None:
        self.rows: list[list[list[Token]]] = [[[] for _ in range(HEADS)] for _ in range(batch)]

    def append(self, keys: torch.Tensor, values: torch.Tensor, position: int, valid: np.ndarray | None) -> None:
        for b, row in enumerate(self.rows):
            for h, head in enumerate(row):
                for t in range(keys.shape[2]):
                    if valid is None or valid[b, t]:
                        head.append(Token(position + t, keys[b, h, t].clone(), values[b, h, t].clone()))

    def fork(self) -> Lists:
        other = Lists(0)
        other.rows = [[[copy.copy(token) for token in head] for head in row] for row in self.rows]
        return other


def look(storage: PagedStorage, lists: Lists) -> None:
    """The storage is sound and holds the tokens of the lists, each as it was when it was first seen."""
    storage.check()
    for b, row in enumerate(lists.rows):
        held = TokenView.of(storage, np.array([b]))
        keys, values = held.states("keys")[0], held.states("values")[0]
        assert held.tokens == max(map(len, row)), "no longer than its longest head"
        for h, head in enumerate(row):
            real = held.exists[0, h]
            assert real.sum() == len(head) and real[: len(head)].all()
            assert held.positions[0, h, : len(head)].tolist() == [token.position for token in head]
            for t, token in enumerate(head):
                found = keys[h, t], values[h, t]
                if held.slots[0, h, t] < held.used:
                    assert torch.equal(found[0], token.key) and torch.equal(found[1], token.value)
                    assert token.packed is None, "a packed token does not come back"
                elif token.packed is None:
                    token.packed = found[0].clone(), found[1].clone()
                    near = 0 if storage.encoder.layout.sides["keys"].level == "dense" else 3.0
                    assert (found[0] - token.key).abs().max() <= near
                else:
                    assert torch.equal(found[0], token.packed[0]) and torch.equal(found[1], token.packed[1])
            assert not keys[h, len(head) :].any() and not values[h, len(head) :].any()


def drop(storage: PagedStorage, lists: Lists, row: int, share: float, draw: np.random.Generator) -> None:
    """Keep a random ``share`` of what may go of a sequence, another in each head."""
    held = TokenView.of(storage, np.array([row]))
    keep = torch.from_numpy(draw.random(held.shape) < share)
    keep |= (held.slots < held.used) & ((held.slots < SINKS) | (held.slots >= held.used - TAIL))
    keep_only(held, keep, TAIL)
    lists.rows[row] = [
        [t for t, k in zip(head, keep[0, h], strict=False) if k] for h, head in enumerate(lists.rows[row])
    ]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("block"), st.integers(1, 30), st.booleans()),
        st.tuples(st.just("ones"), st.integers(1, 9), st.booleans()),
        st.tuples(st.just("drop"), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 2)),
        st.tuples(st.just("drop"), st.sampled_from([0.2, 0.6, 0.97]), st.integers(0, 2)),
        st.tuples(st.just("fork"), st.booleans(), st.none()),
        st.tuples(st.just("select"), st.integers(0, 999), st.none()),
        st.tuples(st.just("truncate"), st.integers(1, TAIL), st.none()),
        st.tuples(st.just("save"), st.none(), st.none()),
    ),
    min_size=3,
    max_size=14,
)


class Run:
    """A storage and the lists, the positions seen, and the forks that were left behind."""

    def __init__(self, codec: str, batch: int) -> None:
        self.codec, self.storage, self.lists = codec, make(codec, batch), Lists(batch)
        self.seen, self.draw, self.left = 0, np.random.default_rng(0), list[tuple[PagedStorage, Lists]]()

    def block(self, length: int, padded: bool) -> None:
        keys, values = random_tokens(self.seen + 1, self.storage.batch, length, (DIM, DIM), HEADS)
        valid = self.draw.random((self.storage.batch, length)) < 0.7 if padded else None
        self.storage.append_block(keys, values, self.seen, valid, pack=False)
        self.lists.append(keys, values, self.seen, valid)
        self.seen += length

    def ones(self, count: int, padded: bool) -> None:
        for _ in range(count):
            keys, values = random_tokens(self.seen + 1, self.storage.batch, 1, (DIM, DIM), HEADS)
            valid = self.draw.random((self.storage.batch, 1)) < 0.7 if padded else None
            self.storage.append_one(keys, values, self.seen, None if valid is None else valid[:, 0])
            self.lists.append(keys, values, self.seen, valid)
            self.seen += 1

    def drop(self, share: float, row: int) -> None:
        drop(self.storage, self.lists, row % self.storage.batch, share, self.draw)

    def fork(self, stay: bool, _: None) -> None:
        other = self.storage.fork(), self.lists.fork()
        if not stay:
            other, (self.storage, self.lists) = (self.storage, self.lists), other
        self.left.append(other)

    def select(self, seed: int, _: None) -> None:
        rows = np.random.default_rng(seed).integers(0, self.storage.batch, 1 + seed % 3)
        self.storage.select(rows)
        copied = self.lists.fork().rows
        self.lists.rows = [[[copy.copy(t) for t in head] for head in copied[row]] for row in rows]

    def truncate(self, count: int, _: None) -> None:
        # No further than the tail, so that heads lose the same tokens.
        self.seen = max(self.seen - count, 0)
        self.storage.truncate_from(self.seen)
        self.lists.rows = [[[t for t in head if t.position < self.seen] for head in row] for row in self.lists.rows]

    def save(self, *_: None) -> None:
        state = self.storage.state()
        self.storage = make(self.codec, self.storage.batch)
        self.storage.restore(state)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, batch=st.integers(1, 3))
def test_against_lists(codec: str, steps: list[tuple[str, object, object]], batch: int) -> None:
    """After any operations each storage holds what its lists hold, and no fork notices the others."""
    run = Run(codec, batch)
    run.block(40, False)
    for name, *arguments in steps:
        getattr(run, name)(*arguments)
        look(run.storage, run.lists)
    for storage, lists in run.left:
        look(storage, lists)
    run.storage.pool.check()


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_dropped_is_freed(codec: str) -> None:
    """Where tokens can move no head has more than a page that is not full; else pages go with their last token."""
    storage, lists, draw = make(codec, 2), Lists(2), np.random.default_rng(1)
    keys, values = random_tokens(3, 2, 400, (DIM, DIM), HEADS)
    storage.append_block(keys, values, 0, None, pack=False)
    lists.append(keys, values, 0, None)
    for row in range(2):
        drop(storage, lists, row, 1.0, draw)
    full, bytes_before = len(np.unique(storage.table.page_ids())), sum(bytes_by_part(storage).values())
    for share in (0.5, 0.4, 0.2):
        for row in range(2):
            drop(storage, lists, row, share, draw)
        look(storage, lists)
    used = len(np.unique(storage.table.page_ids()))
    assert storage.pool.held_pages - storage.pool.free_pages == used
    if is_tokenwise(storage.layout):
        counts = [len(head) - SINKS - TAIL for row in lists.rows for head in row]
        assert used <= sum(-(-count // PAGE) + 2 for count in counts) < full / 4
        assert sum(bytes_by_part(storage).values()) < bytes_before / 2
    else:
        assert used < full


@pytest.mark.parametrize("codec", CODECS)
def test_forgotten_pages_never_show(codec: str) -> None:
    """Freed pages and the places behind a page's last token may hold anything: nothing of it reaches attention."""
    storage, lists, draw = make(codec, 1), Lists(1), np.random.default_rng(2)
    keys, values = random_tokens(5, 1, 100, (DIM, DIM), HEADS)
    storage.append_block(keys, values, 0, None, pack=False)
    lists.append(keys, values, 0, None)
    for share in (1.0, 0.6, 0.5):
        drop(storage, lists, 0, share, draw)
    look(storage, lists)
    query = torch.randn(1, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(0))

    def attend() -> torch.Tensor:
        see = Visibility(100, 1, None, 0, True, None)
        return reference.attend(query, storage.pages(), loose_tokens(storage), see, Scoring(DIM**-0.5)).output

    expected = attend()
    used = np.unique(storage.table.page_ids())
    records = storage.pool.read(used).clone()
    for slab in storage.pool.slabs():
        slab.view(torch.uint8).fill_(255)
    storage.pool.write(used, records)
    storage.dense.keys[:, :, storage.dense.longest :] = torch.nan
    look(storage, lists)
    assert torch.equal(attend(), expected)
    by_hand = [lists.rows[0][h // 2] for h in range(2 * HEADS)]
    for h, tokens in enumerate(by_hand):
        stored = [t.packed or (t.key, t.value) for t in tokens]
        k, v = (torch.stack(side).double() for side in zip(*stored, strict=True))
        weights = (k @ query[0, h, 0].double() * DIM**-0.5).softmax(0)
        torch.testing.assert_close(expected[0, 0, h].double(), weights @ v, rtol=0, atol=1e-5)


def test_slabs_are_given_back() -> None:
    """A pool that held a long prompt does not keep its memory once the prompt is gone."""
    storage, lists, draw = make("none", 1), Lists(1), np.random.default_rng(3)
    keys, values = random_tokens(7, 1, 6000, (DIM, DIM), HEADS)
    storage.append_block(keys, values, 0, None, pack=False)
    lists.append(keys, values, 0, None)
    drop(storage, lists, 0, 1.0, draw)
    before = storage.pool.held_pages
    for share in (0.3, 0.3, 0.3):
        drop(storage, lists, 0, share, draw)
    gc.collect()
    look(storage, lists)
    assert storage.pool.held_pages < before / 4
    slab_bytes = sum(slab.untyped_storage().nbytes() for slab in storage.pool.slabs())
    assert slab_bytes < sum(bytes_by_part(storage).values()) * 1.1
