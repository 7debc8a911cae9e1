"""Running models and caches in tests: prompts, generation, and step-by-step forward passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache, bind, unbind
from hf_kvcache.codecs import specs
from hf_kvcache.codecs.registry import available
from hf_kvcache.integration.versions import CACHE_ARGUMENT, cache_of
from tests.families import VOCABULARY

PAGE, TAIL, SINKS = 16, 8, 4
_SIZES = {"page_size": PAGE, "tail_length": TAIL, "sink_length": SINKS}
#: The longest prompt of which nothing is packed before the first generated token.
UNPACKED = SINKS + TAIL + PAGE - 1
#: Rounding between two orders of summation in float32, for logits of a standard deviation of 1 to 2.
ROUNDING = 1e-4


def small_cache(model: PreTrainedModel, codec: str = "none", **options: Any) -> KVCache:
    """A cache with pages so small that short prompts fill some."""
    return KVCache(model.config, codec, **{**_SIZES, **options})


def quantized(model: PreTrainedModel, codec: str, **options: Any) -> QuantizedKVCache:
    """The same with a quantizing codec."""
    return QuantizedKVCache(model.config, codec=codec, **{**_SIZES, **options})


def all_codecs() -> list[Any]:
    """Every codec spec for parametrization; all widths of a codec but one are ``slow``."""
    return [
        spec if index == 0 else pytest.param(spec, marks=pytest.mark.slow)
        for name in available()
        for index, spec in enumerate(
            sorted((s for s in specs() if s.rstrip("0123456789") == name or s == name), key=_order)
        )
    ]


def one_of_each_codec() -> list[str]:
    """The codec specs that :func:`all_codecs` does not mark as slow."""
    return [spec for spec in all_codecs() if isinstance(spec, str)]


def _order(spec: str) -> bool:
    return not spec.endswith("3")  # codes of three bits cross bytes, which makes this width the easiest to get wrong


def as_cache(cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument, by the name that this release of transformers uses."""
    return {CACHE_ARGUMENT: cache}


def full_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache for ``model``."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def set_binding(model: PreTrainedModel, cache: Cache | None) -> None:
    """Bind the model for a KVCache and unbind it for others, so that the reference does not depend on this package."""
    (bind if isinstance(cache, KVCache) else unbind)(model.config.get_text_config(decoder=True))


def prompt(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` without special tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCABULARY - 2, (batch, length), generator=generator)


def left_padded(rows: list[torch.Tensor], to: int | None = None) -> dict[str, torch.Tensor]:
    """One batch of prompts ``[1, n]`` of different lengths, as ``generate`` takes it."""
    length = to or max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    mask = torch.cat([(torch.arange(length) >= length - row.shape[1]).long()[None] for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


class Generated(NamedTuple):
    """Tokens ``[B, n]``, the logits they were taken from ``[B, n, V]``, and the cache."""

    tokens: torch.Tensor
    logits: torch.Tensor
    cache: Cache


def generate(model: PreTrainedModel, inputs: Any, cache: Cache | None, new: int = 20, **options: Any) -> Generated:
    """``new`` tokens from ``inputs`` (ids or a dict of tensors), greedily by default."""
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, **options}
    set_binding(model, cache)
    torch.manual_seed(7)
    out = model.generate(**inputs, **as_cache(cache), return_dict_in_generate=True, output_logits=True, **arguments)
    assert cache_of(out) is cache
    length = inputs["input_ids"].shape[1]
    return Generated(out.sequences[:, length:], torch.stack(out.logits, 1), cache)


@torch.no_grad()
def forward(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, T, V]`` of new tokens on top of what the cache holds."""
    set_binding(model, cache)
    return model(input_ids=ids, **as_cache(cache), use_cache=True, **inputs).logits


def teacher_forced(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, prefill: int) -> torch.Tensor:
    """Logits of a prefill of ``prefill`` tokens followed by single-token steps over the rest of ``ids``."""
    steps = [ids[:, :prefill], *ids[:, prefill:].split(1, 1)]
    return torch.cat([forward(model, step, cache) for step in steps], 1)


def assert_packed(cache: Cache) -> None:
    """The cache has packed pages, and its checks pass."""
    assert isinstance(cache, KVCache)
    assert cache.memory().packed_elements > 0, "nothing was packed: the test is vacuous"
    cache.integrity()


def assert_same(ours: Generated, theirs: Generated, tolerance: float = ROUNDING) -> None:
    """The same tokens from the same logits."""
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=tolerance)
