"""Drafting and rolling back: a rolled-back cache gives what it would have given without the drafts."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from tests import families
from tests.choosing import chosen
from tests.running import (
    ROUNDING,
    SINKS,
    UNPACKED,
    assert_packed,
    forward,
    full_cache,
    generate,
    prompt,
    quantized,
    small_cache,
)

FAMILIES = ["llama", "gemma3"]


@pytest.fixture
def token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers whose result for a token does not depend on how many tokens come with it.

    A matrix product rounds otherwise for five tokens than for one. That last bit of a key can move its page's scale to
    the next number in half precision, and so every key of the page: not a matter of rolling back, so it is kept out.
    """
    plain = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([plain(self, token) for token in x.unbind(-2)], -2)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)


@chosen(
    "spec, family",
    ["none", "int4", "int2", "rotated4", "kvarn3", "turboquant2", "fp8"],
    FAMILIES,
    # Scales per channel, which a draft can spoil for a page, are most at risk; a window in each kind of page but one.
    fast=[
        ("none", "gemma3"),
        ("int2", "llama"),
        ("rotated4", "gemma3"),
        ("kvarn3", "llama"),
        ("turboquant2", "gemma3"),
        ("fp8", "llama"),
    ],
)
def test_speculation_equals_greedy(model: PreTrainedModel, spec: str, token_by_token: None) -> None:
    """Assisted and prompt-lookup decoding give the cache's own greedy result, far past the first pages."""
    inputs = prompt(11).repeat(1, 2)
    assert inputs.shape[1] <= UNPACKED - SINKS  # nothing is packed at the prefill, in sliding layers neither
    expected = generate(model, inputs, quantized(model, spec), 54)
    assistant = families.build("llama" if model.config.model_type == "llama" else "gemma3")
    with torch.no_grad():
        noise = torch.Generator().manual_seed(3)
        for weight in assistant.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.02)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        ours = generate(model, inputs, quantized(model, spec), 54, **options)
        assert_packed(ours.cache)
        assert torch.equal(ours.tokens, expected.tokens), options


@pytest.mark.parametrize("remove", [1, 13, 29, 47, 70, 79])
def test_crop_into_pages(model: PreTrainedModel, remove: int) -> None:
    """A crop may cut a page, all pages, or the sinks; what is left is the shorter sequence, exactly."""
    ids = prompt(80)
    cache = small_cache(model)
    forward(model, ids, cache)
    cache.crop(-remove)
    cache.integrity()
    new = prompt(40, seed=4)
    ours = torch.cat([forward(model, step, cache) for step in new.split([7, *[1] * 33], 1)], 1)
    assert_packed(cache)
    kept = torch.cat([ids[:, : 80 - remove], new], 1)
    theirs = forward(model, kept, full_cache(model))[:, 80 - remove :]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_crop_of_everything(model: PreTrainedModel) -> None:
    """A cache from which all is removed takes the next prompt like a new one."""
    cache = small_cache(model)
    forward(model, prompt(80), cache)
    cache.crop(-80)
    assert cache.get_seq_length() == 0
    ours = forward(model, prompt(60), cache)
    torch.testing.assert_close(ours, forward(model, prompt(60), full_cache(model)), rtol=0, atol=ROUNDING)
    cache.integrity()


def test_memory_is_bounded_while_recording(model: PreTrainedModel) -> None:
    """A caller that records and never confirms does not keep everything in full precision for ever."""
    cache = quantized(model, "int4")
    forward(model, prompt(20), cache)
    cache.activate_past_recording()
    for part in prompt(700, seed=1).split(50, 1):
        forward(model, part, cache)
    assert_packed(cache)
    assert cache.get_seq_length() == 720
