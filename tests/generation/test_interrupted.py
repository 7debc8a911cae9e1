"""A forward pass that ends in the middle: the next use raises an error, and crop(0) undoes the pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_kvcache import KVCache
from tests.generation.kinds import KINDS, decode, filled
from tests.running import forward, prompt

MESSAGE = "ended in the middle"


def cut_off_behind(layer: nn.Module, model: PreTrainedModel, cache: KVCache, tokens: int = 1) -> None:
    """Run a forward pass that Ctrl-C interrupts after the attention of a layer."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = layer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        forward(model, prompt(tokens, seed=9), cache)
    hook.remove()


def mixer(model: PreTrainedModel, number: int) -> nn.Module:
    """The attention module of a layer, or the recurrence or convolution in its place."""
    layer = model.model.layers[number]
    return next(module for name, module in layer.named_children() if name in ("self_attn", "linear_attn", "conv"))


@pytest.mark.parametrize("kind", KINDS)
def test_is_noticed(kind: str) -> None:
    """A further pass, saving and the integrity check raise an error after an interrupted pass."""
    model, cache = filled(kind)
    cut_off_behind(mixer(model, 0), model, cache)
    for use in (lambda: decode(model, cache, 1), cache.state_dict, cache.integrity):
        with pytest.raises(RuntimeError, match=MESSAGE):
            use()
    cache.reset()
    forward(model, prompt(60), cache)
    cache.integrity()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("recurrent", "convolutions")])
@pytest.mark.parametrize("tokens", [1, 3])
def test_is_taken_back(kind: str, tokens: int) -> None:
    """After crop(0) the cache continues as if the pass had never begun, or crop(0) has raised an error."""
    model, cache = filled(kind)
    expected = decode(model, cache.fork())
    cut_off_behind(mixer(model, 0), model, cache, tokens)
    if tokens > 1 and kind in ("snapkv", "h2o", "reindexed", "evicted latents"):  # which evict after several tokens
        with pytest.raises(RuntimeError, match=r"evicted meanwhile. Call reset\(\)"):
            cache.crop(0)
        return
    cache.crop(0)
    assert cache.get_seq_length() == 63
    cache.integrity()
    torch.testing.assert_close(decode(model, cache), expected, rtol=0, atol=1e-4)


def test_what_waits_for_other_layers_stays() -> None:
    """crop(0) keeps the last complete pass in layers whose keys others read, which store their tokens late."""
    model, cache = filled("shared keys")
    forward(model, prompt(20), cache)
    expected = decode(model, cache.fork())
    cut_off_behind(mixer(model, 0), model, cache)
    cache.crop(0)
    torch.testing.assert_close(decode(model, cache), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["recurrent", "convolutions"])
def test_what_cannot_be_taken_back_says_so(kind: str) -> None:
    """A recurrent state cannot return to an earlier token, so crop(0) raises an error that names the layer."""
    model, cache = filled(kind)
    cut_off_behind(mixer(model, 0), model, cache)
    with pytest.raises(RuntimeError, match=r"layer 0 .*reset\(\)"):
        cache.crop(0)


@pytest.mark.parametrize("kind", ["none", "snapkv", "latents", "recurrent", "shared keys"])
def test_a_prompt(kind: str) -> None:
    """If the first pass is interrupted, crop(0) leaves an empty cache."""
    model = KINDS[kind].build()
    cache = KINDS[kind].cache(model)
    cut_off_behind(mixer(model, 0), model, cache, 40)
    with pytest.raises(RuntimeError, match=MESSAGE):
        forward(model, prompt(40), cache)
    cache.crop(0)
    assert cache.get_seq_length() == 0
    again = KINDS[kind].cache(model)
    assert torch.equal(forward(model, prompt(60), cache), forward(model, prompt(60), again))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", ["none", "h2o", "low rank"])
def test_within_attention(kind: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass is interrupted between update and attention. Only evicting layers notice it in the last layer."""
    model, cache = filled(kind)
    expected = decode(model, cache.fork())
    calls = 0

    def interrupted(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls > number:
            raise MemoryError

    with monkeypatch.context() as patch:
        original: Callable[..., object] = type(cache.own_layers[0]).attend
        patch.setattr(type(cache.own_layers[0]), "attend", lambda *a, **k: interrupted() or original(*a, **k))
        with pytest.raises(MemoryError):
            forward(model, prompt(1, seed=9), cache)
    if number and kind != "h2o":
        cache.crop(-1)  # both layers hold the token: nothing is uneven
    else:
        with pytest.raises(RuntimeError, match="crop\\(0\\)"):
            forward(model, prompt(1), cache)
        cache.crop(0)
    cache.integrity()
    torch.testing.assert_close(decode(model, cache), expected, rtol=0, atol=1e-4)


def test_while_tokens_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """If packing a page is interrupted, every use raises an error until reset()."""
    model, cache = filled("rotated4")
    layer = cache.own_layers[0]
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        assert layer.storage is not None
        patch.setattr(layer.storage, "pack_due", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decode(model, cache, 40)
    for use in (lambda: decode(model, cache, 1), lambda: cache.crop(0), cache.integrity):
        with pytest.raises(RuntimeError, match=r"call reset\(\)"):
            use()
    cache.reset()
    forward(model, prompt(60), cache)
    cache.integrity()


def test_layers_may_be_filled_one_after_the_other() -> None:
    """Updates without a model may come layer by layer, several to a layer. They do not count as a forward pass."""
    model = KINDS["none"].build()
    cache = KINDS["none"].cache(model)
    for layer in range(2):
        for _ in range(3):
            states = torch.randn(1, 2, 10, 16)
            cache.update(states, states, layer)
    cache.integrity()
    assert cache.get_seq_length() == 30
