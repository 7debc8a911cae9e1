"""Drafting and rolling back: a rolled-back cache gives exactly what it would have given without the drafts."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache.codecs import specs
from tests import families
from tests.running import (
    ROUNDING,
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", specs())
def test_drafts_equal_plain_decoding(model: PreTrainedModel, spec: str) -> None:
    """Random runs of right tokens followed by wrong ones, which are cropped: the right ones' logits are as in decoding.

    Steps of a single token, long drafts and steps without a wrong token are among them, over four page boundaries.
    """
    ids = prompt(UNPACKED - 9 + 80)
    start = UNPACKED - 9
    plain = quantized(model, spec)
    forward(model, ids[:, :start], plain)
    expected = torch.cat([forward(model, step, plain) for step in ids[:, start:].split(1, 1)], 1)

    drafting = quantized(model, spec)
    drafting.activate_past_recording()
    forward(model, ids[:, :start], drafting)
    drafting.crop(0)
    choose, logits, at = random.Random(0), [], start
    while at < ids.shape[1]:
        right = min(choose.randint(1, 5), ids.shape[1] - at)
        wrong = choose.choice([0, 0, 1, 2, 3])
        drafts = prompt(max(wrong, 1), seed=at)[:, :wrong]
        step = forward(model, torch.cat([ids[:, at : at + right], drafts], 1), drafting)
        drafting.crop(-wrong)
        drafting.integrity()
        logits.append(step[:, :right])
        at += right
    assert drafting.get_seq_length() == plain.get_seq_length()
    assert_packed(drafting)
    assert drafting.memory().packed_elements == plain.memory().packed_elements
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=5 * ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["none", "int4", "int2", "rotated4", "kvarn3", "turboquant2", "fp8"])
def test_speculation_equals_greedy(model: PreTrainedModel, spec: str) -> None:
    """Assisted and prompt-lookup decoding give the cache's own greedy result, far past the first pages."""
    inputs = prompt(13).repeat(1, 2)
    assert inputs.shape[1] <= UNPACKED - 4  # nothing is packed at the prefill, in sliding layers neither
    expected = generate(model, inputs, quantized(model, spec), 70)
    assistant = families.build("llama" if model.config.model_type == "llama" else "gemma3")
    with torch.no_grad():
        noise = torch.Generator().manual_seed(3)
        for weight in assistant.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.02)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        ours = generate(model, inputs, quantized(model, spec), 70, **options)
        assert_packed(ours.cache)
        assert torch.equal(ours.tokens, expected.tokens), options


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["none", "int4", "rotated3", "kvarn3", "fp8"])
def test_crop_within_the_tail(model: PreTrainedModel, spec: str) -> None:
    """Tokens that were removed from the tail can be fed again, with the same logits."""
    ids = prompt(71)
    cache = quantized(model, spec)
    forward(model, ids[:, :63], cache)
    if any(layer.is_sliding for layer in cache.own_layers):
        cache.activate_past_recording()  # a sliding layer forgets otherwise what the shorter sequence needs
    before = torch.cat([forward(model, step, cache) for step in ids[:, 63:].split(1, 1)], 1)
    cache.crop(-8)
    assert cache.get_seq_length() == 63
    after = torch.cat([forward(model, step, cache) for step in ids[:, 63:].split(1, 1)], 1)
    assert_packed(cache)
    torch.testing.assert_close(after, before, rtol=0, atol=ROUNDING)


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
