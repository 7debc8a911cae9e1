"""Plans of caches that allocate the memory of ``max_length`` tokens at once."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from tests import families
from tests.planning.holding import BATCH, CONTEXT, fill, held


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "quantized:4@400"), ("gemma2", "codec:kvarn4@1k")]
    + [
        pytest.param(family, name, marks=pytest.mark.slow)
        for family in ("llama", "gemma2", "gpt_oss")
        for name in ("none@300", "none@5k", "quantized:8:4@333", "codec:fp8@321")
    ],
)
def test_held_and_read(family: str, name: str) -> None:
    model = families.build(family)
    found = plan(model.config, CONTEXT, BATCH, [name], torch.float32, bandwidth=1000)
    (row,) = found.caches
    cache = fill(model, maker(name)(model.config))
    assert row.bytes == row.peak == held(cache)
    assert row.step_floor_ms is not None
    assert row.step_floor_ms - found.active_bytes == sum(cache.memory().read_last_step.values())


def test_no_more_than_the_maximum_fits() -> None:
    """However much memory there is; and a longer context is said to have no room."""
    config = families.build("llama").config
    names = ["none@400", "none@200", "quantized:4@9"]
    found = plan(config, CONTEXT, 1, names, torch.float32, memory="100GB")
    (row,) = found.caches
    assert (row.name, row.longest_context) == ("none@400", 400)
    assert row.largest_batch == 1 << 16
    too_short, too_small = found.unknown
    assert too_short.startswith("none@200: max_length=200; accepted: whole numbers from 260")
    assert too_small.startswith("quantized:4@9: max_length=9; accepted: whole numbers from 260")


def test_a_longer_context_is_refused() -> None:
    config = families.build("llama").config
    assert plan(config, 401, caches=["none@400"]).unknown == ["none@400: context=401; accepted: 1 to max_length=400"]
