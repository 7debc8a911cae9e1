"""Binding a config: what changes, what stays, and what is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache, bind, unbind
from tests import families
from tests.running import ROUNDING, as_cache, assert_packed, full_cache, generate, prompt, small_cache


@pytest.mark.parametrize("family", ["llama", "gemma3_vlm", "gemma2"])
def test_nothing_leaks_into_saved_files(family: str, tmp_path: Path) -> None:
    """``config.json`` and ``generation_config.json`` of a bound model are those of an unbound one."""
    model = families.build(family)
    model.save_pretrained(tmp_path / "before")
    cache = small_cache(model)
    generate(model, prompt(40), cache, 4)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((tmp_path / part / name).read_text()) for part in ("before", "after"))
        assert before == after
    assert str(model.config.get_text_config(decoder=True)._attn_implementation) == "hf_kvcache"
    assert "hf_kvcache" not in model.config.to_json_string()


def test_implementation_by_name(model: PreTrainedModel, tmp_path: Path) -> None:
    """``from_pretrained(attn_implementation="hf_kvcache")`` works with this package's caches and with others."""
    expected = generate(model, prompt(60), full_cache(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hf_kvcache").eval()
    loaded.generation_config = model.generation_config
    assert str(loaded.config._attn_implementation) == "hf_kvcache"
    for cache in (None, KVCache(loaded.config, page_size=16, tail_length=8)):
        out = loaded.generate(prompt(60), **as_cache(cache), max_new_tokens=20, do_sample=False)
        assert torch.equal(out[:, 60:], expected.tokens)
    assert_packed(cache)


def test_vision_tower_is_left_alone() -> None:
    """Only the text part of a vision-language model is bound."""
    model = families.build("llava")
    KVCache(model.config)
    assert str(model.config.text_config._attn_implementation) == "hf_kvcache"
    assert str(model.config.vision_config._attn_implementation) == "sdpa"
    assert str(model.config._attn_implementation) == "sdpa"


def test_binding_twice(model: PreTrainedModel) -> None:
    """Unbinding sets the implementation that was set before the first binding."""
    bind(model.config)
    bind(model.config)
    KVCache(model.config)
    unbind(model.config)
    assert str(model.config._attn_implementation) == "sdpa"
    unbind(model.config)
    assert str(model.config._attn_implementation) == "sdpa"


def test_pickled_config(model: PreTrainedModel) -> None:
    """A bound config that was pickled can be unbound."""
    bind(model.config)
    config = pickle.loads(pickle.dumps(model.config))
    assert str(config._attn_implementation) == "hf_kvcache"
    unbind(config)
    assert str(config._attn_implementation) == "sdpa"


def test_flex_attention_is_refused() -> None:
    """Its masks are not tensors. The error says what to call, and the config is unchanged."""
    config = families.build("llama").config
    config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attn_implementation='flex_attention'.*set_attn_implementation\('sdpa'\)"):
        KVCache(config)
    assert str(config._attn_implementation) == "flex_attention"


def test_without_binding(model: PreTrainedModel) -> None:
    """``bind=False`` leaves the config as it is, and the cache works through dense tensors."""
    ids = prompt(60)
    cache = QuantizedKVCache(model.config, codec="none", page_size=16, tail_length=8, bind=False)
    assert str(model.config._attn_implementation) == "sdpa"
    with torch.no_grad():
        parts = [model(part, **as_cache(cache), use_cache=True).logits for part in ids.split([50, *[1] * 10], 1)]
        expected = model(ids).logits
    assert_packed(cache)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("change", ["update", "crop", "reorder", "reset"])
def test_stale_handles(model: PreTrainedModel, change: str) -> None:
    """A handle from before a change of the cache raises an error when it is read."""
    cache = small_cache(model)
    keys = torch.randn(2, 2, 30, 16)
    handle, _ = cache.update(keys, keys, 0)
    assert torch.equal(handle + 0, keys)
    {
        "update": lambda: cache.layers[0].update(keys, keys),
        "crop": lambda: cache.layers[0].crop(-1),
        "reorder": lambda: cache.layers[0].reorder_cache(torch.tensor([1, 0])),
        "reset": lambda: cache.layers[0].reset(),
    }[change]()
    with pytest.raises(RuntimeError, match="out of date"):
        handle + 0


_LATE_IMPORTS = """
import sys, torch, transformers.modeling_utils, transformers.cache_utils
late = {"triton", "torch._inductor", "torch.utils.cpp_extension"}
already = late & sys.modules.keys()
import hf_kvcache
sys.exit(" ".join((late & sys.modules.keys()) - already))
"""


def test_import_does_no_work() -> None:
    """Importing the package imports neither triton nor a compiler, beyond what its dependencies import."""
    done = subprocess.run([sys.executable, "-c", _LATE_IMPORTS], capture_output=True, text=True, check=False)
    assert done.stderr.split() == []
