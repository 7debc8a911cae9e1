"""Prompts that several machines share: fsspec on a local folder and in memory, and a real Redis server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache.prompts import remote_tier
from hf_kvcache.prompts.digests import name_of
from tests.prompts.test_files import same
from tests.prompts.toys import read, store_of, variant
from tests.prompts.working import asked, sharer, start
from tests.running import prompt


@pytest.fixture(autouse=True)
def looking_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_tier, "REFRESH", 0.0)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Redis server of this test, at a free port."""
    pytest.importorskip("redis")
    program = os.environ.get("REDIS_SERVER") or shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("scheme", ["memory", "file"])
@pytest.mark.parametrize("disk", [True, False])
def test_what_one_puts_another_finds(model: PreTrainedModel, scheme: str, disk: bool, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}" if scheme == "memory" else f"file://{tmp_path / 'shared'}"
    share_and_check(model, url, [tmp_path / "one", tmp_path / "two"] if disk else [None, None])


def share_and_check(model: PreTrainedModel, url: str, directories: list[Path | None]) -> None:
    """One store puts, another one finds it, keeps it on its own disk, and finds nothing for another model."""
    one, two = (store_of(model, directory=directory, remote=url) for directory in directories)
    ids = variant(150, 150, seed=1)
    one.put(ids, read(model, ids))
    one.flush()
    cache, length = two.fetch(torch.cat([ids, prompt(3)], 1))
    assert length == 150 and same(cache.state_dict(), read(model, ids).state_dict())
    assert two.stats().hits_by_tier["remote"] == 1
    assert two.stats().entries == {"memory": 1, "disk": int(directories[1] is not None), "remote": 1}
    assert two.fetch(variant(150, 140, seed=2))[1] == 140  # from memory by now, token by token
    three = store_of(model, remote=url)
    cache, length = three.fetch(variant(150, 140, seed=2))  # by whole blocks
    fresh = read(model, ids)
    fresh.crop(128 - 150)
    assert length == 128 and same(cache.state_dict(), fresh.state_dict())
    assert store_of(model, "int8", remote=url).fetch(ids)[1] == 0


def test_damage_and_absence_cost_only_hits(model: PreTrainedModel, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    one = store_of(model, remote=f"file://{folder}")
    for seed in (1, 2):
        one.put(variant(80, 0, seed), read(model, variant(80, 0, seed)))
    one.flush()
    first, second = sorted(folder.rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-9])
    second.unlink()
    two = store_of(model, remote=f"file://{folder}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (1, 2, 1, 2):
            assert two.fetch(torch.cat([variant(80, 0, seed), prompt(2)], 1))[1] == 0
    assert len(caught) == 1 and "skipped" in str(caught[0].message)


def test_one_unreadable_description_costs_one_prompt(model: PreTrainedModel, tmp_path: Path) -> None:
    """A machine that died while it wrote a description does not close the tier for others, who may write it again."""
    folder, ids = tmp_path / "shared", [variant(80, 0, seed) for seed in range(4)]
    one = store_of(model, remote=f"file://{folder}")
    for x in ids:
        one.put(x, read(model, x))
    one.flush()
    paths = {path.stem: path for path in folder.rglob("*.json")}
    names = [name_of(x[0].numpy()) for x in ids]
    paths[names[0]].write_bytes(paths[names[0]].read_bytes()[:20])
    paths[names[1]].write_text("[]")
    paths[names[2]].write_bytes(paths[names[3]].read_bytes())
    two = store_of(model, remote=f"file://{folder}")
    found = [two.fetch(torch.cat([x, prompt(2)], 1))[1] for x in ids]
    assert found == [0, 0, 0, 80] and two.stats().failures == 0
    for x in ids:
        two.put(x, read(model, x))
    two.flush()
    three = store_of(model, remote=f"file://{folder}")
    assert [three.fetch(torch.cat([x, prompt(2)], 1))[1] for x in ids] == [80] * 4


def test_a_good_file_elsewhere_replaces_a_damaged_one(model: PreTrainedModel, tmp_path: Path) -> None:
    """A damaged download is not kept and not tried again at once; a good one takes the place of a damaged file."""
    ids, url = variant(80, 0, seed=1), f"file://{tmp_path / 'shared'}"
    asked = torch.cat([ids, prompt(2)], 1)
    with store_of(model, directory=tmp_path / "local", remote=url) as store:
        store.put(ids, read(model, ids))
    (local,), (shared,) = ((tmp_path / name).rglob("*.safetensors") for name in ("local", "shared"))
    whole = shared.read_bytes()
    for path in (local, shared):
        path.write_bytes(whole[:-9])
    two, reads = store_of(model, directory=tmp_path / "local", remote=url), []
    remote: Any = two._shelf._remote
    remote._remote.read = lambda name, read=remote._remote.read: reads.append(name) or read(name)
    with pytest.warns(RuntimeWarning, match="skipped") as caught:
        assert [two.fetch(asked)[1] for _ in range(3)] == [0] * 3
    assert len(caught) == 1 == len(reads) and not local.exists()
    local.write_bytes(whole[:-9])
    shared.write_bytes(whole)
    three = store_of(model, directory=tmp_path / "local", remote=url)
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert three.fetch(asked)[1] == 0
    cache, length = three.fetch(asked)
    assert length == 80 and same(cache.state_dict(), read(model, ids).state_dict())
    assert local.read_bytes() == whole and three.stats().damaged == 0
    assert three.stats().entries == {"memory": 1, "disk": 1, "remote": 1}


def test_a_full_disk_costs_only_the_file(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, url = variant(80, 0, seed=1), f"file://{tmp_path / 'shared'}"
    with store_of(model, remote=url) as store:
        store.put(ids, read(model, ids))
    two = store_of(model, directory=tmp_path / "local", remote=url)

    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hf_kvcache.prompts.disk.replace_file", full)
    with pytest.warns(RuntimeWarning, match="no space left"):
        assert two.fetch(torch.cat([ids, prompt(2)], 1))[1] == 80
    assert two.stats().failures == 1 and two.stats().entries["memory"] == 1


def test_redis(model: PreTrainedModel, redis_server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Two stores share; the server is killed in the middle: one warning a store, no exception; what is local stays."""
    url, process = redis_server
    share_and_check(model, url, [tmp_path / "one", None])
    one, two = store_of(model, remote=url), store_of(model, remote=url)
    ids = variant(150, 150, seed=1)
    assert one.fetch(torch.cat([ids, prompt(3)], 1))[1] == 150
    process.kill()
    process.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3, 6):
            assert two.fetch(torch.cat([ids, prompt(3)], 1))[1] == 0
            two.put(variant(40, 0, seed), read(model, variant(40, 0, seed)))
            two.flush()
        assert one.fetch(torch.cat([ids, prompt(3)], 1))[1] == 150
        assert one.fetch(prompt(40, seed=9))[1] == 0
    assert len(caught) == 2 and all("remote tier" in str(x.message) for x in caught)
    assert two.stats().failures == 1 and two.stats().entries["memory"] == 3


@pytest.mark.slow
def test_two_processes_share_redis(model: PreTrainedModel, redis_server: tuple[str, subprocess.Popen[bytes]]) -> None:
    """What another process put is found, and what it looks for was put here; without a server it goes on alone."""
    url, server = redis_server
    other, line = start(sharer, url)
    store = store_of(model, remote=url)
    cache, length = store.fetch(asked(0).repeat(1, 2))
    assert length == asked(0).shape[1] and same(cache.state_dict(), read(model, asked(0)).state_dict())
    assert store.stats().hits_by_tier["remote"] == 1
    store.put(asked(1), read(model, asked(1)))
    store.flush()
    line.send("look")
    assert line.recv() is True
    server.kill()
    server.wait()
    line.send("look without it")
    said, found = line.recv()
    assert len(said) == 1 and "the remote tier of a prompt store fails" in said[0]
    assert found == [asked(number).shape[1] for number in range(5)]
    other.join(60)
    assert other.exitcode == 0
