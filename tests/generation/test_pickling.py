"""Saving caches with pickle and torch.save."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from tests.generation.kinds import KINDS, decode, filled


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_cache_goes_on(kind: str) -> None:
    """An unpickled cache continues bit for bit, and the pickled cache is not changed."""
    model, cache = filled(kind)
    again = pickle.loads(pickle.dumps(cache))
    again.integrity()
    assert torch.equal(decode(model, again), decode(model, cache))


def test_a_fork_takes_only_its_own_pages_along() -> None:
    """The pickle of a fork has the pages of that fork only."""
    model, cache = filled("rotated4")
    fork = cache.fork()
    size = len(pickle.dumps(fork))
    decode(model, cache, 60)
    assert len(pickle.dumps(fork)) == size


def test_torch_save() -> None:
    """torch.save can save a filled cache."""
    model, cache = filled("snapkv")
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    assert torch.equal(decode(model, torch.load(file, weights_only=False)), decode(model, cache))
