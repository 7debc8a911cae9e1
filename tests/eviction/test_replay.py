"""What a second reading of the context finds, against attention weights written out by the model itself."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from tests import families
from tests.running import forward, left_padded, prompt
from tests.tolerances import assert_near

PROMPT_IDS = torch.tensor([7, 8, 9])


def by_hand(family: str, ids: torch.Tensor, asked: torch.Tensor | None) -> list[torch.Tensor]:
    """``[Hkv, T]`` of each layer: context, request and context again in one pass, and the weights that it gives."""
    model = families.build(family, attention="eager")
    again = ids if asked is None else torch.cat([asked[None], ids], 1)
    with torch.no_grad():
        weights = model(torch.cat([ids, again], 1), output_attentions=True).attentions
    length, heads = ids.shape[1], model.config.num_key_value_heads
    return [w[0].unflatten(0, (heads, -1))[:, :, length:, :length].amax((1, 2)) for w in weights]


@pytest.mark.parametrize("family", ["llama", "llama_mha", "qwen3"])
@pytest.mark.parametrize("asked", [None, PROMPT_IDS])
def test_largest_probabilities(family: str, asked: torch.Tensor | None) -> None:
    """Over the queries and the heads of a group; rows of a padded batch as alone."""
    model, rows = families.build(family), [prompt(40, seed=1), prompt(29, seed=2)]
    batch = left_padded(rows)
    cache = HeavyHitterCache(model.config, 24, "kvzip", sink_length=2, tail_length=4, page_size=8)
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    forward(model, batch["input_ids"], cache, attention_mask=mask, position_ids=positions)
    found = cache.replay(model, batch["input_ids"], mask, asked)
    for row, ids in enumerate(rows):
        for layer, expected in enumerate(by_hand(family, ids, asked)):
            assert_near(found[layer][row, :, : ids.shape[1]], expected)
