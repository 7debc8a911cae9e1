"""Generation with output options, streamers, dtypes, devices and gradient modes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tests import families
from tests.running import (
    ROUNDING,
    as_cache,
    assert_packed,
    assert_same,
    full_cache,
    generate,
    prompt,
    set_binding,
    small_cache,
)


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_plain_output(model: PreTrainedModel) -> None:
    """Without ``return_dict_in_generate`` the same sequences are returned as a tensor."""
    expected = generate(model, prompt(50), full_cache(model)).tokens
    out = model.generate(prompt(50), **as_cache(small_cache(model)), max_new_tokens=20, do_sample=False)
    assert isinstance(out, torch.Tensor) and torch.equal(out[:, 50:], expected)


def test_streamer(model: PreTrainedModel) -> None:
    """A streamer receives the prompt and then every token."""
    streamer = _Recorder()
    ours = generate(model, prompt(50), small_cache(model), streamer=streamer)
    assert streamer.ended and streamer.tokens == torch.cat([prompt(50), ours.tokens], 1)[0].tolist()


def test_hidden_states(model: PreTrainedModel) -> None:
    """Hidden states can be returned, and equal those of the full cache."""
    outputs = []
    for cache in (full_cache(model), small_cache(model)):
        set_binding(model, cache)
        outputs.append(
            model.generate(
                prompt(50),
                **as_cache(cache),
                max_new_tokens=8,
                do_sample=False,
                return_dict_in_generate=True,
                output_hidden_states=True,
            )
        )
    for theirs, ours in zip(*(out.hidden_states for out in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """In half precision the logits differ from those of the full cache by at most one rounding per layer."""
    model = families.build(family, dtype=dtype)
    ids = torch.cat([prompt(60), prompt(20, seed=1)], 1)
    logits = {}
    for cache in (full_cache(model), small_cache(model)):
        set_binding(model, cache)
        with torch.no_grad():
            parts = [ids[:, :60], *ids[:, 60:].split(1, 1)]
            steps = [model(part, **as_cache(cache), use_cache=True).logits for part in parts]
        logits[type(cache)] = torch.cat(steps, 1).float()
    assert_packed(cache)
    assert {layer.dtype for layer in cache.own_layers} == {dtype}
    theirs, ours = logits.values()
    tolerance = 24 * torch.finfo(dtype).eps * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dispatched_by_accelerate(family: str) -> None:
    """``device_map`` adds hooks to the modules, which must pass on the cache and its handles."""
    from accelerate import dispatch_model

    plain = families.build(family)
    expected = generate(plain, prompt(60), full_cache(plain))
    model = dispatch_model(families.build(family), {"": "cpu"}, force_hooks=True)
    ours = generate(model, prompt(60), small_cache(model))
    assert_packed(ours.cache)
    assert_same(ours, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__
)
def test_gradient_modes(model: PreTrainedModel, mode: Any) -> None:
    """Forward passes work in every gradient mode, and in several modes in turn on the same cache."""
    ids = prompt(70)
    expected = model(ids).logits.detach()
    cache = small_cache(model)
    contexts: list[AbstractContextManager[Any]] = [mode(), torch.no_grad(), mode()]
    steps = []
    for part, context in zip(ids.split([60, 1, 9], 1), contexts, strict=True):
        with context:
            steps.append(model(part, **as_cache(cache), use_cache=True).logits.detach().clone())
    assert_packed(cache)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=ROUNDING)


def test_inference_mode_then_no_grad(model: PreTrainedModel) -> None:
    """A cache that was filled under inference mode can be copied and used outside of it."""
    ids = prompt(75)
    expected = model(ids).logits.detach()
    cache = small_cache(model)
    with torch.inference_mode():
        model(ids[:, :60], **as_cache(cache), use_cache=True)
    fork = cache.fork()
    for each in (cache, fork):
        with torch.no_grad():
            steps = [model(part, **as_cache(each), use_cache=True).logits for part in ids[:, 60:].split(1, 1)]
        torch.testing.assert_close(torch.cat(steps, 1), expected[:, 60:], rtol=0, atol=ROUNDING)
    assert_packed(cache)
