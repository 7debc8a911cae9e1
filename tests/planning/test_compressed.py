"""Plans for DeepSeek V4, whose layers compress their tokens and pack them as the cache says."""

from __future__ import annotations

import torch

from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from tests.compressed.models import build
from tests.planning.holding import BATCH, CONTEXT, fill, held

CACHES = ("full", "none", "quantized:8", "quantized:4")


def test_planned_bytes_are_held() -> None:
    model = build()
    found = plan(model.config, CONTEXT, BATCH, CACHES, torch.float32)
    planned = {row.name: row.bytes for row in found.caches}
    assert planned == {name: held(fill(model, maker(name)(model.config))) for name in CACHES}
    assert len(set(planned.values())) == len(CACHES)
