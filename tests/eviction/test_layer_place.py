"""Which layer a policy is told it scores: the model's index, which calibration goes by, and the place for budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from hf_kvcache.eviction import Context, Policy
from hf_kvcache.eviction.calibration import calibrate
from hf_kvcache.layers.evicting import EvictingLayer
from tests import families
from tests.eviction.test_triattention import Letters
from tests.running import generate, prompt

SIZES: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8, "interval": 8}


class Noting(Policy):
    """Keeps the newest and takes note of where it was asked."""

    name = "noting"
    needs_states = needs_values = False

    def __init__(self) -> None:
        self.asked: set[tuple[int, int]] = set()
        self.places: set[tuple[int, int]] = set()

    def layer_quota(self, quota: int, place: int, places: int, least: int, most: int) -> int:
        self.places.add((place, places))
        return quota

    def score(self, ctx: Context) -> torch.Tensor:
        self.asked.add((ctx.layer, ctx.layers))
        return ctx.positions.double()


@pytest.mark.parametrize(
    ("family", "layers", "evicting"), [("gemma3", 3, [1]), ("qwen3_next", 3, [1, 2]), ("llama", 2, [0, 1])]
)
def test_policies_see_the_index_in_the_model(family: str, layers: int, evicting: list[int]) -> None:
    model, policy = families.build(family), Noting()
    cache = HeavyHitterCache(model.config, 24, policy, **SIZES)
    generate(model, prompt(60), cache, new=4)
    assert [i for i, layer in enumerate(cache.layers) if isinstance(layer, EvictingLayer)] == evicting
    assert policy.asked == {(index, layers) for index in evicting}
    assert policy.places == {(place, len(evicting)) for place in range(len(evicting))}


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_calibration_of_a_hybrid_is_that_of_its_own_layer(family: str) -> None:
    """The statistics of the other layers are made useless: they are not looked at."""
    model = families.build(family)
    found = calibrate(model, ["some text, which is long enough"], Letters(), tokens=31)
    cache = HeavyHitterCache(model.config, 24, "triattention", calibration=found, offset=64, window=4, **SIZES)
    own = {layer.index for layer in cache.layers if isinstance(layer, EvictingLayer)}
    for index, layer in found.layers.items():
        if index not in own:
            layer.mean.fill_(torch.nan)
            layer.length.fill_(torch.nan)
    assert own < set(found.layers)
    result = generate(model, prompt(60), cache, new=12)
    (layer,) = (layer for layer in cache.layers if isinstance(layer, EvictingLayer))
    kept = layer.kept_positions()
    assert layer.evictor is not None and layer.evictor.evictions and torch.isfinite(result.logits).all()
    newest = torch.arange(kept.max() - kept.shape[2] + 1, kept.max() + 1)
    assert not torch.equal(kept[0, 0], newest), "scores without a number would keep the newest"
