"""Drafts change nothing: prompt lookup keeps the tokens that plain decoding keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from tests import families
from tests.running import assert_same, generate, prompt

SIZES: dict[str, Any] = {"sink_length": 4, "tail_length": 8, "page_size": 16, "interval": 16}


def repeating() -> torch.Tensor:
    """A prompt that says something twice, but whose end is new: its first forward pass has no draft."""
    ids = prompt(60)
    return torch.cat([ids, ids[:, 20:50]], 1)


@pytest.mark.parametrize("policy", ["leverage", "knorm", "compactor", "keydiff", "snapkv"])
def test_prompt_lookup_is_plain_decoding(policy: str) -> None:
    """In the first layer the keys of a token that comes twice are one key, rotated: rounding must not choose."""
    model = families.build("qwen2")
    plain, looked_up = (
        generate(model, repeating(), HeavyHitterCache(model.config, 40, policy, **SIZES), new=40, **drafts)
        for drafts in ({}, {"prompt_lookup_num_tokens": 5})
    )
    assert_same(looked_up, plain, tolerance=1e-3)


def test_equal_scores_are_equal_whatever_the_last_bit() -> None:
    from hf_kvcache.eviction.layer_selection import round_scores

    scores = torch.tensor([0.2641665, 0.26416668, -3e-9, 0.0, torch.inf, torch.nan, torch.finfo().max, 1.0, 1.001])
    rounded = round_scores(scores)
    assert rounded[0] == rounded[1] and rounded[3] == 0 and rounded[4] == torch.inf and rounded[5].isnan()
    assert rounded[7] == 1 and rounded[8] > 1
    torch.testing.assert_close(rounded[[0, 2, 8]], scores[[0, 2, 8]], rtol=1e-4, atol=0)
    order = torch.randn(1000).sort().values
    assert (round_scores(order).diff() >= 0).all()
