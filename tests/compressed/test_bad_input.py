"""What a cache of DeepSeek V4 refuses, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_kvcache import CompressedKVCache, HeavyHitterCache, KVCache, QuantizedKVCache, SparseReadCache
from hf_kvcache.integration.versions import CACHE_ARGUMENT
from tests.compressed.models import build, ids, read


def test_padding_is_refused_before_anything_is_stored() -> None:
    model, tokens = build(), ids(2, 9)
    held = CompressedKVCache(model.config)
    mask = torch.ones(2, 9, dtype=torch.int64)
    read(model, tokens, held, attention_mask=mask)
    before = held.memory().total
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[1, 9:11] = 0
    with pytest.raises(ValueError, match=r"hides tokens of sequences \[1\].*one sequence at a time"):
        read(model, ids(2, 6), held, attention_mask=mask)
    assert (held.get_seq_length(), held.memory().total) == (9, before)
    fresh = CompressedKVCache(model.config)
    with pytest.raises(ValueError, match="hides tokens"):
        model.generate(tokens, attention_mask=mask[:, 6:], **{CACHE_ARGUMENT: fresh}, max_new_tokens=2)
    assert fresh.get_seq_length() == 0
    # Another cache of the same model is not concerned.
    read(model, tokens, transformers.DynamicCache(config=model.config), attention_mask=mask[:, 6:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: CompressedKVCache(c, 3), "bits=3; accepted: 4, 8 or None"),
        (lambda c: CompressedKVCache(c, 8, window_bits=2), "window_bits=2; accepted"),
        (lambda c: KVCache(c, "int4"), "codec='int4'.*keys are values too; accepted: CompressedKVCache"),
        (lambda c: KVCache(c, max_length=512), "max_length=512 with a 'deepseek_v4'.*compresses its tokens itself"),
        (lambda c: KVCache(c, offload="cpu"), "offload='cpu' with a 'deepseek_v4'.*compresses its tokens itself"),
        (lambda c: KVCache(c, page_size=64), "page_size=64 with a 'deepseek_v4'.*accepted: to leave it out, or Comp"),
        (lambda c: KVCache(c, sink_length=0), "sink_length=0 with a 'deepseek_v4'.*compresses its tokens itself"),
        (lambda c: QuantizedKVCache(c, 8, tail_length=64), "tail_length=64 with a 'deepseek_v4'.*its tokens itself"),
        (lambda c: QuantizedKVCache(c, 8, group_size=32), "group_size=32 with a 'deepseek_v4'.*compresses its tokens"),
        (lambda c: SparseReadCache(c, 0.5), "sparse=.*compresses its tokens itself"),
        (lambda c: QuantizedKVCache(c, bits=3), "bits=3; accepted: 4, 8 or None"),
        (lambda c: QuantizedKVCache(c, key_bits=8, value_bits=4), "keys are values too"),
        (lambda c: HeavyHitterCache(c, 64), "eviction=.* compresses its tokens itself"),
        (lambda c: CompressedKVCache(transformers.LlamaConfig()), "'llama': its layers do not compress tokens"),
    ],
)
def test_settings_that_do_not_go_together(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(build().config)


def test_a_saved_cache_stays_on_the_device(tmp_path: Path) -> None:
    held = CompressedKVCache(build().config)
    read(build(), ids(1, 9), held)
    held.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"offload='cpu' with a 'deepseek_v4'.*accepted: None"):
        KVCache.load(tmp_path / "saved", build().config, offload="cpu")


def test_other_batches_and_dtypes_are_refused() -> None:
    model = build()
    held = CompressedKVCache(model.config)
    read(model, ids(2, 9), held)
    for tokens in (ids(3, 1), ids(1, 2)):
        with pytest.raises(ValueError, match="does not go with what layer 0 holds: batch 2"):
            read(model, tokens, held)
    with pytest.raises(ValueError, match="is not a list of sequences"):
        held.reorder_cache(torch.tensor([0, 2]))
    assert held.get_seq_length() == 9


def test_general_caches_are_the_named_one() -> None:
    """KVCache and QuantizedKVCache of such a model have its layers, so that a plan and a store find them."""
    config = build().config
    assert KVCache(config).options.compressed.bits is None
    assert KVCache(config, validate=True).options.validate
    assert QuantizedKVCache(config).options.compressed == CompressedKVCache(config, 4).options.compressed


def test_a_damaged_state_is_refused() -> None:
    model = build()
    held = CompressedKVCache(model.config, 8)
    read(model, ids(2, 30), held)
    state = held.state_dict()
    name = next(name for name in state if name.endswith("raw_kv"))
    for damaged in ({**state, name: state[name][:, :-1]}, {k: x for k, x in state.items() if k != name}):
        with pytest.raises(ValueError, match="damaged"):
            held.load_state_dict(damaged)
    with pytest.raises(ValueError, match="state was saved with codec"):
        CompressedKVCache(model.config, 4).load_state_dict(state)
    held.load_state_dict(state)
    held.integrity()
