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
    [("gemma2", "codec:kvarn4@1k")]
    + [
        pytest.param(family, name, marks=pytest.mark.slow)
        for family in ("llama", "gemma2", "gpt_oss")
        for name in ("quantized:4@400", "none@300", "none@5k", "quantized:8:4@333", "codec:fp8@321")
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
    """However much memory there is; and what has no room is said to have none."""
    config = families.build("llama").config
    names = ["none@400", "none@319", "quantized:4@9"]
    found = plan(config, 320, 1, names, torch.float32, memory="1TB", lengths=(100, 400, 401))
    (row,) = found.caches
    assert row.curve == {100: row.bytes, 400: row.bytes}
    assert (row.name, row.longest_context, row.largest_batch) == ("none@400", 400, 1 << 16)
    too_small, too_short = found.unknown
    assert too_small.startswith("quantized:4@9: max_length=9; accepted: whole numbers from 260")
    assert too_short == "none@319: context=320; accepted: 1 to max_length=319"
