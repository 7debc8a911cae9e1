"""Layers with an indexer read only the latents that it picks, and give what transformers' own cache gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache import LatentKVCache, unbind
from hf_kvcache.integration.picks import PickedIndices, PickMask
from hf_kvcache.kernels.latent_decode import latent_attend
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.mla import IndexedLatentLayer
from hf_kvcache.layers.picked_reads import attend_picked, places_of
from hf_kvcache_eval.caches import held_bytes
from tests.kernels.test_latent_decode import Shape, make_call, make_case
from tests.mla import families as mla_families
from tests.mla.families import names
from tests.mla.running import both, latent
from tests.running import ROUNDING, as_cache, forward, full_cache, generate, left_padded, prompt

INDEXED = [name for name in names() if "indexed" in str(mla_families.layer_types(name))]
_FAST = "deepseek_v32"
_FAMILIES = [name if name == _FAST else pytest.param(name, marks=pytest.mark.slow) for name in INDEXED]

pytestmark = pytest.mark.skipif(not INDEXED, reason="this transformers has no such layers")


def gathered(cache: Any) -> int:
    """Attention calls that read only picked tokens."""
    return sum(layer.gathered for layer in cache.layers if isinstance(layer, IndexedLatentLayer))


@pytest.mark.parametrize("name", _FAMILIES)
def test_decoding_reads_what_is_picked(name: str) -> None:
    """Greedy tokens and logits of a padded batch are those of ``DynamicCache``, and each step reads picked tokens."""
    rows = [prompt(40), prompt(29) + 1, prompt(1)]
    ours, theirs = both(mla_families.shared(name), left_padded(rows), 24)
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=ROUNDING)
    layers = [layer for layer in ours.cache.layers if isinstance(layer, IndexedLatentLayer) and layer.gathered]
    assert layers and all(layer.gathered >= 23 for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_three_hundred_tokens(name: str, attention: str) -> None:
    """300 tokens, over many pages."""
    try:
        model = mla_families.build(name, attention=attention)
    except ValueError as error:
        pytest.skip(str(error))  # transformers has this attention for no model of the family
    ours, theirs = both(model, prompt(40), 300)
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=ROUNDING)
    assert gathered(ours.cache) >= 299


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", _FAMILIES)
def test_blocks_of_queries(name: str, mode: Any) -> None:
    """Queries of a block have picks of their own; more queries than pay for it read all tokens under the mask."""
    model = mla_families.shared(name)
    cache, reference = latent(model), full_cache(model)
    with mode():
        for length in (70, 3, 1, 20, 2, 1):
            ids = prompt(length, 2, seed=length)
            before = gathered(cache)
            got, wanted = (model(ids, **as_cache(x)).logits for x in (cache, reference))
            torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDING)
            assert (gathered(cache) > before) == (length <= 3), length


def test_what_changes_between_steps() -> None:
    """Picked tokens are found after a crop, in a fork, in another order of sequences, and in drafts."""
    model = mla_families.shared(_FAST)
    cache, reference = latent(model), full_cache(model)
    changes = [
        lambda x: x.crop(-9),
        lambda x: x.reorder_cache(torch.tensor([1, 0, 0])),
        lambda x: x.batch_select_indices(torch.tensor([2, 1])),
        lambda x: x.batch_repeat_interleave(2),
    ]
    rows = 3
    for ids in prompt(60, rows).split([50, 10], 1):
        for x in (cache, reference):
            forward(model, ids, x)
    for change in changes:
        for x in (cache, reference):
            change(x)
        layer: Any = cache.layers[0]
        rows = layer.batch_size
        forward(model, prompt(9, rows, seed=9), cache.fork())
        for step in range(20):
            ids = prompt(1, rows, seed=step)
            got, wanted = (forward(model, ids, x) for x in (cache, reference))
            torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDING)
    assert gathered(cache) >= 80
    ids = prompt(20).repeat(1, 2)
    drafted = generate(model, ids, latent(model), 24, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted.tokens, generate(model, ids, full_cache(model), 24).tokens)
    assert gathered(drafted.cache) > 0


def test_other_caches_get_plain_indices() -> None:
    """While a model is bound, other caches and a model without a cache compute what they always do."""
    model = mla_families.build(_FAST)
    latent(model)
    seen: list[type] = []
    handle = model.model.layers[0].self_attn.indexer.register_forward_hook(lambda *x: seen.append(type(x[2])))
    bound = generate(model, prompt(30), full_cache(model), 6)
    handle.remove()
    assert set(seen) == {torch.Tensor}
    assert torch.equal(bound.tokens, generate(model, prompt(30), latent(model), 6).tokens)


def test_the_wrapped_indexer_is_undone() -> None:
    """Unbinding the last model gives the indexer its own forward back."""
    model = mla_families.build(_FAST)
    indexer = type(model.model.layers[0].self_attn.indexer)
    unbind(model.config)
    own = indexer.forward
    latent(model)
    assert indexer.forward is not own
    unbind(model.config)
    assert indexer.forward is own


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_masks_of_picks(mode: Any) -> None:
    """The operations that make a mask are noted, others are computed, and both give what plain tensors give."""
    with mode():
        indices = torch.tensor([[[1, 3], [0, 2]]], dtype=torch.int32)
        base = torch.ones(1, 1, 2, 6, dtype=torch.bool).tril(3)
        results = []
        for x in (indices, PickedIndices(indices)):
            hidden = x.new_ones((1, 2, 6), dtype=torch.bool).scatter(-1, x.long(), False).unsqueeze(1)
            filled = torch.zeros(1, 1, 2, 6).masked_fill(hidden, torch.finfo(torch.float32).min)
            results.append([base & ~hidden, filled, hidden | base, x + 1, copy.deepcopy(x), x.float().sum()])
    plain: list[Any] = results[0]
    noted: list[Any] = results[1]
    assert [type(x) is PickMask for x in noted] == [True, True, False, False, False, False]
    for x, y in zip(plain, noted, strict=True):
        torch.testing.assert_close(y.dense() if isinstance(y, PickMask) else torch.as_tensor(y), x, rtol=0, atol=0)
    mask, picked = noted[0].picked()
    assert mask is base and torch.equal(picked.indices, indices) and not picked.alone
    every = PickedIndices(torch.arange(6, dtype=torch.int32)[None, None])
    hidden = every.new_ones((1, 1, 6), dtype=torch.bool).scatter(-1, every.long(), False).unsqueeze(1)
    assert (base[:, :, 1:] & ~hidden).picked()[1] is None  # nothing is left out


@pytest.mark.parametrize("scattered", [False, True])
def test_places(scattered: bool) -> None:
    """Positions are found in pages with and without gaps and in slots, and others are not."""
    call = make_call(make_case("int8", Shape(batch=3), ragged=True, scattered=scattered, unused=True))
    pages, dense = call.pages, call.dense
    assert pages is not None
    size = pages.layout.page_size
    assert bool(pages.scattered) == scattered and dense.positions is not None and dense.unused is not None
    held, slots = pages.host_positions(0, pages.columns), dense.keys.shape[2]
    wanted: list[dict[int, int]] = []
    for row in range(3):
        found = {int(p): i for i, p in enumerate(dense.positions[row]) if not dense.unused[row, i]}
        for c in range(pages.columns):
            for t in range(pages.counts[row, c]):
                found[int(held[row, c, t])] = slots + c * size + t
        wanted.append(found)
    positions = torch.arange(-1, max(map(max, wanted)) + 5).expand(3, -1).contiguous()
    places = places_of(positions, pages, dense)
    for row, found in enumerate(wanted):
        assert places[row].tolist() == [found.get(p, -1) for p in positions[row].tolist()]


@pytest.mark.parametrize("codec", ["float32", "int4 rotated in groups"])
def test_attention_to_picks(codec: str) -> None:
    """Each query attends to its own tokens: as under a mask that shows it only these, hidden ones left out."""
    call = make_call(make_case(codec, Shape(64, 16, 32, 4, 3, 2), sinks=True, softcap=20.0))
    seen = call.visibility.start + call.visibility.length
    rng = np.random.default_rng(0)
    picks = np.stack([[rng.permutation(seen)[:17] for _ in range(3)] for _ in range(2)])
    picks[0, 0, 5:9], picks[1, 2] = -1, -1  # a query with fewer, and one with none
    positions, shown = torch.from_numpy(picks), torch.zeros(2, 1, 3, seen + 1, dtype=torch.bool)
    shown.scatter_(3, positions.masked_fill(positions < 0, seen)[:, None], True)
    causal = torch.ones(3, seen, dtype=torch.bool).tril(seen - 3)
    base = torch.from_numpy(rng.random((2, 1, 3, seen)) < 0.8) & causal
    under = [
        Visibility(call.visibility.start, 3, mask, 0, mask is None, None) for mask in (base, shown[..., :seen] & base)
    ]
    got = attend_picked(call.query, positions, call.pages, call.dense, under[0], call.scoring)
    wanted = latent_attend(call.query, call.pages, call.dense, under[1], call.scoring)
    torch.testing.assert_close(got.output, wanted.output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.log_sum_exp, wanted.log_sum_exp, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ("deepseek_v32", "glm_moe_dsa") if name in INDEXED])
@pytest.mark.parametrize(("bits", "spread", "share"), [(8, 0.3, 0.55), (4, 0.6, 0.45)])
def test_few_bits_are_close_and_take_less(name: str, bits: int, spread: float, share: float, tmp_path: Path) -> None:
    """In units of the spread of the logits, and as a share of transformers' bytes; a loaded cache goes on alike.

    Rounding changes a few of the 16 picks, each of which changes logits by more than rounding itself does.
    """
    model, ids, more = mla_families.shared(name), prompt(400), prompt(12, seed=1)
    theirs, held = full_cache(model), latent(model, bits=bits)
    for cache in (theirs, held):
        forward(model, ids, cache)
    held.save(tmp_path / "saved", ids)
    loaded = LatentKVCache.load(tmp_path / "saved", model.config, input_ids=ids)
    logits = [torch.cat([forward(model, x, cache) for x in more.split(1, 1)], 1) for cache in (theirs, held, loaded)]
    assert gathered(held) == gathered(loaded) > 0
    assert torch.equal(logits[1], logits[2])
    assert float((logits[1] - logits[0]).abs().mean() / logits[0].std()) < spread
    assert held_bytes(held) < share * held_bytes(theirs)
