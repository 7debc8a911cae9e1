"""Processes that use a store, each a copy of one that has imported everything and read all prompts."""

from __future__ import annotations

import multiprocessing
import random
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.prompts.test_files import same
from tests.prompts.toys import store_of, variant

#: Prompts of the processes, by number.
PROMPTS = 12


def asked(number: int) -> torch.Tensor:
    return variant(60 + number, 10 * (number % 4), seed=number)


def worker(directory: Path, seed: int, budget: int, rounds: int, to_parent: Connection) -> None:
    """Put and fetch at random, and check all that is found."""
    warnings.simplefilter("error")  # a damaged file would be a warning
    from tests.prompts.all_read import FRESH, MODEL

    store = store_of(MODEL, memory=100_000, directory=directory, disk=budget)
    to_parent.send("ready")
    draw = random.Random(seed)
    for turn in range(rounds):
        number = draw.randrange(PROMPTS)
        ids = asked(number)
        cache, length = store.fetch(torch.cat([ids, ids], 1))
        if length == ids.shape[1]:
            assert same(cache.state_dict(), FRESH[number].state_dict())
        store.put(ids, FRESH[number])
        if turn % 3 == 0:
            store.flush()
    store.close()


def sharer(url: str, to_parent: Connection) -> None:
    """Put one prompt into a store with a remote tier; when told to, look for another one, and once more with no server.

    Tells its parent when the prompt is there, then whether the other one was found and right, then what failed.
    """
    from tests.prompts.all_read import FRESH, MODEL

    with store_of(MODEL, remote=url) as store:
        store.put(asked(0), FRESH[0])
    to_parent.send("ready")
    to_parent.recv()
    cache, length = store.fetch(asked(1).repeat(1, 2))
    right = length == asked(1).shape[1] and same(cache.state_dict(), FRESH[1].state_dict())
    to_parent.send(right and store.stats().hits_by_tier["remote"] == 1)
    to_parent.recv()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(2, 5):
            store.put(asked(number), FRESH[number])
            store.flush()
            store.fetch(asked(number + 3))
        found = [store.fetch(asked(number).repeat(1, 2))[1] for number in range(5)]
    to_parent.send([[str(warning.message) for warning in caught], found])


def start(work: Any, *arguments: Any) -> tuple[Any, Connection]:
    """A process that works, once it is ready, and what it is talked to by.

    It is a copy of one that has read all prompts before, and imported everything.
    """
    processes: Any = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.prompts.all_read"])
    ours, theirs = processes.Pipe()
    process = processes.Process(target=work, args=(*arguments, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    return process, ours
