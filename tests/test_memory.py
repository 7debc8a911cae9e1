"""``cache.memory()``: the bytes that are allocated, the bits per element, and how both grow."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.pool import PagePool
from tests.running import (
    PAGE,
    SINKS,
    TAIL,
    assert_packed,
    forward,
    full_cache,
    generate,
    left_padded,
    prompt,
    small_cache,
)

#: Bookkeeping of the pool that is not counted: reference counts and free list, a few bytes a page.
_UNCOUNTED = ("_references", "_free", "_starts")


def _allocated(value: Any, seen: dict[int, int]) -> None:
    """Collect the bytes of every tensor storage and array that ``value`` refers to, each once."""
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, np.ndarray):
        owner = value if value.base is None or not isinstance(value.base, np.ndarray) else value.base
        seen[id(owner)] = owner.nbytes
    elif isinstance(value, dict):
        for item in value.values():
            _allocated(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            _allocated(item, seen)
    elif type(value).__module__.startswith("hf_kvcache.storage"):
        hidden = _UNCOUNTED if isinstance(value, PagePool) else ()
        for name, item in vars(value).items():
            if name not in hidden:
                _allocated(item, seen)


def _walk(storage: PagedStorage | None) -> int:
    seen: dict[int, int] = {}
    _allocated(storage, seen)
    return sum(seen.values())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("codec", ["none", "int3", "kvarn2", "turboquant1", "fp8"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
def test_total_is_what_is_allocated(model: PreTrainedModel, codec: str, padded: bool) -> None:
    """The total is the sum over every tensor and array that the storage refers to."""
    cache = small_cache(model, codec)
    inputs = left_padded([prompt(33), prompt(140)]) if padded else prompt(140, 2)
    generate(model, inputs, cache, 6)
    assert_packed(cache)
    report = cache.memory()
    for layer, part in zip(cache.own_layers, report.layers, strict=True):
        assert part.total == pytest.approx(_walk(layer.storage), abs=64 * 8)  # for the row index of boolean masks
    assert report.total == sum(part.total for part in report.layers) == sum(report.parts.values())


#: Bits per element of a page of 16 tokens and 16 channels, by hand: the code, and 16 bits for each scale.
BITS = {
    "none": 32.0,
    "fp8": 8 + 16 / 16,  # a scale per token
    "int8": 8 + 2 * 16 / 16,  # scale and zero per channel of 16 tokens, or per token of 16 channels
    "int4": 4 + 2 * 16 / 16,
    "int3": 3 + 2 * 16 / 16,
    "int2": 2 + 2 * 16 / 16,
    "rotated4": 4 + 2 * 16 / 16,
    "kvarn3": 3 + 3 * 16 / 16,  # a second scale along the other axis
    "turboquant2": 2 + 16 / 16,
}


@pytest.mark.parametrize("codec", BITS)
def test_bits_per_element(model: PreTrainedModel, codec: str) -> None:
    """They are the bits of codes and scales divided by the elements of the pages."""
    cache = small_cache(model, codec)
    forward(model, prompt(100), cache)
    assert_packed(cache)
    report = cache.memory()
    assert report.bits_per_element == pytest.approx(BITS[codec])
    pages = (100 - SINKS - TAIL) // PAGE
    assert report.packed_elements == 2 * 2 * 2 * pages * PAGE * 16  # layers, heads, sides
    assert report.parts["sinks"] == 2 * 2 * 2 * SINKS * 16 * 4
    assert report.parts["tail"] == 2 * 2 * 2 * (100 - SINKS - pages * PAGE) * 16 * 4


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_full_is_a_dynamic_cache(model: PreTrainedModel, family: str) -> None:
    """The report compares with the bytes of a DynamicCache for the same tokens, sliding layers included."""
    full, ours = full_cache(model), small_cache(model)
    for cache in (full, ours):
        forward(model, prompt(60, 2), cache)
        forward(model, prompt(1, 2), cache)
    held = sum(side.numel() * side.element_size() for layer in full.layers for side in (layer.keys, layer.values))
    report = ours.memory()
    assert report.full_same_dtype == held == 2 * report.full_bf16
    assert report.ratio == pytest.approx(report.total / held)


def test_states_of_other_layers_count() -> None:
    """The report includes the linear-attention states of a hybrid model."""
    from tests import families

    model = families.build("qwen3_next")
    cache = small_cache(model)
    forward(model, prompt(60), cache)
    state = cache.layers[0]
    held = sum(
        tensor.numel() * tensor.element_size()
        for states in (state.conv_states, state.recurrent_states)
        for tensor in states.values()
    )
    assert cache.memory().layers[0].parts["other"] == held > 0


def test_ratio_at_long_context(model: PreTrainedModel) -> None:
    """At 4,096 tokens with slack, 4 bits with scale and zero per 16 elements take little more than 6/32 of float32."""
    cache = KVCache(model.config, "int4", page_size=16, tail_length=8)
    keys = torch.randn(1, 2, 4096, 16)
    for layer in range(2):
        cache.update(keys, keys, layer)
    report = cache.memory()
    assert 6 / 32 < report.ratio < 0.22
    assert report.parts["slack"] < 0.05 * report.total


def test_grows_by_pages_only(model: PreTrainedModel) -> None:
    """A token allocates nothing, except at page boundaries, where it allocates the new pages."""
    cache = small_cache(model, "int4")
    forward(model, prompt(28), cache)
    totals, packed = [], []
    for token in prompt(100).split(1, 1):
        forward(model, token, cache)
        report = cache.memory()
        totals.append(report.total)
        packed.append(report.packed_elements)
    growth = [b - a for a, b in pairwise(totals)]
    boundary = [b > a for a, b in pairwise(packed)]
    assert sum(boundary) == 6
    # The step after a boundary makes an index of the new pages, which are then read for the first time.
    quiet = [not (page or before) for page, before in zip(boundary, [True, *boundary], strict=False)]
    assert all(grown == 0 for grown, still in zip(growth, quiet, strict=True) if still)
    record = cache.layers[0].storage.layout.record_bytes
    assert max(growth) <= 2 * 2 * 4 * record


def test_reset_frees(model: PreTrainedModel) -> None:
    """An empty cache holds no bytes, before the first token and after a reset."""
    cache = small_cache(model, "int4")
    assert cache.memory().total == 0
    forward(model, prompt(90), cache)
    cache.reset()
    assert cache.memory().total == 0
    assert np.isnan(cache.memory().bits_per_element) and np.isnan(cache.memory().ratio)


def test_printed(model: PreTrainedModel) -> None:
    """The printed report lists the parts, the total, the ratios and the bits."""
    cache = small_cache(model, "int4")
    forward(model, prompt(90), cache)
    text = str(cache.memory())
    for word in ("codes", "scales", "sinks", "tail", "total", "bfloat16 DynamicCache", "bits per packed element"):
        assert word in text
    assert "codes" in str(cache.memory().layers[0])


@pytest.mark.parametrize(("bits", "most"), [(4, 0.31), (3, 0.25), (2, 0.19)])
@pytest.mark.parametrize("step", [8192, 1000], ids=["at once", "in blocks"])
def test_share_of_a_bfloat16_cache(bits: int, most: float, step: int) -> None:
    """The sizes of the default codecs at 8,192 tokens in bfloat16 and SmolLM2's shape, slack included."""
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    )
    cache = QuantizedKVCache(config, bits=bits)
    for start in range(0, 8192, step):
        new = torch.randn(1, 3, min(step, 8192 - start), 64, dtype=torch.bfloat16)
        cache.update(new, new, 0)
        cache.layers[0].flush()
    report = cache.memory()
    assert report.full_bf16 == 8192 * 3 * 64 * 2 * 2
    assert report.ratio_bf16 < most
    assert bits < report.bits_per_element <= bits + 0.5
