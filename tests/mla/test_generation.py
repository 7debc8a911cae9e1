"""A cache that decodes without expanding latents equals ``DynamicCache``, in every family that has latents."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Cache, PreTrainedModel

from hf_kvcache.layers.mla import IndexedLatentLayer
from tests.mla import families as mla_families
from tests.mla.families import BROKEN, names
from tests.mla.running import FEW, assert_absorbed, both, latent, some, unbind_model
from tests.running import (
    ROUNDING,
    Generated,
    assert_packed,
    assert_same,
    forward,
    full_cache,
    generate,
    left_padded,
    prompt,
    teacher_forced,
)


@pytest.mark.parametrize("family", names())
def test_greedy(model: PreTrainedModel) -> None:
    """One sequence, past a page boundary; nothing is expanded after the first step."""
    ours, theirs = both(model, prompt(40))
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 23)


@pytest.mark.parametrize("family", some())
def test_left_padded_batch(model: PreTrainedModel) -> None:
    """A batch whose rows have clearly different lengths."""
    ours, theirs = both(model, left_padded([prompt(21), prompt(40), prompt(33)]))
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 23)


@pytest.mark.parametrize("family", [name for name in ("deepseek_v3", "deepseek_v32") if name in FEW])
def test_eager_attention(family: str) -> None:
    """The previous implementation may be another one than sdpa."""
    model = mla_families.build(family, "eager")
    ours, theirs = both(model, prompt(40))
    unbind_model(model)
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 23)


@pytest.mark.parametrize("family", some())
def test_beam_search(model: PreTrainedModel) -> None:
    """Beams are reordered at every step."""
    ours, theirs = both(model, prompt(40, 2), 14, num_beams=3)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert_absorbed(ours.cache, model, 13)


@pytest.mark.parametrize("family", some(without=BROKEN["draft"]))
def test_prompt_lookup(model: PreTrainedModel) -> None:
    """Drafts come from the prompt; several are read at once, and most are rolled back."""
    inputs = prompt(20).repeat(1, 2)
    theirs = generate(model, inputs, full_cache(model), 24)
    ours = generate(model, inputs, latent(model), 24, prompt_lookup_num_tokens=3)
    assert_packed(ours.cache)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert_absorbed(ours.cache, model, 6)  # at most four tokens a step


@pytest.mark.parametrize("family", some([], without=BROKEN["draft"]))
def test_assisted(family: str, model: PreTrainedModel) -> None:
    """The assistant is the model itself with a little noise, so that it often agrees."""
    assistant, noise = mla_families.build(family), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.02)
    theirs = generate(model, prompt(40), full_cache(model), 24)
    ours = generate(model, prompt(40), latent(model), 24, assistant_model=assistant)
    assert_packed(ours.cache)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert_absorbed(ours.cache, model, 1)


@pytest.mark.parametrize("family", some(FEW[:2]))
def test_second_turn(model: PreTrainedModel) -> None:
    """The second turn of a padded batch is padded too, so that there is padding between the turns."""
    first = left_padded([prompt(20), prompt(47)])
    second = left_padded([prompt(25, seed=1), prompt(7, seed=1)])

    def turns(cache: Cache) -> tuple[Generated, Generated]:
        answer = generate(model, first, cache, 10)
        ids = torch.cat([first["input_ids"], answer.tokens, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones_like(answer.tokens), second["attention_mask"]], 1)
        return answer, generate(model, {"input_ids": ids, "attention_mask": mask}, cache, 12)

    theirs, cache = turns(full_cache(model)), latent(model)
    for ours, expected in zip(turns(cache), theirs, strict=True):
        assert_same(ours, expected)
    assert_packed(cache)
    assert_absorbed(cache, model, 9 + 11)


@pytest.mark.parametrize("family", some())
def test_prefill_in_chunks(model: PreTrainedModel) -> None:
    """The prompt comes in parts that do not fit the pages, one long enough to be expanded; then single tokens."""
    steps = prompt(117).split([20, 7, 60, 13, 15, 1, 1], 1)
    full = full_cache(model)
    expected = torch.cat([forward(model, step, full) for step in steps], 1)
    cache = latent(model)
    logits = torch.cat([forward(model, step, cache) for step in steps], 1)
    assert_packed(cache)
    torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)
    assert_absorbed(cache, model, 2)


@pytest.mark.parametrize("family", some())
@pytest.mark.parametrize("size", [13, 45])
def test_padded_prefill_in_chunks(model: PreTrainedModel, size: int) -> None:
    """The same by ``generate``, with a batch in which the first parts of a row are all padding."""
    inputs = left_padded([prompt(61), prompt(110), prompt(83)])
    ours, theirs = both(model, inputs, 8, prefill_chunk_size=size)
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 7)


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("deepseek_v32", marks=pytest.mark.slow)])
def test_long_history(model: PreTrainedModel) -> None:
    """Many queries over more tokens than are expanded at a time."""
    steps = prompt(1300).split([1200, 97, 1, 2], 1)
    full = full_cache(model)
    expected = torch.cat([forward(model, step, full) for step in steps], 1)
    cache = latent(model)
    logits = torch.cat([forward(model, step, cache) for step in steps], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)


def _exact(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a half-precision model, computed in float32 with its weights."""
    exact = copy.deepcopy(model).float()
    return teacher_forced(exact, ids, full_cache(exact), 50)[:, 50:]


@pytest.mark.parametrize("family", some(FEW[:1]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """The error against float32 is about that of transformers' own cache."""
    model = mla_families.build(family, dtype=dtype)
    ids = prompt(80, 4)
    expected = _exact(model, ids)
    theirs = teacher_forced(model, ids, full_cache(model), 50)[:, 50:]
    cache = latent(model)
    ours = teacher_forced(model, ids, cache, 50)[:, 50:]
    unbind_model(model)
    errors = [float((logits.float() - expected).abs().median()) for logits in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]
    assert_absorbed(cache, model, 30)


#: Accepted median error of a logit, in standard deviations of logits: about twice the largest of any family.
_CODECS = [
    pytest.param({"bits": 8}, 0.02, id="bits=8"),
    pytest.param({"codec": "int8"}, 0.02, id="int8", marks=pytest.mark.slow),
    pytest.param({"codec": "fp8"}, 0.2, id="fp8", marks=pytest.mark.slow),
    pytest.param({"bits": 4}, 0.4, id="bits=4"),
]


@pytest.mark.parametrize("family", some())
@pytest.mark.parametrize(("options", "tolerance"), _CODECS)
def test_codecs(model: PreTrainedModel, options: dict[str, Any], tolerance: float) -> None:
    """Quantized latents change the logits, within the tolerance of the codec.

    The keys of an indexer have 8 bits then. Those of these models have 16 numbers, and other tokens are chosen.
    """
    ids = prompt(100)
    expected = teacher_forced(model, ids, full_cache(model), 80)[:, 80:]
    cache = latent(model, **options)
    logits = teacher_forced(model, ids, cache, 80)[:, 80:]
    assert_packed(cache)
    assert_absorbed(cache, model, 20)
    if any(isinstance(layer, IndexedLatentLayer) for layer in cache.layers):
        tolerance *= 3
    assert 0 < float((logits - expected).abs().median() / expected.std()) < tolerance
