"""Layers that decode by prepared Triton steps against layers that decode by the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from hf_kvcache.integration.attention import attention_function
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels import prepared_call
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.triton import decode
from hf_kvcache.kernels.triton.step import PreparedCall
from tests.choosing import chosen
from tests.generation.layers import Layer, States, states
from tests.kernels.triton.conftest import INTERPRETED
from tests.tolerances import assert_near

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="its layers are on the CPU")

#: A page event comes with the eighth token.
PROMPT, STEPS = 37, 9


class Both:
    """The same layer twice: with prepared steps and without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, spec: str, **options: Any) -> None:
        self.layers = Layer(kind, spec, **options), Layer(kind, spec, **options)
        self.prepared, self.calls = False, 0
        monkeypatch.setattr(
            prepared_call, "implementation", lambda op, device: decode if self.prepared and op == "decode" else None
        )
        original = PreparedCall.__call__

        def counted(call: PreparedCall, *arguments: Any) -> torch.Tensor:
            self.calls += 1
            return original(call, *arguments)

        monkeypatch.setattr(PreparedCall, "__call__", counted)

    def each(self, act: Callable[[Layer], Any]) -> None:
        """Do something with both layers, and compare what comes of it."""
        results = []
        for layer, prepared in zip(self.layers, (True, False), strict=True):
            self.prepared = prepared
            with torch.no_grad():
                results.append(act(layer))
        if isinstance(results[0], torch.Tensor):
            assert_near(results[0], results[1].double())
        stores = [layer.cache.layers[0].storage for layer in self.layers]
        for storage in stores:
            assert storage is not None
            storage.check()
        assert stores[0].dense.lengths.tolist() == stores[1].dense.lengths.tolist()
        for row, length in enumerate(stores[0].dense.lengths.tolist()):
            for name in ("keys", "values"):
                held = [getattr(storage.dense, name)[row, :, :length] for storage in stores]
                assert torch.equal(*held)
            held_at = [storage.dense.positions[row, :length].tolist() for storage in stores]
            assert held_at[0] == held_at[1]


def step(new: States, mask: torch.Tensor | None = None) -> Callable[[Layer], torch.Tensor]:
    """An update of one token or several, and their attention."""

    def act(layer: Layer) -> torch.Tensor:
        key, value = layer.cache.update(new.key, new.value, 0)
        return attention_function(layer.attention, new.query, key, value, mask)[0]

    return act


def prompt(new: States, mask: torch.Tensor | None = None) -> Callable[[Layer], None]:
    """A first update, whose attention is of no interest here."""

    def act(layer: Layer) -> None:
        layer.cache.update(new.key, new.value, 0)
        layer.cache.layers[0].note_attended(AttentionCall(new.query, mask, Scoring(0.25)))

    return act


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_decoding_with_page_events_and_rollbacks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of either path in turn, on windows that move and on tokens that are taken back."""
    both, tokens = Both(monkeypatch, kind, "unbiased4"), states(PROMPT + STEPS + 2)
    both.each(prompt(tokens.at(0, PROMPT)))
    for at in range(PROMPT, PROMPT + STEPS):
        general = at % 5 == 0
        both.each((lambda layer, at=at: layer(tokens.at(at, at + 1))) if general else step(tokens.at(at, at + 1)))
    assert both.calls == STEPS - 2
    if kind == "full":
        both.each(lambda layer: layer.cache.crop(-3))
        both.each(step(tokens.at(PROMPT + STEPS, PROMPT + STEPS + 1)))


@chosen("kind", ["full", "sliding"], fast=[("full",)])
def test_a_padded_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of unequal length, each of which gets its token in a slot of its own."""
    both, tokens = Both(monkeypatch, kind, "rotated8"), states(PROMPT + STEPS, batch=2)
    mask = torch.ones(2, PROMPT + STEPS, dtype=torch.bool)
    mask[1, :30] = False
    both.each(prompt(tokens.at(0, PROMPT), mask[:, :PROMPT]))
    for at in range(PROMPT, PROMPT + STEPS):
        seen = mask[:, : at + 1].clone()
        both.each(step(tokens.at(at, at + 1), seen))
    assert both.calls == STEPS
    assert both.layers[0].cache.layers[0].storage.dense.uniform_length is None


@pytest.mark.parametrize("batch", [1, 2])
def test_a_window_that_drops_tokens_before_they_are_packed(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail is longer than the window: tokens move to other slots, and the table of pages stays as it is."""
    both, first, last = Both(monkeypatch, "sliding", "unbiased4", tail_length=32), 45, 56
    tokens, mask = states(last, batch=batch), torch.ones(batch, last, dtype=torch.bool)
    mask[1:, :3] = False
    both.each(prompt(tokens.at(0, first), mask[:, :first]))
    for at in range(first, last):
        both.each(step(tokens.at(at, at + 1), mask[:, : at + 1].clone()))
    assert both.calls == last - first
    storage = both.layers[0].cache.layers[0].storage
    assert storage.table.columns == 0
    assert storage.dense.longest < first


@chosen("batch, wrapper", [1, 2], ["", "ada-"], fast=[(2, "")])
def test_attention_that_keys_receive(batch: int, wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """H2O's sums are the same by prepared steps, over evictions, over pages, and where sequences differ in length."""
    both, tokens = Both(monkeypatch, "full", "rotated8"), states(PROMPT + 5, batch=batch)
    for layer in both.layers:
        layer.cache = HeavyHitterCache(
            layer.attention.config,
            24,
            f"{wrapper}h2o",
            "rotated8",
            page_size=8,
            tail_length=4,
            sink_length=2,
            interval=2,
        )
    mask = torch.ones(batch, PROMPT + 5, dtype=torch.bool)
    mask[1:, :9] = False
    both.each(prompt(tokens.at(0, PROMPT), mask[:, :PROMPT]))
    for at in range(PROMPT, PROMPT + 5):
        both.each(step(tokens.at(at, at + 1), mask[:, : at + 1].clone()))
        evictors = [layer.cache.layers[0].evictor for layer in both.layers]
        received = [evictor.observations.accumulated for evictor in evictors]
        for side in ("dense", "pages"):
            sums = [getattr(found, side) for found in received]
            held = min(x.shape[2] for x in sums)
            assert_near(sums[0][..., :held], sums[1][..., :held].double())
            assert not any(x[..., held:].any() for x in sums)
    assert both.calls == 5
    assert evictors[0].evictions > 1
