"""What a plan says is what caches hold after a real run, to the byte, for every family of the model table."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache

from hf_kvcache import KVCache, unbind
from hf_kvcache.cache.memory import layer_report
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from tests.model_families.building import NotBuilt, build
from tests.model_families.catalog import TEXT, Family, families

CACHES = ("full", "none", "quantized:8", "quantized:4", "quantized:4:2", "codec:int4")
#: Plain, soft-capped with a window, hybrid, latents, sinks, heads that share, parts of their own, no attention.
SAMPLE = ("llama", "gemma2", "qwen3_next", "deepseek_v3", "gpt_oss", "bloom", "jamba", "mamba")
BATCH, CONTEXT = 2, 300


def _parameters() -> list[object]:
    return [
        pytest.param(family, id=family.model_type, marks=[] if family.model_type in SAMPLE else [pytest.mark.slow])
        for family in families()
        if family.task == TEXT
    ]


@pytest.mark.parametrize("family", _parameters())
def test_planned_bytes_are_held(family: Family) -> None:
    try:
        model = build(family)
        KVCache(model.config, bind=False)
        held(model, DynamicCache(config=model.config.get_text_config(decoder=True)))
    except (NotBuilt, ValueError, NotImplementedError) as error:
        pytest.skip(str(error))
    found = plan(model.config, CONTEXT, BATCH, CACHES, torch.float32)
    assert found.caches
    for row in found.caches:
        assert row.bytes == held(model, maker(row.name)(model.config)), row.name
    assert found.weight_bytes == 4 * found.parameters


def held(model: torch.nn.Module, cache: Cache) -> int:
    """Bytes after a prompt."""
    ids = torch.randint(3, 60, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, **with_cache(model, cache))
    finally:
        unbind(model.config.get_text_config(decoder=True))
    if isinstance(cache, KVCache):
        return cache.memory().total
    return sum(sum(layer_report(layer).parts.values()) for layer in cache.layers)
