"""What h2o remembers of each key goes with the key when others are dropped, whatever place it then has."""

from __future__ import annotations

import numpy as np
import pytest

from hf_kvcache.storage.token_view import TokenView
from tests.eviction.toys import PAGE, Toy, states

LENGTH = 60


def accumulated(toy: Toy) -> list[dict[int, float]]:
    """By head, what each key has received so far, by the key's position."""
    storage, evictor = toy.layer.storage, toy.layer.evictor
    assert storage is not None and evictor is not None and evictor.observations.accumulated is not None
    held = TokenView.of(storage, np.array([0]))
    found = evictor.observations.accumulated.by_token(held)[0]
    return [
        {int(at): float(x) for at, x, real in zip(positions, of_head, exists, strict=True) if real}
        for positions, of_head, exists in zip(held.positions[0], found, held.exists[0], strict=True)
    ]


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_masses_stay_with_their_keys(codec: str) -> None:
    """Right after an eviction and after another; tokens move between pages, or only within them."""
    toy = Toy("h2o", codec, budget=30, interval=None, evict_prefill=None)
    toy(states(LENGTH))
    for _ in range(2):
        before = accumulated(toy)
        toy.cache.compress()
        after = accumulated(toy)
        for kept, all_of_them in zip(after, before, strict=True):
            assert 0 < len(kept) < len(all_of_them)
            assert kept == {at: all_of_them[at] for at in kept}
        toy(states(3 * PAGE, seed=1))
