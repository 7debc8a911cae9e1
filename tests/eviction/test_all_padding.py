"""Prompt chunks, and whole rows, that are all padding: there is no token to score, keep or divide by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from tests import families
from tests.eviction.toys import Toy, reading_once, states
from tests.running import generate, left_padded, prompt

#: Chunks of a prompt; of the second row the first two are padding, and the third begins so.
CHUNKS, PADDING, LENGTH = [12, 24, 48], 30, 60


@pytest.mark.parametrize("policy", reading_once())
def test_a_row_whose_first_chunks_are_padding_is_as_alone(policy: str) -> None:
    given, real = states(LENGTH, 2), torch.arange(LENGTH) >= torch.tensor([[0], [PADDING]])
    toy, alone = Toy(policy, budget=12), Toy(policy, budget=12)
    toy.run(given, CHUNKS, real)
    alone.run(given.rows(slice(1, 2)).at(PADDING, LENGTH), [CHUNKS[-1] - PADDING])
    assert [[at - PADDING for at in head] for head in toy.positions(1)] == alone.positions()


@pytest.mark.parametrize("policy", reading_once())
def test_a_row_without_any_token_does_not_disturb_the_others(policy: str) -> None:
    given, real = states(LENGTH, 2), torch.tensor([[True], [False]]).expand(2, LENGTH)
    toy, alone = Toy(policy, budget=12), Toy(policy, budget=12)
    assert torch.isfinite(toy.run(given, CHUNKS, real)[0]).all()
    alone.run(given.rows(slice(0, 1)), CHUNKS)
    assert toy.positions(0) == alone.positions() and toy.positions(1) == [[], []]


@pytest.mark.parametrize("policy", reading_once())
def test_a_batch_without_any_token_is_no_error(policy: str) -> None:
    toy = Toy(policy, budget=12)
    toy.run(states(LENGTH, 2), CHUNKS, torch.zeros(2, LENGTH, dtype=torch.bool))
    assert toy.positions(0) == toy.positions(1) == [[], []]


def test_a_model_reads_them_so() -> None:
    model, rows = families.build("llama"), [prompt(40, seed=1), prompt(12, seed=2)]
    sizes: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8, "interval": 8}
    batch = left_padded(rows)
    batch["attention_mask"][0] = 0
    cache = HeavyHitterCache(model.config, 24, "h2o", **sizes)
    logits = generate(model, batch, cache, new=12, prefill_chunk_size=12).logits
    alone = generate(model, rows[1], HeavyHitterCache(model.config, 24, "h2o", **sizes), new=12).logits
    torch.testing.assert_close(logits[1:], alone, rtol=0, atol=1e-3)
    cache.integrity()
