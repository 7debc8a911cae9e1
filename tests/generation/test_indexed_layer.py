"""MiniMax-M3: keys and values in pages, and the keys of its indexer beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.indexed import IndexedLayer

LENGTH = 45
SIZES: dict[str, Any] = {"sink_length": 2, "tail_length": 8, "page_size": 8}


@pytest.fixture(scope="module")
def minimax() -> PreTrainedModel:
    """A layer of full attention, and two that choose 2 blocks of 4 keys beside the newest."""
    modeling = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    config = modeling.MiniMaxM3VLTextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=16,
        dense_intermediate_size=16,
        shared_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
        index_local_blocks=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return modeling.MiniMaxM3VLForCausalLM._from_config(config).eval()


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: PreTrainedModel, held: Any, *pieces: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(piece, **with_cache(model, held)).logits for piece in pieces], 1)


def test_the_layers_are_ours_and_give_what_dynamic_cache_gives(minimax: PreTrainedModel) -> None:
    pieces = (ids(2, LENGTH), *ids(2, 12, 1).split(1, 1), ids(2, 5, 2))
    expected = read(minimax, DynamicCache(config=minimax.config), *pieces)
    held = KVCache(minimax.config, **SIZES)
    assert [type(layer) is IndexedLayer for layer in held.layers] == [False, True, True]
    torch.testing.assert_close(read(minimax, held, *pieces), expected, rtol=0, atol=1e-5)
    packed = QuantizedKVCache(minimax.config, bits=8, **SIZES)
    assert float((read(minimax, packed, *pieces) - expected).abs().mean() / expected.std()) < 0.1
    assert packed.layers[1].storage.table.page_ids().size > 0


def test_the_keys_of_the_indexer_follow(minimax: PreTrainedModel, tmp_path: Path) -> None:
    """Crop, reordering, selecting, a fork and a file, against a cache that read the tokens anew."""
    tokens, more = ids(3, LENGTH), ids(2, 6, 1).split(1, 1)
    held = KVCache(minimax.config, **SIZES)
    for layer in held.layers:
        layer.activate_past_recording()
    read(minimax, held, tokens, ids(3, 7, 3))
    held.crop(-7)
    held.reorder_cache(torch.tensor([2, 0, 1]))
    fork = held.fork()
    read(minimax, fork, ids(3, 4, 4))
    held.batch_select_indices(torch.tensor([0, 2]))
    held.save(tmp_path / "cache")
    anew = KVCache(minimax.config, **SIZES)
    read(minimax, anew, tokens[[2, 1]])
    expected = read(minimax, anew, *more)
    for cache in (KVCache.load(tmp_path / "cache", minimax.config), held):
        cache.integrity()
        torch.testing.assert_close(read(minimax, cache, *more), expected, rtol=0, atol=1e-5)


def test_a_pass_that_ends_before_the_indexer_is_taken_back(
    minimax: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the last layer, which has its keys and values then, as all layers before it have."""
    held, anew, more = KVCache(minimax.config, **SIZES), KVCache(minimax.config, **SIZES), ids(2, 6, 1)
    for cache in (held, anew):
        read(minimax, cache, ids(2, LENGTH))
    with monkeypatch.context() as patch:
        patch.setattr(held.layers[-1], "update_index", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            read(minimax, held, ids(2, 3, 2))
    held.crop(0)
    assert held.get_seq_length() == LENGTH
    assert torch.equal(read(minimax, held, more), read(minimax, anew, more))
