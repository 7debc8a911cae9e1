"""Caches through pickle and torch.save."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from tests.generation.kinds import KINDS, decode, filled


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_cache_goes_on(kind: str) -> None:
    """What comes out of a pickle decodes on bit for bit, and what went in is not disturbed."""
    model, cache = filled(kind)
    again = pickle.loads(pickle.dumps(cache))
    again.integrity()
    assert torch.equal(decode(model, again), decode(model, cache))


def test_a_fork_takes_only_its_own_pages_along() -> None:
    """A pickle holds the pages of the fork that is pickled, and none of those that only others hold."""
    model, cache = filled("rotated4")
    fork = cache.fork()
    size = len(pickle.dumps(fork))
    decode(model, cache, 60)
    assert len(pickle.dumps(fork)) == size


def test_torch_save() -> None:
    """torch.save takes a filled cache too."""
    model, cache = filled("snapkv")
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    assert torch.equal(decode(model, torch.load(file, weights_only=False)), decode(model, cache))
