"""Masks of every kind give the same as with ``DynamicCache``, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import Cache, PreTrainedModel

from benchmarks.gpu.pretended_device import DEVICE, PretendedDevice
from hf_kvcache import HeavyHitterCache, KVCache
from hf_kvcache.integration.padding import Padding, attach_padding, padding_of
from tests import families
from tests.running import ROUNDING, forward, full_cache, left_padded, prompt, small_cache

#: Tokens of the prompt: enough for pages, and for the window of families that have one.
LENGTH = 60
#: The arguments of the model for some forward passes.
Passes = list[dict[str, torch.Tensor]]


def evicting(model: PreTrainedModel) -> KVCache:
    """A cache that evicts nothing, by a policy that looks at the queries."""
    return HeavyHitterCache(model.config, 10**6, "snapkv", page_size=16, tail_length=8, interval=16)


CACHES: dict[str, Callable[[PreTrainedModel], KVCache]] = {"none": small_cache, "evicting": evicting}


def ones(length: int, hidden: slice | None = None) -> torch.Tensor:
    """A 2D mask ``[1, length]`` that hides one span."""
    mask = torch.ones(1, length, dtype=torch.long)
    if hidden is not None:
        mask[:, hidden] = 0
    return mask


def causal(queries: int, keys: int, offset: int = 0) -> torch.Tensor:
    """A 4D boolean mask of causality; with ``offset=1`` a token does not see itself."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries - offset)[None, None].clone()


def last_logits(model: PreTrainedModel, cache: Cache, steps: Passes) -> torch.Tensor:
    """Logits of the last step's last token."""
    for inputs in steps:
        rest = {name: x for name, x in inputs.items() if name != "input_ids"}
        logits = forward(model, inputs["input_ids"], cache, **rest)
    return logits[:, -1]


def at(*positions: int) -> torch.Tensor:
    return torch.tensor([positions])


def two_steps(first: torch.Tensor | None, second: torch.Tensor | None, new: int = 1) -> Passes:
    """A prompt with one mask and ``new`` tokens with another; positions do not depend on the masks."""
    steps: Passes = [
        {"input_ids": prompt(LENGTH), "position_ids": torch.arange(LENGTH)[None]},
        {"input_ids": prompt(new), "position_ids": torch.arange(LENGTH, LENGTH + new)[None]},
    ]
    for step, mask in zip(steps, (first, second), strict=True):
        if mask is not None:
            step["attention_mask"] = mask
    return steps


def strictly_causal() -> torch.Tensor:
    mask = causal(LENGTH, LENGTH, offset=1)
    mask[0, 0, 0, 0] = True
    return mask


def block_diagonal() -> torch.Tensor:
    """Two texts in one sequence, neither of which sees the other."""
    mask = causal(LENGTH, LENGTH)
    mask[:, :, 30:, :30] = False
    return mask


def tree() -> torch.Tensor:
    """Five new tokens: two branches after one root."""
    mask = causal(5, LENGTH + 5)
    mask[0, 0, 3, LENGTH + 1 : LENGTH + 3] = False
    mask[0, 0, 4, LENGTH + 1 : LENGTH + 3] = False
    return mask


def by_head() -> torch.Tensor:
    """Each head sees different tokens of the prompt."""
    mask = causal(1, LENGTH + 1).repeat(1, 4, 1, 1)
    for head in range(4):
        mask[0, head, 0, 10 * head : 10 * head + 8] = False
    return mask


HELD: dict[str, Passes] = {
    "strictly causal": two_steps(strictly_causal(), None),
    "two texts, then both": two_steps(block_diagonal(), None),
    "two texts, then one": two_steps(block_diagonal(), ones(LENGTH + 1, slice(0, 30))[:, None, None].bool()),
    "tree": two_steps(None, tree(), 5),
    "by head": two_steps(None, by_head()),
    "hidden span, then shown": two_steps(ones(LENGTH, slice(10, 30)), ones(LENGTH + 1)),
    "hidden span, then another of equal size": two_steps(ones(LENGTH, slice(10, 30)), ones(LENGTH + 1, slice(30, 50))),
    "hidden span, hidden still": two_steps(ones(LENGTH, slice(10, 30)), ones(LENGTH + 1, slice(10, 30))),
    "hidden only later": two_steps(None, ones(LENGTH + 1, slice(10, 30))),
    "beginning hidden only later": two_steps(None, ones(LENGTH + 1, slice(0, 7))),
    "a hole among new tokens": two_steps(None, ones(LENGTH + 9, slice(LENGTH + 3, LENGTH + 5)), 9),
    "longer than what was seen": two_steps(ones(LENGTH + 20), ones(LENGTH + 20)),
}


def additive(steps: Passes) -> Passes:
    """The same with 4D masks of numbers that are added to scores, as eager attention takes them."""
    lowest, out = torch.finfo(torch.float32).min, []
    for step in steps:
        mask = step.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            step = step | {"attention_mask": torch.zeros(mask.shape).masked_fill_(~mask, lowest)}
        out.append(step)
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", HELD)
def test_like_dynamic_cache(name: str, kind: str, attention: str) -> None:
    """Tokens that a mask hides are stored, unless they are padding, and are seen when a later mask shows them."""
    model = families.build("llama", attention)
    steps = HELD[name] if attention == "sdpa" else additive(HELD[name])
    expected = last_logits(model, full_cache(model), steps)
    got = last_logits(model, CACHES[kind](model), steps)
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["hidden span, then shown", "hidden span, hidden still", "hidden only later"])
def test_windows(name: str) -> None:
    """A family of sliding and full layers."""
    model = families.build("gemma3")
    expected = last_logits(model, full_cache(model), HELD[name])
    torch.testing.assert_close(last_logits(model, small_cache(model), HELD[name]), expected, rtol=0, atol=ROUNDING)


REFUSED: dict[str, tuple[Passes, str]] = {
    "left padding, then shown": (
        two_steps(ones(LENGTH, slice(0, 9)), ones(LENGTH + 1)),
        "token 0 of sequence 0, which was padding",
    ),
    "right padding, then shown": (
        two_steps(ones(LENGTH, slice(50, None)), ones(LENGTH + 1)),
        "token 50 of sequence 0, which was padding",
    ),
    "padding, then another span of equal size": (
        two_steps(ones(LENGTH, slice(0, 9)), ones(LENGTH + 1, slice(20, 29))),
        "token 0 of sequence 0, which was padding",
    ),
    "padding, then no mask": (two_steps(ones(LENGTH, slice(0, 9)), None), "which was padding"),
    "padding, then shown in 4D": (two_steps(ones(LENGTH, slice(0, 9)), causal(1, LENGTH + 1)), "which was padding"),
    "only the prompt's": (two_steps(ones(LENGTH), ones(LENGTH)), "attention_mask of 60 tokens .* 61 in all"),
    "only the new token's": (two_steps(ones(LENGTH), ones(1)), "attention_mask of 1 tokens .* 61 in all"),
    "too short at once": (two_steps(ones(40), None), "attention_mask of 40 tokens"),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, kind: str) -> None:
    """A mask that shows padding, which is not stored, or that is too short for the tokens, is an error."""
    steps, message = REFUSED[name]
    model = families.build("llama")
    with pytest.raises((ValueError, RuntimeError), match=message if name != "too short at once" else None):
        last_logits(model, CACHES[kind](model), steps)


def test_padding_between_turns_is_not_stored() -> None:
    """Each turn is padded at its left end, and a row holds what it holds alone."""
    model = families.build("llama")
    cache = small_cache(model)
    first, second = left_padded([prompt(20), prompt(33)]), left_padded([prompt(9), prompt(4)])
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    forward(model, first["input_ids"], cache, attention_mask=first["attention_mask"])
    forward(model, second["input_ids"], cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)[:, -9:])
    layer = cache.own_layers[0]
    layer.flush()
    assert layer.storage is not None and layer.storage.tokens().tolist() == [29, 37]
    assert layer.padding.counts(2).tolist() == [13, 5]
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    assert layer.padding.counts(3).tolist() == [5, 5, 13]
    cache.crop(-9)
    assert layer.padding.counts(3).tolist() == [0, 0, 13]
    cache.reset()
    assert layer.padding.counts(1).tolist() == [0]


def test_saved_padding_is_still_padding() -> None:
    """A restored cache refuses the masks that the saved one refuses."""
    model = families.build("llama")
    cache, other = small_cache(model), small_cache(model)
    steps = REFUSED["left padding, then shown"][0]
    last_logits(model, cache, steps[:1])
    other.load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="which was padding"):
        last_logits(model, other, steps[1:])


def _gemma() -> Any:
    config = transformers.GemmaConfig(**families._shape(head_dim=16), use_bidirectional_attention=True)
    return _random(transformers.GemmaForCausalLM(config))


def _doge() -> Any:
    return _random(
        transformers.DogeForCausalLM(transformers.DogeConfig(**families._shape(head_dim=16), keep_window_size=16))
    )


def _random(model: Any) -> Any:
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 or name.endswith(".A"):
            torch.nn.init.normal_(weight, std=1.2 * weight.shape[-1] ** -0.5 if weight.dim() >= 2 else 1.0)
    return model.eval()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("build", [_gemma, _doge], ids=["attention not causal by itself", "mask made of values"])
def test_families_with_masks_of_their_own(build: Callable[[], Any], kind: str) -> None:
    """Blocks after a prompt are causal, and a token that the model's own mask hides may be seen later."""
    if build is _doge and kind == "evicting":
        pytest.skip("refused: it reads values before attention does (tests/integration/test_architectures.py)")
    model = build()
    expected, got = full_cache(model), CACHES[kind](model)
    for part in prompt(80).split([40, 20, *[1] * 20], 1):
        reference = forward(model, part, expected)
        torch.testing.assert_close(forward(model, part, got), reference, rtol=0, atol=ROUNDING)


@torch.no_grad()
def test_a_mask_without_the_window_that_the_cache_has() -> None:
    """Where a mask has no window (Moshi's), each query of a block sees all tokens that ``DynamicCache`` shows."""
    model = families.build("mistral")
    expected, got = full_cache(model), small_cache(model)
    ids, offset = prompt(LENGTH), families.WINDOW - 1
    mask = causal(10, offset + 10)
    for cache in (expected, got):
        forward(model, ids[:, :50], cache)
    wanted = forward(model, ids[:, 50:], expected, attention_mask=mask)
    torch.testing.assert_close(forward(model, ids[:, 50:], got, attention_mask=mask), wanted, rtol=0, atol=ROUNDING)


def test_a_mask_on_another_device() -> None:
    """A copy is known by its elements, as long as the mask is in use; one to which something was added is not."""
    mask = torch.ones(2, 1, 3, 9, dtype=torch.bool).tril(6)
    padding = Padding(torch.ones(2, 9), 6, 3, None)
    with PretendedDevice():
        alone = mask.to(DEVICE)
        assert padding_of(alone, 6, 3, None) is None
        attach_padding(mask, padding)
        moved, other = mask.to(DEVICE), mask.to(DEVICE)
        other[1, 0, 2, 0] = False
        assert padding_of(moved, 6, 3, None) is padding and padding_of(mask.to(DEVICE), 6, 3, 4) is None
        assert padding_of(other, 6, 3, None) is None and padding_of(mask.to(DEVICE), 5, 3, None) is None
        copied = mask.to(DEVICE)
        del mask
        assert padding_of(copied, 6, 3, None) is None
