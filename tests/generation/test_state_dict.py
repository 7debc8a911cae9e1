"""Saving a cache and going on from the saved one."""

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
    """A cache with 70 tokens in it, and the mask of two sequences of which one may be left-padded."""
    ids = torch.randint(1, model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : 33 if padded else 0] = 0
    cache = KVCache(model.config, codec, **PAGES)
    with torch.no_grad():
        model(ids, attention_mask=mask, **as_cache(cache))
    return cache, mask


def _next_logits(model: PreTrainedModel, cache: KVCache, mask: torch.Tensor) -> torch.Tensor:
    """Logits of 20 further tokens, one at a time."""
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
    """A cache read from a safetensors file decodes bit for bit like the one that was saved."""
    cache, mask = _filled(model, codec, padded)
    assert_packed(cache)
    save_file(cache.state_dict(), tmp_path / "cache.safetensors")
    other = KVCache(model.config, codec, **PAGES)
    other.load_state_dict(load_file(tmp_path / "cache.safetensors"))
    other.integrity()
    assert other.get_seq_length() == 70
    assert torch.equal(_next_logits(model, other, mask), _next_logits(model, cache, mask))


def test_saving_does_not_disturb(model: PreTrainedModel) -> None:
    """The cache that was saved goes on as if it had not been."""
    cache, mask = _filled(model, "rotated4")
    untouched = cache.fork()
    cache.state_dict()
    assert torch.equal(_next_logits(model, cache, mask), _next_logits(model, untouched, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"codec": "int8"}, "codec"), ({"page_size": 32}, "page_size"), ({"sink_length": 0}, "sink_length")],
)
def test_other_settings_are_refused(model: PreTrainedModel, options: dict[str, object], message: str) -> None:
    """A state of a cache with other settings raises, and what the cache held stays."""
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
    """Pages of the same codec with other options would decode to something else: the state is refused."""
    state = _filled(model, codec)[0].state_dict()
    cache = KVCache(model.config, codec, **PAGES, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codec"):
        cache.load_state_dict(state)


def test_foreign_state_is_refused(model: PreTrainedModel) -> None:
    """A dictionary that no cache made names what is missing."""
    with pytest.raises(ValueError, match="meta"):
        KVCache(model.config).load_state_dict({"weight": torch.zeros(2)})
