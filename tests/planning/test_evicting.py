"""Plans of caches that keep some tokens: of every policy, where heads compete, and while the prompt is read."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache import KVCache, unbind
from hf_kvcache.cache.memory import tensor_bytes
from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.eviction.registry import available
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from hf_kvcache.planning.evicting import widest_split
from hf_kvcache.storage.memory import bytes_by_part
from tests import families
from tests.planning.holding import BATCH, CONTEXT, fill, held, saved_by_chance

#: Those that differ in what decides the bytes: sums, a budget by layer with a window of queries, every query.
SAMPLE = ("h2o", "pyramidkv", "expected")
#: Policies whose heads compete.
NOT_EQUAL = ("gate", "kvzip", "kvzipplus", "rms")


@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=[] if p in SAMPLE else pytest.mark.slow) for p in available() if p not in NOT_EQUAL],
)
def test_every_policy(policy: str) -> None:
    """In tokens and as a share; in full precision, packed, and packed so that tokens share scales."""
    model = families.build("llama")
    names = [f"{policy}:90", f"{policy}:0.6+4bits", f"{policy}:0.95+kvarn4", f"{policy}:1k"]
    found = plan(model.config, CONTEXT, BATCH, names, torch.float32)
    assert [row.name for row in found.caches] == names, found.unknown
    for row in found.caches:
        cache = fill(model, maker(row.name)(model.config))
        assert row.bytes == held(cache) + saved_by_chance(cache), row.name


@pytest.mark.parametrize("name", ["ada-snapkv:90", "critical-ada-expected:0.4", "kvzip:0.3", "across-knorm:0.3"])
def test_at_most_where_heads_compete(name: str) -> None:
    """The plan is an upper bound, and above what is held by less than a page and its positions a head."""
    model = families.build("llama")
    (row,) = plan(model.config, CONTEXT, BATCH, [name], torch.float32).caches
    cache = fill(model, maker(name)(model.config))
    (record,) = {layer.storage.layout.record_bytes for layer in cache.layers}
    heads = BATCH * model.config.num_hidden_layers * model.config.num_key_value_heads
    columns = 28 * sum(layer.storage.table.lengths.size * CONTEXT // 64 for layer in cache.layers)
    assert "at most" in row.note
    assert held(cache) <= row.bytes <= held(cache) + saved_by_chance(cache) + heads * (record + 8 * 64) + columns


@pytest.mark.parametrize(
    ("name", "family"), [("h2o:100", "llama"), ("snapkv:0.3+4bits", "gemma2"), ("expected:64", "llama")]
)
def test_the_peak_is_met(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all layers hold when one of them is about to evict, and the pages that it then makes."""
    model, seen, evict = families.build(family), list[int](), Evictor.evict
    (row,) = plan(model.config, CONTEXT, BATCH, [name], torch.float32).caches
    cache: Any = maker(name)(model.config)

    def measured(self: Evictor, storage: Any, rows: np.ndarray, tokens: int) -> None:
        layers = [layer for layer in cache.layers if layer.storage is not None]
        before = sum(sum(bytes_by_part(layer.storage).values()) + tensor_bytes(layer.own_tensors()) for layer in layers)
        evict(self, storage, rows, tokens)
        seen.append(before + storage.pool.held_pages * storage.layout.record_bytes)

    monkeypatch.setattr(Evictor, "evict", measured)
    fill(model, cache)
    assert row.peak == max(*seen, held(cache)) > row.bytes


def test_a_second_reading_holds_the_prompt_twice() -> None:
    """What waits for compress() holds the whole prompt, and then a copy of it."""
    model = families.build("llama")
    (row,) = plan(model.config, CONTEXT, BATCH, ["kvzip:0.3"], torch.float32).caches
    cache: Any = maker("kvzip:0.3")(model.config)
    with torch.no_grad():
        model(torch.ones(BATCH, CONTEXT, dtype=torch.int64), use_cache=True, **with_cache(model, cache))
    unbind(model.config)
    assert row.peak == 2 * held(cache) and "compress(model, input_ids)" in row.note


@pytest.mark.parametrize(
    "name",
    ["h2o:100", "kvzip:100"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("expected:64+4bits", "window:70", "ada-snapkv:70")],
)
def test_long_prompts_are_planned_by_short_ones(name: str) -> None:
    """A plan of a long prompt is what the same arithmetic says that is given every token."""
    config = families.build("llama").config
    lengths = [3001, 20000]
    (row,) = plan(config, lengths[0], 1, [name], torch.float32, lengths=lengths).caches
    assert row.curve[3001] == row.curve[20000] == row.bytes and row.bytes_per_token == 0
    (longer,) = plan(config, lengths[1], 1, [name], torch.float32).caches
    copies = 2 if name.startswith("kvzip") else 1
    layers = config.num_hidden_layers if copies == 2 else 1
    states = 2 * config.num_key_value_heads * config.head_dim * 4 + 8  # and the position
    more = (longer.peak - row.peak) / (lengths[1] - lengths[0])
    observed = {"h2o": 4 * config.num_key_value_heads, "expected": 4 * config.num_attention_heads * config.head_dim}
    assert more == copies * layers * (states + observed.get(name.split(":")[0], 0))


def test_widest_split() -> None:
    """Against all ways to share tokens among three heads."""
    for total, most, page in itertools.product(range(13), (4, 5, 7), (2, 3, 4)):
        ways = [way for way in itertools.product(range(most + 1), repeat=3) if sum(way) == total]
        if ways:
            found = tuple(widest_split(total, 3, most, page).tolist())
            pages = [[-(-n // page) for n in way] for way in ways]
            mine = [-(-n // page) for n in found]
            assert found in ways
            assert sum(mine) == max(map(sum, pages)) and max(mine) + 1 >= max(map(max, pages)), (total, most, page)


def test_a_cache_without_bases_cannot_be_made() -> None:
    config = families.build("llama").config
    with pytest.raises(ValueError, match="lowrank:8: a cache of coefficients needs the bases"):
        maker("lowrank:8")(config)
    assert isinstance(maker("h2o:90")(config), KVCache)
