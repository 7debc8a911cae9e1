"""A layer with a maximum length holds what the layer without one holds: the same pages, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache.codecs import resolve
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Pages, Scoring
from hf_kvcache.kernels.prepared_call import takes_ragged
from hf_kvcache.layers import static_ops
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.static import StaticLayer
from tests.running import PAGE, SINKS, TAIL

HEADS, GROUP, DIM = 2, 3, 32
MAX = 200


def layers(codec: str, window: int | None, **sizes: int) -> tuple[KVCacheLayer, StaticLayer]:
    """A layer that grows, and one with a maximum length."""
    made: list[Any] = []
    for kind, most in ((KVCacheLayer, None), (StaticLayer, MAX)):
        given = {"sink_length": SINKS, "tail_length": TAIL, "page_size": PAGE, **sizes}
        options = LayerOptions(resolve(codec), **given, validate=False, deferred=False, max_length=most)
        made.append(kind(0, options, window))
    return made[0], made[1]


def step(layer: Any, keys: torch.Tensor, queries: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention over one update, ``mask`` being 2D as transformers gets it."""
    seen, length = layer.get_seq_length(), keys.shape[2]
    layer.update(keys, keys.flip(-1).contiguous())
    if isinstance(layer, StaticLayer) and mask is not None:
        mask = dense_mask(layer, mask, seen, length)
    return layer.attend(AttentionCall(queries, mask, Scoring(DIM**-0.5)))


def dense_mask(layer: StaticLayer, mask: torch.Tensor, seen: int, length: int) -> torch.Tensor:
    """The mask that transformers would make of a 2D mask, as wide as the layer says."""
    columns = torch.arange(layer.max_length if length == 1 else seen + length)
    at = torch.arange(seen, seen + length)[:, None]
    shown = columns <= at
    if layer.sliding_window is not None:
        shown &= columns > at - layer.sliding_window
    padding = torch.nn.functional.pad(mask.bool(), (0, len(columns) - mask.shape[1]))
    return shown & padding[:, None, None]


def records(pages: Pages | None) -> dict[tuple[int, int], bytes]:
    """The bytes of every page, by row and the position of its first token."""
    if pages is None:
        return {}
    held = {}
    for column in range(pages.columns):
        of_column = pages.records(column, column + 1)[0]
        for row in np.flatnonzero(pages.counts[:, column]).tolist():
            held[row, int(pages.first[row, column])] = of_column[row].numpy().tobytes()
    return held


def same(growing: KVCacheLayer, static: StaticLayer) -> None:
    """Both layers hold the same pages and the same tokens in full precision, in the same places."""
    assert growing.storage is not None and static.storage is not None
    growing.flush()
    ours, theirs = static.storage, growing.storage
    assert static.get_seq_length() == growing.get_seq_length()
    assert records(ours.pages()) == records(theirs.pages())
    assert ours.lengths.tolist() == theirs.dense.lengths.tolist()
    for row, length in enumerate(ours.lengths.tolist()):
        assert (ours.numbers.positions[row, :length] == theirs.dense.positions[row, :length]).all()
        assert torch.equal(ours.tensors.dense_keys[row, :, :length], theirs.dense.keys[row, :, :length])
        assert torch.equal(ours.tensors.dense_values[row, :, :length], theirs.dense.values[row, :, :length])
    static.check()


#: Tokens of each update, and those of them that are padding, by row.
UPDATES = {
    "one row": (1, [(50, []), *[(1, [])] * 40, (7, []), (33, []), *[(1, [])] * 20]),
    "from the first token": (2, [(1, [])] * 90),
    "left-padded": (3, [(37, [(0, 0, 9), (2, 0, 36)]), *[(1, [])] * 60, (5, []), *[(1, [])] * 20]),
    "padding between turns": (2, [(40, [(0, 0, 3)]), *[(1, [])] * 9, (40, [(1, 0, 11)]), *[(1, [])] * 30]),
    "right-padded": (2, [(30, [(1, 20, 30)]), *[(1, [])] * 30]),
}
CASES = [
    ("unbiased4", None, "one row"),
    ("none", 24, "one row"),
    ("unbiased2", 40, "left-padded"),
    ("int8", None, "padding between turns"),
    pytest.param("kvarn4", 24, "padding between turns", marks=pytest.mark.slow),
    pytest.param("rotated4", None, "right-padded", marks=pytest.mark.slow),
    ("fp8", 64, "from the first token"),
]


@pytest.mark.parametrize(("codec", "window", "updates"), CASES)
def test_the_same_pages_and_outputs(codec: str, window: int | None, updates: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, steps = UPDATES[updates]
    growing, static = layers(codec, window)
    dtype, close = (torch.bfloat16, 2e-2) if codec == "int8" else (torch.float32, 2e-4)
    mask = torch.zeros(batch, 0, dtype=torch.long)
    for number, (length, padding) in enumerate(steps):
        new = torch.ones(batch, length, dtype=torch.long)
        for row, start, stop in padding:
            new[row, start:stop] = 0
        mask = torch.cat([mask, new], 1)
        given = mask if "padd" in updates else None
        keys = torch.randn(batch, HEADS, length, DIM, generator=generator).to(dtype)
        queries = torch.randn(batch, HEADS * GROUP, length, DIM, generator=generator).to(dtype)
        expected, found = (step(layer, keys, queries, given) for layer in (growing, static))
        shown = new.bool()
        torch.testing.assert_close(found[shown], expected[shown], atol=close, rtol=close)
        if number % 7 == 0:
            same(growing, static)
    same(growing, static)


@pytest.mark.skipif(not takes_ragged(False, torch.device("cpu")), reason="the CPU kernels are not compiled")
def test_padded_steps_take_prepared_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a padded prompt, page events of single rows among the steps; the outputs are compared above."""
    _, static = layers("unbiased4", None)
    mask = torch.ones(3, 37, dtype=torch.long)
    mask[0, :9], mask[2, :36] = 0, 0
    queries = torch.randn(3, HEADS * GROUP, 37, DIM)
    step(static, torch.randn(3, HEADS, 37, DIM), queries, mask)

    def general(*_: Any) -> None:
        raise AssertionError("the general way")

    monkeypatch.setattr(static_ops, "attend_kernel", general)
    for _ in range(PAGE + 2):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        step(static, torch.randn(3, HEADS, 1, DIM), queries[:, :, :1], mask)
    assert static.storage is not None and len(set(static.storage.lengths.tolist())) == 3


def test_padding_that_was_taken_back_is_forgotten() -> None:
    """No mask is needed any more then. Before it come a step that is all padding, and tokens around more of it."""
    generator = torch.Generator().manual_seed(0)
    growing, static = layers("none", None)
    mask = torch.zeros(2, 0, dtype=torch.long)
    for new in ([[0], [0]], [[1], [1]], None, [[1], [1]], [[1], [0]], [[1], [1]], None, [[1, 1], [1, 1]]):
        if new is None:
            for layer in (growing, static):
                layer.crop(-2)
            mask = mask[:, :-2]
            continue
        mask = torch.cat([mask, torch.tensor(new)], 1)
        keys = torch.randn(2, HEADS, len(new[0]), DIM, generator=generator)
        queries = torch.randn(2, HEADS * GROUP, len(new[0]), DIM, generator=generator)
        found = [step(layer, keys, queries, None if mask.all() else mask) for layer in (growing, static)]
        shown = torch.tensor(new).bool()
        torch.testing.assert_close(found[1][shown], found[0][shown], atol=2e-4, rtol=2e-4)
        same(growing, static)
