"""Sparse reading in ``generate`` and in everything that caches can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache, SparseReadCache
from hf_kvcache.codecs import specs
from hf_kvcache.layers.sparse import SparseReads
from hf_kvcache.prompts import PromptStore
from hf_kvcache.sparse.picked import PickedPages
from hf_kvcache.sparse.registry import available
from tests.generation.kinds import decode
from tests.generation.test_offload import outside
from tests.running import ROUNDING, as_cache, forward, left_padded, prompt
from tests.storage.outside import target

SIZES: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 16}


def _sparse(model: PreTrainedModel, amount: int | float = 0.4, selector: str = "moments", **options: Any) -> Any:
    return SparseReadCache(model.config, amount, selector, **{"dense_layers": 0, **SIZES, **options})


def _picking(cache: Any) -> list[bool]:
    """For each layer, whether its latest step read some of its pages only."""
    layers = [layer for layer in cache.layers if isinstance(layer, SparseReads)]
    return [layer.latest_read is not None and isinstance(layer.latest_read.pages, PickedPages) for layer in layers]


_FAST = ("none", "unbiased4", "int4")


@pytest.mark.parametrize("codec", [pytest.param(s, marks=() if s in _FAST else pytest.mark.slow) for s in specs()])
def test_exact_at_full_budget(model: PreTrainedModel, codec: str) -> None:
    """While the budget covers all pages the logits are those of a cache that reads everything, bit by bit."""
    ours, other = _sparse(model, 150, codec=codec), KVCache(model.config, codec, **SIZES)
    share = _sparse(model, 1.0, codec=codec)
    for ids in prompt(110, 2).split([70, *[1] * 37, 3], 1):
        expected = forward(model, ids, other)
        assert torch.equal(forward(model, ids, ours), expected)
        assert torch.equal(forward(model, ids, share), expected)
    assert not any(_picking(ours))
    forward(model, prompt(130, 2), ours)
    forward(model, prompt(1, 2), ours)
    assert all(_picking(ours))  # the budget is used up, in the first layer too, which may read 1.3 times as much


_QUICK = ("moments", "kascade")
_SELECTORS = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in available()]


@pytest.mark.parametrize("selector", _SELECTORS)
def test_every_selector(model: PreTrainedModel, selector: str) -> None:
    """Every selector reads as much as the budget says, and goes on from a fork and from a file as from itself."""
    cache = _sparse(model, 0.4, selector, bits=8)
    forward(model, prompt(110), cache)
    decode(model, cache, 3)
    picking = _picking(cache)
    assert picking == ([False, *[True] * (len(picking) - 1)] if selector == "kascade" else [True] * len(picking))
    report = cache.memory().layers[-1]
    assert report.read_last_step["pages"] < 0.5 * (report.parts["codes"] + report.parts["scales"])
    fork = cache.fork()
    again = _sparse(model, 0.4, selector, bits=8)
    again.load_state_dict(cache.state_dict())
    expected = decode(model, cache, 20)
    assert torch.equal(decode(model, fork, 20), expected)
    assert torch.equal(decode(model, again, 20), expected)
    cache.integrity()


@pytest.mark.parametrize("selector", ["moments", "oracle"])
def test_inference_mode_and_others(model: PreTrainedModel, selector: str) -> None:
    """Steps outside of inference mode go on from those within it, while they read the same pages."""
    cache, other = _sparse(model, 0.4, selector), _sparse(model, 0.4, selector)
    ids = prompt(110)
    expected = [forward(model, part, other) for part in ids.split([104, *[1] * 6], 1)]
    for step, (part, logits) in enumerate(zip(ids.split([104, *[1] * 6], 1), expected, strict=True)):
        with torch.inference_mode(step % 4 < 2):
            assert torch.equal(forward(model, part, cache), logits)
    assert all(_picking(cache))


def test_padded_rows_are_as_alone(model: PreTrainedModel) -> None:
    """A row of a padded batch reads the pages that it would read alone, for all selectors but random ones."""
    rows = [prompt(100, seed=1), prompt(61, seed=2)]
    batch = left_padded(rows)
    together = model.generate(**batch, **as_cache(_sparse(model)), max_new_tokens=24, do_sample=False)
    for row, own in enumerate(rows):
        alone = model.generate(own, **as_cache(_sparse(model)), max_new_tokens=24, do_sample=False)
        assert torch.equal(together[row, -24:], alone[0, -24:])


@pytest.mark.parametrize("selector", ["moments", pytest.param("kascade", marks=pytest.mark.slow)])
def test_beams(model: PreTrainedModel, selector: str) -> None:
    """Each beam goes on as if its tokens had been given one by one."""
    cache, ids = _sparse(model, selector=selector), prompt(90)
    forward(model, ids, cache)
    cache.batch_repeat_interleave(3)
    new = prompt(4, 3, seed=5)
    for step in range(2):
        forward(model, new[:, step : step + 1], cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    got = forward(model, new[:, 2:3], cache)
    for row, origin in enumerate(order.tolist()):
        alone = _sparse(model, selector=selector)
        forward(model, ids, alone)
        for step in range(2):
            forward(model, new[origin : origin + 1, step : step + 1], alone)
        expected = forward(model, new[row : row + 1, 2:3], alone)
        torch.testing.assert_close(got[row : row + 1], expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("selector", ["moments", pytest.param("kascade", marks=pytest.mark.slow)])
def test_assisted_decoding(model: PreTrainedModel, selector: str) -> None:
    """Prompt lookup crops drafts. At full budget its tokens are those of plain decoding."""
    ids = prompt(30).repeat(1, 3)
    for amount in (1.0, 0.5):
        cache, plain = (_sparse(model, amount, selector, bits=8) for _ in range(2))
        arguments = {"max_new_tokens": 30, "do_sample": False}
        got = model.generate(ids, **as_cache(cache), prompt_lookup_num_tokens=4, **arguments)
        if amount == 1.0:
            assert torch.equal(got, model.generate(ids, **as_cache(plain), **arguments))
        cache.integrity()
        assert got.shape[1] > ids.shape[1]


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "ada-expected"])
def test_with_eviction(model: PreTrainedModel, policy: str) -> None:
    """Steps read from what is kept; with a budget for all of it, as the evicting cache itself does, bit by bit.

    Where the kept pages lie outside of the device, nothing changes.
    """
    sizes = {"sink_length": 2, "tail_length": 4, "page_size": 8}
    ours = _sparse(model, 1.0, budget=60, policy=policy, bits=8, **sizes)
    other = HeavyHitterCache(model.config, 60, policy, bits=8, **sizes)
    forward(model, prompt(110), ours)
    forward(model, prompt(110), other)
    assert torch.equal(decode(model, ours, 10), decode(model, other, 10))
    sparse = _sparse(model, 0.5, budget=60, policy=policy, bits=8, **sizes)
    forward(model, prompt(110), sparse)
    decode(model, sparse, 4)
    assert all(_picking(sparse))
    sparse.integrity()
    fork, elsewhere = (
        sparse.fork(),
        outside(_sparse(model, 0.5, budget=60, policy=policy, bits=8, **sizes), target("fetched")),
    )
    forward(model, prompt(110), elsewhere)
    decode(model, elsewhere, 4)
    expected = decode(model, sparse, 10)
    assert torch.equal(decode(model, fork, 10), expected) and torch.equal(decode(model, elsewhere, 10), expected)
    assert all(_picking(elsewhere)) and elsewhere.memory().fetched > 0


@pytest.mark.parametrize("family", ["gemma3"])
def test_windows_read_everything(model: PreTrainedModel) -> None:
    """Layers with a sliding window read all of it; those of full attention pick."""
    cache = _sparse(model, 0.4)
    forward(model, prompt(110), cache)
    decode(model, cache, 2)
    full = sum(isinstance(layer, SparseReads) for layer in cache.layers)
    assert 0 < full < len(cache.layers) and all(_picking(cache)) and len(_picking(cache)) == full


def test_stored_prompts_are_of_one_way_of_reading(model: PreTrainedModel) -> None:
    """A store goes on from its prompts, and refuses caches that read otherwise than its own."""
    store, ids, more = PromptStore(lambda: _sparse(model)), prompt(90), prompt(5, seed=1)
    cache, other = _sparse(model), _sparse(model, 0.9)
    for each in (cache, other):
        forward(model, ids, each)
    with pytest.raises(ValueError, match=r"the cache has sparse=\['moments', .*, 0\.9, 0\.3, 0\].*, 0\.4, 0\.3, 0\]"):
        store.put(ids, other)
    store.put(ids, cache)
    found, length = store.fetch(torch.cat([ids, more], 1))
    assert length == 90
    assert torch.equal(forward(model, more, found), forward(model, more, cache))


def test_dense_layers(model: PreTrainedModel) -> None:
    """The first layers read everything."""
    cache = _sparse(model, 0.4, dense_layers=1)
    forward(model, prompt(110), cache)
    decode(model, cache, 2)
    assert _picking(cache) == [False, *[True] * (len(cache.layers) - 1)]
