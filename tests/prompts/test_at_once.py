"""Several threads on one store, several processes on one directory, and processes that are killed at any moment."""

from __future__ import annotations

import random
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache.prompts.writer import BackgroundWriter
from tests.generation.test_threads import at_once, switching_often  # noqa: F401
from tests.prompts.test_disk import size_of
from tests.prompts.test_files import same
from tests.prompts.toys import GREEDY, read, store_of, stored_tokens
from tests.prompts.working import PROMPTS, asked, start, worker
from tests.running import as_cache, small_cache

#: The budget of the directory, in files of one prompt.
FILES = 6


def test_eight_threads(model: PreTrainedModel, tmp_path: Path) -> None:
    """Eight threads over one store, which drops entries all the time, give what each gives alone."""
    store = store_of(model, "none", memory=150_000, directory=tmp_path)
    expected = [model.generate(asked(n), **as_cache(small_cache(model)), **GREEDY) for n in range(8)]

    def work(number: int) -> torch.Tensor:
        found = []
        for turn in range(4):
            which = (number + turn * 3) % 8
            out = store.generate(model, asked(which), keep_reply=turn % 2 == 0, **GREEDY)
            assert torch.equal(out, expected[which])
            found.append(out[:, -8:])
        return torch.cat(found)

    for out in at_once([lambda n=n: work(n) for n in range(8)]):  # type: ignore[misc]
        assert out.shape == (4, 8)
    stats = store.stats()
    assert stats.requests == 32 and stats.hits > 8 and stats.evictions["memory"] > 0 == stats.damaged + stats.failures
    assert stats.bytes["memory"] <= 150_000
    for entry in store._shelf.entries():
        if entry.cache is not None:
            entry.cache.integrity()
    store.flush()
    assert store.stats().bytes["disk"] == size_of(tmp_path)


def test_closing_while_others_write(switching_often: None) -> None:  # noqa: F811
    """A writer that one thread closes does what others give it at the same moment, and every close returns."""
    writer, done = BackgroundWriter(), []

    def add() -> None:
        for _ in range(300):
            writer.add(lambda: done.append(1))

    def close() -> None:
        for _ in range(150):
            writer.close()

    threads = [threading.Thread(target=work, daemon=True) for work in (add, add, close, close)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    writer.close()
    assert len(done) == 600


def one_file(model: PreTrainedModel, folder: Path) -> int:
    store = store_of(model, directory=folder)
    store.put(asked(PROMPTS - 1), read(model, asked(PROMPTS - 1)))
    store.flush()
    return size_of(folder)


@pytest.mark.slow
def test_two_processes(model: PreTrainedModel, tmp_path: Path) -> None:
    """Two processes put and fetch in one directory with room for half of the prompts: all that is found is right."""
    budget = FILES * one_file(model, tmp_path / "one")
    both = [start(worker, tmp_path / "two", seed, budget, 150) for seed in range(2)]
    for process, _ in both:
        process.join(300)
        assert process.exitcode == 0
    assert 0 < size_of(tmp_path / "two") <= budget
    check_all(model, tmp_path / "two", budget)


@pytest.mark.slow
def test_killed_at_any_moment(model: PreTrainedModel, tmp_path: Path) -> None:
    """50 times two processes put and fetch, and are killed: every finished file opens and is right, budgets hold."""
    budget = FILES * one_file(model, tmp_path / "one")
    directory, draw, halves = tmp_path / "two", random.Random(0), 0
    for turn in range(50):
        both = [start(worker, directory, 2 * turn + number, budget, 100_000) for number in range(2)]
        for process, _ in both:
            time.sleep(draw.random() * 0.3)
            process.kill()
        for process, _ in both:
            process.join()
            assert process.exitcode == -signal.SIGKILL
        halves += len(list(directory.rglob("*.tmp")))
        assert size_of(directory) <= budget
        names = {path.name for path in directory.rglob("*.safetensors")}
        check_all(model, directory, budget)
        assert {path.name for path in directory.rglob("*.safetensors")} == names, "opening loses nothing"
        assert not list(directory.rglob("*.tmp"))
    assert names and halves > 2, "so many were killed in the middle of a write"


def check_all(model: PreTrainedModel, directory: Path, budget: int) -> None:
    """Open a directory; all its files are found and right, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = store_of(model, directory=directory, disk=budget)
        assert store.stats().entries["disk"] == len(list(directory.rglob("*.safetensors")))
        for tokens in stored_tokens(store):
            (number,) = (n for n in range(PROMPTS) if len(tokens) == asked(n).shape[1])
            assert tokens == tuple(asked(number)[0].tolist())
            cache, length = store.fetch(torch.cat([asked(number), asked(number)], 1))
            assert length == len(tokens) and same(cache.state_dict(), read(model, asked(number)).state_dict())
