"""What a plan says is what caches hold after a real run, to the byte, for every family of the model table."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from hf_kvcache import KVCache
from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from tests.model_families.building import NotBuilt, build
from tests.model_families.catalog import TEXT, Family, families
from tests.planning.holding import BATCH, CONTEXT, fill, held, made_by_a_step, saved_by_chance

CACHES = ("full", "none", "quantized:8", "quantized:4", "quantized:4:2", "codec:int4")
EVICTING = ("h2o:90", "window:60:2+8bits", "snapkv:0.5+int4")
#: All memory at once, and pages that are chosen at each step.
OTHERS = ("quantized:4@400", "sparse:moments:0.5:0+8bits")
#: Cuts its masks, which then do not say any more that they hide nothing: every step reads everything.
CUTS_MASKS = ("gemma4_unified",)
#: Plain, soft-capped with a window, hybrid, latents, sinks, heads that share, no attention.
SAMPLE = ("llama", "gemma2", "qwen3_next", "deepseek_v3", "gpt_oss", "bloom", "mamba")


def _fast(family: Family) -> bool:
    return family.task == TEXT and family.model_type in SAMPLE


def _parameters() -> list[object]:
    return [
        pytest.param(family, id=f"{family.model_type}-{family.task}", marks=[] if _fast(family) else [pytest.mark.slow])
        for family in families()
    ]


@pytest.mark.parametrize("family", _parameters())
def test_planned_bytes_are_held(family: Family) -> None:
    try:
        model = build(family)
        KVCache(model.config, bind=False)
        fill(model, DynamicCache(config=model.config.get_text_config(decoder=True)))
    except (NotBuilt, ValueError, NotImplementedError) as error:
        pytest.skip(str(error))
    except (TypeError, AttributeError) as error:
        if family.task == TEXT:
            raise
        pytest.skip(f"takes no text alone: {error}")
    names = CACHES + EVICTING + OTHERS
    found = plan(model.config, CONTEXT, BATCH, names, torch.float32)
    assert found.caches
    for row in found.caches:
        cache = fill(model, maker(row.name)(model.config))
        filled = held(cache) + saved_by_chance(cache)
        made = made_by_a_step(model, cache)
        if row.name.startswith("sparse") and family.model_type in CUTS_MASKS:
            assert row.bytes > filled and made == 0, row.name
        else:
            assert row.bytes == filled + made, row.name
    assert found.weight_bytes == 4 * found.parameters
    # Whatever cannot be planned cannot be made either.
    for name in set(names) - {row.name for row in found.caches}:
        with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
            fill(model, maker(name)(model.config))
