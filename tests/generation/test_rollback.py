"""Rolling back drafts: a cache whose drafts were removed gives what it gives without drafts."""

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
    """Make linear layers compute one token at a time, so that results do not depend on the number of tokens.

    A matrix product rounds differently for five tokens than for one. The last bit of a key can move the scale of its
    page to the next number in half precision, and so change every key of the page. That is not an error of rolling
    back.
    """
    plain = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([plain(self, token) for token in x.unbind(-2)], -2)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)


@chosen(
    "spec, family",
    ["none", "int4", "int2", "rotated4", "kvarn3", "turboquant2", "fp8"],
    FAMILIES,
    # A draft could change the scales per channel of a page. All kinds of pages but one run with a window.
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
    """Assisted and prompt-lookup decoding give the greedy result of the same cache, over many pages."""
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
    """A crop may end in a page, before all pages, or in the sinks. The cache then holds the shorter sequence."""
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
    """A cache whose tokens were all removed reads the next prompt like a new cache."""
    cache = small_cache(model)
    forward(model, prompt(80), cache)
    cache.crop(-80)
    assert cache.get_seq_length() == 0
    ours = forward(model, prompt(60), cache)
    torch.testing.assert_close(ours, forward(model, prompt(60), full_cache(model)), rtol=0, atol=ROUNDING)
    cache.integrity()


def test_memory_is_bounded_while_recording(model: PreTrainedModel) -> None:
    """If drafts are never confirmed, only a bounded number of tokens stays in full precision."""
    cache = quantized(model, "int4")
    forward(model, prompt(20), cache)
    cache.activate_past_recording()
    for part in prompt(700, seed=1).split(50, 1):
        forward(model, part, cache)
    assert_packed(cache)
    assert cache.get_seq_length() == 720
