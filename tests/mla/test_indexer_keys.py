"""The keys of a sparse indexer that a layer holds beside latents."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from hf_kvcache import LatentKVCache
from hf_kvcache.layers.indexer_keys import IndexerKeys
from hf_kvcache.layers.mla import IndexedLatentLayer
from tests.mla import families as mla_families
from tests.running import forward, prompt

SIZES: dict[str, Any] = {"page_size": 16, "tail_length": 16, "sink_length": 4}


def small(config: Any, **options: Any) -> LatentKVCache:
    return LatentKVCache(config, **{**SIZES, **options})


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_indexer_keys_against_a_list(data: st.DataObject) -> None:
    """Any sequence of operations, against plain lists of rows; buffers that grow keep their contents."""
    held, model = IndexerKeys(), [np.zeros((0, 3)) for _ in range(2)]
    for step in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["append", "drop", "select", "fork"])):
            case "append":
                new = np.random.default_rng(step).normal(size=(len(model), data.draw(st.sampled_from([1, 2, 300])), 3))
                model = [np.concatenate(pair) for pair in zip(model, new, strict=True)]
                got = held.append(torch.from_numpy(new))
                np.testing.assert_array_equal(got.numpy(), np.stack(model))
            case "drop":
                count = data.draw(st.integers(0, 5))
                held.drop_last(count)
                model = [row[: max(0, len(row) - count)] for row in model]
            case "select":
                rows = np.array(data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=3)))
                held.select(rows)
                model = [model[row] for row in rows]
            case "fork":
                other = held.fork()
                held.append(torch.full((len(model), 1, 3), torch.nan, dtype=torch.float64))
                held = other
    keys = held.keys()
    assert (keys is None or keys.shape[1] == 0) == (len(model[0]) == 0)
    if keys is not None:
        np.testing.assert_array_equal(keys.numpy(), np.stack(model))


def test_indexer_keys_that_do_not_go_together() -> None:
    """Another batch, width or dtype is refused, and the keys stay."""
    held = IndexerKeys()
    held.append(torch.ones(2, 3, 4))
    for wrong in (torch.ones(1, 1, 4), torch.ones(2, 1, 5), torch.ones(2, 1, 4).double()):
        with pytest.raises(ValueError, match="do not go with those held"):
            held.append(wrong)
    keys = held.keys()
    assert keys is not None and keys.shape == (2, 3, 4)


def test_indexed_layers_count_their_keys() -> None:
    """The bytes held include the indexer's keys."""
    model = mla_families.shared("glm_moe_dsa")
    cache = small(model.config)
    forward(model, prompt(30), cache)
    layer = next(layer for layer in cache.layers if isinstance(layer, IndexedLatentLayer) and layer.indexer.tensors())
    held = sum(x.numel() * x.element_size() for x in layer.indexer.tensors())
    assert 0 < held <= cache.memory().parts["other"]
