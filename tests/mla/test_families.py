"""The tiny models have the properties that other tests rely on, and work with ``DynamicCache``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache import LatentKVCache
from tests.mla import families as mla_families
from tests.mla.configs import INDEX_TOPK
from tests.mla.families import BROKEN, STATEFUL, names, shared
from tests.running import ROUNDING, forward, full_cache, generate, left_padded, prompt, set_binding


def test_every_family() -> None:
    """There is a model of each family that the installed transformers has."""
    assert mla_families.installed() <= mla_families.written()


@pytest.mark.parametrize("name", [name for name in STATEFUL if name in mla_families.installed()])
def test_models_with_a_state(name: str) -> None:
    """``generate`` gives with a cache of latents what it gives with ``DynamicCache``."""
    expected = generate(mla_families.build(name), prompt(60), full_cache(mla_families.build(name)))
    model = mla_families.build(name)
    ours = generate(model, prompt(60), cache := LatentKVCache(model.config, page_size=16, tail_length=8))
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=ROUNDING)
    assert cache.absorbed_steps > 0


@pytest.mark.parametrize("name", names())
def test_layers_expand_latents(name: str) -> None:
    """A model has layers that expand latents, and a hybrid model has recurrent layers too."""
    model = shared(name)
    layers = full_cache(model).layers
    expanding = [module for module in model.modules() if hasattr(module, "expand_kv")]
    recurrent = sum(type(layer).__name__ == "LinearAttentionLayer" for layer in layers)
    assert len(expanding) >= 2
    assert len(expanding) + recurrent == len(layers)
    assert bool(recurrent) == (name in mla_families.RECURRENT)


@pytest.mark.parametrize("name", [name for name in names() if "indexed" in str(mla_families.layer_types(name))])
@torch.no_grad()
def test_indexer_selects(name: str) -> None:
    """Without the indexer's choice the logits differ, but only where there are more tokens than it chooses."""
    model: Any = mla_families.build(name)
    chosen = model(prompt(50)).logits
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 64
    difference = (model(prompt(50)).logits - chosen).abs().amax((0, 2))
    assert difference[:INDEX_TOPK].max() < ROUNDING
    assert difference[INDEX_TOPK + 4 :].median() > 0.1


@pytest.mark.parametrize("name", names())
def test_greedy(name: str) -> None:
    """Decoding with transformers' own cache gives the logits of one forward pass, and no two tokens are as likely."""
    model = shared(name)
    out = generate(model, prompt(40), full_cache(model), 24)
    ids = torch.cat([prompt(40), out.tokens], 1)
    torch.testing.assert_close(out.logits, _without_cache(model, ids)[:, 39:-1], rtol=0, atol=ROUNDING)
    first, second = out.logits.topk(2, -1).values.unbind(-1)
    assert (first - second).min() > 10 * ROUNDING, "two tokens are as likely: rounding may choose another"
    assert len(out.tokens.unique()) > 10


@torch.no_grad()
def _without_cache(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    set_binding(model, None)
    return model(input_ids=ids, use_cache=False).logits


def _goes_on(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor) -> None:
    """A cache that should hold the tokens ``ids [B, T]`` behaves as if it does."""
    new = prompt(10, len(ids), seed=2)
    ours = torch.cat([forward(model, step, cache) for step in new.split([5, 1, 1, 1, 2], 1)], 1)
    theirs = _without_cache(model, torch.cat([ids, new], 1))[:, ids.shape[1] :]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def _padded(model: PreTrainedModel) -> None:
    rows = [prompt(21), prompt(40), prompt(33)]
    together = generate(model, left_padded(rows), full_cache(model), 12)
    for index, row in enumerate(rows):
        alone = generate(model, row, full_cache(model), 12)
        torch.testing.assert_close(together.logits[index : index + 1], alone.logits, rtol=0, atol=ROUNDING)


def _beams(model: Any) -> None:
    cached = generate(model, prompt(40, 2), full_cache(model), 10, num_beams=3).tokens
    without = model.generate(prompt(40, 2), max_new_tokens=10, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(cached, without[:, 40:])


def _chunks(model: PreTrainedModel) -> None:
    cache = full_cache(model)
    for part in prompt(60).split([20, 7, 13, 19, 1], 1):
        forward(model, part, cache)
    _goes_on(model, cache, prompt(60))


def _draft(model: PreTrainedModel) -> None:
    ids = prompt(20).repeat(1, 2)
    drafted = generate(model, ids, full_cache(model), 24, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted.tokens, generate(model, ids, full_cache(model), 24).tokens)


def _crop(model: PreTrainedModel) -> None:
    cache = full_cache(model)
    forward(model, prompt(60), cache)
    cache.crop(-23)
    _goes_on(model, cache, prompt(60)[:, :37])


def _copy(model: PreTrainedModel) -> None:
    cache = full_cache(model)
    forward(model, prompt(50), cache)
    other = copy.deepcopy(cache)
    forward(model, prompt(9, seed=5), cache)
    _goes_on(model, other, prompt(50))


def _rows(model: PreTrainedModel, rows: list[int], change: Callable[[Any], None]) -> None:
    cache = full_cache(model)
    forward(model, prompt(50, 3), cache)
    change(cache)
    _goes_on(model, cache, prompt(50, 3)[rows])


def _reorder(model: PreTrainedModel) -> None:
    _rows(model, [2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))


def _select(model: PreTrainedModel) -> None:
    _rows(model, [2, 1], lambda cache: cache.batch_select_indices(torch.tensor([2, 1])))


def _repeat(model: PreTrainedModel) -> None:
    _rows(model, [0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2))


OPERATIONS: dict[str, Callable[[PreTrainedModel], None]] = {
    "padded": _padded,
    "beams": _beams,
    "chunks": _chunks,
    "draft": _draft,
    "crop": _crop,
    "copy": _copy,
    "reorder": _reorder,
    "select": _select,
    "repeat": _repeat,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("operation", OPERATIONS)
def test_dynamic_cache(name: str, operation: str) -> None:
    """transformers' own cache supports the operations that tests compare with, or is listed as broken."""
    run = OPERATIONS[operation]
    if name in BROKEN.get(operation, ()):
        with pytest.raises((ValueError, RuntimeError, AttributeError), match=BROKEN[operation][name]):
            run(shared(name))
    else:
        run(shared(name))
