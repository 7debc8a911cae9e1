"""The scale of keys: what it is, what it changes, and that it follows a sequence."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from hf_kvcache import QuantizedKVCache
from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.reference.key_scale import balanced
from hf_kvcache.storage.key_basis import KeyBasis, key_scale
from tests import families
from tests.running import as_cache, prompt


def by_hand(query: np.ndarray, keys: np.ndarray) -> list[float]:
    """The scale of one head, channel by channel; ``query [g, n, D]``, ``keys [n, D]``."""
    ratios = [float(np.var(keys[:, c])) / float(np.mean(query[:, :, c] ** 2)) for c in range(keys.shape[1])]
    logs = [math.log2(ratio) / 4 for ratio in ratios]
    mean = sum(logs) / len(logs)
    return [2.0 ** min(4, max(-4, round(log - mean))) for log in logs]


def spread(*shape: int, seed: int) -> torch.Tensor:
    """Normal numbers whose channels differ in size by powers of two that no rounding tips over."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 16.0 ** torch.randint(-1, 2, (*shape[:2], 1, shape[3]), generator=generator)
    return torch.randn(*shape, generator=generator) * sizes


def test_against_a_scale_by_hand() -> None:
    """GQA, sinks and left padding that holds NaN; a sequence with too few tokens is not scaled."""
    query, keys = spread(3, 6, 300, 8, seed=0), spread(3, 2, 300, 8, seed=1) + 5
    valid = np.ones((3, 300), dtype=bool)
    valid[1, :40] = valid[2, :292] = False
    expected = torch.ones(3, 2, 8)
    for row, first in ((0, 4), (1, 44)):
        for head in range(2):
            group = query[row, 3 * head : 3 * head + 3, first:].numpy()
            expected[row, head] = torch.tensor(by_hand(group, keys[row, head, first:].numpy()))
    there = torch.from_numpy(valid)[:, None, :, None]
    poisoned = [x.masked_fill(~there, torch.nan) for x in (query, keys)]
    found = key_scale(*poisoned, valid, 4)
    near = (found / expected).log2().abs()
    assert near.max() <= 1 and (near == 0).double().mean() > 0.95, "a ratio on the edge may be rounded either way"
    assert (found[2] == 1).all() and len(found.unique()) > 2
    alone = key_scale(query[1:2, :, 40:], keys[1:2, :, 40:], None, 4)
    assert torch.equal(alone, found[1:2])


@pytest.mark.parametrize("x", [0.0, 1e-20, 1e18, torch.nan, torch.inf])
def test_any_numbers_give_powers_of_two(x: float) -> None:
    """Channels without variance, keys of one size, and numbers that are not finite."""
    variance = torch.full((1, 1, 8), x)
    variance[..., 0] = 3.0
    for pair in ((variance, torch.ones(1, 1, 8)), (torch.ones(1, 1, 8), variance)):
        found = balanced(*pair)
        assert ((found.log2() % 1 == 0) & (found >= 1 / 16) & (found <= 16)).all()


def test_large_channels_that_queries_hardly_see() -> None:
    """What Qwen2's biases do to keys: the error of scores is far smaller than without a scale."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(256.0)
    keys = torch.randn(1, 1, 256, 64, generator=generator)
    keys[..., 3], keys[..., 35] = 80 * position.cos(), 80 * position.sin()
    query = torch.randn(1, 1, 256, 64, generator=generator)
    query[..., [3, 35]] *= 0.02
    encoder = PageEncoder(resolve("unbiased4"), 64, 64, 256, torch.float32)
    errors = []
    for scale in (torch.ones(1, 1, 64), key_scale(query, keys, None, 0)):
        mean = encoder.key_mean_of(keys.mean(2), scale)[0]
        records = encoder.encode(keys[0], keys[0], mean, scale[0])
        buffer = torch.empty(1, 1, 256, 64)
        decoded = encoder.decode("keys", records[None], mean, buffer, scale[0])
        errors.append(float(((decoded - keys[0]) @ query[0, 0].T).square().mean()))
    assert errors[1] < errors[0] / 20


def test_it_goes_with_its_sequence() -> None:
    """Forks, copies of rows and a restored cache have the scale; a new prompt behind a reset has its own."""
    model = families.build("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[:3] *= 50
    cache = QuantizedKVCache(model.config, bits=4, page_size=16, tail_length=16)
    with torch.no_grad():
        model(prompt(80, 2), **as_cache(cache))
    basis = cache.layers[0].storage.writer.basis
    first = basis.scale.clone()
    assert len(first.unique()) > 1
    first[1] *= 2  # so that the rows differ
    basis.scale[1] *= 2
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].storage.writer.basis.scale, first.flip(0))
    fork = cache.fork()
    restored = QuantizedKVCache(model.config, bits=4, page_size=16, tail_length=16)
    restored.load_state_dict(cache.state_dict())
    for other in (fork, restored):
        assert torch.equal(other.layers[0].storage.writer.basis.scale, first.flip(0))
    cache.reset()
    with torch.no_grad():
        model(prompt(11, 2), **as_cache(cache))  # seven behind the sinks are too few
    assert (cache.layers[0].storage.writer.basis.scale == 1).all()
    assert torch.equal(fork.layers[0].storage.writer.basis.scale, first.flip(0))


@pytest.mark.parametrize("ask", ["settle", "scale", "fork", "pickle", "select", "fix_mean"])
def test_it_is_there_whoever_asks_first(ask: str) -> None:
    """A first update is kept until the scale is asked for, and no longer."""
    query, keys = spread(2, 4, 40, 8, seed=2), spread(2, 2, 40, 8, seed=3)
    expected = key_scale(query, keys, None, 4)
    basis = KeyBasis(PageEncoder(resolve("unbiased4"), 8, 8, 16, torch.float32), 2, 2, torch.device("cpu"))
    basis.balance(query, keys, None, 4)
    rows = np.arange(2)
    asked = {
        "settle": lambda: (basis.settle(), basis)[1],
        "scale": lambda: (basis.scale, basis)[1],
        "fork": basis.fork,
        "pickle": lambda: pickle.loads(pickle.dumps(basis)),
        "select": lambda: (basis.select(rows), basis)[1],
        "fix_mean": lambda: (basis.fix_mean(rows, keys[:, :, 4:20]), basis)[1],
    }[ask]()
    assert asked._first_update is None and basis._first_update is None
    assert torch.equal(asked.scale, expected) and len(expected.unique()) > 2
