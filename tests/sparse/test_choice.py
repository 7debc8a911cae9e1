"""What a step reads: the choice of pages, attention over them and the bytes, against loops in float64."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_kvcache import SparseReadCache
from hf_kvcache.integration.attention import attention_function
from hf_kvcache.layers.sparse import SparseLayer
from hf_kvcache.sparse import reader as sparse_reader
from hf_kvcache.sparse.fetched import FetchedPages
from hf_kvcache.storage.page_table import ids_at
from tests.generation.test_offload import outside
from tests.sparse import brute_force
from tests.storage.outside import target
from tests.tolerances import SPLIT_IN_16_BITS, assert_within

SINKS, TAIL, PAGE = 2, 5, 8


def _one_layer(heads: int, kv_heads: int, dim: int, **options: Any) -> tuple[LlamaAttention, SparseReadCache]:
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        intermediate_size=8,
        vocab_size=8,
    )
    sizes = {"sink_length": SINKS, "tail_length": TAIL, "page_size": PAGE, "dense_layers": 0}
    return LlamaAttention(config, 0), SparseReadCache(config, **{**sizes, **options})


class Sequences:
    """A layer under test, and all that it was given, as lists of arrays."""

    def __init__(self, batch: int, heads: int, kv_heads: int, dim: int, **options: Any) -> None:
        self.attention, self.cache = _one_layer(heads, kv_heads, dim, **options)
        by_mass = self.cache.options.sparse.selector.name == "moments"
        self.scores = partial(brute_force.page_masses, page=PAGE) if by_mass else brute_force.page_scores
        self.heads, self.kv_heads, self.dim, self.amount = heads, kv_heads, dim, options["read_budget"]
        self.draw = torch.Generator().manual_seed(0)
        self.offset = 2 * torch.randn(1, kv_heads, 1, dim, generator=self.draw)
        empty = torch.zeros(batch, kv_heads, 0, dim)
        self.keys, self.values, self.valid = empty, empty, torch.ones(batch, 0, dtype=torch.bool)

    @property
    def layer(self) -> SparseLayer:
        layer = self.cache.layers[0]
        assert isinstance(layer, SparseLayer)
        return layer

    def add(self, count: int, padding: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the layer so many tokens; returns their queries and its output."""
        batch = self.keys.shape[0]
        query, key, value = (
            torch.randn(batch, n, count, self.dim, generator=self.draw)
            for n in (self.heads, self.kv_heads, self.kv_heads)
        )
        key = key + self.offset
        new = torch.ones(batch, count, dtype=torch.bool) if padding is None else padding
        self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        self.valid = torch.cat([self.valid, new], 1)
        #: The pages of each sequence before these tokens came: a step packs others behind its attention.
        self.spans = [brute_force.pages_of(self.layer, row) for row in range(batch)]
        total, seen = self.keys.shape[2], self.keys.shape[2] - count
        mask = None if bool(self.valid.all()) else self.valid  # as flash attention's masks: padding and nothing else
        if not seen:
            mask = (torch.arange(total) <= torch.arange(total)[:, None]) & self.valid[:, None, None]
        with torch.inference_mode():
            handles = self.cache.update(key, value, 0)
            return query, attention_function(self.attention, query, *handles, mask)[0]

    def check_step(self, query: torch.Tensor, output: torch.Tensor) -> None:
        """The output of one token is attention over sinks, tail and the best pages, and so are the bytes read."""
        picked, pages_read, tokens = brute_force.chosen(self.layer), 0, 0
        storage = self.layer.storage
        assert storage is not None
        held = np.concatenate([self.layer.decompressed("keys"), self.layer.decompressed("values")], -1)
        for row, spans in enumerate(self.spans):
            packed = {position for span in spans for position in span}
            others = [t for t in torch.nonzero(self.valid[row]).flatten().tolist() if t not in packed]
            allowed = brute_force.pages_allowed(self.amount, spans, SINKS, TAIL, PAGE)
            tokens += len(others)
            for head in range(self.kv_heads):
                both = torch.cat([self.keys, self.values], -1)[row, head].double().numpy()
                both[list(packed)] = held[row, head][list(packed)]
                keys, values = both[:, : self.dim], both[:, self.dim :]
                group = self.heads // self.kv_heads
                own = slice(head * group, (head + 1) * group)
                asked = query[row, own, 0].double().numpy()
                columns = list(range(len(spans)))
                assert picked is not None or allowed == len(spans)
                if picked is not None:
                    columns = picked[row * self.kv_heads + head]
                    least, most = self.scores(keys, asked, spans)
                    assert len(columns) == allowed and columns == sorted(set(columns))
                    rest = np.delete(least, columns)
                    assert not len(rest) or most[columns].min() >= rest.max() - 1e-3
                pages_read += len(columns)
                seen = others + [t for column in columns for t in spans[column]]
                expected = np.stack([brute_force.attention(q, keys, values, sorted(seen)) for q in asked])
                assert_within(output[row, 0, own], torch.from_numpy(expected), SPLIT_IN_16_BITS["output"])
        read = self.cache.memory().read_last_step
        assert read["pages"] == pages_read * storage.layout.record_bytes
        if len(set(self.valid.sum(1).tolist())) == 1:
            assert read["tokens"] == tokens * self.kv_heads * 2 * self.dim * 4


@settings(max_examples=25, deadline=None)
@example([], 50, 2, (3, 1, 24), 31, "int4", "quest", None)  # a bound lies on a step of 8 bits
@example(["token", "token", "crop"], 47, 1, (4, 2, 8), 31, "none", "moments", None)  # the second half has two tokens
@example(["token", "crop"], 23, 1, (4, 2, 8), 0.2, "none", "moments", None)  # ... and one
@given(
    steps=st.lists(st.sampled_from(["token", "token", "tokens", "block", "crop", "reorder", "fork"]), max_size=6),
    prompt=st.integers(1, 90),
    batch=st.integers(1, 2),
    shape=st.sampled_from([(4, 2, 8), (3, 1, 24), (6, 2, 16)]),
    amount=st.sampled_from([0.2, 0.5, SINKS + TAIL + PAGE, SINKS + TAIL + 3 * PAGE]),
    codec=st.sampled_from(["none", "rotated8", "int4"]),
    selector=st.sampled_from(["moments", "quest"]),
    where=st.sampled_from([None, "fetched", "fetched", "files"]),
)
def test_random_operations(
    steps: list[str],
    prompt: int,
    batch: int,
    shape: tuple[int, int, int],
    amount: float,
    codec: str,
    selector: str,
    where: str | None,
) -> None:
    """After prompts, chunks, crops, reordering and forks, each token reads the best pages and no others.

    So it does with pages outside of the device, of which it then fetches those that it has not.
    """
    model = Sequences(batch, *shape, read_budget=amount, codec=codec, selector=selector)
    outside(model.cache, target(where))
    model.add(prompt)
    for step in [*steps, "token"]:
        if step == "crop" and model.keys.shape[2] > 12:
            model.cache.crop(-9)
            model.keys, model.values, model.valid = model.keys[:, :, :-9], model.values[:, :, :-9], model.valid[:, :-9]
        elif step == "reorder":
            rows = torch.arange(batch).flip(0)
            model.cache.reorder_cache(rows)
            model.keys, model.values, model.valid = model.keys[rows], model.values[rows], model.valid[rows]
        elif step == "fork":
            model.cache = model.cache.fork()
        elif step == "block":
            model.add(20)
        elif step in ("token", "tokens"):
            for _ in range(9 if step == "tokens" else 1):
                query, output = model.add(1)
            model.check_step(query, output)
    model.cache.integrity()


def test_a_step_fetches_what_is_not_there() -> None:
    """Picked pages that earlier steps have left on the device are not fetched again, and no other page ever is."""
    model = Sequences(2, 4, 2, 16, read_budget=0.3, codec="rotated8")
    outside(model.cache, target("fetched"))
    model.add(200)
    kept, latest = 0, set[int]()
    for _ in range(3 * PAGE):
        before, reader = model.cache.memory().fetched, model.layer._reader
        there = set() if reader is None or reader.resident is None else set(reader.resident._ids.tolist())
        found = model.add(1)
        report = model.cache.memory()
        model.check_step(*found)  # which reads all pages
        storage, read = model.layer.storage, model.layer.latest_read
        assert storage is not None and read is not None and isinstance(read.pages, FetchedPages)
        columns = np.array(brute_force.chosen(model.layer))
        picked = {int(page) for page in ids_at(storage.table, columns).flatten()}
        assert latest <= there
        new, latest = picked - there, picked
        slots = report.layers[0].buffers // storage.layout.record_bytes
        assert report.fetched - before == len(new) * storage.layout.record_bytes
        assert len(picked) <= slots <= 1.25 * len(picked) + 1 + len(columns)
        kept += len(picked) - len(new)
    assert kept
    model.cache.offload(0)
    model.cache.prefetch(0)
    before = model.cache.memory().fetched
    model.add(1)
    assert model.cache.memory().fetched - before == model.cache.memory().read_last_step["pages"]
    fork = model.cache.fork()
    assert fork.memory().fetched == 0
    fork.integrity()


@pytest.mark.parametrize("selector", ["moments", "quest"])
def test_padded_rows(selector: str) -> None:
    """In a padded batch each row reads as many pages as it would alone, and the best ones of its own."""
    model = Sequences(3, 4, 2, 16, read_budget=0.4, codec="rotated8", selector=selector)
    padding = torch.arange(70) >= torch.tensor([0, 33, 66])[:, None]
    model.add(70, padding)
    for _ in range(12):
        model.check_step(*model.add(1))


@pytest.mark.parametrize("padding", [0, 41])
@pytest.mark.parametrize(("shape", "amount"), [((4, 2, 16), 0.3), ((9, 3, 8), 0.6), ((2, 1, 24), 0.2)])
def test_heads_share(shape: tuple[int, int, int], amount: float, padding: int) -> None:
    """With ``across=True`` the best pages of all heads are read, as many as the heads may read together.

    Each sequence of a padded batch reads what it would alone.
    """
    model = Sequences(2, *shape, read_budget=amount, codec="none", selector="moments", across=True)
    model.add(120, torch.arange(120) >= torch.tensor([0, padding])[:, None])
    heads, kv_heads, _ = shape
    uneven = False
    for _ in range(2 * PAGE):
        query, output = model.add(1)
        picked = brute_force.chosen(model.layer)
        for row, spans in enumerate(model.spans):
            allowed = brute_force.pages_allowed(amount, spans, SINKS, TAIL, PAGE)
            keys, values = model.keys[row].double().numpy(), model.values[row].double().numpy()
            asked = query[row, :, 0].double().numpy().reshape(kv_heads, heads // kv_heads, -1)
            packed = {position for span in spans for position in span}
            others = [t for t in torch.nonzero(model.valid[row]).flatten().tolist() if t not in packed]
            expected = brute_force.chosen_across_heads(keys, asked, spans, others[:SINKS], PAGE, allowed)
            assert picked[row * kv_heads : (row + 1) * kv_heads] == expected
            assert sum(map(len, expected)) == kv_heads * allowed
            uneven |= len(set(map(len, expected))) > 1
            for head, columns in enumerate(expected):
                seen = sorted(others + [t for column in columns for t in spans[column]])
                exact = [brute_force.attention(q, keys[head], values[head], seen) for q in asked[head]]
                own = slice(head * len(exact), (head + 1) * len(exact))
                assert_within(output[row, 0, own], torch.from_numpy(np.stack(exact)), SPLIT_IN_16_BITS["output"])
    assert uneven == (kv_heads > 1)


@pytest.mark.parametrize("selector", ["moments", "quest"])
def test_a_block_reads_the_union(selector: str) -> None:
    """Several tokens at once read what any of them picks; more than 16 read everything."""
    model = Sequences(1, 4, 2, 16, read_budget=0.3, codec="none", selector=selector)
    model.add(100)
    fork = model.cache.fork()
    query, _ = model.add(3)
    union = brute_force.chosen(model.layer)
    for head in range(2):
        expected: set[int] = set()
        spans = model.spans[0]
        allowed = brute_force.pages_allowed(0.3, spans, SINKS, TAIL, PAGE)
        for token in range(3):
            keys = model.keys[0, head].double().numpy()
            scores, _ = model.scores(keys, query[0, 2 * head : 2 * head + 2, token].double().numpy(), spans)
            expected |= set(np.argsort(-scores)[:allowed].tolist())
        assert union[head] == sorted(expected) and allowed < len(expected)
    model.cache = fork
    model.keys, model.values, model.valid = model.keys[:, :, :100], model.values[:, :, :100], model.valid[:, :100]
    model.add(17)
    assert model.layer.latest_read is not None and model.layer.latest_read.summaries == 0


def test_a_page_event_summarizes_new_pages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """While decoding, keys of a page are decoded once, however many pages there are."""
    from hf_kvcache.sparse import summaries

    made: list[int] = []
    keys_of = summaries._keys_of

    def counted(storage: Any, start: int, stop: int) -> Any:
        made.append(stop - start)
        return keys_of(storage, start, stop)

    monkeypatch.setattr(summaries, "_keys_of", counted)
    model = Sequences(1, 4, 2, 16, read_budget=0.3, codec="rotated8")
    model.add(90)
    model.add(1)
    first = sum(made)
    for _ in range(4 * PAGE):
        model.add(1)
    assert first == 10 and made[-4:] == [1, 1, 1, 1] and sum(made) == first + 4
    model.cache.reorder_cache(torch.tensor([0]))
    model.cache.fork()
    model.add(1)
    assert sum(made) <= first + 5


def test_an_interrupted_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of the dtype before go on with the call that was prepared for them, and with what it writes to."""
    model = Sequences(1, 4, 2, 16, read_budget=0.3, codec="rotated8")
    model.add(90)
    model.add(1)
    storage, query = model.layer.storage, torch.randn(1, 4, 1, 16, generator=model.draw)
    assert storage is not None
    pages, chosen = storage.pages(), model.layer.reader(storage)
    assert pages is not None
    limits = chosen.limits(storage, pages)
    first = chosen.pick_prepared(storage, pages, limits, query, 0.25)
    if first is None:
        pytest.skip("this backend prepares no choice")
    expected = first.table.clone()
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(sparse_reader, "prepare_choice", Mock(side_effect=MemoryError))
        chosen.pick_prepared(storage, pages, limits, query.bfloat16(), 0.25)
    again = chosen.pick_prepared(storage, pages, limits, query, 0.25)
    assert again is not None and torch.equal(again.table, expected) and expected[0].all()
