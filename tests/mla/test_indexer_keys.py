"""The keys of a sparse indexer that a layer holds beside latents."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from hf_kvcache import LatentKVCache
from hf_kvcache.integration import packed_keys
from hf_kvcache.integration.packed_keys import PackedKeys
from hf_kvcache.layers.indexer_keys import IndexerKeys
from hf_kvcache.layers.mla import IndexedLatentLayer
from tests.mla import families as mla_families
from tests.running import forward, prompt

SIZES: dict[str, Any] = {"page_size": 16, "tail_length": 16, "sink_length": 4}


def small(config: Any, **options: Any) -> LatentKVCache:
    return LatentKVCache(config, **{**SIZES, **options})


def near(got: Any, rows: list[np.ndarray], packed: bool) -> None:
    """Keys are those of ``rows``, or with 8 bits within half a step of each token's own scale."""
    wanted = np.stack(rows)
    steps = np.abs(wanted).max(-1, keepdims=True, initial=0) / 254 * (1 + 1e-5) if packed else 0 * wanted
    assert (np.abs(np.asarray(got.clone()) - wanted) <= steps).all()


@pytest.mark.parametrize("packed", [False, True])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_indexer_keys_against_a_list(packed: bool, data: st.DataObject) -> None:
    """Any sequence of operations, against plain lists of rows; buffers that grow keep their contents."""
    held, model = IndexerKeys(packed), [np.zeros((0, 3)) for _ in range(2)]
    for step in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["append", "drop", "select", "fork"])):
            case "append":
                new = np.random.default_rng(step).normal(size=(len(model), data.draw(st.sampled_from([1, 2, 300])), 3))
                model = [np.concatenate(pair) for pair in zip(model, new, strict=True)]
                got = held.append(torch.from_numpy(new))
                near(got, model, packed)
            case "drop":
                count = data.draw(st.integers(0, 5))
                held.drop_last(count)
                model = [row[: max(0, len(row) - count)] for row in model]
            case "select":
                rows = np.array(data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=3)))
                held.select(rows)
                model = [model[row] for row in rows]
            case "fork":
                other = held.fork()
                held.append(torch.full((len(model), 1, 3), torch.nan, dtype=torch.float64))
                held = other
    keys = held.keys()
    assert (keys is None or keys.shape[1] == 0) == (len(model[0]) == 0)
    if keys is not None:
        near(keys, model, packed)


def test_indexer_keys_that_do_not_go_together() -> None:
    """Another batch, width or dtype is refused, and the keys stay."""
    held = IndexerKeys()
    held.append(torch.ones(2, 3, 4))
    for wrong in (torch.ones(1, 1, 4), torch.ones(2, 1, 5), torch.ones(2, 1, 4).double()):
        with pytest.raises(ValueError, match="do not go with those held"):
            held.append(wrong)
    keys = held.keys()
    assert keys is not None and keys.shape == (2, 3, 4)


def test_indexed_layers_count_their_keys() -> None:
    """The bytes held include the indexer's keys."""
    model = mla_families.shared("glm_moe_dsa")
    cache = small(model.config)
    forward(model, prompt(30), cache)
    layer = next(layer for layer in cache.layers if isinstance(layer, IndexedLatentLayer) and layer.indexer.tensors())
    held = sum(x.numel() * x.element_size() for x in layer.indexer.tensors())
    assert 0 < held <= cache.memory().parts["other"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_from_codes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An indexer's product is computed from the codes without decoding all keys, and is that of the decoded keys."""
    monkeypatch.setattr(packed_keys, "_CPU_TOKENS", 7)
    keys, query = torch.randn(2, 20, 16, dtype=torch.float64).to(dtype), torch.randn(2, 3, 4, 16)
    packed = IndexerKeys(packed=True).append(keys)
    assert isinstance(packed, PackedKeys) and (packed.shape, packed.dtype) == (keys.shape, dtype)
    wanted = torch.matmul(query.double(), packed.double().transpose(-1, -2)[:, None])
    monkeypatch.setattr(PackedKeys, "dense", None)
    got = torch.matmul(query, packed.transpose(-1, -2).float().unsqueeze(1))
    assert type(got) is torch.Tensor
    # In bfloat16 the decoded keys are rounded once more, and the codes are not.
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_packed_keys_change_few_picks() -> None:
    """Of 256 tokens that are picked among 4,096, 8 bits change at most 3 %."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(1, 4096, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    keys = torch.nn.functional.layer_norm(mixed, (128,))
    query, weights = torch.randn(1, 1, 64, 128, generator=generator), torch.randn(1, 1, 1, 64, generator=generator)
    picks = []
    for held in (IndexerKeys().append(keys), IndexerKeys(packed=True).append(keys)):
        scores = torch.matmul(query, held.transpose(-1, -2).float().unsqueeze(1)).relu()
        picks.append(set((weights @ scores).flatten().topk(256).indices.tolist()))
    assert len(picks[0] & picks[1]) >= 0.97 * 256


@pytest.mark.parametrize(("bits", "width"), [(None, 64), (8, 20), (4, 20)])
def test_bits_pack_the_indexer_too(bits: int | None, width: int) -> None:
    """With packed latents a key of 16 numbers takes 16 bytes and a scale; without, it stays as it is."""
    model = mla_families.shared("deepseek_v32")
    cache = small(model.config, bits=bits)
    forward(model, prompt(30), cache)
    layer: Any = cache.layers[0]
    assert sum(x[0, 0].numel() * x.element_size() for x in layer.indexer.tensors()) == width


def test_damaged_keys_are_refused() -> None:
    """A saved layer whose codes have lost their scale, or some of their tokens, is refused."""
    model = mla_families.shared("deepseek_v32")
    cache = small(model.config, bits=8)
    forward(model, prompt(60), cache)
    state = cache.state_dict()
    scale = next(name for name in state if name.endswith("indexer.scale"))
    codes = scale.replace("scale", "codes")
    for wrong in (
        {name: x for name, x in state.items() if name != scale},
        state | {codes: state[codes][:, :-1]},
        state | {scale: state[scale][:, :, None]},
    ):
        with pytest.raises(ValueError, match="indexer"):
            small(model.config, bits=8).load_state_dict(wrong)


def test_a_pass_that_ends_before_the_last_indexer_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mla_families.shared("deepseek_v32")
    cache, anew = small(model.config), small(model.config)
    for held in (cache, anew):
        forward(model, prompt(30), held)
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[-1], "update_indexer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            forward(model, prompt(3, seed=1), cache)
    cache.crop(0)
    assert cache.get_seq_length() == 30
    assert torch.equal(forward(model, prompt(3, seed=2), cache), forward(model, prompt(3, seed=2), anew))


def test_keys_under_another_name_are_refused() -> None:
    """Files of earlier versions have another name for an indexer's keys. To ignore these would leave it without any."""
    model = mla_families.shared("deepseek_v32")
    cache = small(model.config)
    forward(model, prompt(30), cache)
    layer: Any = cache.layers[0]
    tensors = layer.tensors()
    tensors["indexer"] = tensors.pop("indexer.keys")
    with pytest.raises(ValueError, match="'indexer', which such a layer does not have"):
        layer.check_tensors(tensors, layer.progress())


@pytest.mark.parametrize("bits", [None, 8])
def test_restored_keys_of_another_dtype_than_the_latents(bits: int | None) -> None:
    """Under autocast latents may be wider than the indexer's keys, which a restored layer goes on with."""
    model = mla_families.shared("deepseek_v32")
    cache = small(model.config, bits=bits)
    forward(model, prompt(30), cache)
    layer: Any = cache.layers[0]
    held = layer.indexer.keys().clone()
    layer.indexer = IndexerKeys(packed=bits is not None)
    layer.update_indexer(held.bfloat16())
    other: Any = small(model.config, bits=bits).layers[0]
    other.restore(layer.tensors(), layer.progress())
    new = torch.ones(1, 1, held.shape[2], dtype=torch.bfloat16)
    got, wanted = other.update_indexer(new), layer.update_indexer(new)
    assert got.dtype == torch.bfloat16 and torch.equal(got.clone(), wanted.clone())
