"""``cache.save`` and ``KVCache.load``: what is loaded is what was saved, and nothing else is ever loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Gemma4TextConfig, PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache, QuantizedKVCache
from hf_kvcache.codecs import specs
from hf_kvcache.eviction.policies.snapkv import SnapKV
from hf_kvcache.eviction.registry import available
from hf_kvcache.prompts import PromptStore
from hf_kvcache.utils import safetensors
from tests import families
from tests.generation.kinds import KINDS, decode, filled
from tests.lowrank.one_layer import rotation
from tests.prompts.toys import some
from tests.running import forward, left_padded, prompt, small_cache

#: Kinds whose layers the tests make by hand, so that a file cannot describe them.
BY_HAND = ("low rank",)


@pytest.mark.parametrize("kind", some([name for name in KINDS if name not in BY_HAND], "recurrent", "h2o"))
def test_every_kind_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """A loaded cache has the class, the state and the logits of the saved one, and saves to the same file."""
    model, cache = filled(kind)
    before = {name: x.clone() for name, x in cache.state_dict().items()}
    cache.save(tmp_path / "one")
    loaded = KVCache.load(tmp_path / "one", model.config)
    assert type(loaded) is type(cache) and loaded.options.codec.name == cache.options.codec.name
    loaded.integrity()
    assert same(loaded.state_dict(), before) and same(cache.state_dict(), before)
    loaded.save(tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    assert torch.equal(decode(model, loaded, 40), decode(model, cache, 40))
    loaded.integrity()
    again = KVCache.load(tmp_path / "one", model.config)  # the loaded cache wrote into its mapping, not into the file
    assert same(again.state_dict(), before)


def test_layers_of_different_widths(tmp_path: Path) -> None:
    """Gemma 4's layers have widths and numbers of KV heads of their own; with others the file is refused."""
    model = families.build("gemma4")
    cache = small_cache(model, "int8")
    forward(model, prompt(60), cache)
    cache.save(tmp_path / "file", prompt(60))
    loaded = KVCache.load(tmp_path / "file", model.config, input_ids=prompt(60))
    assert same(loaded.state_dict(), cache.state_dict())
    assert torch.equal(decode(model, loaded, 40), decode(model, cache, 40))
    other = Gemma4TextConfig.from_dict(model.config.to_dict() | {"per_layer_config": {1: {"head_dim": 64}}})
    with pytest.raises(ValueError, match=r"head_dim=\[16, 32, 16, 32\], this model has \[16, 64, 16, 16\]"):
        KVCache.load(tmp_path / "file", other)


@pytest.mark.parametrize("codec", some(specs(), "rotated4", "kvarn3"))
def test_every_codec(model: PreTrainedModel, codec: str, tmp_path: Path) -> None:
    cache = small_cache(model, codec)
    padded = left_padded([prompt(61), prompt(40)])
    forward(model, padded["input_ids"], cache, attention_mask=padded["attention_mask"])
    cache.save(tmp_path / "file", padded["input_ids"])
    loaded = KVCache.load(tmp_path / "file", model.config, input_ids=padded["input_ids"])
    assert same(loaded.state_dict(), cache.state_dict())
    assert KVCache.about_file(tmp_path / "file")["tokens"] == padded["input_ids"].tolist()


#: A file cannot describe a gate: see the tests of gates.
PLAIN = [name for name in available() if name != "gate"]


@pytest.mark.parametrize(
    "policy", some([*PLAIN, "ada-snapkv", "ada-critical-snapkv", "chunk-threshold-snapkv"], "ada-snapkv")
)
def test_every_policy(model: PreTrainedModel, policy: str, tmp_path: Path) -> None:
    """Files, forks and stores give the state that was kept, and it goes on as before."""
    options: dict[str, Any] = {"window": 6, "floor": 0.4} if policy == "ada-snapkv" else {}

    def make() -> HeavyHitterCache:
        return HeavyHitterCache(model.config, 0.5, policy, tail_length=4, page_size=8, bits=4, pin=(3, 5), **options)

    cache = make()
    forward(model, prompt(50), cache)
    if cache.policy.needs_replay:
        cache.compress(model, prompt(50))
    with PromptStore(make, directory=tmp_path / "store", model=model) as store:
        store.put(prompt(50), cache)
    later = PromptStore(make, directory=tmp_path / "store", model=model)
    found, length = later.fetch(torch.cat([prompt(50), prompt(2)], 1))
    assert length == 50 and later.stats().hits_by_tier["disk"] == 1
    assert same(found.state_dict(), cache.state_dict()) and same(cache.fork().state_dict(), cache.state_dict())
    cache.save(tmp_path / "file")
    loaded = HeavyHitterCache.load(tmp_path / "file", model.config)
    assert loaded.options.eviction.describe() == cache.options.eviction.describe()  # type: ignore[union-attr]
    assert (loaded.budget, repr(loaded.policy)) == (cache.budget, repr(cache.policy))
    expected = decode(model, cache, 40)
    for one in (loaded, found):
        assert torch.equal(decode(model, one, 40), expected)


def test_low_rank_bases_go_along(model: PreTrainedModel, tmp_path: Path) -> None:
    bases = {index: rotation(2, (16, 16), 2, before_rope=True, seed=index) for index in range(2)}
    cache = small_cache(model, latents=bases)
    forward(model, prompt(61), cache)
    cache.save(tmp_path / "file")
    loaded = KVCache.load(tmp_path / "file", model.config)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    assert torch.equal(decode(model, loaded, 30), decode(model, cache, 30))


def test_objects_need_an_empty_cache(model: PreTrainedModel, tmp_path: Path) -> None:
    """A setting that a file cannot describe is named, and an empty cache with the settings takes the content."""

    class OwnPolicy(SnapKV):
        def __init__(self, reference: torch.Tensor) -> None:
            super().__init__(window=8)
            self.reference = reference

    def make() -> HeavyHitterCache:
        return HeavyHitterCache(model.config, 24, OwnPolicy(torch.ones(2)), sink_length=2, tail_length=4, page_size=8)

    cache = make()
    forward(model, prompt(50), cache)
    cache.save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"reference=tensor.*empty="):
        KVCache.load(tmp_path / "file", model.config)
    loaded = KVCache.load(tmp_path / "file", model.config, empty=make())
    assert same(loaded.state_dict(), cache.state_dict())
    with pytest.raises(ValueError, match="has seen 50"):
        KVCache.load(tmp_path / "file", model.config, empty=loaded)
    other = HeavyHitterCache(model.config, 24, "snapkv", sink_length=2, tail_length=4, page_size=8)
    with pytest.raises(ValueError, match="eviction"):
        KVCache.load(tmp_path / "file", model.config, empty=other)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the mappings of a process")
@pytest.mark.parametrize("kind", some(["rotated4", "recurrent", "snapkv"], "recurrent"))
def test_loading_copies_nothing(kind: str, tmp_path: Path) -> None:
    """Pages, full-precision tokens and states of linear layers lie in the mapped file."""
    model, cache = filled(kind)
    cache.save(tmp_path / "cache.file")
    loaded = KVCache.load(tmp_path / "cache.file", model.config)
    tensors = []
    for layer in loaded.layers:
        if layer in loaded.own_layers:
            tensors += [*layer.storage.pool.slabs(), layer.storage.dense.keys, layer.storage.dense.values]
        else:
            tensors += [
                x for value in vars(layer).values() for x in (value.values() if isinstance(value, dict) else ())
            ]
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("cache.file")
    ]
    held = [x for x in tensors if isinstance(x, torch.Tensor) and x.numel()]
    assert len(held) >= 6 and all(any(a <= x.data_ptr() < b for a, b in spans) for x in held)
    assert all(x.data_ptr() % 64 == 0 for x in held)


def test_private_tokens_are_not_in_the_file(model: PreTrainedModel, tmp_path: Path) -> None:
    cache, ids = small_cache(model), prompt(40)
    forward(model, ids, cache)
    cache.save(tmp_path / "file", ids, private=True)
    assert KVCache.about_file(tmp_path / "file")["tokens"] is None
    assert json.dumps(ids.tolist())[2:-2].encode() not in (tmp_path / "file").read_bytes()
    KVCache.load(tmp_path / "file", model.config, input_ids=ids)
    with pytest.raises(ValueError, match="other tokens"):
        KVCache.load(tmp_path / "file", model.config, input_ids=ids + 1)
    with pytest.raises(ValueError, match="float32; accepted: whole numbers"):
        KVCache.load(tmp_path / "file", model.config, input_ids=ids + 0.5)


def test_every_damage_is_found(model: PreTrainedModel, tmp_path: Path) -> None:
    """A file that lacks its end, or has one other bit anywhere, raises a ValueError."""
    cache, path = small_cache(model, "rotated4"), tmp_path / "file"
    forward(model, prompt(40), cache)
    cache.save(path)
    whole = path.read_bytes()
    _, _, start = safetensors.read_header(path)
    for length in (0, 7, 8, 100, start - 1, start, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="path="):
            KVCache.load(path, model.config)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="path="):
        KVCache.load(path, model.config)
    for at in [*range(0, start, 397), *range(start, len(whole), 1997), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError):  # of a digest, or of the model that a damaged header names
            KVCache.load(path, model.config)
    for name in (b"tokens_digest", b"seen", b"settings", b"class"):  # a description without what is read first
        path.write_bytes(whole.replace(name, name[:-1] + b"_", 1))
        with pytest.raises(ValueError, match="damaged"):
            KVCache.load(path, model.config, input_ids=prompt(40))
    path.write_bytes(whole)
    assert KVCache.load(path, model.config).get_seq_length() == 40


def test_foreign_and_newer_files(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="cannot be read"):
        KVCache.load(path, model.config)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="no file of a cache"):
        KVCache.load(path, model.config)
    save_file({"weight": torch.ones(3)}, path, {"format": "hf_kvcache cache 2"})
    with pytest.raises(ValueError, match=r"has version 2 .* reads version 1"):
        KVCache.load(path, model.config)


def test_other_models_and_classes_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    """The error says what differs: the shape, the name, the revision or the class."""
    path = tmp_path / "file"
    cache = small_cache(model)
    forward(model, prompt(40), cache)
    cache.save(path)
    with pytest.raises(ValueError, match=r"holds a KVCache; accepted by QuantizedKVCache.load"):
        QuantizedKVCache.load(path, model.config)
    other = type(model.config)(**{**model.config.to_dict(), "head_dim": 32})
    with pytest.raises(ValueError, match=r"made with head_dim=16, this model has 32"):
        KVCache.load(path, other)
    named = [type(model.config)(**model.config.to_dict()) for _ in range(2)]
    for config, name in zip(named, ("a/b", "a/c"), strict=True):
        config._name_or_path = name
    cache = KVCache(named[0])
    forward(model, prompt(40), cache)
    cache.save(path)
    with pytest.raises(ValueError, match=r"model name 'a/b'.*'a/c'"):
        KVCache.load(path, named[1])
    assert KVCache.load(path, named[1], check_model=False).get_seq_length() == 40


def test_nothing_is_lost_by_a_failure(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors before and during writing leave the earlier file, and no other."""
    path, cache = tmp_path / "file", small_cache(model)
    forward(model, prompt(40), cache)
    cache.save(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"shape \[1, 39\]; accepted: \[1, 40\]"):
        cache.save(path, prompt(39))
    drafting = cache.fork()
    drafting.activate_past_recording()
    forward(model, prompt(3), drafting)
    with pytest.raises(RuntimeError, match="middle of a draft"):
        drafting.save(path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_kvcache.cache.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        cache.save(path)
    assert [found.name for found in tmp_path.iterdir()] == ["file"] and path.read_bytes() == whole


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same tensors, bit for bit."""
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())
