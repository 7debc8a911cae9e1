"""Attention matching inside a cache: a bias of each kept key goes where its token goes, and attention reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache
from hf_kvcache.storage.memory import bytes_by_part
from hf_kvcache.storage.paged import PagedStorage
from hf_kvcache.storage.token_view import TokenView
from tests import families
from tests.eviction.toys import HEADS, PAGE, SINKS, TAIL, Toy, states
from tests.generation.layers import States
from tests.running import forward, left_padded, prompt
from tests.tolerances import assert_near

SIZES: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8}
REPLAYING = ("kvzip", "rms")


def storage_of(layer: Any) -> PagedStorage:
    storage = layer.flushed().storage
    assert storage is not None
    return storage


def biases(toy: Toy, row: int = 0) -> list[dict[int, float]]:
    """The bias of each token that a sequence holds, by its position, for each head."""
    held = TokenView.of(storage_of(toy.layer), np.array([row]))
    bias = held.bias()
    assert bias is not None
    return [
        {
            int(at): float(b)
            for at, b, there in zip(held.positions[0, h], bias[0, h], held.exists[0, h], strict=True)
            if there
        }
        for h in range(HEADS)
    ]


def by_definition(toy: Toy, new: States, row: int) -> torch.Tensor:
    """Output ``[n, Hq, D]`` of new tokens in float64: one softmax over what is held and them."""
    held = TokenView.of(storage_of(toy.layer), np.array([row]))
    bias, outputs = held.bias(), []
    assert bias is not None
    for query_head in range(new.query.shape[1]):
        head = query_head // (new.query.shape[1] // HEADS)
        there = held.exists[0, head]
        keys = torch.cat([held.states("keys")[0, head][there], new.key[row, head]]).double()
        values = torch.cat([held.states("values")[0, head][there], new.value[row, head]]).double()
        added = torch.cat([bias[0, head][there], torch.zeros(new.length)]).double()
        scores = new.query[row, query_head].double() @ keys.T * keys.shape[1] ** -0.5 + added
        later = torch.arange(len(keys)) > int(there.sum()) + torch.arange(new.length)[:, None]
        outputs.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ values)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("codec", ["none", "rotated8", "int8", pytest.param("unbiased4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("new", [1, 3, 20])
def test_attention_adds_the_bias(codec: str, new: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens, a few and a block of them, over rows of which one is padded, after two evictions."""
    monkeypatch.setenv("HF_KVCACHE_BACKEND", backend)
    toy, given, real = Toy("snapkv", codec, compensate="match"), states(140, 2), torch.ones(2, 140, dtype=torch.bool)
    real[1, :17] = False
    for start, stop in ((0, 80), (80, 120)):
        toy(given.at(start, stop), real)
    assert all(len({*head.values()}) > 8 for row in range(2) for head in biases(toy, row))
    expected = [by_definition(toy, given.at(120, 120 + new), row) for row in range(2)]
    assert_near(toy(given.at(120, 120 + new), real), torch.stack(expected))


@pytest.mark.parametrize("codec", ["none", "rotated8", "int8"])
def test_a_token_keeps_its_bias(codec: str) -> None:
    """While others are evicted around it and it moves to other pages; what is not packed has none."""
    toy, given = Toy("snapkv", codec, compensate="match"), states(120)
    toy(given.at(0, 60))
    for stop in range(68, 121, 8):
        before, packed = biases(toy), toy.positions()
        toy.run(given.at(stop - 8, stop))
        for head, (old, now) in enumerate(zip(before, biases(toy), strict=True)):
            moved = [at for at in packed[head][SINKS:-TAIL] if at in now]
            assert moved and all(now[at] == old[at] for at in moved)
            full = [*list(now)[:SINKS], *list(now)[-TAIL:]]
            assert not any(now[at] for at in full)
    assert toy.cache.layers[0].evictor.evictions > 4  # type: ignore[union-attr]
    toy.cache.integrity()


def test_the_bias_is_where_the_tokens_are() -> None:
    """In forks, reordered and repeated rows, a state that was saved, after a crop of decoded tokens, and in bytes."""
    toy, given = Toy("snapkv", "rotated8", compensate="match"), states(90, 3)
    toy(given.at(0, 80))
    before = [biases(toy, row) for row in range(3)]
    fork = toy.fork()
    fork.cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert [biases(fork, row) for row in range(3)] == [before[2], before[0], before[0]]
    loaded = Toy("snapkv", "rotated8", compensate="match")
    loaded.cache.load_state_dict({name: x.clone() for name, x in toy.cache.state_dict().items()})
    assert [biases(loaded, row) for row in range(3)] == before
    assert torch.equal(loaded(given.at(80, 81)), toy.fork()(given.at(80, 81)))
    fork = toy.fork()
    fork.cache.activate_past_recording()
    fork(given.at(80, 82))
    fork.cache.crop(-2)
    assert [biases(fork, row) for row in range(3)] == before
    storage, plain = storage_of(toy.layer), Toy("snapkv", "rotated8")
    plain(given.at(0, 80))
    pages = len(np.unique(storage.table.page_ids()))
    sizes = [bytes_by_part(one)["scales"] for one in (storage, storage_of(plain.layer))]
    assert sizes[0] - sizes[1] == 2 * PAGE * pages


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("kvzipplus", "rare-rms")]


@pytest.mark.parametrize("policy", [*REPLAYING, *SLOWER])
@pytest.mark.parametrize("bits", [None, 8])
def test_replayed_queries_are_matched(policy: str, bits: int | None) -> None:
    """A padded batch: for the queries of the second reading the output comes nearer, in float64, written out."""
    model, rows = families.build("llama"), [prompt(90, seed=1), prompt(71, seed=2)]
    batch = left_padded(rows)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    errors = {}
    for compensate in (0, "match"):
        cache = HeavyHitterCache(model.config, 24, policy, bits=bits, compensate=compensate, **SIZES)
        forward(model, batch["input_ids"], cache, attention_mask=mask, position_ids=positions)
        full = cache.fork()
        if compensate:
            found = cache.replay(model, batch["input_ids"], mask)
            assert found.queries is not None  # type: ignore[attr-defined]
            queries = found.queries  # type: ignore[attr-defined]
            assert [q.shape[2] for q in queries[0]] == [len(ids[0]) for ids in rows]
        cache.compress(model, batch["input_ids"], attention_mask=mask)
        cache.integrity()
        errors[compensate] = cache, full
    before, after = (matching_error(*errors[which], queries) for which in (0, "match"))
    assert after < 0.5 * before


def matching_error(cache: HeavyHitterCache, full: HeavyHitterCache, queries: list[list[torch.Tensor]]) -> float:
    """Squared distance of the outputs over what is kept from those over all, of all layers, heads and rows."""
    total = 0.0
    for kept_layer, full_layer, of_rows in zip(cache.own_layers, full.own_layers, queries, strict=True):
        for row, query in enumerate(of_rows):
            outputs = []
            for storage in (storage_of(kept_layer), storage_of(full_layer)):
                held = TokenView.of(storage, np.array([row]))
                bias, keys, values = held.bias(), held.states("keys")[0].double(), held.states("values")[0].double()
                grouped = query[0].double().unflatten(0, (len(keys), -1)) * keys.shape[2] ** -0.5
                scores = grouped @ keys[:, None].mT
                scores = scores if bias is None else scores + bias[0, :, None, None]
                scores = scores.masked_fill(~held.exists[0, :, None, None], -torch.inf)
                outputs.append(scores.softmax(-1) @ values[:, None])
            total += float((outputs[0] - outputs[1]).square().sum())
    return total


@pytest.mark.parametrize("policy", ["kvzip", "snapkv"])
def test_nothing_changes_where_everything_stays(policy: str, model: PreTrainedModel) -> None:
    """Bit by bit: biases are 0 and values are what they were."""
    ids, logits = prompt(60), []
    for compensate in (0, "match"):
        cache = HeavyHitterCache(
            model.config, 100, policy, "rotated8", key_axis="token", compensate=compensate, **SIZES
        )
        forward(model, ids, cache)
        cache.compress(model, ids)
        logits.append(forward(model, ids[:, :3], cache))
    assert torch.equal(*logits)


def test_bad_arguments(model: PreTrainedModel) -> None:
    for policy, given in (("kvzip", 8), ("snapkv", "fit"), ("snapkv", -1)):
        with pytest.raises(ValueError, match=rf"compensate={given!r}.*accepted"):
            HeavyHitterCache(model.config, 24, policy, compensate=given, **SIZES)  # type: ignore[arg-type]
    plain, matching, other = (
        HeavyHitterCache(model.config, 24, policy, compensate=compensate, **SIZES)  # type: ignore[arg-type]
        for policy, compensate in (("kvzip", 0), ("kvzip", "match"), ("rms", "match"))
    )
    for cache in (plain, matching, other):
        forward(model, prompt(60), cache)
    found = plain.replay(model, prompt(60))
    held = matching.memory().total
    with pytest.raises(ValueError, match=r"replayed has no queries.*accepted"):
        matching.compress(replayed=found)
    with pytest.raises(ValueError, match=r"replayed was measured for another policy.*accepted"):
        other.compress(replayed=found)
    assert matching.memory().total == held and all(not layer.evictor.evictions for layer in matching.own_layers)  # type: ignore[attr-defined]
    matching.compress(replayed=matching.replay(model, prompt(60)))
    assert matching.memory().total < held


def test_policies_see_the_bias() -> None:
    """Probabilities of observed queries over tokens of which some stand for others, by one softmax in float64."""
    toy, given = Toy("snapkv", compensate="match"), states(80)
    toy(given.at(0, 60))
    evictor, held = toy.layer.evictor, TokenView.of(storage_of(toy.layer), np.zeros(1, np.int64))
    assert evictor is not None
    selection = evictor.selection()
    context = selection.context(held, 10, selection.protected(held, 0))
    assert context.queries is not None and context.bias is not None and context.bias.abs().max() > 0.1
    found = torch.cat(list(context.probabilities()), 3)
    query = context.queries.double().unflatten(1, (HEADS, -1)) * context.scoring.scaling
    scores = query @ context.keys.double()[:, :, None].mT + context.bias.double()[:, :, None, None]
    later = context.positions[:, :, None] > context.query_positions.expand(1, -1)[:, None, :, None]  # type: ignore[union-attr]
    assert_near(found, scores.masked_fill(later[:, :, None], -torch.inf).softmax(-1).nan_to_num())
