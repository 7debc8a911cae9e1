"""Plans of caches of low-rank coefficients, with and without the bases of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kvcache import LatentKVCache
from hf_kvcache.lowrank import calibrate
from hf_kvcache.planning import plan
from tests import families
from tests.planning.holding import BATCH, CONTEXT, fill, held


class _Tokenizer:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        return type("Encoded", (), {"input_ids": torch.tensor([[3 + ord(letter) % 90 for letter in text]])})


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [("gemma2", "8", {"rank": 8}), ("llama", "0.8+4bits", {"ratio": 0.8, "bits": 4})],
)
def test_low_rank(family: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Without bases as with any that give all layers the same rank; with a file as with its ranks, in either order."""
    model = families.build(family)
    text = "some text that is not read for what it says, only for being long enough " * 2
    bases = calibrate(model, [text], _Tokenizer(), tokens=100, sinks=2, progress=False)
    bases.save(tmp_path / "bases")
    width, _, codec = name.partition("+")
    from_file = f"lowrank:{width}:{tmp_path / 'bases'}" + f"+{codec}" * bool(codec)
    found = plan(model.config, CONTEXT, BATCH, [f"lowrank:{name}", from_file], torch.float32)
    assert not found.unknown
    for row, spread in zip(found.caches, ("uniform", "energy"), strict=True):
        cache = LatentKVCache(model.config, projection=bases, spread=spread, **options)
        assert row.bytes == held(fill(model, cache)), spread
        assert ("'balanced'" in row.note) == (spread == "uniform")


def test_what_has_no_keys_and_values_is_said() -> None:
    found = plan(families.build("deepseek_v3").config, CONTEXT, 1, ["full", "lowrank:0.5"], torch.float32)
    assert len(found.caches) == 1 and "accepted: models that cache keys and values" in found.unknown[0]
    found = plan(families.build("llama").config, CONTEXT, 1, ["full", "lowrank:400"], torch.float32)
    assert len(found.caches) == 1 and "rank=400; accepted: whole numbers from" in found.unknown[0]
