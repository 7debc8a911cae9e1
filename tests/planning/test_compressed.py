"""Plans for DeepSeek V4, whose layers compress their tokens and pack them as the cache says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hf_kvcache.integration.versions import with_cache
from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from hf_kvcache.planning.model import ModelOnMeta
from tests.compressed.models import build
from tests.planning.holding import BATCH, CONTEXT, fill, held

CACHES = ("full", "none", "quantized:8", "quantized:4")


def test_planned_bytes_are_held() -> None:
    model = build()
    found = plan(model.config, CONTEXT, BATCH, CACHES, torch.float32)
    planned = {row.name: row.bytes for row in found.caches}
    assert planned == {name: held(fill(model, maker(name)(model.config))) for name in CACHES}
    assert len(set(planned.values())) == len(CACHES)


@pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.slow), "quantized:4"])
def test_every_length(name: str) -> None:
    """Before a window of compression is full, when one is, and behind it."""
    model, lengths = build(), [1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 64, 130]
    (row,) = plan(model.config, CONTEXT, 1, [name], torch.float32, lengths=lengths).caches
    for length in lengths:
        cache: Any = maker(name)(model.config)
        with torch.no_grad():
            model(torch.ones(1, length, dtype=torch.int64), use_cache=True, **with_cache(model, cache))
        assert row.curve[length] == held(cache), length


@pytest.mark.slow
def test_one_layer_of_each_type_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 43 layers of the real model are of two types: one of each runs, and a search runs them no further."""
    seen, run = [], ModelOnMeta._pass

    def counted(self: ModelOnMeta, cache: Any, batch: int, tokens: int) -> Any:
        seen.append(len(cache.layers))
        return run(self, cache, batch, tokens)

    monkeypatch.setattr(ModelOnMeta, "_pass", counted)
    config = AutoConfig.from_pretrained(Path(__file__).parent / "configs" / "deepseek_v4_flash.json")
    (row,) = plan(config, "128k", caches=["quantized:4"], memory="800GB", lengths=range(1000, 20000, 500)).caches
    assert seen == [2, 2, 2]
    assert row.longest_context is not None and row.longest_context > 10**7
