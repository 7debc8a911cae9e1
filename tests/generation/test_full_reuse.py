"""With ``codec="none"`` a cache that is used again equals DynamicCache: turns, forks, resets, drafts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import KVCache
from hf_kvcache.integration.versions import RELEASE
from tests import families
from tests.running import (
    as_cache,
    assert_packed,
    assert_same,
    full_cache,
    generate,
    left_padded,
    prompt,
    small_cache,
)

FEW = ["llama", "gemma3", "mistral", "gpt_oss"]


@pytest.mark.parametrize("family", families.names(without=("deepseek_v3",)))
def test_padding_in_the_middle(model: PreTrainedModel) -> None:
    """The second turn of a batch is left-padded too, so there is padding between the turns."""
    first = left_padded([prompt(20), prompt(47)])
    second = left_padded([prompt(25, seed=1), prompt(7, seed=1)])
    caches = full_cache(model), small_cache(model)
    turns = [generate(model, first, cache, 10) for cache in caches]
    assert_same(turns[1], turns[0])
    inputs = {
        "input_ids": torch.cat([first["input_ids"], turns[0].tokens, second["input_ids"]], 1),
        "attention_mask": torch.cat(
            [first["attention_mask"], torch.ones_like(turns[0].tokens), second["attention_mask"]], 1
        ),
    }
    theirs, ours = (generate(model, inputs, cache, 12) for cache in caches)
    assert_packed(caches[1])
    assert_same(ours, theirs)


#: One family for each kind of cached state: full layers, sliding layers, both, keys that layers share, latents.
DRAFTED = ["llama", "mistral", "gemma3", "gemma4", "deepseek_v3"]


def _mostly_slow(fast: list[str]) -> list[Any]:
    """The families that can decode with drafts; all but ``fast`` are marked as slow."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in families.every_name() if name not in fast]
    return [*fast, *(param for param in slow if param.values[0] not in families.RECURRENT)]


@pytest.mark.parametrize("family", families.names(without=families.RECURRENT))
def test_prompt_lookup_of_a_packed_prompt(model: PreTrainedModel) -> None:
    _prompt_lookup(model, 60)


@pytest.mark.parametrize("family", _mostly_slow(DRAFTED))
def test_prompt_lookup(model: PreTrainedModel) -> None:
    """Prompt-lookup decoding where no page is packed before the first draft."""
    _prompt_lookup(model, 20)


def _prompt_lookup(model: PreTrainedModel, length: int) -> None:
    """Prompt-lookup decoding: the drafts come from the prompt, and most are rolled back."""
    inputs = prompt(length).repeat(1, 2)
    theirs = generate(model, inputs, full_cache(model), 30)
    ours = generate(model, inputs, small_cache(model), 30, prompt_lookup_num_tokens=4)
    assert_packed(ours.cache)
    assert torch.equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("family", _mostly_slow(DRAFTED))
def test_assisted(model: PreTrainedModel) -> None:
    """Assisted decoding. The assistant is the model with a little noise, so its drafts are often accepted."""
    assistant = families.build(_family_of(model))
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.02)
    inputs = prompt(50)
    try:  # in 5.17 an assistant's own cache fails if it has sliding layers
        theirs = generate(model, inputs, full_cache(model), 30, assistant_model=assistant)
    except RuntimeError as error:
        pytest.skip(f"transformers {RELEASE} itself: {error}")
    assert torch.equal(theirs.tokens, generate(model, inputs, full_cache(model), 30).tokens)
    ours = generate(model, inputs, small_cache(model), 30, assistant_model=assistant)
    assert_packed(ours.cache)
    assert torch.equal(ours.tokens, theirs.tokens)


def _family_of(model: PreTrainedModel) -> str:
    from tests.conftest import MODELS

    return next(name for name, shared in MODELS.items() if shared is model)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("copied", [copy.deepcopy, KVCache.fork], ids=["deepcopy", "fork"])
def test_prefix_reuse(model: PreTrainedModel, copied: Any) -> None:
    """The prefix of a prompt is computed once and continued in several ways, which do not disturb each other."""
    prefix = prompt(58)
    model(prefix, **as_cache(shared := small_cache(model)), use_cache=True)
    for seed in range(3):
        inputs = torch.cat([prefix, prompt(5 + 9 * seed, seed=seed)], 1)
        ours = generate(model, inputs, copied(shared), 12)
        assert_packed(ours.cache)
        assert_same(ours, generate(model, inputs, full_cache(model), 12))
    assert shared.get_seq_length() == 58
    shared.integrity()


@pytest.mark.parametrize("family", [*FEW, "qwen3_next", "gemma4"])
def test_reset(model: PreTrainedModel) -> None:
    """After a reset a cache accepts another batch, and behaves like a new cache."""
    cache = small_cache(model)
    generate(model, prompt(50, 3), cache, 5)
    assert_packed(cache)
    for inputs in (prompt(60), prompt(33, 2)):
        cache.reset()
        assert cache.get_seq_length() == 0
        ours = generate(model, inputs, cache, 16)
        assert_packed(cache)
        assert_same(ours, generate(model, inputs, full_cache(model), 16))
