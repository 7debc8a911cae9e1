"""How many functions of this package a plain decode step calls, from ``update`` to the output of attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kvcache import KVCache
from hf_kvcache.kernels.cpu import library

#: Calls of a plain step in one layer.
MOST_CALLS = 12
#: Methods of the implementation's name, by which transformers looks the attention function up. They are counted apart.
NAME = "_Bound."


def calls_of(action: Callable[[], Any]) -> list[str]:
    """The functions of the package that ``action`` calls, generated ones too, in order."""
    names: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("hf_kvcache."):
            owner = f"{type(frame.f_locals['self']).__name__}." if "self" in frame.f_locals else ""
            names.append(owner + frame.f_code.co_name)

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.skipif(library.reason_missing() is not None, reason="the compiled kernels for the CPU are missing")
@pytest.mark.parametrize("codec", ["unbiased4", "rotated8", "none"])
def test_calls_of_a_plain_step(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "native")
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=32,
        vocab_size=32,
    )
    model = LlamaForCausalLM(config).eval()
    cache = KVCache(config, codec)
    with torch.inference_mode():
        model(torch.zeros(1, 300, dtype=torch.long), past_key_values=cache)
        token = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(2):
            model(token, past_key_values=cache)
        names = calls_of(lambda: model(token, past_key_values=cache))
    first = names.index("KVCache.update")
    in_layers = [name for name in names[first:] if not name.startswith(NAME)]
    assert in_layers.count("KVCache.update") == 2
    assert len(in_layers) <= 2 * MOST_CALLS, in_layers
    assert len(names[first:]) - len(in_layers) <= 2 * 7, names[first:]
