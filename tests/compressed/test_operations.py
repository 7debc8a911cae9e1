"""Every part of the state follows what is done to the cache: compared with a cache that read the tokens anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kvcache import CompressedKVCache, KVCache
from hf_kvcache.layers.compression import Compression
from hf_kvcache.planning import plan
from tests.compressed.models import build, ids, read, steps

BITS = [None, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (8, 4))]
#: Tokens before, in and behind the ends of windows of compression (of 3 and 8 tokens) and of the sliding window (12).
LENGTH = 37


def filled(bits: int | None, tokens: torch.Tensor) -> CompressedKVCache:
    """A cache that has read ``tokens`` in pieces of several lengths, of one token among them."""
    model = build()
    held = CompressedKVCache(model.config, bits)
    for piece in tokens.split([5, 1, 1, 9, 1, tokens.shape[1] - 17], 1):
        read(model, piece, held)
    return held


def goes_on_like(held: Any, other: Any, tokens: torch.Tensor) -> None:
    """Where rows are packed, the last bit of a product decides now and then which code is nearest."""
    held.integrity()
    found, expected = (steps(build(), tokens, cache) for cache in (held, other))
    tolerance = 1e-4 if held.options.compressed.bits is None else 0.02
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bits", BITS)
def test_crop_leaves_no_trace(bits: int | None) -> None:
    """Drafts of every length up to three windows, dropped whole or in part."""
    tokens, more = ids(2, LENGTH), ids(2, 6, 1)
    held = filled(bits, tokens)
    for layer in held.layers:
        layer.activate_past_recording()
    kept = tokens
    for drafted, dropped in ((1, 1), (4, 3), (9, 9), (25, 24), (17, 5), (2, 0), (30, 30)):
        draft = ids(2, drafted, drafted)
        read(build(), draft, held)
        held.crop(-dropped)
        kept = torch.cat([kept, draft[:, : drafted - dropped]], 1)
    assert held.get_seq_length() == kept.shape[1]
    goes_on_like(held, filled(bits, kept), more)


@pytest.mark.parametrize("bits", BITS)
def test_crop_to_nothing(bits: int | None) -> None:
    """Also where the first pass was so long that the first rows of it were never held."""
    tokens, held = ids(1, 70), CompressedKVCache(build().config, bits)
    read(build(), tokens, held)
    held.crop(-70)
    held.integrity()
    fresh = CompressedKVCache(build().config, bits)
    for cache in (held, fresh):
        read(build(), tokens[:, :LENGTH], cache)
    goes_on_like(held, fresh, tokens[:, LENGTH : LENGTH + 6])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda held: held.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        pytest.param(lambda held: held.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2], marks=pytest.mark.slow),
        pytest.param(lambda held: held.batch_select_indices(torch.tensor([1, -1])), [1, 2], marks=pytest.mark.slow),
    ],
)
def test_sequences_take_all_of_their_state_along(
    bits: int | None, change: Callable[[Any], None], rows: list[int]
) -> None:
    tokens, more = ids(3, LENGTH), ids(len(rows), 6, 1)
    held = filled(bits, tokens)
    change(held)
    goes_on_like(held, filled(bits, tokens[rows]), more)


@pytest.mark.parametrize("bits", BITS)
def test_forks_and_files(bits: int | None, tmp_path: Path) -> None:
    """A fork and a loaded cache go on as the cache itself, each without the others."""
    model, tokens, more = build(), ids(2, LENGTH), ids(2, 6, 1)
    held = filled(bits, tokens)
    fork = held.fork()
    steps(model, ids(2, 9, 2), fork)
    held.save(tmp_path / "cache", tokens)
    loaded = KVCache.load(tmp_path / "cache", model.config, input_ids=tokens)
    assert isinstance(loaded, CompressedKVCache)
    with pytest.raises(ValueError, match=r"offload=.* with a 'deepseek_v4' model"):
        KVCache.load(tmp_path / "cache", model.config, input_ids=tokens, offload="cpu")
    for cache in (held.fork(), loaded):
        goes_on_like(cache, held.fork(), more)
    goes_on_like(held, filled(bits, tokens), more)
    goes_on_like(fork, filled(bits, torch.cat([tokens, ids(2, 9, 2)], 1)), more)


@pytest.mark.parametrize(
    "where", ["compressor", *(pytest.param(where, marks=pytest.mark.slow) for where in ("update", "indexer"))]
)
def test_an_interrupted_pass_is_taken_back(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the last layer or before; a step until then is refused, and crop(0) returns to the last pass."""
    model, tokens = build(), ids(2, LENGTH)
    held, other = filled(None, tokens), filled(None, tokens)
    name = {"update": "take", "compressor": "add_entries", "indexer": "overlap"}[where]
    with monkeypatch.context() as patch:
        patch.setattr(Compression, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            read(model, ids(2, 10, 5), held)
    with pytest.raises(RuntimeError, match=r"ended in the middle.*crop\(0\)"):
        read(model, ids(2, 1, 5), held)
    held.crop(0)
    assert held.get_seq_length() == LENGTH
    goes_on_like(held, other, ids(2, 6, 1))


def test_a_plan_knows_the_bits() -> None:
    """The bytes of a plan are those that caches of these bits hold after such a prompt."""
    config, tokens = build().config, ids(2, 70)
    planned = {row.name: row.bytes for row in plan(config, 70, 2, ("none", "quantized:8"), torch.float32).caches}
    for name, bits in (("none", None), ("quantized:8", 8)):
        held = CompressedKVCache(config, bits)
        read(build(), tokens, held)
        assert planned[name] == held.memory().total


def test_what_cannot_be_cropped_says_so_and_stays() -> None:
    held, other = filled(None, ids(2, LENGTH)), filled(None, ids(2, LENGTH))
    with pytest.raises(RuntimeError, match=r"no longer holds .* activate_past_recording\(\)"):
        held.crop(-22)
    with pytest.raises(ValueError, match=r"crop\(1\)"):
        held.crop(1)
    goes_on_like(held, other, ids(2, 6, 1))


@pytest.mark.slow
def test_a_long_prompt_under_recording_stays_small() -> None:
    """Only the last tokens of what is not confirmed can be rolled back, so that little is held for it."""
    model = build()
    held = CompressedKVCache(model.config)
    for layer in held.layers:
        layer.activate_past_recording()
    read(model, ids(1, 1500), held)
    assert held.layers[2].compressions["compressor"].raw_kv.allocated_bytes() < 4 * 32 * 700
    held.crop(-10)
    fresh = CompressedKVCache(model.config)
    read(model, ids(1, 1500)[:, :1490], fresh)
    goes_on_like(held, fresh, ids(1, 9, 1))
