"""Prompts on disk: for a later process, for another process, and after damage."""

from __future__ import annotations

import os
import shutil
import stat
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import KVCache
from hf_kvcache.cache import files
from hf_kvcache.prompts import PromptStore
from hf_kvcache.utils import safetensors
from tests import families
from tests.generation.kinds import KINDS, decode
from tests.prompts.test_files import same
from tests.prompts.toys import GREEDY, read, some, store_of, variant
from tests.running import forward, prompt


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", some(["rotated4", "recurrent", "h2o"], "recurrent"))
def test_a_later_store_goes_on(kind: str, tmp_path: Path) -> None:
    """A second store finds what the first one wrote, bit for bit, as if it had been in memory."""
    model, ids = KINDS[kind].build(), variant(80, 60, seed=1)
    with PromptStore(lambda: KINDS[kind].cache(model), directory=tmp_path / "store", model=model) as first:
        output = first.generate(model, ids, **GREEDY)
    in_memory, length = first.fetch(ids)
    later = PromptStore(lambda: KINDS[kind].cache(model), directory=tmp_path / "store", model=model)
    from_disk, found = later.fetch(ids)
    assert found == length == 79 and same(from_disk.state_dict(), in_memory.state_dict())
    assert later.stats().hits_by_tier["disk"] == 1 and later.stats().entries["memory"] == 1
    assert torch.equal(later.generate(model, ids, **GREEDY), output)
    assert later.stats().hits_by_tier == {"memory": 1, "disk": 1, "remote": 0}
    assert later.stats().bytes["disk"] == size_of(tmp_path)


def test_split_models_place_their_layers_themselves(model: PreTrainedModel, tmp_path: Path) -> None:
    """A file is not moved to the first of several devices, where the layers of the others do not lie."""
    store, split = store_of(model, directory=tmp_path), families.build("llama")
    store.generate(model, prompt(40), **GREEDY)
    assert store._shelf.device == model.device
    split.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
    later = store_of(split, directory=tmp_path)
    store.flush()
    assert torch.equal(later.generate(split, prompt(40), **GREEDY), store.generate(model, prompt(40), **GREEDY))
    assert later._shelf.device is None and later.stats().hits_by_tier["disk"] == 1


def test_two_stores_share_a_directory(model: PreTrainedModel, tmp_path: Path) -> None:
    """Files that another store writes or deletes are noticed; those of other settings are not even looked at."""
    one, two = (store_of(model, directory=tmp_path) for _ in range(2))
    other = store_of(model, "int8", directory=tmp_path)
    ids = variant(80, 60, seed=1)
    one.put(ids, read(model, ids))
    one.flush()
    assert two.fetch(variant(80, 60, seed=2))[1] == 60
    assert other.fetch(ids)[1] == 0 and other.stats().entries["disk"] == 0
    longer = torch.cat([ids, prompt(20)], 1)
    two.put(longer, read(model, longer))
    two.flush()
    # The longer prompt stands in for the shorter one on disk, and in memory both are there.
    assert one.stats().entries == {"memory": 1, "disk": 1, "remote": 0}
    assert one.fetch(torch.cat([longer, ids], 1))[1] == 100
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert one.stats().entries["disk"] == 0 and one.fetch(ids)[1] == 79


def test_only_the_owner_may_read(model: PreTrainedModel, tmp_path: Path) -> None:
    with store_of(model, directory=tmp_path / "store") as store:
        store.put(prompt(40), read(model, prompt(40)))
    for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    (tmp_path / "store").chmod(0o777)
    store_of(model, directory=tmp_path / "store")
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


def test_private_prompts(model: PreTrainedModel, tmp_path: Path) -> None:
    """Files without tokens are found by whole blocks, and as wholes."""
    with store_of(model, directory=tmp_path, private=True) as store:
        ids = variant(150, 150, seed=1)
        store.put(ids, read(model, ids))
    (path,) = tmp_path.rglob("*.safetensors")
    assert KVCache.about_file(path)["tokens"] is None
    for asked, length in ((torch.cat([ids, prompt(3)], 1), 150), (ids, 128), (variant(150, 100, seed=2), 64)):
        later = store_of(model, directory=tmp_path, private=True)
        cache, found = later.fetch(asked)
        fresh = read(model, ids)
        fresh.crop(length - 150) if length < 150 else None
        assert found == length and same(cache.state_dict(), fresh.state_dict())


def test_the_budget_is_hard(model: PreTrainedModel, tmp_path: Path) -> None:
    """Files of the prompts that were used longest ago make room, those of other namespaces too."""
    ids = [variant(80, 0, seed=seed) for seed in range(5)]
    sizes = store_of(model, directory=tmp_path / "one")
    sizes.put(ids[0], read(model, ids[0]))
    sizes.flush()
    budget = int(3.2 * size_of(tmp_path))
    stores = [store_of(model, directory=tmp_path / "two", disk=budget, namespace=name) for name in ("a", "b")]
    for number, one in enumerate(ids):
        stores[number % 2].put(one, read(model, one))
        stores[number % 2].flush()
        assert size_of(tmp_path / "two") <= budget
        time.sleep(0.02)  # the clock of files
        stores[0].fetch(torch.cat([ids[0], prompt(2)], 1))
        time.sleep(0.02)
    later = [store_of(model, directory=tmp_path / "two", disk=budget, namespace=name) for name in ("a", "b")]
    lengths = [later[number % 2].fetch(torch.cat([one, prompt(2)], 1))[1] for number, one in enumerate(ids)]
    assert lengths[0] == lengths[4] == 80 and lengths[1] == 0 and sum(n == 80 for n in lengths) == 3
    small = store_of(model, directory=tmp_path / "three", disk=2000)
    with pytest.raises(ValueError, match="disk=2000 bytes"):
        small.put(ids[0], read(model, ids[0]))
    assert small.stats().entries["memory"] == 0


@pytest.mark.parametrize("used_by", ["put", "fetch"])
def test_an_evicted_file_is_written_again(model: PreTrainedModel, tmp_path: Path, used_by: str) -> None:
    """A prompt in memory whose file made room for others has one again once it is used, unless a longer one has it."""
    ids = [variant(80, 0, seed=seed) for seed in range(4)]
    caches = [read(model, one) for one in ids]
    one = store_of(model, directory=tmp_path / "one")
    one.put(ids[0], caches[0])
    one.flush()
    budget = int(3.2 * size_of(tmp_path / "one"))
    store = store_of(model, directory=tmp_path / "two", disk=budget)
    for number in range(4):
        store.put(ids[number], caches[number])
        store.flush()
        time.sleep(0.02)  # the clock of files
    assert store.stats().entries == {"memory": 4, "disk": 3, "remote": 0}
    if used_by == "put":
        store.put(ids[0], caches[0])
    else:
        assert store.fetch(torch.cat([ids[0], prompt(2)], 1))[1] == 80
    store.flush()
    assert store.stats().bytes["disk"] == size_of(tmp_path / "two") <= budget
    later = store_of(model, directory=tmp_path / "two", disk=budget)
    assert [later.fetch(torch.cat([x, prompt(2)], 1))[1] for x in ids] == [80, 0, 80, 80]
    # The longer prompt takes the place of the shorter one, which is not written again beside it.
    longer = torch.cat([ids[0], prompt(9)], 1)
    store.put(longer, read(model, longer))
    store.flush()
    names = {path.name for path in (tmp_path / "two").rglob("*.safetensors")}
    store.put(ids[0], caches[0])
    assert store.fetch(torch.cat([ids[0], prompt(2)], 1))[1] == 80
    store.flush()
    assert {path.name for path in (tmp_path / "two").rglob("*.safetensors")} == names


def test_a_damaged_file_that_another_process_replaced(model: PreTrainedModel, tmp_path: Path) -> None:
    """What is skipped is the damaged file, not its name."""
    ids = variant(80, 0, seed=1)
    asked = torch.cat([ids, prompt(2)], 1)
    with store_of(model, directory=tmp_path) as store:
        store.put(ids, read(model, ids))
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    one, two = (store_of(model, directory=tmp_path) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="skipped") as caught:
        assert one.fetch(asked)[1] == two.fetch(asked)[1] == one.fetch(asked)[1] == 0
    assert len(caught) == 2 and one.stats().damaged == 1
    two.put(ids, read(model, ids))
    two.flush()
    cache, length = one.fetch(asked)
    assert length == 80 and same(cache.state_dict(), read(model, ids).state_dict())
    assert one.stats().damaged == 0 and one.stats().hits_by_tier["disk"] == 1


@pytest.mark.parametrize("after", ["read_about", "check_digest", "read_header", "mapping"])
def test_a_file_that_goes_while_it_is_read(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Another process may delete a file at any moment. That costs the hit, and nothing is said."""
    ids = variant(80, 0, seed=1)
    with store_of(model, directory=tmp_path) as store:
        store.put(ids, read(model, ids))
    (path,) = tmp_path.rglob("*.safetensors")
    later = store_of(model, directory=tmp_path)
    assert later.stats().entries["disk"] == 1
    module = files if after in ("read_about", "check_digest") else safetensors
    function = getattr(module, after, None)

    def while_mapping(*args: Any) -> Any:
        path.unlink()
        raise RuntimeError("unable to open file: No such file or directory")  # as torch says it

    def then_gone(*args: Any) -> Any:
        assert function is not None
        found = function(*args)
        path.unlink(missing_ok=True)
        return found

    if function is None:
        monkeypatch.setattr(safetensors, "safe_open", while_mapping)
    else:
        monkeypatch.setattr(module, after, then_gone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert later.fetch(ids)[1] == 0
    assert not path.exists() and later.stats().damaged == 0 == later.stats().entries["disk"]


def test_damaged_files_are_skipped_once(model: PreTrainedModel, tmp_path: Path) -> None:
    """One warning a file, no hit, no error; and the prompt can be stored again."""
    ids = [variant(80, 0, seed=seed) for seed in range(4)]
    with store_of(model, directory=tmp_path) as store:
        for one in ids:
            store.put(one, read(model, one))
    paths = sorted(tmp_path.rglob("*.safetensors"))
    whole = [path.read_bytes() for path in paths]
    paths[0].write_bytes(whole[0][: len(whole[0]) // 2])
    paths[1].write_bytes(whole[1][:-5] + b"other")
    paths[2].write_bytes(whole[3])  # the file of another prompt
    later = store_of(model, directory=tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = [later.fetch(torch.cat([one, prompt(2)], 1)) for one in ids]
    assert len(caught) == 3 == later.stats().damaged, [str(x.message) for x in caught]
    assert sorted(length for _, length in found) == [0, 0, 0, 80]
    for one in ids:
        later.put(one, read(model, one))
    later.flush()
    again = store_of(model, directory=tmp_path)
    for one in ids:
        cache, length = again.fetch(torch.cat([one, prompt(2)], 1))
        assert length == 80 and same(cache.state_dict(), read(model, one).state_dict())


def test_foreign_directories_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("you")
    with pytest.raises(ValueError, match="is no folder of a PromptStore"):
        store_of(model, directory=tmp_path / "letters")
    assert os.listdir(tmp_path / "letters") == ["dear.txt"]
    with pytest.raises(ValueError, match="is no folder of a PromptStore"):
        store_of(model, directory=tmp_path / "letters" / "dear.txt")
    store_of(model, directory=tmp_path / "ours")
    (tmp_path / "ours" / "hf_kvcache_prompts.json").write_text('{"format": "hf_kvcache prompts", "version": 2}')
    with pytest.raises(ValueError, match="version 2; accepted: 1"):
        store_of(model, directory=tmp_path / "ours")


def test_only_its_own_files_are_deleted(model: PreTrainedModel, tmp_path: Path) -> None:
    """What someone else puts into the directory neither counts nor is deleted, behind a link or not."""
    ids = [variant(80, 0, seed=seed) for seed in range(3)]
    (tmp_path / "weights").mkdir()
    store = store_of(model, directory=tmp_path / "store", disk=100_000)
    (tmp_path / "store" / ("0" * 32)).symlink_to(tmp_path / "weights")
    (tmp_path / "store" / "mine").mkdir()
    (namespace,) = (path.parent for path in tmp_path.rglob("namespace.json"))
    others = [folder / "model.safetensors" for folder in (tmp_path / "weights", tmp_path / "store" / "mine")]
    others += [namespace / "work.tmp", tmp_path / "weights" / f"{'1' * 64}.safetensors"]
    for path in others:
        path.write_bytes(bytes(100_000))
        os.utime(path, (1, 1))
    for one in ids:
        store.put(one, read(model, one))
    store.flush()
    assert all(path.exists() for path in others)
    own = sum(path.stat().st_size for path in namespace.glob("*.safetensors"))
    assert 0 < own == store.stats().bytes["disk"] <= 100_000


def test_a_deleted_directory_costs_only_hits(model: PreTrainedModel, tmp_path: Path) -> None:
    store, ids = store_of(model, directory=tmp_path / "store"), prompt(40)
    store.put(ids, read(model, ids))
    store.flush()
    shutil.rmtree(tmp_path / "store")
    assert store.fetch(ids)[1] == 39 and store.stats().entries == {"memory": 1, "disk": 0, "remote": 0}
    store.put(prompt(50), read(model, prompt(50)))
    store.flush()
    assert store_of(model, directory=tmp_path / "store").fetch(prompt(50))[1] == 49
    assert store.stats().failures == 0


def test_models_are_kept_apart(model: PreTrainedModel, tmp_path: Path) -> None:
    """What differs by weights, dtype or name only is never a hit; the model has to be given."""
    ids = prompt(40)
    with store_of(model, directory=tmp_path) as store:
        store.put(ids, read(model, ids))
    asked = torch.cat([ids, ids], 1)
    assert store_of(model, directory=tmp_path).fetch(asked)[1] == 40
    changed = families.build("llama")
    changed.lm_head.weight.data.mul_(1.001)
    assert store_of(changed, directory=tmp_path).fetch(asked)[1] == 0
    assert store_of(families.build("llama", dtype=torch.float64), directory=tmp_path).fetch(asked)[1] == 0
    assert store_of(model, directory=tmp_path, namespace="other").fetch(asked)[1] == 0
    # A name is not enough: a checkpoint that was trained again may have the name of the one before.
    named = families.build("llama")
    named.config._name_or_path = "someone/llama"
    for options in ({"directory": tmp_path}, {"remote": f"file://{tmp_path / 'shared'}"}):
        with pytest.raises(ValueError, match="model=None with a directory or a remote tier; accepted: the model"):
            PromptStore(lambda: KINDS["none"].cache(named), **options)


def test_a_waiting_eviction_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    from hf_kvcache import HeavyHitterCache

    def make() -> HeavyHitterCache:
        return HeavyHitterCache(model.config, 28, "snapkv", tail_length=4, page_size=8, evict_prefill="end")

    store, cache = PromptStore(make, directory=tmp_path, model=model), make()
    forward(model, prompt(40), cache)
    with pytest.raises(ValueError, match=r"call compress\(\)"):
        store.put(prompt(40), cache)
    cache.compress()
    store.put(prompt(40), cache)
    assert torch.equal(decode(model, store.fetch(prompt(40).repeat(1, 2))[0], 5), decode(model, cache, 5))
