"""Attention over a storage against float64 over plain lists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch_bytes
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.dense_read import dense_side
from tests.storage.list_model import (
    HEADS,
    KEY_DIM,
    VALUE_DIM,
    ListModel,
    attention_by_lists,
    loose_tokens,
    make_storage,
    random_tokens,
)
from tests.tolerances import TOLERANCES, assert_near


def filled(length: int = 60, padding: bool = False) -> tuple[PagedStorage, ListModel]:
    """Two sequences of some pages and a tail; with padding, the second has holes in front and inside."""
    storage, model = make_storage("none", 2), ListModel(2, 4, 2, 3)
    keys, values = random_tokens(0, 2, length)
    valid = None
    if padding:
        valid = np.ones((2, length), dtype=bool)
        valid[1, :7] = valid[1, 23:26] = False
    storage.append_block(keys, values, 0, valid)
    model.append(keys, values, 0, valid)
    model.pack_due()
    return storage, model


def queries(batch: int, length: int, ratio: int) -> torch.Tensor:
    return random_tokens(99, batch, length, (KEY_DIM, 1), ratio * HEADS)[0]


def attend_storage(
    storage: PagedStorage, query: torch.Tensor, dense: DenseTokens, visibility: Visibility, scoring: Scoring
) -> torch.Tensor:
    return reference.attend(query, storage.pages(), dense, visibility, scoring).output


def everything(start: int, length: int, window: int | None = None) -> Visibility:
    return Visibility(start, length, None, 0, True, window)


@pytest.mark.parametrize("chunk_tokens", [4, 12, 2048])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("ratio", [1, 3])
def test_chunks(ratio: int, padding: bool, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how many pages are decoded at a time."""
    monkeypatch.setattr(reference, "CHUNK_TOKENS", chunk_tokens)
    storage, model = filled(padding=padding)
    query = queries(2, 1, ratio)
    output = attend_storage(storage, query, loose_tokens(storage), everything(59, 1), Scoring(0.3))
    assert_near(output, attention_by_lists(model, query, 59, 0.3))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("mask_heads", [1, 3 * HEADS])
@pytest.mark.parametrize("padding", [False, True])
def test_masks(padding: bool, mask_heads: int, additive: bool) -> None:
    """Any boolean or additive mask, per query head too, decides what is seen beside what is held."""
    storage, model = filled(padding=padding)
    query = queries(2, 3, 3)
    visible = torch.rand(2, mask_heads, 3, 60, generator=torch.Generator().manual_seed(1)) > 0.4
    visible[0, 0, 1] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min) if additive else visible
    visibility = Visibility(57, 3, mask, 0, False, None)
    output = attend_storage(storage, query, loose_tokens(storage), visibility, Scoring(0.3))
    hidden = ~visible.expand(2, 3 * HEADS, 3, 60)
    assert_near(output, attention_by_lists(model, query, 57, 0.3, causal=False, hidden=hidden))
    assert not output[0, 1, 0].any()


def test_a_mask_that_starts_late() -> None:
    """What stands before the first column of a mask is not seen."""
    storage, model = filled()
    query = queries(2, 2, 1)
    mask = torch.rand(2, 1, 2, 30, generator=torch.Generator().manual_seed(2)) > 0.3
    output = attend_storage(
        storage, query, loose_tokens(storage), Visibility(58, 2, mask, 30, True, None), Scoring(0.3)
    )
    hidden = torch.ones(2, HEADS, 2, 60, dtype=torch.bool)
    hidden[..., 30:] = ~mask.expand(2, HEADS, 2, 30)
    assert_near(output, attention_by_lists(model, query, 58, 0.3, hidden=hidden))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_sink_logits(softcap: float | None) -> None:
    """Learned sink logits take probability away, per query head."""
    storage, model = filled(padding=True)
    query, sinks = queries(2, 2, 2), torch.tensor([-1.0, 0.0, 2.0, 5.0])
    scoring = Scoring(0.3, softcap, sinks)
    output = attend_storage(storage, query, loose_tokens(storage), everything(58, 2), scoring)
    expected = attention_by_lists(model, query, 58, 0.3, softcap=softcap, sink_logits=sinks)
    assert_near(output, expected)


@pytest.mark.parametrize("window", [None, 9, 40])
def test_a_long_block_of_queries_is_cut(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the queries of a prefill over pages, tail and the new tokens themselves changes nothing."""
    storage, model = filled(padding=True)
    keys, values = random_tokens(7, 2, 11)
    held = loose_tokens(storage)
    assert held.positions is not None and held.unused is not None
    at = torch.arange(60, 71).expand(2, 11)
    tokens = DenseTokens(
        torch.cat([held.keys, keys], 2),
        torch.cat([held.values, values], 2),
        torch.cat([held.positions, at], 1),
        torch.cat([held.unused, torch.zeros(2, 11, dtype=torch.bool)], 1),
    )
    model.append(keys, values, 60, None)
    query = queries(2, 11, 2)
    expected = attention_by_lists(model, query, 60, 0.3, window=window)
    for elements in (1, 5 * 2 * 4 * 2048, 1 << 24):
        monkeypatch.setattr(reference, "_SCORE_ELEMENTS", elements)
        assert_near(attend_storage(storage, query, tokens, everything(60, 11, window), Scoring(0.3)), expected)


def test_nothing_is_seen() -> None:
    """A query whose window holds no token gets exactly zero."""
    storage, _ = filled()
    output = attend_storage(
        storage, queries(2, 1, 1), loose_tokens(storage), everything(200, 1, window=10), Scoring(0.3)
    )
    assert torch.equal(output, torch.zeros(2, 1, HEADS, VALUE_DIM))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_queries(dtype: torch.dtype) -> None:
    """The output has the dtype of the query, and the error of that rounding only."""
    storage, model = filled()
    query = queries(2, 2, 2).to(dtype)
    output = attend_storage(storage, query, loose_tokens(storage), everything(58, 2), Scoring(0.3))
    assert output.dtype == dtype
    assert_near(output, attention_by_lists(model, query, 58, 0.3))


@pytest.mark.parametrize("codec", ["rotated4", "rotated2", "int3", "kvarn4", "turboquant3", "fp8"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_packed_pages_are_read_as_they_decode(codec: str, softcap: float | None) -> None:
    """Reading packed pages in their rotated basis is attention over the dense tensors that they decode to."""
    storage = make_storage(codec, 2, page_size=16, dims=(KEY_DIM, VALUE_DIM))
    keys, values = random_tokens(3, 2, 100)
    keys = keys + 3  # a mean that softmax does not see
    storage.append_block(keys, values, 0, None)
    assert storage.table.columns == 5
    dense = ListModel(2, 16, 2, 3)
    dense.append(dense_side(storage, "keys", 0, 100), dense_side(storage, "values", 0, 100), 0, None)
    query = queries(2, 2, 2)
    output = attend_storage(storage, query, loose_tokens(storage), everything(98, 2), Scoring(0.2, softcap)).double()
    expected = attention_by_lists(dense, query, 98, 0.2, softcap=softcap)
    # The keys' mean makes scores of order 10, whose rounding is what is left.
    relative, absolute = TOLERANCES[torch.float32]
    torch.testing.assert_close(output, expected, rtol=10 * relative, atol=10 * absolute)


@pytest.mark.parametrize("codec", ["rotated4", "turboquant4"])
def test_centred_keys(codec: str) -> None:
    """With centring, what is read is what the pages decode to, the mean added back for every consumer."""
    from hf_kvcache.codecs import resolve
    from hf_kvcache.codecs.pages import PageEncoder

    option = {"key_axis": "token"} if codec == "rotated4" else {"center": True}
    encoder = PageEncoder(resolve(codec, **option), KEY_DIM, VALUE_DIM, 16, torch.float32)
    storage = PagedStorage(encoder, torch.empty(2, HEADS, 1, KEY_DIM), torch.empty(2, HEADS, 1, VALUE_DIM), 2, 3)
    keys, values = random_tokens(3, 2, 100)
    offset = torch.randn(2, HEADS, 1, KEY_DIM, generator=torch.Generator().manual_seed(5)) * 2
    storage.append_block(keys + offset, values, 0, None)
    dense_keys = dense_side(storage, "keys", 0, 100)
    # Without the centring, rounding a key of that length would cost several times as much.
    assert float((dense_keys - keys - offset).square().mean().sqrt()) < 0.2
    dense = ListModel(2, 16, 2, 3)
    dense.append(dense_keys, dense_side(storage, "values", 0, 100), 0, None)
    query = queries(2, 1, 2)
    for softcap in (None, 5.0):
        output = attend_storage(
            storage, query, loose_tokens(storage), everything(99, 1), Scoring(0.2, softcap)
        ).double()
        expected = attention_by_lists(dense, query, 99, 0.2, softcap=softcap)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=4e-5)


def test_scratch_memory_does_not_grow_with_the_cache() -> None:
    """Reading four times as many tokens needs no more scratch memory once a chunk is full."""
    held = []
    for length in (4096, 16384):
        storage = make_storage("rotated4", 1, page_size=64, tail=64, dims=(64, 64), heads=1)
        storage.append_block(*random_tokens(1, 1, length, (64, 64), 1), 0, None)
        tokens = loose_tokens(storage)
        query = random_tokens(2, 1, 1, (64, 1), 1)[0]
        attend_storage(storage, query, replace(tokens, unused=None), everything(length - 1, 1), Scoring(0.1))
        held.append(scratch_bytes())
    assert held[0] == held[1]
