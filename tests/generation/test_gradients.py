"""Gradients through a model with a cache equal those with DynamicCache, or raise an error."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, PreTrainedModel

from hf_kvcache import unbind
from hf_kvcache.integration.versions import with_cache
from tests.generation.kinds import KINDS
from tests.running import full_cache, prompt, set_binding

#: Kinds that are compared with a pass without a cache, because their attention works with no other cache here.
ALONE = ("latents", "evicted latents", "indexed latents")


def gradients(model: PreTrainedModel, cache: Cache | None, bound: bool = True) -> dict[str, torch.Tensor | None]:
    """The gradients of the loss of a whole sequence in one forward pass."""
    set_binding(model, cache)
    if not bound:
        unbind(model.config.get_text_config(decoder=True))
    model.zero_grad()
    ids = prompt(50, batch=2)
    model(input_ids=ids, labels=ids, **with_cache(model, cache), use_cache=cache is not None).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_alike(ours: dict[str, torch.Tensor | None], theirs: dict[str, torch.Tensor | None]) -> None:
    for name, expected in theirs.items():
        found = ours[name]
        if expected is None:
            assert found is None, name
            continue
        assert found is not None, f"no gradient of {name}"
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()), msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_first_forward_pass(kind: str) -> None:
    """The first forward pass has the exact gradients of queries, keys, values and all weights before them."""
    model = KINDS[kind].build()
    theirs = gradients(model, None if kind in ALONE else full_cache(model))
    assert_alike(gradients(model, KINDS[kind].cache(model)), theirs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["rotated4", "latents", "shared keys"])
def test_where_another_attention_reads(kind: str, attention: str) -> None:
    """Handles that are read as dense tensors pass gradients on too."""
    model = KINDS[kind].build()
    theirs = gradients(model, None)
    model.set_attn_implementation(attention)
    cache = KINDS[kind].cache(model)
    assert_alike(gradients(model, cache, bound=False), theirs)


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_over_earlier_tokens_it_is_an_error(trained: str, bound: bool) -> None:
    """A second forward pass has no gradient: backward() raises an error, whichever weight requires a gradient."""
    model = KINDS["rotated4"].build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.0.self_attn.{trained}" in name)
    cache = KINDS["rotated4"].cache(model)
    if not bound:
        unbind(model.config)
    ids = prompt(40)
    with torch.no_grad():
        model(input_ids=ids, **with_cache(model, cache))
    for block in (ids[:, :5], ids[:, :1]):
        loss = model(input_ids=block, labels=block, **with_cache(model, cache)).logits.sum()
        with pytest.raises(RuntimeError, match="only the first forward pass"):
            loss.backward()


@pytest.mark.parametrize("weight", ["kv_b_proj", "kv_a_proj", "q_b_proj"])
def test_over_earlier_latents_it_is_an_error(weight: str) -> None:
    """A second pass over latents raises the error too if only the weight that expands latents requires a gradient."""
    model = KINDS["latents"].build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0." in name and weight in name)
    cache = KINDS["latents"].cache(model)
    with torch.no_grad():
        model(input_ids=prompt(40), **with_cache(model, cache))
    loss = model(input_ids=prompt(1), **with_cache(model, cache)).logits.sum()
    with pytest.raises(RuntimeError, match="only the first forward pass"):
        loss.backward()


def test_nothing_of_the_graph_is_kept() -> None:
    """The stored tokens of a forward pass with gradients carry none, and decoding continues as usual."""
    model = KINDS["h2o"].build()
    cache, other = KINDS["h2o"].cache(model), KINDS["h2o"].cache(model)
    model(input_ids=prompt(40), **with_cache(model, cache))
    with torch.no_grad():
        model(input_ids=prompt(40), **with_cache(model, other))
    assert not any(tensor.requires_grad for tensor in cache.state_dict().values())
    with torch.no_grad():
        ours, theirs = (model(input_ids=prompt(1), **with_cache(model, c)).logits for c in (cache, other))
    assert torch.equal(ours, theirs)
