"""Models whose layers or weights accelerate puts on several devices: each layer's cache lies where the layer runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.gpu.pretended_device import DEVICE, PretendedDevice, moved
from hf_kvcache import HeavyHitterCache, KVCache
from hf_kvcache.codecs import specs
from hf_kvcache.prompts import PromptStore
from hf_kvcache.prompts.namespace import weights_digest
from tests import families
from tests.generation.kinds import KINDS
from tests.lowrank.test_calibration import measure
from tests.prompts.toys import some
from tests.running import as_cache, left_padded, prompt, small_cache

hooks = pytest.importorskip("accelerate.hooks")
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
#: Arguments that accelerate leaves alone, as transformers asks it to.
SKIPPED = ["past_key_values", "cache"]
#: A layer of experts counts its tokens by an operator that the pretended device cannot compute.
WITHOUT_EXPERTS = [name for name in KINDS if name != "recurrent"]


def cache_of(kind: str, model: PreTrainedModel) -> KVCache:
    return small_cache(model, "rotated4") if kind == "sink logits" else KINDS[kind].cache(model)


def build(kind: str) -> PreTrainedModel:
    return families.build("gpt_oss") if kind == "sink logits" else KINDS[kind].build()


@pytest.mark.parametrize("kind", some(WITHOUT_EXPERTS, "reindexed"))
def test_layers_on_two_devices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded batch gives the tokens of one device, and nothing of a layer lies on the device of another one."""
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "reference")
    padded = left_padded([prompt(61), prompt(40)])
    model = build(kind)
    expected = model.generate(**padded, **as_cache(cache_of(kind, model)), **GREEDY)
    with PretendedDevice():
        split = build(kind)
        layers = split.get_decoder().layers
        half = len(layers) // 2
        # The first layer of the models with latents has no experts.
        on_device = [0] if "latents" in kind else range(half, len(layers))
        for index in on_device:
            hook = hooks.AlignDevicesHook(DEVICE, io_same_device=True, skip_keys=SKIPPED)
            hooks.add_hook_to_module(moved(layers[index]), hook)
        cache = cache_of(kind, split)
        assert torch.equal(split.generate(**padded, **as_cache(cache), **GREEDY), expected)
        for layer in cache.own_layers:
            where = DEVICE if layer.index in on_device else torch.device("cpu")
            assert layer.storage.dense.keys.device == where == layer.device
            assert {slab.device for slab in layer.storage.pool.slabs()} == {where}


@pytest.mark.parametrize("where", some(["cpu", "disk"], "disk"))
@pytest.mark.parametrize("kind", some([*KINDS, "sink logits"], "reindexed"))
def test_offloaded_weights(kind: str, where: str, tmp_path: Path) -> None:
    """Weights that lie elsewhere while their module does not run, rotary embeddings and latents included."""
    model = build(kind)
    expected = model.generate(prompt(60), **as_cache(cache_of(kind, model)), **GREEDY)
    offloaded = offload(build(kind), where, tmp_path)
    cache = cache_of(kind, offloaded)
    if kind == "evicted latents":  # queries cannot be taken into latent space without the weight
        with pytest.raises(RuntimeError, match="accepted here: 'streaming'"):
            offloaded.generate(prompt(60), **as_cache(cache), **GREEDY)
        return
    assert torch.equal(offloaded.generate(prompt(60), **as_cache(cache), **GREEDY), expected)
    assert {layer.device for layer in cache.own_layers} == {torch.device("cpu")}


def offload(model: PreTrainedModel, where: str, folder: Path) -> PreTrainedModel:
    import accelerate

    if where == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.slow
def test_a_store_of_an_offloaded_model(tmp_path: Path) -> None:
    """It gives what a store of the model gives, and knows the weights though they are elsewhere."""
    model, other = families.build("llama"), families.build("llama")
    other.lm_head.weight.data.mul_(1.01)
    store = PromptStore(lambda: small_cache(model, "rotated4"), model=model)
    expected = [store.generate(model, prompt(60), **GREEDY) for _ in range(2)]
    digest = weights_digest(model)
    for where in ("cpu", "disk"):
        offloaded = offload(families.build("llama"), where, tmp_path)
        assert weights_digest(offloaded) == digest
        changed = families.build("llama")
        changed.load_state_dict(other.state_dict())
        assert weights_digest(offload(changed, where, tmp_path / "other")) != digest
        store = PromptStore(lambda: small_cache(offloaded, "rotated4"), directory=tmp_path / where, model=offloaded)  # noqa: B023
        with store:
            for tokens in expected:
                assert torch.equal(store.generate(offloaded, prompt(60), **GREEDY), tokens)
        assert store.stats().hits == 1 and store.stats().entries["disk"] == 1
        padded = left_padded([prompt(61), prompt(40)])
        assert store.generate(offloaded, **padded, **GREEDY).shape == (2, 73)
    with pytest.raises(ValueError, match="has no values for"):
        weights_digest(families.build("llama").to("meta"))


def test_offloaded_output_projections(tmp_path: Path) -> None:
    """Calibration, and a policy that weighs values by the output projection, read its weight where it lies."""
    model = families.build("llama")
    expected, measured = weighed(model)
    for where in ("cpu", "disk"):
        output, moments = weighed(offload(families.build("llama"), where, tmp_path / where))
        assert torch.equal(output, expected)
        for index, layer in measured.items():
            for name, value in vars(layer).items():
                assert not isinstance(value, torch.Tensor) or torch.equal(value, vars(moments[index])[name]), name


def weighed(model: PreTrainedModel) -> tuple[torch.Tensor, dict[int, Any]]:
    cache = HeavyHitterCache(model.config, 28, "critical-snapkv", sink_length=2, tail_length=4, page_size=8)
    return model.generate(prompt(60), **as_cache(cache), **GREEDY), measure(model)


@pytest.mark.parametrize("codec", some(specs(), "turboquant4", "kvarn2"))
def test_heads_are_packed_alone(model: PreTrainedModel, codec: str) -> None:
    """What a head holds does not depend on which others lie beside it, as with tensor parallelism, to the bit."""
    both, *one = (small_cache(model, codec) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    for length in (60, 1, 17, 1):
        keys, values = torch.randn(2, 1, 2, length, 16, generator=generator)
        for cache, heads in ((both, slice(2)), (one[0], slice(1)), (one[1], slice(1, 2))):
            cache.update(keys[:, heads], values[:, heads], 0)
    for side in ("keys", "values"):
        whole, *parts = (getattr(cache.layers[0], side) for cache in (both, *one))
        assert whole.shape == (1, 2, 79, 16) and torch.equal(whole, torch.cat(parts, 1))
