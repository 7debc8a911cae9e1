"""Saving a cache, and continuing from the saved state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_kvcache import KVCache
from tests.running import as_cache, assert_packed

PAGES = {"page_size": 16, "tail_length": 8}


def _filled(model: PreTrainedModel, codec: str, padded: bool = False) -> tuple[KVCache, torch.Tensor]:
    """A cache of 70 tokens of two sequences, and the attention mask, in which one sequence may be left-padded."""
    ids = torch.randint(1, model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : 33 if padded else 0] = 0
    cache = KVCache(model.config, codec, **PAGES)
    with torch.no_grad():
        model(ids, attention_mask=mask, **as_cache(cache))
    return cache, mask


def _next_logits(model: PreTrainedModel, cache: KVCache, mask: torch.Tensor) -> torch.Tensor:
    """The logits of 20 further tokens, decoded one at a time."""
    out = []
    for step in range(20):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        with torch.no_grad():
            out.append(model(torch.full((2, 1), 5 + step), attention_mask=mask, **as_cache(cache)).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("codec", ["none", "rotated4", "unbiased3"])
def test_goes_on_from_a_file(model: PreTrainedModel, codec: str, padded: bool, tmp_path: Path) -> None:
    """A cache that is read from a safetensors file decodes bit for bit like the saved cache."""
    cache, mask = _filled(model, codec, padded)
    assert_packed(cache)
    save_file(cache.state_dict(), tmp_path / "cache.safetensors")
    other = KVCache(model.config, codec, **PAGES)
    other.load_state_dict(load_file(tmp_path / "cache.safetensors"))
    other.integrity()
    assert other.get_seq_length() == 70
    assert torch.equal(_next_logits(model, other, mask), _next_logits(model, cache, mask))


def test_saving_does_not_disturb(model: PreTrainedModel) -> None:
    """Saving does not change a cache."""
    cache, mask = _filled(model, "rotated4")
    untouched = cache.fork()
    cache.state_dict()
    assert torch.equal(_next_logits(model, cache, mask), _next_logits(model, untouched, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"codec": "int8"}, "codec"), ({"page_size": 32}, "page_size"), ({"sink_length": 0}, "sink_length")],
)
def test_other_settings_are_refused(model: PreTrainedModel, options: dict[str, object], message: str) -> None:
    """A state of a cache with other settings raises an error, and the cache is not changed."""
    state = _filled(model, "rotated4")[0].state_dict()
    cache = KVCache(model.config, **{"codec": "rotated4", **PAGES, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        cache.load_state_dict(state)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("codec", "options"),
    [("turboquant4", {"center": True}), ("int4", {"group_size": 8}), ("rotated4", {"key_axis": "token"})],
)
def test_other_codec_options_are_refused(model: PreTrainedModel, codec: str, options: dict[str, object]) -> None:
    """A state of the same codec with other options raises an error, because its pages would decode to other values."""
    state = _filled(model, codec)[0].state_dict()
    cache = KVCache(model.config, codec, **PAGES, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codec"):
        cache.load_state_dict(state)


def test_foreign_state_is_refused(model: PreTrainedModel) -> None:
    """For a dictionary that is no saved state, the error names the missing entry."""
    with pytest.raises(ValueError, match="meta"):
        KVCache(model.config).load_state_dict({"weight": torch.zeros(2)})
