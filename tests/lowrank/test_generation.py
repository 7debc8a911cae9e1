"""Whole models with low-rank caches. At full rank they equal DynamicCache; at lower ranks they equal themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache.lowrank.projection import LayerProjection, SideProjection
from tests.lowrank.one_layer import rotated_cache, rotation, with_projections
from tests.running import (
    ROUNDING,
    Generated,
    as_cache,
    assert_packed,
    assert_same,
    forward,
    full_cache,
    generate,
    left_padded,
    prompt,
    quantized,
    small_cache,
    teacher_forced,
)


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


#: Families with soft-capping, with windows, and with learned sinks and a scaled embedding.
FAMILIES = ["llama", "gemma2", "gemma3", "gpt_oss"]
#: Families with a KV head per query head, norms of keys, biases, a window in all layers, and partly rotated heads.
ALIKE = ["llama_mha", "qwen3", "qwen2", "mistral", "gpt_neox", "phi"]
EVERY = [*FAMILIES, *map(slow, ALIKE)]
FEW = ["llama", "gemma3", *map(slow, ("gemma2", "gpt_oss", *ALIKE))]
FORMS: dict[str, dict[str, Any]] = {
    "each head": {},
    "all heads": {"groups": 1},
    "before rope": {"before_rope": True},
    "all heads before rope": {"groups": 1, "before_rope": True},
}
#: One form that is read in the width of its coefficients and one that is decoded; the others resemble them.
pytestmark = pytest.mark.parametrize(
    "form", ["each head", "all heads before rope", *(slow(form) for form in ("all heads", "before rope"))]
)


def both(model: PreTrainedModel, form: str, inputs: Any, new: int = 20, **options: Any) -> tuple[Generated, Generated]:
    """Generated with a low-rank cache of full rank, and with transformers' own cache."""
    ours = generate(model, inputs, rotated_cache(model, **FORMS[form]), new, **options)
    assert_packed(ours.cache)
    return ours, generate(model, inputs, full_cache(model), new, **options)


@pytest.mark.parametrize("family", EVERY)
def test_greedy(model: PreTrainedModel, form: str) -> None:
    """One sequence, past a page boundary."""
    ours, theirs = both(model, form, prompt(60))
    assert_same(ours, theirs)
    assert len(set(ours.tokens[0].tolist())) > 1, "the model repeats one token: nothing is compared"


@pytest.mark.parametrize("family", FEW)
def test_left_padded_batch(model: PreTrainedModel, form: str) -> None:
    """Rows of clearly different lengths: rotary positions count non-padding tokens only."""
    assert_same(*both(model, form, left_padded([prompt(21), prompt(60), prompt(41)])))


@pytest.mark.parametrize("family", FEW)
def test_beam_search(model: PreTrainedModel, form: str) -> None:
    """Beams are reordered at every step."""
    ours, theirs = both(model, form, prompt(50, 2), 14, num_beams=3)
    assert torch.equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("family", FEW)
def test_prompt_lookup(model: PreTrainedModel, form: str) -> None:
    """Drafts are verified several at a time and rolled back."""
    inputs = prompt(11).repeat(1, 3)
    assert torch.equal(*(g.tokens for g in both(model, form, inputs, 40, prompt_lookup_num_tokens=4)))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prefill_in_chunks(model: PreTrainedModel, form: str) -> None:
    """The prompt comes in parts that do not fit the pages, small and large."""
    for size in (13, 40):
        assert_same(*both(model, form, prompt(101), 12, prefill_chunk_size=size))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_conversation(model: PreTrainedModel, form: str) -> None:
    """Three turns on one cache; every turn's prompt is the whole conversation."""
    caches = full_cache(model), rotated_cache(model, **FORMS[form])
    history = prompt(30)
    for turn in range(3):
        theirs = generate(model, history, caches[0], 8)
        assert_same(generate(model, history, caches[1], 8), theirs)
        history = torch.cat([history, theirs.tokens, prompt(10, seed=turn + 1)], 1)
    assert_packed(caches[1])


@pytest.mark.parametrize("remove", [1, 29, 70])
def test_crop_into_pages(model: PreTrainedModel, form: str, remove: int) -> None:
    """After a crop the cache holds the shorter sequence."""
    ids, new = prompt(80), prompt(40, seed=4)
    cache = rotated_cache(model, **FORMS[form])
    forward(model, ids, cache)
    cache.crop(-remove)
    ours = torch.cat([forward(model, step, cache) for step in new.split([7, *[1] * 33], 1)], 1)
    assert_packed(cache)
    theirs = forward(model, torch.cat([ids[:, : 80 - remove], new], 1), full_cache(model))[:, 80 - remove :]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_forks_and_saving(model: PreTrainedModel, form: str) -> None:
    """A fork, and a cache that was saved and loaded, continue as the cache itself does, with the same padding."""
    inputs = left_padded([prompt(40), prompt(70)])
    cache = rotated_cache(model, **FORMS[form])
    numbers = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    forward(model, inputs["input_ids"], cache, attention_mask=inputs["attention_mask"], position_ids=numbers)
    fork, loaded = cache.fork(), rotated_cache(model, **FORMS[form])
    loaded.load_state_dict(cache.state_dict())
    new = prompt(30, 2)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 30, dtype=torch.long)], 1)

    def go_on(of: Any) -> torch.Tensor:
        steps = []
        for t in range(30):
            at = numbers[:, -1:] + 1 + t
            steps.append(forward(model, new[:, t : t + 1], of, attention_mask=mask[:, : 71 + t], position_ids=at))
        return torch.cat(steps, 1)

    expected = go_on(cache)
    for other in (fork, loaded):
        torch.testing.assert_close(go_on(other), expected, rtol=0, atol=ROUNDING)
        assert_packed(other)
    whole = forward(
        model,
        torch.cat([inputs["input_ids"], new], 1),
        full_cache(model),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
    )[:, 70:]
    torch.testing.assert_close(expected, whole, rtol=0, atol=ROUNDING)


def test_dense_fallback(model: PreTrainedModel, form: str) -> None:
    """Another attention implementation reads what this package's own reads."""
    ids = prompt(80)
    expected = teacher_forced(model, ids, full_cache(model), 60)
    cache = rotated_cache(model, **FORMS[form])
    first = forward(model, ids[:, :60], cache)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        rest = [model(input_ids=step, **as_cache(cache), use_cache=True).logits for step in ids[:, 60:].split(1, 1)]
    assert_packed(cache)
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("codec", ["rotated8", "unbiased4"])
def test_low_rank_equals_itself(model: PreTrainedModel, form: str, codec: str) -> None:
    """With a low rank and quantization, a row of a padded batch gives what it gives alone."""
    groups, before_rope = FORMS[form].get("groups", 2), FORMS[form].get("before_rope", False)

    def cut(index: int) -> LayerProjection:
        full = rotation(2, (16, 16), groups, before_rope, seed=index)
        rank = 8 * 2 // groups
        sides = [SideProjection(s.down[:, :, :rank], s.up[:, :rank], s.mean) for s in (full.keys, full.values)]
        return LayerProjection(sides[0], sides[1], 2, before_rope)

    def cache() -> Any:
        return with_projections(quantized(model, codec), cut)

    alone = [generate(model, prompt(length), cache(), 20) for length in (41, 60)]
    together = generate(model, left_padded([prompt(41), prompt(60)]), cache(), 20)
    exact = generate(model, prompt(60), small_cache(model), 20)
    # The first logits are those of the prompt, which is not read from the cache.
    assert (alone[1].logits - exact.logits)[:, 1].abs().max() > 0.1, "nothing was lost: the test is vacuous"
    for row, one in enumerate(alone):
        assert_packed(one.cache)
        # In a few steps a rounding error may have changed the code of a coefficient, hence the median.
        assert (together.logits[row] - one.logits[0]).abs().amax(1).median() < ROUNDING
