"""Attention of a second reading that does not happen, and heads of all layers that compete."""

from __future__ import annotations

import pickle
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache import HeavyHitterCache
from hf_kvcache.eviction import resolve
from hf_kvcache.eviction.policies import reread
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.storage.token_view import TokenView
from tests import families
from tests.eviction.brute_force import Head, heads_of
from tests.eviction.rope_contexts import CASES, biased, rotary_context, rotation
from tests.running import assert_same, forward, generate, left_padded, prompt
from tests.tolerances import Tolerance, assert_within

#: Queries are turned in float32, by a few hundred positions.
TOLERANCE = Tolerance(1e-4, 1e-4)
SIZES: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8}


@pytest.mark.parametrize(("shape", "family"), CASES)
@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"chunk": 7, "power": 4}])
def test_scores_equal_the_brute_force(
    shape: str, family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reread, "_FEWEST_QUERIES", 3)
    monkeypatch.setattr(reread, "_STRIP_ELEMENTS", 1)
    policy: Any = resolve("reread", **options)
    ctx = biased(rotary_context(shape, family, policy))
    scores = policy.score(ctx)
    at = ctx.query_positions
    assert at is not None
    told = replace(ctx, reach=lambda i: int((ctx.positions <= at[..., i].max()).sum(-1).max()), reach_of=ctx.queries)
    assert_within(policy.score(told), scores, TOLERANCE)
    for index, kv_head in heads_of(ctx):
        expected = torch.from_numpy(brute_force(policy, Head(ctx, index, kv_head), family))
        assert_within(scores[index, kv_head, : len(expected)], expected, TOLERANCE)


def brute_force(policy: Any, head: Head, family: str) -> np.ndarray:
    """A context and, behind it, a second copy of the query's chunk, each token of it at its second position."""
    scoring, seen = head.ctx.scoring, head.ctx.seen
    powers, count = np.zeros(head.count), 0
    for query, at in enumerate(head.at):
        start = at - at % policy.chunk
        again = [i for i, position in enumerate(head.positions) if start <= position <= at]
        move = [rotation(family, seen + head.positions[i] - start) for i in again]
        back = [rotation(family, head.positions[i]).T for i in again]
        copies = [a @ b @ head.keys[i] for a, b, i in zip(move, back, again, strict=True)]
        for q in range(head.group):
            moved = rotation(family, seen + at - start) @ rotation(family, at).T @ head.queries[q, query]
            scores = np.array([*head.keys, *copies]) @ moved * scoring.scaling if head.count else np.zeros(0)
            if scoring.softcap is not None:
                scores = scoring.softcap * np.tanh(scores / scoring.softcap)
            weights = np.exp(scores + np.array([*head.bias, *head.bias[again]]))
            total = weights.sum()
            if scoring.sink_logits is not None:
                total += np.exp(float(scoring.sink_logits[head.kv_head * head.group + q]))
            powers += (weights[: head.count] / total) ** policy.power if head.count else 0.0
            count += 1
    return (powers / max(count, 1)) ** (1 / policy.power)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="chunk=0"):
        resolve("reread", chunk=0)
    for power in (0, 3, 2.0):
        with pytest.raises(ValueError, match=f"power={power}; accepted: "):
            resolve("reread", power=power)
    with pytest.raises(ValueError, match=r"floor=1\.5"):
        resolve("across-reread", floor=1.5)


def evicting(model: Any, policy: str, **options: Any) -> HeavyHitterCache:
    return HeavyHitterCache(model.config, 16, policy, **SIZES | options)


def scored(cache: HeavyHitterCache, row: int) -> torch.Tensor:
    """Scores of one sequence in all heads of all layers, ``[layers * Hkv, T]``, infinite where tokens must stay."""
    found = []
    for layer in cache.layers:
        assert isinstance(layer, EvictingLayer) and layer.storage is not None and layer.evictor is not None
        held, selection = TokenView.of(layer.storage, np.array([row])), layer.evictor.selection()
        quota, recent = selection.share(held)
        context = selection.context(held, quota, selection.protected(held, recent))
        found.append(selection.scores(context).masked_fill(context.protected, torch.inf)[0])
    return torch.cat(found)


def kept(cache: HeavyHitterCache) -> list[list[list[int]]]:
    """Positions that each head of all layers that evict holds, by sequence."""
    layers = [layer.kept_positions() for layer in cache.layers if isinstance(layer, EvictingLayer)]
    rows = range(len(layers[0]))
    return [[[int(at) for at in head if at >= 0] for layer in layers for head in layer[row]] for row in rows]


@pytest.mark.parametrize("policy", ["across-reread", "across-h2o"])
def test_heads_of_all_layers_compete(policy: str) -> None:
    """Each keeps its floor, and what is left goes to the best of all; rows of a padded batch as alone."""
    model, rows = families.build("llama"), [prompt(48, seed=1), prompt(33, seed=2)]
    batch = left_padded(rows)
    mask = batch["attention_mask"]
    cache = evicting(model, policy, floor=0.5)
    forward(model, batch["input_ids"], cache, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    wanted = [scored(cache, row) for row in range(2)]
    cache.compress()
    cache.integrity()
    all_kept = kept(cache)
    for row, scores in enumerate(wanted):
        stay = scores.topk(8).indices
        total = 16 * len(scores)
        sure = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, stay, True) | scores.isinf()
        rest = scores.masked_fill(sure, -1.0).flatten().topk(total - int(sure.sum())).indices
        sure.view(-1)[rest] = True
        offset = 48 - len(rows[row][0])
        assert [[at - offset for at in head] for head in all_kept[row]] == [x.nonzero()[:, 0].tolist() for x in sure]
        assert len({len(head) for head in all_kept[row]}) > 1, "heads that keep equally many show nothing"
    alone = evicting(model, policy, floor=0.5)
    forward(model, rows[0], alone)
    alone.compress()
    assert kept(alone)[0] == all_kept[0]


def test_nothing_goes_before_compress_unless_told() -> None:
    """Then generation goes on; a fork and a saved copy of it too. Told otherwise, each layer chooses alone."""
    model, ids = families.build("llama"), prompt(48)
    cache = evicting(model, "across-reread")
    forward(model, ids[:, :-1], cache)
    assert all((layer.kept_positions() >= 0).sum() == 47 * layer.storage.heads for layer in cache.layers)
    before = cache.memory().total
    cache.compress()
    cache.compress()  # within its budget: drops nothing more
    assert cache.memory().total < before and cache.memory().parts["other"] == 0
    fork = cache.fork()
    ours, theirs = generate(model, ids, cache, 12), generate(model, ids, fork, 12)
    assert_same(ours, theirs)
    alone = evicting(model, "across-reread", evict_prefill="chunk", interval=8)
    within = evicting(model, "ada-reread", floor=0.1, interval=8)
    for one in (alone, within):
        generate(model, ids, one, 12)
    assert kept(alone) == kept(within)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_end_of_a_prompt_is_chosen_in_all_layers(family: str) -> None:
    """Before the first single token, whatever layer evicts first; on a fork and an unpickled copy too."""
    model, ids = families.build(family), prompt(48)
    by_hand, whole = (evicting(model, "across-snapkv", window=8, evict_prefill=when) for when in (None, "end"))
    for cache in (by_hand, whole):
        forward(model, ids[:, :-1], cache)
    by_hand.compress()
    assert kept(by_hand) != kept(whole)
    caches = [whole, whole.fork(), pickle.loads(pickle.dumps(whole))]
    expected = forward(model, ids[:, -1:], by_hand)
    for cache in caches:
        torch.testing.assert_close(forward(model, ids[:, -1:], cache), expected, rtol=0, atol=1e-5)
        assert kept(cache) == kept(by_hand)
        cache.integrity()
    gone = weakref.ref(whole)
    del caches, cache, whole
    assert gone() is None, "layers must not keep their cache alive"


def test_an_empty_cache_is_compressed_to_nothing() -> None:
    cache = evicting(families.build("llama"), "across-reread")
    cache.compress()
    assert cache.get_seq_length() == 0
