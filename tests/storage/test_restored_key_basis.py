"""What the first packed tokens of a sequence fix of the basis of its keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from hf_kvcache import KVCache
from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.storage.key_basis import key_scale
from hf_kvcache.storage.paged import PagedStorage


def storage(like: torch.Tensor) -> PagedStorage:
    encoder = PageEncoder(resolve("unbiased4"), like.shape[3], like.shape[3], 16, like.dtype)
    return PagedStorage(encoder, like, like, sink_length=4, tail_length=4)


def test_storages_of_one_state_have_means_of_their_own() -> None:
    """Two storages restored from one state, before its first page, each take the mean of their own tokens."""
    keys = torch.randn(1, 2, 60, 32, generator=torch.Generator().manual_seed(0))
    origin = storage(keys)
    origin.append_block(keys[:, :, :10], keys[:, :, :10], 0, None)
    state = origin.state()
    first, second = storage(keys), storage(keys)
    for other in (first, second):
        other.restore(state)
    first.append_block(keys[:, :, 10:] + 5, keys[:, :, 10:], 10, None)
    assert first.key_mean is not None
    mean = first.key_mean.clone()
    second.append_block(keys[:, :, 10:] - 5, keys[:, :, 10:], 10, None)
    assert torch.equal(first.key_mean, mean)
    assert torch.equal(state["center"], torch.zeros_like(mean))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scale_of_each_dtype(dtype: torch.dtype) -> None:
    """Keys 16 times as large in some channels as in the others get 4 times the scale."""
    random = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(1, heads, 400, 32, generator=random) for heads in (4, 2))
    keys[..., ::2] *= 16
    scale = key_scale(query.to(dtype), keys.to(dtype), None, sinks=4)
    assert scale.dtype == torch.float32
    assert torch.equal(scale[..., ::2] / scale[..., 1::2], torch.full((1, 2, 16), 4.0))


def test_states_saved_without_a_scale() -> None:
    """Files of earlier versions, whose keys were not divided, are read; a scale of another shape is refused."""
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 60, 32, generator=random) for _ in range(2))
    config = LlamaConfig(num_hidden_layers=1, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    cache, loaded = (KVCache(config, "unbiased4", page_size=16, tail_length=8, sink_length=4) for _ in range(2))
    cache.update(keys, values, 0)  # nobody gives queries, so the scale is 1
    loaded.update(keys[:, :, :1], values[:, :, :1], 0)
    layer: Any = cache.layers[0]
    layer.flush()
    other: Any = loaded.layers[0]
    tensors, progress = layer.tensors(), layer.progress()
    with pytest.raises(ValueError, match="'key_scale' is"):
        other.check_tensors(tensors | {"key_scale": tensors["key_scale"][..., :5]}, progress)
    del tensors["key_scale"]
    other.check_tensors(tensors, progress)
    other.restore(tensors, progress)
    assert torch.equal(layer.decompressed("keys"), other.decompressed("keys"))


def test_scale_against_loops() -> None:
    """Of padded rows, of whose padding nothing may be read, and of too few tokens, the scale is that of a loop."""
    random = torch.Generator().manual_seed(0)
    query, keys = torch.randn(3, 4, 30, 16, generator=random), torch.randn(3, 2, 30, 16, generator=random)
    keys *= torch.logspace(-2, 2, 16)
    valid = np.ones((3, 30), dtype=bool)
    valid[0], valid[1, :10], valid[1, 14], valid[2, :17] = False, False, False, False  # 0, 19 and 13 tokens
    for x in (query, keys):
        x.masked_fill_(~torch.from_numpy(valid)[:, None, :, None], torch.nan)
    scale = key_scale(query, keys, valid, sinks=4)
    for row in range(3):
        held = np.flatnonzero(valid[row])[4:]
        for head in range(2):
            wanted = torch.ones(16)
            if len(held) >= 8:
                own = query[row, 2 * head : 2 * head + 2][:, held].double()
                parts = keys[row, head, held].double().var(0, unbiased=False), own.square().mean((0, 1))
                spread, power = (x + 1e-6 * x.mean() for x in parts)
                exponent = (spread / power).log2() / 4
                wanted = torch.exp2((exponent - exponent.mean()).clamp(-4, 4).round()).float()
            assert torch.equal(scale[row, head], wanted)
    assert len(scale[1:].unique()) > 4


def test_scaled_keys_stay_in_the_range_of_half_precision() -> None:
    """A channel of large keys that differ little, asked for by large queries, is not scaled beyond the range."""
    random = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(1, 1, 60, 32, generator=random) for _ in range(2))
    query[..., 0] *= 300
    keys[..., 0] = 5000 + keys[..., 0] / 100
    for dtype, least in ((torch.float32, 2.0**-4), (torch.float16, 2.0)):
        scale = key_scale(query.to(dtype), keys.to(dtype), None, sinks=4)
        assert scale[0, 0, 0] == least
        assert (keys.to(dtype) / scale.unsqueeze(2).to(dtype)).isfinite().all()
