"""Plans of caches that read some pages: what the choice holds, and what a step reads."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from tests import families
from tests.planning.holding import BATCH, CONTEXT, fill, held, step


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "sparse:moments:0.5:0"),
        ("llama", "sparse:kascade:0.4:0"),
        pytest.param("gemma2", "sparse:landmark:160:0+int4", marks=pytest.mark.slow),
        pytest.param("llama", "sparse:moments:0.5:1+4bits", marks=pytest.mark.slow),
        pytest.param("llama", "sparse:random:0.6:0", marks=pytest.mark.slow),
        pytest.param("llama", "sparse:moments:300:0", marks=pytest.mark.slow),
        pytest.param("llama", "sparse:moments:4k:0", marks=pytest.mark.slow),
        pytest.param("gemma2", "sparse:moments:0.5:0", marks=pytest.mark.slow),
    ],
)
def test_held_and_read(family: str, name: str) -> None:
    """After a prompt and the first step, which reads what the plan says and the new token."""
    model = families.build(family)
    found = plan(model.config, CONTEXT, BATCH, [name], torch.float32, bandwidth=1000)
    (row,) = found.caches
    cache = fill(model, maker(name)(model.config))
    before = held(cache)
    report = step(model, cache).memory()
    assert row.bytes == row.peak == before + report.parts["summaries"]
    assert row.step_floor_ms is not None
    config = model.config
    token = BATCH * config.num_hidden_layers * config.num_key_value_heads * 2 * config.head_dim * 4
    assert row.step_floor_ms - found.active_bytes == sum(report.read_last_step.values()) - token


def test_measuring_everything_reads_everything() -> None:
    """What attends to all pages to find the best ones has no smaller floor than reading them."""
    config = families.build("llama").config
    names = ["sparse:oracle:0.3:0", "sparse:random:0.3:0"]
    everything, some = plan(config, CONTEXT, 1, names, torch.float32, bandwidth="1GB/s").caches
    assert everything.bytes == some.bytes
    assert (everything.step_floor_ms or 0) > (some.step_floor_ms or 0)
