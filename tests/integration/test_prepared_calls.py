"""Plain decoding by prepared calls, against attention that is set up again for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, QuantizedKVCache
from hf_kvcache.eviction.accumulated import AccumulatedAttention
from hf_kvcache.integration.padding import padding_of
from hf_kvcache.kernels.dispatch import reason_missing
from hf_kvcache.kernels.inputs import CallInputs, Scoring
from hf_kvcache.kernels.padding import NO_PADDING, PaddingPlaces
from hf_kvcache.kernels.prepared_call import PreparedCall
from hf_kvcache.layers import decode_step
from hf_kvcache.layers.decode_step import PreparedDecoding
from hf_kvcache.layers.new_tokens import NewTokens
from tests import families
from tests.choosing import chosen
from tests.mla import families as mla_families
from tests.running import ROUNDING, forward, full_cache, left_padded, prompt, small_cache
from tests.storage.list_model import (
    HEADS,
    KEY_DIM,
    ListModel,
    assert_holds,
    attention_by_lists,
    make_storage,
    random_tokens,
)
from tests.tolerances import assert_near

pytestmark = pytest.mark.skipif(
    reason_missing("native", "cpu") is not None, reason="only the native kernels have prepared calls"
)

SIZES: dict[str, Any] = {"page_size": 16, "tail_length": 8, "sink_length": 4}
#: Model and cache: soft-capping and windows, learned sinks, latents with and without a codec, eviction.
CASES: dict[str, tuple[str, Callable[[Any], KVCache]]] = {
    "llama": ("llama", lambda config: QuantizedKVCache(config, **SIZES)),
    "gemma2": ("gemma2", lambda config: QuantizedKVCache(config, bits=8, **SIZES)),
    "mistral": ("mistral", lambda config: KVCache(config, **SIZES)),
    "snapkv": ("llama", lambda config: HeavyHitterCache(config, policy="snapkv", budget=32, interval=8, **SIZES)),
    "latents": ("deepseek_v3", lambda config: LatentKVCache(config, **SIZES)),
    "8-bit latents": ("youtu", lambda config: LatentKVCache(config, bits=8, **SIZES)),
}


@pytest.fixture
def calls_taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each token that was offered to a prepared call, whether the call took it."""
    taken: list[bool] = []
    attend = PreparedDecoding.attend

    def noted(*args: Any) -> torch.Tensor | None:
        output = attend(*args)
        taken.append(output is not None)
        return output

    monkeypatch.setattr(PreparedDecoding, "attend", noted)
    return taken


def _build(name: str) -> PreTrainedModel:
    return mla_families.build(name) if name in mla_families.names() else families.build(name)


def _without_prepared_calls(cache: KVCache) -> KVCache:
    for layer in cache.own_layers:
        layer.prepared = None
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_same_as_without_prepared_calls(case: str, dtype: torch.dtype, calls_taken: list[bool]) -> None:
    """Logits and stored tensors are the same bit by bit, in a batch of two, while pages fill and windows move."""
    name, make = CASES[case]
    model = _build(name).to(dtype)
    ours, other = make(model.config), _without_prepared_calls(make(model.config))
    for ids in prompt(75, 2).split([40, *[1] * 35], 1):
        got = forward(model, ids, ours)
        taken = len(calls_taken)
        assert torch.equal(got, forward(model, ids, other))
        assert len(calls_taken) == taken
    assert len(calls_taken) == 35 * len(ours.own_layers) and all(calls_taken)
    for a, b in zip(ours.own_layers, other.own_layers, strict=True):
        held, expected = a.tensors(), b.tensors()
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[key], expected[key]) for key in held)
    ours.integrity()


def test_learned_sinks_may_change(calls_taken: list[bool]) -> None:
    """Prepared calls read gpt-oss's sinks in float32 in place, and notice when other tensors replace them."""
    model = families.build("gpt_oss")
    ours, other = (KVCache(model.config, **SIZES) for _ in range(2))
    _without_prepared_calls(other)
    for number, ids in enumerate(prompt(50).split([40, *[1] * 10], 1)):
        if number == 5:
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.self_attn.sinks.add_(2.0)
        if number == 8:
            for layer in model.model.layers:
                layer.self_attn.sinks = torch.nn.Parameter(layer.self_attn.sinks.detach() - 4.0)
        assert torch.equal(forward(model, ids, ours), forward(model, ids, other))
    assert calls_taken and all(calls_taken)


def test_up_projections_may_change(calls_taken: list[bool]) -> None:
    """Prepared calls notice up-projections that are changed in place, replaced or moved to other memory."""
    model = mla_families.build("deepseek_v3")
    ours, other = (LatentKVCache(model.config, **SIZES) for _ in range(2))
    _without_prepared_calls(other)
    projections = [m.kv_b_proj for m in model.modules() if hasattr(m, "expand_kv")]
    for number, ids in enumerate(prompt(50).split([40, *[1] * 10], 1)):
        for projection in projections:
            with torch.no_grad():
                if number == 3:
                    projection.weight.mul_(0.5)
                if number == 5:
                    projection.weight = torch.nn.Parameter(-projection.weight)
                if number == 7:
                    projection.weight.data = 3 * projection.weight.data
        assert torch.equal(forward(model, ids, ours), forward(model, ids, other))
    assert calls_taken and all(calls_taken)


@chosen("case", CASES, fast=[("llama",), ("gemma2",), ("snapkv",), ("latents",)])
def test_blocks_of_padded_rows(case: str, calls_taken: list[bool]) -> None:
    """A few tokens at once, of a padded batch, give what they give without prepared calls, while beams are exchanged.

    Layers that evict and layers of latents take single tokens only.
    """
    name, make = CASES[case]
    model = _build(name)
    ours, other = make(model.config), _without_prepared_calls(make(model.config))
    padded, lengths = left_padded([prompt(20), prompt(33), prompt(27)]), [33, 3, 1, 16, 1, 1, 5, 2, 2, 12]
    mask = torch.cat([padded["attention_mask"], torch.ones(3, 60, dtype=torch.long)], 1)
    ids, at, expected = torch.cat([padded["input_ids"], prompt(60, 3)], 1), 0, 0
    for number, length in enumerate(lengths):
        until, new = {"attention_mask": mask[:, : at + length]}, ids[:, at : at + length]
        got, shown = forward(model, new, ours, **until), mask[:, at : at + length].bool()
        taken = len(calls_taken)
        # Not bit by bit: sums over hidden slots are of another order, after which a code may be rounded otherwise.
        torch.testing.assert_close(got[shown], forward(model, new, other, **until)[shown], rtol=0, atol=1e-3)
        assert len(calls_taken) == taken
        blocks = all(layer.prepares_blocks for layer in ours.own_layers)
        expected += number > 0 and (blocks or length == 1)
        at += length
        if number % 3 == 2:
            order = torch.tensor([0, 2, 1] if number == 2 else [1, 1, 2])
            for cache in (ours, other):
                cache.reorder_cache(order)
            mask, ids = mask[order], ids[order]
    layers = sum(layer.storage is not None for layer in ours.own_layers)
    assert len(calls_taken) == expected * layers and all(calls_taken)
    ours.integrity()


def test_padding_of_layers_that_evict(calls_taken: list[bool]) -> None:
    """Single tokens of which some are padding take no prepared call, and what follows does."""
    model, padded = families.build("llama"), left_padded([prompt(24), prompt(21)])
    ours, reference = CASES["snapkv"][1](model.config), full_cache(model)
    for at, stop in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 23), (23, 24)]:
        until, ids = {"attention_mask": padded["attention_mask"][:, :stop]}, padded["input_ids"][:, at:stop]
        expected, got = forward(model, ids, reference, **until), forward(model, ids, ours, **until)
        shown = until["attention_mask"][:, at:].bool()
        torch.testing.assert_close(got[shown], expected[shown], rtol=0, atol=ROUNDING)
    assert len(calls_taken) == 2 * len(ours.own_layers) and all(calls_taken)


def test_blocks_that_other_layers_read(calls_taken: list[bool]) -> None:
    """A layer that reads the keys of another one attends to a block that is stored already, and stays causal."""
    model = families.build("gemma3n")
    ours, reference = KVCache(model.config, **SIZES), full_cache(model)
    for number, ids in enumerate(prompt(60).split([33, 3, 7, 16, 1], 1)):
        expected = forward(model, ids, reference)
        torch.testing.assert_close(forward(model, ids, ours), expected, rtol=0, atol=ROUNDING)
        assert bool(calls_taken) == (number > 0)
    assert all(calls_taken)


def test_calls_stay_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither exchanged beams nor drafts that are taken back make a layer prepare its call anew."""
    prepared: list[CallInputs] = []
    prepare = decode_step.prepare
    monkeypatch.setattr(decode_step, "prepare", lambda inputs: (prepared.append(inputs), prepare(inputs))[1])
    model = families.build("llama")
    ours, other = (QuantizedKVCache(model.config, **SIZES) for _ in range(2))
    for cache in (ours, _without_prepared_calls(other)):
        forward(model, prompt(40, 3), cache)
    for beams in ([1, 0, 2], [2, 2, 0], [0, 1, 1]):
        for cache in (ours, other):
            cache.reorder_cache(torch.tensor(beams))
        assert torch.equal(*(forward(model, prompt(1, 3), cache) for cache in (ours, other)))
    assert len(prepared) == len(ours.own_layers)
    prepared.clear()
    for cache in (ours, other):
        cache.activate_past_recording()
    for kept in (2, 0, 3, 1):
        assert torch.equal(*(forward(model, prompt(3, 3, seed=kept), cache) for cache in (ours, other)))
        for cache in (ours, other):
            cache.crop(kept - 3)
    assert len(prepared) >= len(ours.own_layers), "no draft was taken"
    assert len(prepared) <= 2 * len(ours.own_layers)  # once more after a page was packed ahead
    for a, b in zip(ours.own_layers, other.own_layers, strict=True):
        assert all(torch.equal(a.tensors()[key], held) for key, held in b.tensors().items())


def test_passes_without_prepared_calls(calls_taken: list[bool]) -> None:
    """Many tokens, new padding, a mask that hides more, and drafts that reach a new page take none."""
    model = families.build("llama")
    padded = left_padded([prompt(20), prompt(33)])
    cache = QuantizedKVCache(model.config, **SIZES)
    forward(model, padded["input_ids"], cache, attention_mask=padded["attention_mask"])
    mask = torch.cat([padded["attention_mask"], torch.tensor([[1], [0]])], 1)
    forward(model, prompt(1, 2), cache, attention_mask=mask)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    mask[:, 25] = 0
    forward(model, prompt(1, 2), cache, attention_mask=mask)
    assert not calls_taken
    cache.reset()
    forward(model, prompt(40), cache)  # 24 full-precision tokens; with 28 a page is due
    forward(model, prompt(17), cache)
    cache.reset()
    forward(model, prompt(40), cache)
    cache.activate_past_recording()
    forward(model, prompt(5), cache)
    assert not calls_taken
    cache.reset()
    forward(model, prompt(40), cache)
    cache.activate_past_recording()
    forward(model, prompt(4), cache)
    assert len(calls_taken) == len(cache.own_layers) and all(calls_taken)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_windows_of_padded_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of padding and windows only are recognized, so that kernels run without a mask, past the window too."""
    model = families.build(name)
    padded = left_padded([prompt(20), prompt(33)])
    mask = torch.cat([padded["attention_mask"], torch.ones(2, 40, dtype=torch.long)], 1)
    ids = torch.cat([padded["input_ids"], prompt(40, 2)], 1)
    ours, reference = KVCache(model.config, **SIZES), full_cache(model)
    at = 0
    for length in (33, *[1] * 15, 5, *[1] * 20):
        until, new = {"attention_mask": mask[:, : at + length]}, ids[:, at : at + length]
        expected = forward(model, new, reference, **until)
        with monkeypatch.context() as patched:
            patched.setattr("hf_kvcache.kernels.reference.decode.attend", _never)
            got = forward(model, new, ours, **until)
        real = mask[:, at : at + length].bool()
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=ROUNDING)
        at += length


def test_a_mask_of_padding_shared_by_layers() -> None:
    """A 2D mask, as flash attention uses, is read as padding by layers with different windows."""
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for window in (None, 2, 24, None):
        padding = padding_of(mask, 3, 1, window)
        assert padding is not None and not padding.none
        assert padding.hides_only(PaddingPlaces(np.array([0]), np.array([0])))
        assert not padding.hides_only(NO_PADDING)


def _never(*args: Any) -> None:
    raise AssertionError("the reference ran")


class Decoding:
    """A storage with a few tokens and no page, its list model, and the prepared calls of the storage."""

    def __init__(self) -> None:
        self.storage, self.model, self.steps = make_storage(tail=30), ListModel(1, 4, 2, 30), PreparedDecoding(None)
        self.seen = 0
        self.received: AccumulatedAttention | None = None
        for _ in range(5):
            keys, values = random_tokens(self.seen, 1, 1)
            self.storage.append_one(keys, values, self.seen, None)
            self.model.append(keys, values, self.seen, None)
            self.seen += 1

    def step(self, layout: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> torch.Tensor | None:
        """One token, with the memory layout of the query and the keys that ``layout`` makes."""
        keys, values = random_tokens(self.seen, 1, 1)
        query = random_tokens(1000 + self.seen, 1, 1, (KEY_DIM, 1), 3 * HEADS)[0]
        new = NewTokens(layout(keys), values, self.seen)
        return self.steps.attend(self.storage, new, layout(query), Scoring(0.25), received=self.received)

    def check(self, output: torch.Tensor | None) -> None:
        """Compare the output with that of the list model, to which the token is appended."""
        keys, values = random_tokens(self.seen, 1, 1)
        query = random_tokens(1000 + self.seen, 1, 1, (KEY_DIM, 1), 3 * HEADS)[0]
        self.model.append(keys, values, self.seen, None)
        assert output is not None
        assert_near(output, attention_by_lists(self.model, query, self.seen, 0.25, True, None, None))
        self.seen += 1
        assert_holds(self.storage, self.model, self.seen)


def _heads_last(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _with_gaps(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x], -1)[..., 0]


def test_other_strides() -> None:
    """Tokens with another memory layout than the one before; one with gaps between its elements is not taken."""
    decoding = Decoding()
    for layout in (torch.clone, _heads_last, torch.clone, lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]]):
        decoding.check(decoding.step(layout))
    held = decoding.storage.tokens()
    assert decoding.step(_with_gaps) is None
    assert (decoding.storage.tokens() == held).all()
    decoding.check(decoding.step())


@pytest.mark.parametrize("change", ["reserve", "set_lengths", "shrink"])
def test_after_a_change(change: str) -> None:
    """Between two tokens the buffer or the count of its slots moves; unused slots hold NaN."""
    decoding = Decoding()
    dense = decoding.storage.dense
    for _ in range(3):
        for buffer in (dense.keys, dense.values):
            buffer[:, :, dense.longest :] = torch.nan
        decoding.check(decoding.step())
        addresses = dense.keys.data_ptr(), dense.lengths.ctypes.data
        before = dense.keys, dense.lengths  # referenced, so that their memory is not reused
        if change == "reserve":
            dense.reserve(dense.capacity + 1)
        elif change == "shrink":
            dense.shrink(dense.capacity - 1)
        else:
            dense.set_lengths(dense.lengths)
        assert addresses != (dense.keys.data_ptr(), dense.lengths.ctypes.data) and before


class Counting:
    """A prepared call that goes on with another buffer, and adds 1 to the sum of each key in place of its probability.

    Args:
        call: stores and attends.
        sums: added to.
    """

    def __init__(self, call: PreparedCall, sums: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._call, self.sums = call, sums

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __call__(self, *token: Any) -> torch.Tensor:
        slot = token[3]
        self.sums[0][:, :, : slot + 1] += 1
        return self._call(*token)


@pytest.mark.parametrize("change", ["the buffer grows", "other tensors", "both"])
def test_sums_of_a_call_that_goes_on(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the buffer or the sums are replaced, nothing is added to the old sums, and there is room for all slots."""
    prepare, decoding = decode_step.prepare, Decoding()

    def counting(inputs: CallInputs) -> Counting:
        call = prepare(replace(inputs, sums=None))
        assert call is not None and inputs.sums is not None
        return Counting(call, inputs.sums)

    monkeypatch.setattr(decode_step, "prepare", counting)
    storage, received = decoding.storage, AccumulatedAttention.of(decoding.storage)
    decoding.received, first = received, decoding.seen
    for _ in range(4):
        if change != "other tensors":
            storage.dense.reserve(2 * storage.dense.capacity)
        if change != "the buffer grows":
            received.trim(decoding.seen, 0)
        decoding.check(decoding.step())
        assert received.dense.shape[2] >= storage.dense.keys.shape[2]
    reads = torch.tensor([decoding.seen - max(at, first) for at in range(decoding.seen)])
    assert (received.dense[:, :, : decoding.seen] == reads).all() and not received.dense[:, :, decoding.seen :].any()


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gets no memory raises an error and adds no token; the next call works."""
    decoding = Decoding()
    decoding.check(decoding.step())
    with monkeypatch.context() as patched:
        patched.setattr(decoding.steps._latest, "_run", lambda call: 1)
        with pytest.raises(MemoryError, match="partial results"):
            decoding.step()
    assert_holds(decoding.storage, decoding.model, decoding.seen)
    decoding.check(decoding.step())


def test_an_interrupted_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call prepared before it is not taken for the one that was wanted."""

    def interrupted(inputs: CallInputs) -> None:
        raise KeyboardInterrupt

    def spread(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]

    decoding = Decoding()
    decoding.check(decoding.step())
    with monkeypatch.context() as patched:
        patched.setattr(decode_step, "prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoding.step(spread)
    decoding.check(decoding.step(spread))


def test_pages_packed_ahead_of_a_loaded_draft() -> None:
    """A state saved in the middle of a draft, with pages whose tokens are in the buffer too, decodes plainly."""
    model = families.build("llama")
    drafted = small_cache(model, "rotated4")
    forward(model, prompt(60), drafted)
    drafted.activate_past_recording()
    for ids in prompt(40, seed=1).split(4, 1):
        forward(model, ids, drafted)
    assert drafted.own_layers[0].storage.ahead > 0, "nothing is packed ahead: the test is vacuous"
    loaded = small_cache(model, "rotated4")
    loaded.load_state_dict(drafted.state_dict())
    drafted.crop(0)
    for token in prompt(60, seed=2).split(1, 1):
        torch.testing.assert_close(forward(model, token, loaded), forward(model, token, drafted), rtol=0, atol=1e-5)
