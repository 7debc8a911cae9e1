"""One attention layer with given queries, keys and values, which do not depend on how tokens are split into updates.

In a whole model the order of summation depends on that split. It changes the last bit of keys, and may flip a code.
Here keys are given, so the outputs of a quantized cache can be compared without a tolerance for flipped codes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.integration.attention import attention_function
from tests.families import WINDOW
from tests.running import PAGE, SINKS, TAIL

KINDS = ["full", "sliding"]
#: Rounding between two orders of summation of one attention call.
EXACT = 1e-5


class States(NamedTuple):
    """Queries ``[B, 4, T, 16]``, keys and values ``[B, 2, T, 16]`` of ``T`` tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def length(self) -> int:
        return self.query.shape[2]

    def at(self, start: int, stop: int) -> States:
        """The tokens ``start ... stop - 1``."""
        return States(*(x[:, :, start:stop] for x in self))

    def rows(self, rows: Any) -> States:
        """Some of the sequences."""
        return States(*(x[rows] for x in self))

    def then(self, other: States) -> States:
        """These tokens, followed by those of ``other``."""
        return States(*(torch.cat(pair, 2) for pair in zip(self, other, strict=True)))


def states(length: int, batch: int = 1, seed: int = 0) -> States:
    """Random states. The keys of each channel have another mean, as in trained models."""
    draw = torch.Generator().manual_seed(seed)
    offset = 2 * torch.randn(1, 2, 1, 16, generator=draw)
    query, key, value = (torch.randn(batch, heads, length, 16, generator=draw) for heads in (4, 2, 2))
    return States(query, key + offset, value)


class Layer:
    """A model that is a single attention layer without weights, and its cache.

    Args:
        kind: ``"full"`` or ``"sliding"``.
        spec: the codec.
        **options: options of the cache.
    """

    def __init__(self, kind: str, spec: str, **options: Any) -> None:
        shape = {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 8,
            "vocab_size": 8,
        }
        config: PreTrainedConfig = (
            LlamaConfig(**shape) if kind == "full" else MistralConfig(**shape, sliding_window=WINDOW)
        )
        self.attention = (LlamaAttention if kind == "full" else MistralAttention)(config, 0)
        sizes = {"page_size": PAGE, "tail_length": TAIL, "sink_length": SINKS}
        self.cache: KVCache = QuantizedKVCache(config, codec=spec, **{**sizes, **options})

    def fork(self) -> Layer:
        """The same layer with a fork of the cache."""
        other = object.__new__(Layer)
        other.attention, other.cache = self.attention, self.cache.fork()
        return other

    def __call__(self, new: States, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Attention output ``[B, T, 4, 16]`` of new tokens; ``valid [B, tokens]`` is False for padding."""
        length, offset = self.cache.get_mask_sizes(new.length, 0)
        seen = self.cache.get_seq_length()
        queries = torch.arange(seen, seen + new.length)[:, None]
        keys = torch.arange(offset, offset + length)[None]
        mask = keys <= queries
        if (window := self.cache.own_layers[0].sliding_window) is not None:
            mask = mask & (keys > queries - window)
        mask = mask.expand(len(new.query), 1, -1, -1)
        if valid is not None:
            mask = mask & valid[:, None, None, offset : offset + length]
        key, value = self.cache.update(new.key, new.value, 0)
        return attention_function(self.attention, new.query, key, value, mask)[0]

    def steps(self, new: States, prefill: int = 0, **arguments: Any) -> torch.Tensor:
        """Output of all tokens, of which the first ``prefill`` come in one update and the others one by one."""
        cuts = [0, *range(prefill, new.length + 1)] if prefill else list(range(new.length + 1))
        return torch.cat([self(new.at(a, b)) for a, b in pairwise(cuts)], 1)
