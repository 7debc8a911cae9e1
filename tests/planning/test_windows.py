"""Plans of models whose layers all have a window: what they hold ends to grow, and so does the work of a plan."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from transformers import MistralConfig

from hf_kvcache.cache.memory import layer_report
from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker

WINDOW = 200


def config() -> MistralConfig:
    return MistralConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        sliding_window=WINDOW,
    )


@pytest.mark.parametrize("name", ["none", "quantized:4", "codec:int4"])
def test_long_prompts_are_planned_by_short_ones(name: str) -> None:
    """As many bytes as a layer holds that is given the whole prompt."""
    lengths = [WINDOW - 1, WINDOW + 1, 399, 400, 1000, 1023, 1024, 1025, *range(5000, 5070, 7)]
    (row,) = plan(config(), 64, 2, [name], torch.float32, lengths=lengths).caches
    for length in lengths:
        layers = maker(name)(config()).layers
        for layer in layers:
            states = torch.empty(2, 2, length, 16, device="meta")
            layer.update(states, states)
            layer.flush()
        assert row.curve[length] == sum(sum(layer_report(layer).parts.values()) for layer in layers), length


def test_no_context_is_too_long() -> None:
    """The search for the longest context ends, and takes no memory for its tokens."""
    tracemalloc.start()
    try:
        found = plan(config(), 64, 1, ["full", "none", "quantized:4"], memory="1GB").caches
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row.longest_context for row in found] == [1 << 26] * 3
    assert most < 1 << 28
