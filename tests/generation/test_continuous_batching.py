"""transformers' continuous batching, whose cache no other cache takes the place of."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_kvcache import KVCache
from tests import families
from tests.running import as_cache, prompt, small_cache

pytestmark = pytest.mark.slow
PROMPTS = [prompt(n, seed=n)[0].tolist() for n in (7, 6, 20)]


def batched(model: PreTrainedModel, **options: object) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    found = model.generate_batch(inputs=PROMPTS, generation_config=config, **options)
    return [output.generated_tokens for output in found.values()]


def test_bound_models_work_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works with a model that caches were built for, and says that it does not use the one it is given."""
    model, said = families.build("llama"), list[str]()
    monkeypatch.setattr("hf_kvcache.integration.attention.logger.warning_once", said.append)
    expected = batched(model)
    assert not said
    cache = small_cache(model, "rotated4")
    assert batched(model, **as_cache(cache)) == expected
    assert cache.get_seq_length() == 0 and "is not used" in said[0]
    one = torch.tensor(PROMPTS[:1])
    plain = model.generate(one, **as_cache(small_cache(model)), max_new_tokens=6, do_sample=False)
    assert plain[0, one.shape[1] :].tolist() == expected[0]


def test_the_name_is_refused() -> None:
    model = families.build("llama")
    model.set_attn_implementation("hf_kvcache")
    with pytest.raises(ValueError, match="hf_kvcache is not supported for continuous batching"):
        batched(model)


def test_paged_attention_is_refused() -> None:
    model = families.build("llama")
    model.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|eager' cannot be combined with a KVCache"):
        KVCache(model.config)
