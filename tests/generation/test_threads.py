"""Several threads at once: with forks of one cache, and with one model and a cache for each thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch

from hf_kvcache import KVCache
from tests.generation.kinds import KINDS, decode, filled
from tests.running import forward, prompt


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    """Make the interpreter switch between threads often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(work: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """The results of functions that run at the same time, each in its own thread."""
    out: list[torch.Tensor] = [torch.empty(0)] * len(work)

    def run(number: int) -> None:
        out[number] = work[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


@pytest.mark.parametrize("copy", [KVCache.fork, deepcopy], ids=["fork", "deepcopy"])
@pytest.mark.parametrize("kind", ["rotated4", "sliding", "snapkv", "latents", "low rank", "recurrent"])
def test_forks_decode_as_if_alone(kind: str, copy: Callable[[KVCache], KVCache]) -> None:
    """Two threads with two forks of one cache give what the forks give one after the other."""
    model, cache = filled(kind)
    alone = [decode(model, copy(cache), 60, seed) for seed in (1, 2)]
    copies = [copy(cache), copy(cache)]
    both = at_once([lambda c=c, s=s: decode(model, c, 60, s) for c, s in zip(copies, (1, 2), strict=True)])  # type: ignore[misc]
    for ours, theirs in zip(both, alone, strict=True):
        assert torch.equal(ours, theirs)
    for one in (cache, *copies):
        one.integrity()


def test_many_forks_come_and_go() -> None:
    """Four threads make, use and drop forks. Afterwards the reference counts of the pool are right."""
    model, cache = filled("rotated4")
    alone = [decode(model, cache.fork(), 20, seed) for seed in range(4)]

    def work(seed: int) -> torch.Tensor:
        return torch.stack([decode(model, cache.fork(), 20, seed) for _ in range(5)])

    for found, expected in zip(at_once([lambda s=s: work(s) for s in range(4)]), alone, strict=True):  # type: ignore[misc]
        assert torch.equal(found, expected.expand_as(found))
    cache.integrity()


@pytest.mark.parametrize("kind", ["rotated4", "h2o", "latents"])
def test_one_model_four_caches(kind: str) -> None:
    """Four threads that share a model, each with its own cache, give what each gives alone."""
    model = KINDS[kind].build()

    def work(seed: int) -> torch.Tensor:
        cache = KINDS[kind].cache(model)
        return torch.cat([forward(model, prompt(40, seed=seed), cache), decode(model, cache, 30, seed)], 1)

    alone = [work(seed) for seed in range(4)]
    for ours, theirs in zip(at_once([lambda s=s: work(s) for s in range(4)]), alone, strict=True):  # type: ignore[misc]
        assert torch.equal(ours, theirs)
