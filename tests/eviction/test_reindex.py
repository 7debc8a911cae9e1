"""Sinks and a window: with original positions and with positions inside the cache, against both by definition."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_kvcache import SlidingWindowCache
from tests.running import forward, prompt, set_binding

SINKS, WINDOW, TAIL, INTERVAL, LENGTH = 3, 24, 8, 4, 120


def windowed(model: PreTrainedModel, reindex: bool) -> SlidingWindowCache:
    return SlidingWindowCache(
        model.config, WINDOW, SINKS, reindex, tail_length=TAIL, interval=INTERVAL, page_size=8, evict_prefill="chunk"
    )


def held(seen: int, since: int = SINKS + TAIL) -> list[int]:
    """Positions in the cache after ``seen`` tokens: the tail is emptied every ``INTERVAL`` tokens from ``since`` on."""
    latest = since + (seen - since) // INTERVAL * INTERVAL
    start = max(SINKS, latest - WINDOW)
    return [*range(min(SINKS, seen)), *range(start, seen)]


class InsideTheCache:
    """StreamingLLM by definition: keys before rotary positions, rotated at each step to their index in the cache.

    Args:
        model: a llama.
        reindex: whether positions are indices in the cache, or those of the text.
    """

    def __init__(self, model: PreTrainedModel, reindex: bool) -> None:
        self.model, self.reindex = model, reindex
        self.keys: list[torch.Tensor] = [torch.zeros(0)] * len(model.model.layers)
        self.values = list(self.keys)

    @torch.no_grad()
    def step(self, token: torch.Tensor, position: int, before: list[int]) -> torch.Tensor:
        """Logits ``[V]`` of a token that sees itself and the positions ``before``."""
        decoder = self.model.model
        x = decoder.embed_tokens(token.view(1, 1))
        places = [*before, position]
        at = torch.arange(len(places)) if self.reindex else torch.tensor(places)
        for index, layer in enumerate(decoder.layers):
            attention, y = layer.self_attn, layer.input_layernorm(x)
            query, key, value = (
                projection(y).view(1, 1, -1, attention.head_dim).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            self.keys[index] = torch.cat([self.keys[index], key], 2) if position else key
            self.values[index] = torch.cat([self.values[index], value], 2) if position else value
            seen = self.keys[index][:, :, places], self.values[index][:, :, places]
            cos, sin = decoder.rotary_emb(x, at[None])
            keys, _ = apply_rotary_pos_emb(seen[0], seen[0], cos, sin)
            query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
            groups = query.shape[1] // keys.shape[1]
            keys, values = (side.repeat_interleave(groups, 1) for side in (keys, seen[1]))
            weights = (query @ keys.mT * attention.scaling).softmax(-1)
            x = x + attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(decoder.norm(x))[0, 0]


@pytest.mark.parametrize("reindex", [False, True], ids=["original", "reindexed"])
@pytest.mark.parametrize("prefill", [1, 20])
def test_against_the_definition(model: PreTrainedModel, reindex: bool, prefill: int) -> None:
    """Logits of a text many windows long, and of each layer the positions it holds."""
    ids, cache, reference = prompt(LENGTH), windowed(model, reindex), InsideTheCache(model, reindex)
    ours = torch.cat([forward(model, part, cache)[0] for part in ids.split([prefill, *[1] * (LENGTH - prefill)], 1)])
    set_binding(model, None)
    for seen in range(LENGTH):
        before = list(range(seen)) if seen < prefill else held(seen)
        theirs = reference.step(ids[0, seen], seen, before)
        # Angles of re-rotated keys are rounded twice.
        torch.testing.assert_close(ours[seen], theirs, rtol=0, atol=1e-3, msg=lambda m, at=seen: f"token {at}: {m}")
    for layer in cache.own_layers:
        assert layer.kept_positions()[0].tolist() == [held(LENGTH)] * 2


@pytest.mark.parametrize("chunk", [1, 40])
def test_original_positions_are_a_masked_full_cache(model: PreTrainedModel, chunk: int) -> None:
    """Chunk by chunk, as a mask over a DynamicCache that never drops anything."""
    ids, cache, full = prompt(LENGTH), windowed(model, False), DynamicCache(config=model.config)
    kept: list[int] = []
    for start in range(0, LENGTH, chunk):
        part = ids[:, start : start + chunk]
        mask = torch.zeros(1, 1, chunk, start + chunk, dtype=torch.bool)
        mask[..., kept] = True
        mask[..., start:] = torch.ones(chunk, chunk, dtype=torch.bool).tril()
        ours = forward(model, part, cache)
        at = torch.arange(start, start + chunk)[None]
        theirs = forward(model, part, full, attention_mask=mask, position_ids=at)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        kept = held(start + chunk, *([] if chunk == 1 else [start + chunk]))


def test_distances_stay_short(model: PreTrainedModel) -> None:
    """Reindexed, the sinks are never farther from a query than window, sinks and interval."""
    cache = windowed(model, True)
    for part in prompt(LENGTH).split(20, 1):
        forward(model, part, cache)
    layer = cache.own_layers[0]
    evictor, storage = layer.evictor, layer.storage
    untouched = windowed(model, False)
    for part in prompt(LENGTH).split(20, 1):
        forward(model, part, untouched)
    # Layer 0 sees the same hidden states in both: its sinks differ by a rotation over the tokens that were dropped.
    plain = untouched.own_layers[0].storage.dense.keys[:, :, :SINKS]
    dropped = LENGTH - int(storage.tokens()[0])
    rope = evictor.selection().rope()
    at = torch.arange(SINKS)
    moved = rope.rotate(rope.unrotate(plain, at), at + dropped)
    torch.testing.assert_close(storage.dense.keys[:, :, :SINKS], moved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["phi", "gpt_neox", "gemma3"])
def test_other_families(model: PreTrainedModel, family: str) -> None:
    """Families that rotate a part of the head, or slide in other layers, go on within bounds."""
    cache = windowed(model, True)
    logits = [forward(model, part, cache) for part in prompt(LENGTH).split([20, *[1] * (LENGTH - 20)], 1)]
    assert all(bool(part.isfinite().all()) for part in logits)
    for layer in cache.own_layers:
        if not layer.is_sliding:
            assert layer.kept_positions()[0].tolist() == [held(LENGTH)] * layer.storage.heads
    cache.integrity()
