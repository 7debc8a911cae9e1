"""A cache of latents after a crop, a copy, changes of its rows or a reset, in every family that has latents."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache, PreTrainedModel

from hf_kvcache import LatentKVCache
from tests.mla.families import BROKEN, names
from tests.mla.running import FEW, assert_absorbed, latent, some
from tests.running import ROUNDING, assert_packed, forward, full_cache, generate, prompt

_STEPS = (20, 7, *[1] * 15)


def _after(model: PreTrainedModel, held: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, T, V]`` of more tokens after the tokens ``held [B, T]``, with transformers' own cache."""
    cache = full_cache(model)
    forward(model, held, cache)
    return _go_on(model, cache, len(held))


def _go_on(model: PreTrainedModel, cache: Cache, batch: int) -> torch.Tensor:
    steps = prompt(sum(_STEPS), batch, seed=4).split(_STEPS, 1)
    return torch.cat([forward(model, step, cache) for step in steps], 1)


def _assert_goes_on(model: PreTrainedModel, cache: Cache, expected: torch.Tensor) -> None:
    """A cache continues with the logits ``expected``."""
    torch.testing.assert_close(_go_on(model, cache, len(expected)), expected, rtol=0, atol=ROUNDING)
    assert_packed(cache)
    assert_absorbed(cache, model, _STEPS.count(1))


@pytest.mark.parametrize("family", some(without=BROKEN["crop"]))
@pytest.mark.parametrize("remove", [3, 29, pytest.param(58, marks=pytest.mark.slow)])
def test_crop(model: PreTrainedModel, remove: int) -> None:
    """After a crop into the tail, a page or the sinks, the cache holds the shorter sequence."""
    expected = _after(model, prompt(60)[:, : 60 - remove])
    cache = latent(model)
    forward(model, prompt(60), cache)
    cache.crop(-remove)
    cache.integrity()
    _assert_goes_on(model, cache, expected)


@pytest.mark.parametrize("family", some())
@pytest.mark.parametrize("copied", [LatentKVCache.fork, pytest.param(copy.deepcopy, marks=pytest.mark.slow)])
def test_fork(model: PreTrainedModel, copied: Callable[[LatentKVCache], LatentKVCache]) -> None:
    """A cache and its copy continue with different tokens, and neither changes the other."""
    more = prompt(19, seed=5)
    expected = _after(model, prompt(50)), _after(model, torch.cat([prompt(50), more], 1))
    cache = latent(model)
    forward(model, prompt(50), cache)
    other = copied(cache)
    forward(model, more, cache)
    _assert_goes_on(model, other, expected[0])
    _assert_goes_on(model, cache, expected[1])


def _reorder(cache: Any) -> list[int]:
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    return [2, 0, 0]


def _select(cache: Any) -> list[int]:
    cache.batch_select_indices(torch.tensor([2, 1]))
    return [2, 1]


def _repeat(cache: Any) -> list[int]:
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1, 2, 2]


def _changes_of_rows() -> list[Any]:
    changes = {"reorder": _reorder, "select": _select, "repeat": _repeat}
    return [
        pytest.param(change, name, id=f"{kind}-{name}", marks=[] if name in FEW else pytest.mark.slow)
        for kind, change in changes.items()
        for name in names()
    ]


@pytest.mark.parametrize(("change", "family"), _changes_of_rows())
def test_rows(model: PreTrainedModel, change: Callable[[Cache], list[int]]) -> None:
    """Rows of a batch are exchanged, left out or repeated, in layers of transformers' own too."""
    ids = prompt(50, 3)
    cache = latent(model)
    forward(model, ids, cache)
    rows = change(cache)
    _assert_goes_on(model, cache, _after(model, ids[rows]))


@pytest.mark.parametrize("family", some())
def test_reset(model: PreTrainedModel) -> None:
    """After a reset a cache accepts another batch and behaves like a new one."""
    expected = _after(model, prompt(41))
    cache = latent(model)
    generate(model, prompt(50, 3), cache, 5)
    cache.reset()
    assert cache.get_seq_length() == 0
    forward(model, prompt(41), cache)
    _assert_goes_on(model, cache, expected)
