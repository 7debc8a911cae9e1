"""Every codec in generation: sound, close to the full cache where it has the bits, and consistent with itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache, unbind
from hf_kvcache.codecs import specs
from tests.running import (
    ROUNDING,
    assert_packed,
    assert_same,
    forward,
    full_cache,
    generate,
    left_padded,
    prompt,
    quantized,
    teacher_forced,
)

FAMILIES = ["llama", "gemma3"]
#: One codec for each way in which pages differ: scales per token or channel, rotated, centred, table, float8.
KINDS: dict[str, dict[str, Any]] = {
    "none": {"codec": "none"},
    "int4": {"codec": "int4"},
    "int groups": {"codec": "int2", "group_size": 8},
    "mixed widths": {"codec": "int", "key_bits": 8, "value_bits": 2},
    "rotated3": {"codec": "rotated3"},
    "centred": {"codec": "rotated4", "key_axis": "token"},
    "kvarn2": {"codec": "kvarn2"},
    "turboquant4": {"codec": "turboquant4"},
    "fp8": {"codec": "fp8"},
}
#: Largest error of a logit, in standard deviations of the logits, for 8-bit codecs on models that are noise-sensitive.
NEAR = 0.2


def _cache(model: PreTrainedModel, kind: str, **options: Any) -> KVCache:
    return quantized(model, **{**KINDS[kind], **options})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", specs())
def test_every_codec_runs(model: PreTrainedModel, spec: str) -> None:
    """Greedy decoding over several page boundaries gives finite logits."""
    ours = generate(model, prompt(60), quantized(model, spec), 30)
    assert_packed(ours.cache)
    assert ours.tokens.shape == (1, 30) and bool(ours.logits.isfinite().all())


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2", "gpt_neox"])
@pytest.mark.parametrize("spec", [spec for spec in specs() if spec == "fp8" or spec.endswith("8")])
def test_eight_bits_are_near(model: PreTrainedModel, spec: str) -> None:
    """With 8 bits the logits of teacher-forced tokens stay near those of the full cache."""
    ids = prompt(90)
    theirs = teacher_forced(model, ids, full_cache(model), 60)
    ours = teacher_forced(model, ids, cache := quantized(model, spec), 60)
    assert_packed(cache)
    assert (ours - theirs).abs().max() < NEAR * theirs.std()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["int", "rotated", "kvarn"])
def test_more_bits_are_nearer(model: PreTrainedModel, bits: str) -> None:
    """The error shrinks from 2 to 4 to 8 bits, each time to less than half."""
    ids = prompt(90)
    theirs = teacher_forced(model, ids, full_cache(model), 60)
    errors = [
        (teacher_forced(model, ids, quantized(model, f"{bits}{width}"), 60) - theirs).square().mean().sqrt()
        for width in (2, 4, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_padded_row_equals_its_solo_run(model: PreTrainedModel, kind: str) -> None:
    """A row packs at its own lengths: in a batch it gives what it gives alone."""
    rows = [prompt(21), prompt(60), prompt(90)]
    together = generate(model, left_padded(rows), _cache(model, kind), 26)
    assert_packed(together.cache)
    for index, row in enumerate(rows):
        alone = generate(model, row, _cache(model, kind), 26)
        assert_packed(alone.cache)
        assert torch.equal(together.tokens[index], alone.tokens[0])
        torch.testing.assert_close(together.logits[index], alone.logits[0], rtol=0, atol=5 * ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_extra_padding_changes_nothing(model: PreTrainedModel, kind: str) -> None:
    """Columns of padding that no row needs leave tokens and logits as they are."""
    rows = [prompt(33), prompt(60)]
    tight = generate(model, left_padded(rows), _cache(model, kind), 14)
    wide = generate(model, left_padded(rows, to=83), _cache(model, kind), 14)
    assert_packed(wide.cache)
    assert_same(wide, tight, 5 * ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_fallback(model: PreTrainedModel, kind: str, attention: str) -> None:
    """Read through dense tensors by another attention function, a cache gives what the fused path gives."""
    ids = prompt(100)
    parts = ids.split([60, 1, 1, 17, *[1] * 21], 1)
    fused = _cache(model, kind)
    expected = torch.cat([forward(model, part, fused) for part in parts], 1)
    unbind(model.config)
    model.set_attn_implementation(attention)
    dense = _cache(model, kind, bind=False)
    with torch.no_grad():
        ours = [model(part, past_key_values=dense, use_cache=True).logits for part in parts]
    model.set_attn_implementation("sdpa")
    assert_packed(dense)
    assert dense.memory().packed_elements == fused.memory().packed_elements
    torch.testing.assert_close(torch.cat(ours, 1), expected, rtol=0, atol=5 * ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_forks_do_not_disturb_each_other(model: PreTrainedModel, kind: str) -> None:
    """Two continuations of one prefix, interleaved step by step, give what they give one after the other."""
    prefix, ways = prompt(58), [prompt(30, seed=seed) for seed in (1, 2)]
    expected = []
    for way in ways:
        cache = _cache(model, kind)
        forward(model, prefix, cache)
        expected.append(torch.cat([forward(model, step, cache) for step in way.split(1, 1)], 1))
    cache = _cache(model, kind)
    forward(model, prefix, cache)
    forks = [cache, cache.fork()]
    steps = [
        [forward(model, way[:, i : i + 1], fork) for way, fork in zip(ways, forks, strict=True)]
        for i in range(30)
    ]
    for ours, theirs, fork in zip(zip(*steps, strict=True), expected, forks, strict=True):
        assert_packed(fork)
        assert torch.equal(torch.cat(ours, 1), theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets(model: PreTrainedModel, kind: str) -> None:
    """After a reset nothing of the earlier content shows, not even the mean of its keys."""
    cache = _cache(model, kind)
    forward(model, prompt(80, 2), cache)
    cache.reset()
    again = generate(model, prompt(60), cache, 20)
    assert_packed(cache)
    assert_same(again, generate(model, prompt(60), _cache(model, kind), 20), 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search(model: PreTrainedModel, kind: str) -> None:
    """Beam search works on compressed beams; with one beam it is greedy decoding."""
    beams = generate(model, prompt(40, 2), _cache(model, kind), 20, num_beams=3, num_return_sequences=2)
    assert beams.tokens.shape == (4, 20)
    assert_packed(beams.cache)
    assert_same(
        generate(model, prompt(40, 2), _cache(model, kind), 12, num_beams=1),
        generate(model, prompt(40, 2), _cache(model, kind), 12),
        0,
    )


def _rearranged(cache: KVCache) -> Iterator[tuple[KVCache, list[int]]]:
    """Forks of a cache of three sequences after each operation on rows, with the sequences they then hold."""
    repeated, selected, reordered = cache.fork(), cache.fork(), cache.fork()
    repeated.batch_repeat_interleave(2)
    yield repeated, [0, 0, 1, 1, 2, 2]
    selected.batch_select_indices(torch.tensor([2, 0]))
    yield selected, [2, 0]
    reordered.reorder_cache(torch.tensor([1, 1, 0]))
    yield reordered, [1, 1, 0]
    repeated.reorder_cache(torch.tensor([5, 0, 3, 3, 1, 2]))
    yield repeated, [2, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_move_with_everything_they_hold(model: PreTrainedModel, kind: str) -> None:
    """Repeating, selecting and reordering sequences equals running the moved sequences from the start."""
    ids = prompt(62, 3)
    more = prompt(24, 3, seed=9)
    alone = []
    for row in range(3):
        solo = _cache(model, kind)
        forward(model, ids[row : row + 1], solo)
        alone.append(torch.cat([forward(model, step, solo) for step in more[row : row + 1].split(1, 1)], 1))
    cache = _cache(model, kind)
    forward(model, ids, cache)
    for moved, rows in _rearranged(cache):
        moved = moved.fork()
        steps = [forward(model, step, moved) for step in more[rows].split(1, 1)]
        assert moved.batch_size == len(rows)
        assert_packed(moved)
        expected = torch.cat([alone[row] for row in rows])
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=5 * ROUNDING)


def test_recipe_is_the_cache(model: PreTrainedModel) -> None:
    """``QuantizedKVCache(bits=4)`` is a KVCache whose codec has 4 bits on both sides."""
    cache = QuantizedKVCache(model.config, bits=4)
    assert isinstance(cache, KVCache) and not isinstance(cache, DynamicCache)
    assert (cache.codec.key_bits, cache.codec.value_bits) == (4, 4)
