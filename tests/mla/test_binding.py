"""Models bound to a cache of latents: what is expanded, unbinding, changed weights and changed projections."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_kvcache import LatentKVCache, bind
from hf_kvcache.integration import mla
from tests.mla import families as mla_families
from tests.mla.running import FEW, assert_absorbed, both, expanding, latent, some, unbind_model
from tests.running import ROUNDING, as_cache, assert_same, forward, full_cache, generate, prompt, teacher_forced


@pytest.mark.parametrize("family", some())
def test_decoding_expands_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a decoding step the up-projection is not called at all, whatever the counter says."""
    projections = {module.kv_b_proj for module in expanding(model)}
    plain, calls = nn.Linear.forward, []

    def counted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self in projections:
            calls.append(x.shape)
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    cache = latent(model)
    forward(model, prompt(60), cache)
    assert len(calls) >= len(projections)
    forward(model, prompt(1, seed=2), cache)  # the first step checks, once a model, that the projection is a matrix
    calls.clear()
    for token in prompt(5, seed=1).split(1, 1):
        forward(model, token, cache)
    assert not calls


def _own_expansion(cls: Any) -> Any:
    """The method of the class, which has to be the one that the class's file defines."""
    assert cls.expand_kv.__code__.co_filename == inspect.getfile(cls), "another test left the class bound"
    return cls.expand_kv


@pytest.mark.parametrize("family", some())
def test_unbind(model: PreTrainedModel) -> None:
    """The class gets its own method back; transformers' cache gives the same before, during and after the binding."""
    (cls,) = {type(module) for module in expanding(model)}
    own = _own_expansion(cls)
    before = generate(model, prompt(40), full_cache(model), 8)
    bind(model.config.get_text_config(decoder=True))
    generate(model, prompt(40), latent(model), 8)
    with torch.no_grad():
        steps = [prompt(40), *before.tokens[:, :-1].split(1, 1)]
        bound_full = full_cache(model)  # the helper `forward` would unbind the model
        logits = [model(input_ids=x, **as_cache(bound_full), use_cache=True).logits[:, -1] for x in steps]
    torch.testing.assert_close(torch.stack(logits, 1), before.logits, rtol=0, atol=ROUNDING)
    unbind_model(model)
    assert cls.expand_kv is own
    after = generate(model, prompt(40), full_cache(model), 8)
    assert torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("family", some())
@torch.no_grad()
def test_unbound_in_use(model: PreTrainedModel) -> None:
    """A cache whose model is unbound continues by expanding latents, and without expanding once it is bound again."""
    ids = prompt(60)
    expected = teacher_forced(model, ids, full_cache(model), 50)
    cache = latent(model)
    logits = [forward(model, ids[:, :50], cache), forward(model, ids[:, 50:51], cache)]
    unbind_model(model)
    absorbed = cache.absorbed_steps
    for token in ids[:, 51:55].split(1, 1):
        logits.append(model(input_ids=token, **as_cache(cache), use_cache=True).logits)
    assert cache.absorbed_steps == absorbed
    logits.extend(forward(model, token, cache) for token in ids[:, 55:].split(1, 1))
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=ROUNDING)
    assert cache.absorbed_steps - absorbed == 5 * len(expanding(model))


def test_weights_that_change() -> None:
    """A weight that is changed in place, as by merging an adapter, is used from then on."""
    model = mla_families.build("deepseek_v3")
    generate(model, prompt(40), latent(model), 4)
    with torch.no_grad():
        for module in expanding(model):
            module.kv_b_proj.weight.mul_(0.5)
    ours, theirs = both(model, prompt(40), 12)
    unbind_model(model)
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 11)


def test_two_models() -> None:
    """Unbinding one model of a class leaves another model of the class bound."""
    one, other = (mla_families.build("deepseek_v3") for _ in range(2))
    cls = type(expanding(one)[0])
    own = _own_expansion(cls)
    expected = teacher_forced(one, prompt(60), full_cache(one), 50)
    caches = latent(one), latent(other)
    for model, cache in zip((one, other), caches, strict=True):
        forward(model, prompt(60)[:, :50], cache)
    unbind_model(one)
    with torch.no_grad():  # the helper `forward` would bind the model again
        steps = [other(x, **as_cache(caches[1]), use_cache=True).logits for x in prompt(60)[:, 50:].split(1, 1)]
    logits = torch.cat(steps, 1)
    torch.testing.assert_close(logits, expected[:, 50:], rtol=0, atol=ROUNDING)
    assert_absorbed(caches[1], other, 10)
    unbind_model(other)
    assert cls.expand_kv is own


class _Adapted(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class _Coded(nn.Linear):
    """A linear layer that does not multiply with its ``weight``, like a quantized layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -0.5 * super().forward(x)


def _coded(base: nn.Linear) -> nn.Module:
    coded = _Coded(base.in_features, base.out_features, bias=False)
    coded.load_state_dict(base.state_dict())
    return coded


def _hooked(base: nn.Linear) -> nn.Module:
    base.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    return base


def _instance_forward(base: nn.Linear) -> nn.Module:
    own = base.forward
    vars(base)["forward"] = lambda x: 0.5 * own(x)  # as a device map does to move weights
    return base


@pytest.mark.parametrize("family", [name for name in FEW if name != "dots3_note"])
@pytest.mark.parametrize("changed", [_Adapted, _coded, _hooked, _instance_forward])
def test_up_projection_that_is_no_matrix(family: str, changed: Callable[[nn.Linear], nn.Module]) -> None:
    """Where ``kv_b_proj`` does more than multiply with its weight, latents are expanded by calling it."""
    model = mla_families.build(family)
    plain = generate(model, prompt(40), full_cache(model), 12)
    for module in expanding(model):
        module.kv_b_proj = changed(module.kv_b_proj)
    ours, theirs = both(model, prompt(40), 12)
    unbind_model(model)
    assert (theirs.logits - plain.logits).abs().max() > 0.1, "the change changes nothing"
    assert_same(ours, theirs)
    assert isinstance(ours.cache, LatentKVCache)
    assert ours.cache.absorbed_steps == 0


@pytest.mark.parametrize("chained", [False, True])
def test_hooks_of_a_device_map(chained: bool) -> None:
    """Hooks that only move inputs, as ``device_map="auto"`` adds to every module, leave attention in latent space."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = mla_families.build("deepseek_v3")
    for module in expanding(model):
        hook = hooks.AlignDevicesHook("cpu")
        hooks.add_hook_to_module(module.kv_b_proj, hooks.SequentialHook(hook) if chained else hook)
    ours, theirs = both(model, prompt(40), 12)
    unbind_model(model)
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 11)


def test_offloaded_up_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that lies elsewhere between two calls: latents are expanded, and a warning says so."""
    hooks, said = pytest.importorskip("accelerate.hooks"), list[str]()
    monkeypatch.setattr(mla.logger, "warning_once", said.append)
    model = mla_families.build("deepseek_v3")
    for module in expanding(model):
        hook = hooks.AlignDevicesHook("cpu", offload=True, weights_map=dict(module.kv_b_proj.state_dict()))
        hooks.add_hook_to_module(module.kv_b_proj, hook)
    ours, theirs = both(model, prompt(40), 12)
    unbind_model(model)
    assert_same(ours, theirs)
    assert isinstance(ours.cache, LatentKVCache)
    assert ours.cache.absorbed_steps == 0
    assert said and "offloading" in said[0]
