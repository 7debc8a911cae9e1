"""Every codec in generation with whole models. test_layer_consistency tests the codecs in a single layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.codecs import specs
from tests.choosing import chosen
from tests.running import (
    all_codecs,
    assert_packed,
    assert_same,
    full_cache,
    generate,
    left_padded,
    prompt,
    quantized,
    teacher_forced,
)

FAMILIES = ["llama", "gemma3"]
#: One codec for each way in which pages differ: scales per token or channel, rotated, centered, table, float8.
KINDS: dict[str, dict[str, Any]] = {
    "none": {"codec": "none"},
    "int4": {"codec": "int4"},
    "groups": {"codec": "int4", "group_size": 8},
    "centered": {"codec": "rotated4", "key_axis": "token"},
    "turboquant4": {"codec": "turboquant4"},
    "fp8": {"codec": "fp8"},
}
#: Another order of summation may flip single codes. Reading a wrong page would change the logits far more.
FLIPS = 0.02
#: Largest root mean square error of the logits of 8-bit codecs, in standard deviations of the logits; fp8, with 4
#: significant bits and here large key biases, is allowed three times as much.
NEAR = 0.05


def _kinds_and_families(first: int) -> pytest.MarkDecorator:
    """Every kind of page with one family, in turn from number ``first`` on. All other pairs are marked as slow."""
    fast = [(kind, FAMILIES[(place + first) % 2]) for place, kind in enumerate(KINDS)]
    return chosen("kind, family", KINDS, FAMILIES, fast=fast)


def _cache(model: PreTrainedModel, kind: str, **options: Any) -> KVCache:
    return quantized(model, **{**KINDS[kind], **options})


@pytest.mark.parametrize("family", [FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("spec", all_codecs())
def test_every_codec_runs(model: PreTrainedModel, spec: str) -> None:
    """Greedy decoding over several page boundaries gives finite logits."""
    ours = generate(model, prompt(60), quantized(model, spec), 30)
    assert_packed(ours.cache)
    assert ours.tokens.shape == (1, 30) and bool(ours.logits.isfinite().all())


EIGHT_BITS = [spec for spec in specs() if spec.endswith("8")]


@chosen(
    "spec, family",
    EIGHT_BITS,
    [*FAMILIES, "qwen2", "gpt_neox"],
    fast=[*((spec, "gemma3") for spec in EIGHT_BITS), *(("rotated8", name) for name in ("llama", "qwen2", "gpt_neox"))],
)
def test_eight_bits_are_near(model: PreTrainedModel, spec: str) -> None:
    """With 8 bits the logits of teacher-forced tokens stay near those of the full cache."""
    ids = prompt(90)
    theirs = teacher_forced(model, ids, full_cache(model), 60)
    ours = teacher_forced(model, ids, cache := quantized(model, spec), 60)
    assert_packed(cache)
    assert (ours - theirs)[:, 60:].square().mean().sqrt() < (3 if spec == "fp8" else 1) * NEAR * theirs.std()


@chosen(
    "bits, family",
    ["int", "rotated", "kvarn"],
    FAMILIES,
    fast=[("int", "llama"), ("rotated", "gemma3"), ("kvarn", "llama")],
)
def test_more_bits_are_nearer(model: PreTrainedModel, bits: str) -> None:
    """The error with 4 bits is less than half of that with 2 bits, and likewise with 8 and 4 bits."""
    ids = prompt(90)
    theirs = teacher_forced(model, ids, full_cache(model), 60)
    errors = [
        (teacher_forced(model, ids, quantized(model, f"{bits}{width}"), 60) - theirs).square().mean().sqrt()
        for width in (2, 4, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@_kinds_and_families(0)
def test_padded_row_equals_its_solo_run(model: PreTrainedModel, kind: str) -> None:
    """A padded sequence of a batch gives what it gives alone, because it is packed at its own lengths."""
    rows = [prompt(21), prompt(60), prompt(90)]
    together = generate(model, left_padded(rows), _cache(model, kind), 26)
    assert_packed(together.cache)
    for index, row in enumerate(rows):
        alone = generate(model, row, _cache(model, kind), 26)
        assert_packed(alone.cache)
        assert torch.equal(together.tokens[index], alone.tokens[0])
        torch.testing.assert_close(together.logits[index], alone.logits[0], rtol=0, atol=FLIPS)


@_kinds_and_families(1)
def test_extra_padding_changes_nothing(model: PreTrainedModel, kind: str) -> None:
    """Additional columns of padding do not change tokens or logits."""
    rows = [prompt(33), prompt(60)]
    tight = generate(model, left_padded(rows), _cache(model, kind), 14)
    wide = generate(model, left_padded(rows, to=83), _cache(model, kind), 14)
    assert_packed(wide.cache)
    assert_same(wide, tight, FLIPS)


@_kinds_and_families(0)
def test_beam_search(model: PreTrainedModel, kind: str) -> None:
    """Beam search works with packed pages; with one beam it equals greedy decoding."""
    beams = generate(model, prompt(40, 2), _cache(model, kind), 20, num_beams=3, num_return_sequences=2)
    assert beams.tokens.shape == (4, 20)
    assert_packed(beams.cache)
    assert_same(
        generate(model, prompt(40, 2), _cache(model, kind), 12, num_beams=1),
        generate(model, prompt(40, 2), _cache(model, kind), 12),
        0,
    )


def test_recipe_is_the_cache(model: PreTrainedModel) -> None:
    """``QuantizedKVCache(bits=4)`` is a KVCache whose codec has 4 bits on both sides."""
    cache = QuantizedKVCache(model.config, bits=4)
    assert isinstance(cache, KVCache) and not isinstance(cache, DynamicCache)
    assert (cache.codec.key_bits, cache.codec.value_bits) == (4, 4)
