"""A policy may write into all that it is shown: neither the cache, nor the choice, nor the model's weights change."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from hf_kvcache.eviction import Context, Policy, resolve
from hf_kvcache.eviction.wrapper import Wrapper
from tests import families
from tests.eviction.toys import Toy, assert_same_kept, states
from tests.running import generate, prompt


class Vandal(Wrapper):
    """Scores as another policy does, and then overwrites every tensor of the context."""

    name = "vandal"

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.overwritten: set[str] = set()

    def score(self, ctx: Context) -> torch.Tensor:
        scores = self.policy.score(ctx).clone()
        shown = {field.name: getattr(ctx, field.name) for field in fields(ctx)}
        for name, part in {**shown, "sink_logits": ctx.scoring.sink_logits}.items():
            # What stands for states that a policy does not look at cannot be written to.
            if isinstance(part, torch.Tensor) and 0 not in part.stride():
                part.fill_(torch.nan) if part.is_floating_point() else part.zero_()
                self.overwritten.add(name)
        return scores


@pytest.mark.parametrize(("policy", "codec"), [("critical-snapkv", "none"), ("h2o", "none"), ("rkv", "turboquant4")])
def test_an_evicting_layer_is_not_changed(policy: str, codec: str) -> None:
    given = states(90)
    plain, vandal = Toy(policy, codec), Toy(policy, codec)
    vandal.layer.eviction.__dict__["policy"] = overwriting = Vandal(plain.cache.policy)
    weight = vandal.attention.o_proj.weight.detach().clone()
    assert torch.equal(plain.run(given, [60]), vandal.run(given, [60]))
    assert_same_kept(vandal.kept(), plain.kept())
    assert {"positions", "protected"} <= overwriting.overwritten
    assert torch.equal(vandal.attention.o_proj.weight, weight)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_model_is_not_changed(family: str) -> None:
    model = families.build(family)
    sizes: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8, "interval": 8}
    batch = {"input_ids": prompt(60, 2), "attention_mask": (torch.arange(60) >= torch.tensor([[0], [7]])).long()}
    plain = generate(model, batch, HeavyHitterCache(model.config, 24, "critical-snapkv", window=8, **sizes))
    policy = Vandal(resolve("critical-snapkv", window=8))
    other = generate(model, batch, HeavyHitterCache(model.config, 24, policy, **sizes))
    assert torch.equal(other.logits, plain.logits)
    assert {"keys", "values", "positions", "protected", "queries", "output_weight"} <= policy.overwritten


def test_attention_is_accumulated_where_keys_and_values_differ_in_width() -> None:
    """What a value does behind the output projection is looked at when tokens are chosen, not before."""
    toy, given = Toy("critical-h2o"), states(60)
    narrow = given._replace(value=given.value[..., :8].contiguous())
    weight = toy.attention.o_proj.weight
    toy.attention.o_proj.weight = torch.nn.Parameter(weight[:, : weight.shape[1] // 2].detach())
    toy(narrow)
    assert [len(head) for head in toy.positions()] == [32, 32]
