"""What a second reading of the context finds, against attention weights written out by the model itself."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from tests import families
from tests.running import forward, left_padded, prompt
from tests.tolerances import assert_near

PROMPT_IDS = torch.tensor([7, 8, 9])
BOTH = ("kvzip", "kvzipplus")


def by_hand(family: str, ids: torch.Tensor, asked: torch.Tensor | None, policy: str) -> list[torch.Tensor]:
    """``[Hkv, T]`` of each layer: context, request and context again in one pass, and the weights that it gives.

    Of ``kvzipplus`` ``[Hkv, g, T]``, over the lengths of the hidden states behind the layer's first norm. Of ``rms``
    the root mean square of each query's weights over their sum.
    """
    model = families.build(family, attention="eager")
    again = ids if asked is None else torch.cat([asked[None], ids], 1)
    with torch.no_grad():
        found = model(torch.cat([ids, again], 1), output_attentions=True, output_hidden_states=True)
        inputs = [layer.input_layernorm(x) for layer, x in zip(model.model.layers, found.hidden_states, strict=False)]
    length, heads = ids.shape[1], model.config.num_key_value_heads
    weights = [w[0].unflatten(0, (heads, -1))[:, :, length:, :length] for w in found.attentions]
    if policy == "kvzip":
        return [w.amax((1, 2)) for w in weights]
    if policy == "rms":
        shares = [(w / w.sum(-1, keepdim=True)).double() for w in weights]
        return [(w.square().sum((1, 2)) / (w.shape[1] * w.shape[2])).sqrt().float() for w in shares]
    sizes = [x[0, length:].double().square().sum(-1).sqrt()[:, None] for x in inputs]
    return [(w / size).amax(2).float() for w, size in zip(weights, sizes, strict=True)]


@pytest.mark.parametrize("family", ["llama", "llama_mha", "qwen3"])
@pytest.mark.parametrize(
    ("policy", "asked"), [("kvzip", None), ("rms", PROMPT_IDS), ("kvzip", PROMPT_IDS), ("kvzipplus", PROMPT_IDS)]
)
def test_largest_probabilities(family: str, policy: str, asked: torch.Tensor | None) -> None:
    """Over the queries and the heads of a group; rows of a padded batch as alone."""
    model, rows = families.build(family), [prompt(40, seed=1), prompt(29, seed=2)]
    batch = left_padded(rows)
    cache = HeavyHitterCache(model.config, 24, policy, sink_length=2, tail_length=4, page_size=8)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    forward(model, batch["input_ids"], cache, attention_mask=mask, position_ids=positions)
    found = cache.replay(model, batch["input_ids"], mask, asked)
    for row, ids in enumerate(rows):
        for layer, expected in enumerate(by_hand(family, ids, asked, policy)):
            assert_near(found[layer][row, ..., : ids.shape[1]], expected)


def test_what_another_policy_replayed_is_refused() -> None:
    """Nothing is dropped, and the hooks of the first reading are gone."""
    model, ids = families.build("llama"), prompt(40)
    caches = [HeavyHitterCache(model.config, 24, policy, sink_length=2, tail_length=4) for policy in BOTH]
    for cache in caches:
        forward(model, ids, cache)
    found = [cache.replay(model, ids) for cache in caches]
    for cache, other in zip(caches, reversed(found), strict=True):
        with pytest.raises(ValueError, match=rf"replayed\[0\] of shape .*'{cache.policy.name}', \[B, Hkv"):
            cache.compress(replayed=other)
        assert (cache.layers[0].kept_positions() >= 0).all()
    assert not any(module._forward_pre_hooks for module in model.modules())
    for cache, own in zip(caches, found, strict=True):
        cache.compress(replayed=own)
        assert sum(int((layer.kept_positions() >= 0).sum()) for layer in cache.layers) == 24 * 2 * len(cache.layers)
