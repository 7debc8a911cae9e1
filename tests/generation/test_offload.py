"""Caches whose pages lie outside of the device do what they do on it, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import errno
import gc
import mmap
import os
import pickle
import stat
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, QuantizedKVCache, SlidingWindowCache, SparseReadCache
from hf_kvcache.kernels.prepared_call import prepare
from hf_kvcache.layers import decode_step
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.storage import offload as storage_offload
from hf_kvcache.storage.offload import OffloadTarget
from tests import families
from tests.generation.kinds import KINDS, decode
from tests.mla import families as mla_families
from tests.running import ROUNDING, all_codecs, assert_packed, forward, generate, left_padded, prompt, small_cache
from tests.storage.outside import target

CONFIG = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4)
_FAST = ("rotated4", "snapkv")


def outside(cache: KVCache, to: OffloadTarget | None) -> KVCache:
    """The empty cache, whose pages are to lie in ``to``."""
    if to is not None:
        cache.options = dataclasses.replace(cache.options, offload=to)
        for layer in cache.own_layers:
            layer.options = cache.options
        cache.begin_offloading(True)
    return cache


def everything(model: PreTrainedModel, make: Any) -> list[Any]:
    """Logits, state and errors of a cache that is filled, forked, reordered, cropped, repeated, saved and restored."""
    cache: KVCache = make()
    found = [forward(model, prompt(60, 2), cache), forward(model, prompt(1, 2), cache)]

    def on(some: KVCache, steps: int) -> None:
        found.extend(forward(model, prompt(1, some.batch_size, seed), some) for seed in range(steps))

    on(cache, 20)
    fork = cache.fork()
    for each in (cache, fork, cache, fork):
        on(each, 9)
    cache.reorder_cache(torch.tensor([1, 0]))
    on(cache, 2)
    try:
        cache.crop(-13)
    except RuntimeError as error:
        found.append(str(error))
    on(cache, 3)
    if len(cache.own_layers) == len(cache.layers):  # transformers' own cannot be repeated
        cache.batch_repeat_interleave(2)
        found.append(forward(model, prompt(40, 4), cache))
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
    on(cache, 2)
    assert_packed(cache)
    state = cache.state_dict()
    again: KVCache = make()
    again.load_state_dict(state)
    on(again, 3)
    on(copy.deepcopy(fork), 3)
    for layer in again.own_layers:
        if isinstance(layer, KVCacheLayer) and not layer.evicts:
            found.extend(layer.decompressed(side) for side in ("keys", "values"))
    return [*found, *(state[name] for name in sorted(state))]


@pytest.mark.parametrize(
    "kind", [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_as_on_the_device(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind].build()
    on_device = everything(model, lambda: KINDS[kind].cache(model))
    for to in ("files", "fetched"):
        _same(on_device, everything(model, lambda to=to: outside(KINDS[kind].cache(model), target(to, tmp_path))))


@pytest.mark.slow
@pytest.mark.parametrize("codec", [c if isinstance(c, str) else c.values[0] for c in all_codecs()])
def test_every_codec(codec: str, tmp_path: Path) -> None:
    model = families.build("llama")

    def run(to: str | None) -> list[Any]:
        cache = outside(small_cache(model, codec), target(to, tmp_path))
        logits = [forward(model, prompt(90, 2), cache), *(forward(model, prompt(1, 2, i), cache) for i in range(20))]
        assert_packed(cache)
        state = cache.state_dict()
        return [*logits, *(state[name] for name in sorted(state))]

    on_device = run(None)
    _same(on_device, run("files"))
    _same(on_device, run("fetched"))


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["padded", "drafts"])
@pytest.mark.parametrize("to", ["files", "fetched"])
def test_generate(to: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Padded batches, and drafts that are taken back."""
    model = families.build("gemma3")
    inputs = prompt(70) if options else left_padded([prompt(70), prompt(33)])
    results = []
    for place in (None, to):
        cache = outside(small_cache(model, "rotated4"), target(place, tmp_path))
        results.append(generate(model, inputs, cache, 40, **options))
        assert_packed(cache)
    _same(results[0][:2], results[1][:2])


def test_forks_in_threads(tmp_path: Path) -> None:
    """Threads that decode on forks give what they give alone: each has buffers of its own."""
    model = families.build("llama")
    for to in ("files", "fetched"):
        cache = outside(small_cache(model, "rotated4"), target(to, tmp_path))
        forward(model, prompt(90), cache)
        expected = [decode(model, cache.fork(), 20, seed) for seed in range(2)]
        forks, found = [cache.fork() for _ in range(2)], {}

        def run(seed: int, forks: list[KVCache] = forks, found: dict[int, Any] = found) -> None:
            found[seed] = decode(model, forks[seed], 20, seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _same(expected, [found[seed] for seed in range(2)])


def test_caches_take_turns() -> None:
    """All caches of a thread share two buffers, which go with the last of them."""
    model = families.build("llama")
    caches = [outside(small_cache(model, "rotated4"), target("fetched")) for _ in range(2)]
    expected = [small_cache(model, "rotated4") for _ in caches]
    for step, length in enumerate([90, *[1] * 8]):
        for seed, (cache, other) in enumerate(zip(caches, expected, strict=True)):
            ids = prompt(length, 1 + seed, 10 * step + seed)
            assert torch.equal(forward(model, ids, cache), forward(model, ids, other))
    device = torch.device("cpu")
    buffers = [cache.options.offload.buffers(device) for cache in caches]  # type: ignore[union-attr]
    assert buffers[0] is buffers[1] and caches[0].memory().buffers == buffers[0].nbytes
    gone = weakref.ref(buffers[0])
    del caches, cache, buffers
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_sparse_reads_of_a_fork(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer fork makes the buffers grow between two steps. Pages that stay are read by the same prepared calls."""
    monkeypatch.setenv("HF_KVCACHE_BACKEND", backend)
    model = families.build("llama")
    prepared = []
    monkeypatch.setattr(decode_step, "prepare", lambda inputs: prepared.append(1) or prepare(inputs))

    def run(to: str | None) -> list[torch.Tensor]:
        sizes: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 16, "dense_layers": 0}
        cache = outside(SparseReadCache(model.config, 0.4, "moments", bits=4, **sizes), target(to, tmp_path))
        forward(model, prompt(110), cache)
        fork = cache.fork()
        forward(model, prompt(1), cache)
        forward(model, prompt(200), fork)
        prepared.clear()
        return [forward(model, prompt(1, seed=seed), cache) for seed in range(3)]

    expected = run(None)
    for to in ("files", "fetched"):
        _same(expected, run(to))
        assert backend != "native" or not prepared


def test_slabs(tmp_path: Path) -> None:
    """Any number of slabs is open at once. Their files go with them, also if they never held a page."""
    files = storage_offload.MappedFiles(tmp_path)
    before = len(os.listdir("/dev/fd"))
    slabs = [files.slabs(3, 4096, torch.device("cpu"))[0] for _ in range(20)]
    assert len(os.listdir("/dev/fd")) == before
    slabs[3].records[1] = 7
    assert slabs[3].path is not None and slabs[3].path.read_bytes() == bytes(4096) + bytes([7]) * 4096 + bytes(4096)
    slabs[3].advise(mmap.MADV_DONTNEED, 1, 2)
    assert (slabs[3].records[1] == 7).all()
    del slabs
    gc.collect()
    assert not list(files.path.glob("*.pages"))


@pytest.mark.parametrize("record_bytes", [16, 5000, 1 << 20, (1 << 20) + 16, 5_000_000])
def test_pinned_pieces(record_bytes: int) -> None:
    for pages in (1, 2, 7, 100):
        counts = storage_offload._powers_of_two(pages, record_bytes)
        assert min(counts) > 0 and pages <= sum(counts) <= max(2 * pages, (1 << 21) // record_bytes)


def test_files(tmp_path: Path) -> None:
    """Files are as large as the pages outside, for this user only, and go with the last cache that has pages there."""
    model = families.build("llama")
    cache = small_cache(model, "rotated4", offload=str(tmp_path))
    forward(model, prompt(90), cache)
    (folder,) = tmp_path.iterdir()
    files = list(folder.glob("*.pages"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert files and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    memory = cache.memory()
    assert sum(file.stat().st_size for file in files) == memory.outside > 0
    assert memory.on_device == memory.total - memory.outside and "on the device" in str(memory)
    fork, copied = cache.fork(), pickle.loads(pickle.dumps(cache))
    assert len(list(tmp_path.iterdir())) == 2, "a pickled cache has files of its own"
    expected = decode(model, cache, 5)
    cache.reset()
    del cache
    gc.collect()
    _same([expected] * 2, [decode(model, fork, 5), decode(model, copied, 5)])
    del fork, copied
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left(tmp_path: Path) -> None:
    """A folder whose lock is free is deleted by the next cache; one that is in use is not."""
    first = storage_offload.MappedFiles(tmp_path)
    dead = tmp_path / "hf_kvcache-pages-dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "0.pages").write_bytes(b"tokens")
    second = storage_offload.MappedFiles(tmp_path)
    assert set(tmp_path.iterdir()) == {first.path, second.path}


@pytest.mark.slow
def test_a_process_is_killed(tmp_path: Path) -> None:
    """Its lock goes with it, in whatever state its files are."""
    program = (
        "import sys, time; from hf_kvcache.storage.offload import MappedFiles; files = MappedFiles(sys.argv[1]); "
        "files.slabs(8, 4096, __import__('torch').device('cpu')); print('there', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        (left,) = tmp_path.iterdir()
        storage_offload.MappedFiles(tmp_path)
        assert left.exists(), "it is in use"
        process.kill()
    kept = storage_offload.MappedFiles(tmp_path)
    assert list(tmp_path.iterdir()) == [kept.path]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error before the layer has changed. The pass can be taken back and done again once there is room."""
    model = families.build("llama")
    caches = [small_cache(model, offload=tmp_path), small_cache(model)]
    for cache in caches:
        forward(model, prompt(40), cache)
    allocate, left = os.posix_fallocate, 1

    def full(file: int, start: int, size: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(list(tmp_path.rglob("*.pages")))
    with pytest.raises(OSError, match=r"offload='.*': no room for [\d,]+ bytes of pages \(No space left") as raised:
        forward(model, prompt(60, seed=1), caches[0])
    assert raised.value.errno == errno.ENOSPC
    assert len(list(tmp_path.rglob("*.pages"))) == before + 1, "the first layer had room"
    assert caches[0].own_layers[1].get_seq_length() == 40
    with pytest.raises(RuntimeError, match="ended in the middle"):
        forward(model, prompt(1), caches[0])
    caches[0].crop(0)
    monkeypatch.undo()
    # Pages end elsewhere than without the pass that was taken back, so sums run in another order.
    for logits in zip(*([forward(model, prompt(60, seed=1), x), decode(model, x, 20)] for x in caches), strict=True):
        torch.testing.assert_close(*logits, rtol=0, atol=ROUNDING)
    caches[0].integrity()


def test_a_full_disk_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty layer stays empty: the next update may have other sequences."""
    model = families.build("llama")
    cache = small_cache(model, offload=tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="no room"):
            forward(model, prompt(60), cache)
    cache.crop(0)
    assert cache.get_seq_length() == 0
    forward(model, prompt(60, 2), cache)


def test_a_forked_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama")
    cache = small_cache(model, offload=tmp_path)
    forward(model, prompt(60), cache)
    monkeypatch.setattr(storage_offload.os, "getpid", lambda: 1)
    with pytest.raises(RuntimeError, match="a forked process cannot go on with the cache of its parent"):
        forward(model, prompt(1), cache)


def test_transformers_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of ``offload`` and ``prefetch`` at any moment change nothing but where pages are."""
    asked = []
    monkeypatch.setattr(storage_offload.MappedFiles, "reads_disk", lambda self: asked.append(1) or True)
    model = families.build("gemma3")
    logits = []
    for to in (None, "files", "fetched"):
        cache = outside(small_cache(model), target(to, tmp_path))
        assert cache.offloading == (to is not None)
        forward(model, prompt(60), cache)
        logits.append([])
        for step in range(12):
            if to is not None:
                cache.prefetch(step % 4, only_non_sliding=step % 2 == 0)
                cache.offload(step % 3, only_non_sliding=step % 3 == 0)
            logits[-1].append(forward(model, prompt(1, seed=step), cache))
    assert asked
    _same(logits[0], logits[1])
    _same(logits[0], logits[2])


def test_on_a_cpu_the_host_is_the_device() -> None:
    model = families.build("llama")
    cache = small_cache(model, offload="cpu")
    forward(model, prompt(60), cache)
    assert_packed(cache)
    assert cache.memory().outside == cache.memory().buffers == 0


def test_files_of_caches(tmp_path: Path) -> None:
    """A saved cache can be loaded to where its pages are to lie."""
    model = families.build("llama")
    cache = small_cache(model, "rotated4", offload=tmp_path)
    forward(model, prompt(90), cache)
    cache.save(tmp_path / "saved")
    loaded = QuantizedKVCache.load, KVCache.load
    with pytest.raises(ValueError, match=r"offload='cpu' with empty="):
        KVCache.load(tmp_path / "saved", model.config, empty=small_cache(model, "rotated4"), offload="cpu")
    with pytest.raises(ValueError, match="accepted by QuantizedKVCache"):
        loaded[0](tmp_path / "saved", model.config)
    other = loaded[1](tmp_path / "saved", model.config, offload=tmp_path)
    assert other.memory().outside == cache.memory().outside
    _same([decode(model, cache, 20)], [decode(model, other, 20)])


CACHES: dict[str, Any] = {
    "quantized": lambda offload: QuantizedKVCache(CONFIG, bits=4, offload=offload),
    "heavy hitters": lambda offload: HeavyHitterCache(CONFIG, 64, offload=offload),
    "window": lambda offload: SlidingWindowCache(CONFIG, 64, offload=offload),
    "sparse": lambda offload: SparseReadCache(CONFIG, bits=4, dense_layers=0, offload=offload),
    "latent": lambda offload: LatentKVCache(mla_families.build("deepseek_v3").config, offload=offload),
}


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_takes_it(name: str, tmp_path: Path) -> None:
    cache = CACHES[name](tmp_path)
    assert cache.offloading and len(list(tmp_path.iterdir())) == 1


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, message in (
        (5, r"offload=5; accepted: None, 'cpu', or the path of a folder"),
        (True, "offload=True; accepted"),
        ("disk", r"offload='disk': no such folder; accepted"),
        (tmp_path / "missing", r"missing': no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            KVCache(CONFIG, offload=value)
    with pytest.raises(ValueError, match=r"offload='cpu' with max_length=512.*accepted"):
        KVCache(CONFIG, offload="cpu", max_length=512)
    for call in (lambda cache: cache.offload(0), lambda cache: cache.prefetch(0)):
        with pytest.raises(NotImplementedError, match="offload='cpu' or offload=<folder>"):
            call(KVCache(CONFIG))
    with pytest.raises(ValueError, match=r"layer_idx=3; accepted: 0 to 0"):
        KVCache(CONFIG, offload="cpu").offload(3)
    with pytest.raises(ValueError, match=r"layer_idx=2; accepted: 0 to 1"):
        KVCache(CONFIG, offload="cpu").prefetch(2)

    def denied(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(storage_offload.tempfile, "mkdtemp", denied)
    with pytest.raises(ValueError, match=r"no files can be made there \(Permission denied\).*this user may write"):
        KVCache(CONFIG, offload=tmp_path)
    assert not list(tmp_path.iterdir())


def _same(expected: Any, found: Any) -> None:
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
