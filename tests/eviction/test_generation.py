"""Whole models of several families generate with evicting caches, in every way that ``generate`` has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache, SlidingWindowCache
from hf_kvcache.eviction import resolve
from hf_kvcache.layers.evicting import EvictingLayer
from tests import families
from tests.choosing import chosen
from tests.eviction.toys import INTERVAL, SINKS, TAIL, gate_option, policies, reading_once, small_options
from tests.running import assert_same, forward, full_cache, generate, left_padded, prompt

BUDGET = 24
FAMILIES = ["llama", "gemma3", "gpt_neox", "phi", "gpt_oss", "gemma2"]


def evicting(model: PreTrainedModel, policy: str = "snapkv", **options: Any) -> HeavyHitterCache:
    sizes = {"budget": BUDGET, "page_size": 8, "sink_length": SINKS, "tail_length": TAIL, "interval": INTERVAL}
    own = small_options(policy) | gate_option(policy, model.config)
    return HeavyHitterCache(model.config, policy=policy, **{**sizes, **own, **options})


def evicted(cache: HeavyHitterCache) -> list[EvictingLayer]:
    """The layers that evict, all of which have dropped something and are within bounds."""
    layers = [layer for layer in cache.layers if isinstance(layer, EvictingLayer)]
    for layer in layers:
        assert layer.evictor is not None and layer.evictor.evictions
        assert (layer.kept_positions() >= 0).sum(-1).max() <= BUDGET + INTERVAL
    cache.integrity()
    return layers


WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "sampling": {"do_sample": True}, "beams": {"num_beams": 3}}


@chosen(
    "family, way",
    FAMILIES,
    WAYS,
    # Families differ in one step; what beams and samples add to it are moved rows, full and sliding.
    fast=[*((family, "greedy") for family in FAMILIES), ("llama", "sampling"), ("llama", "beams"), ("gemma3", "beams")],
)
def test_ways_of_generating(model: PreTrainedModel, way: str) -> None:
    """Twice the same; with room for all, what a DynamicCache gives."""
    inputs, options = prompt(50, 2), WAYS[way]
    runs = [generate(model, inputs, evicting(model), 20, **options) for _ in range(2)]
    assert_same(*runs, tolerance=0)
    evicted(runs[0].cache)
    roomy = generate(model, inputs, evicting(model, budget=400), 20, **options)
    assert_same(roomy, generate(model, inputs, full_cache(model), 20, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_batches(model: PreTrainedModel) -> None:
    """Each row of a left-padded batch keeps what it keeps alone, and says the same."""
    rows = [prompt(60), prompt(33, seed=1)]
    # Not by the keys' lengths, which some families make all alike.
    both = generate(model, left_padded(rows), evicting(model, "tova"), 20)
    for index, row in enumerate(rows):
        alone = generate(model, row, evicting(model, "tova"), 20)
        assert torch.equal(both.tokens[index : index + 1], alone.tokens)
        for mine, theirs in zip(evicted(both.cache), evicted(alone.cache), strict=True):
            kept = mine.kept_positions()[index]
            expected = theirs.kept_positions()[0]
            found = torch.where(kept >= 0, kept - 60 + row.shape[1], -1)
            assert torch.equal(found[:, : expected.shape[1]], expected) and (found[:, expected.shape[1] :] < 0).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_turns_and_copies(model: PreTrainedModel) -> None:
    """A second turn goes on where the first ended; copies and selected rows go on like what they are copies of."""
    first = generate(model, prompt(50, 2), evicting(model), 10)
    cache = first.cache
    ids = torch.cat([prompt(50, 2), first.tokens, prompt(9, 2, seed=2)], 1)
    fork = cache.fork()
    again = [generate(model, ids, each, 15) for each in (cache, fork)]
    assert_same(*again, tolerance=0)
    assert cache.get_seq_length() == 50 + 10 + 9 + 14
    evicted(cache)
    one = fork.fork()
    one.batch_select_indices(torch.tensor([1]))
    one.batch_repeat_interleave(2)
    new = prompt(3, 2, seed=4)
    new[0] = new[1]
    expected = forward(model, new, fork)[1:]
    torch.testing.assert_close(forward(model, new, one), expected.expand(2, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "expected"])
def test_prefill_in_chunks(model: PreTrainedModel, policy: str) -> None:
    """By ``prefill_chunk_size``, the same as when the chunks come by hand."""
    ids, cache, by_hand = prompt(96), evicting(model, policy), evicting(model, policy)
    ours = generate(model, ids, cache, 12, prefill_chunk_size=24)
    for part in ids[:, :72].split(24, 1):
        forward(model, part, by_hand)
    theirs = generate(model, ids, by_hand, 12)
    assert torch.equal(ours.tokens, theirs.tokens)
    for mine, other in zip(evicted(cache), evicted(by_hand), strict=True):
        assert torch.equal(mine.kept_positions(), other.kept_positions())


@pytest.mark.parametrize("policy", policies())
def test_every_policy(model: PreTrainedModel, policy: str) -> None:
    """In a whole model each gets what it asks for; those that read the context again are compressed by hand."""
    waits = resolve(policy).waits
    cache = evicting(model, policy, **({"interval": None} if waits else {}))
    ids = prompt(60)
    if waits:
        forward(model, ids[:, :-1], cache)
        cache.compress(model, ids[:, :-1])
        kept = [int((layer.kept_positions() >= 0).sum()) for layer in cache.own_layers]
        assert sum(kept) <= BUDGET * 2 * len(kept)  # heads compete over all layers
    generate(model, ids, cache, 12)
    if policy != "keepall":
        assert all(layer.evictor.evictions for layer in cache.own_layers)
    cache.integrity()


def test_models_without_full_attention() -> None:
    with pytest.raises(ValueError, match="accepted with eviction: at least one layer of full attention"):
        SlidingWindowCache(families.build("mistral").config, 64)


IN_16_BITS = [name for name in reading_once() if name not in ("keepall", "pyramidkv") and "ada-" not in name]


@chosen(
    "policy, dtype",
    IN_16_BITS,
    [torch.bfloat16, torch.float16],
    fast=[(policy, (torch.bfloat16, torch.float16)[place % 2]) for place, policy in enumerate(IN_16_BITS)],
)
def test_half_precision(policy: str, dtype: torch.dtype) -> None:
    """Twice the same, within bounds, from what is held in half precision."""
    model = families.build("llama", dtype=dtype)
    first, second = (generate(model, prompt(50), evicting(model, policy), 20) for _ in range(2))
    assert torch.equal(first.logits, second.logits) and first.logits.isfinite().all()
    assert isinstance(first.cache, HeavyHitterCache)
    evicted(first.cache)
