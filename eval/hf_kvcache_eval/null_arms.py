"""Caches that lose tokens on purpose: what a method has to beat, and what the harness has to notice.

After the prefill they keep the sinks, some of the newest tokens, and of the rest tokens drawn at random (``random``) or
none (``window``), the same number in every head. Kept tokens keep their positions. They are dense and simple, take rows
of equal length only, and exist for measuring.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from hf_kvcache_eval.protocol import Protocol


class DroppingLayer(DynamicLayer):
    """A layer that thins out what its first update brought, once that has been attended to.

    Args:
        budget: share (below 1) or number of the first update's tokens that stay.
        protocol: sinks, tail and seed.
        at_random: fill the budget with random tokens; otherwise with the newest.
        layer: index of the layer, so that each draws its own tokens.
    """

    def __init__(self, budget: float | int, protocol: Protocol, at_random: bool, layer: int) -> None:
        super().__init__()
        self.budget, self.protocol, self.at_random, self.layer = budget, protocol, at_random, layer
        self.seen = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in ``[B, Hkv, T, D]``; returns all that is held before anything is dropped."""
        first = self.seen == 0
        self.seen += key_states.shape[2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if first:
            kept = self._kept(keys)
            self.keys, self.values = keys.gather(2, kept), values.gather(2, kept[..., : values.shape[3]])
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen: the next token's position."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: the tokens held, right before the new ones."""
        held = self.keys.shape[2] if self.keys is not None and self.is_initialized else 0
        return held + query_length, self.seen - held

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, which may repeat."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[indices], self.values[indices]

    def _kept(self, keys: torch.Tensor) -> torch.Tensor:
        """Indices ``[B, Hkv, kept, D]`` of the tokens that stay, ascending."""
        batch, heads, length, dim = keys.shape
        budget = min(length, max(1, round(length * self.budget) if self.budget < 1 else int(self.budget)))
        sinks = min(self.protocol.sink_length, budget)
        newest = budget - sinks
        if self.at_random:
            newest = min(self.protocol.tail_length, newest // 2)
        middle = torch.arange(sinks, length - newest)
        generator = torch.Generator().manual_seed(self.protocol.seed * 1_000_003 + self.layer)
        # Each head draws for itself; rows draw alike, so that a row keeps in a batch what it keeps alone.
        drawn = torch.stack(
            [middle[torch.randperm(len(middle), generator=generator)[: budget - sinks - newest]] for _ in range(heads)]
        )
        ends = torch.cat([torch.arange(sinks), torch.arange(length - newest, length)]).expand(heads, -1)
        kept = torch.cat([ends, drawn], 1).sort(1).values.to(keys.device)
        return kept[None, :, :, None].expand(batch, heads, budget, dim)


class DroppingCache(DynamicCache):
    """A cache of :class:`DroppingLayer`; arguments as there."""

    def __init__(self, config: PreTrainedConfig, budget: float | int, protocol: Protocol, at_random: bool) -> None:
        super().__init__(config=config)
        text_config = config.get_text_config(decoder=True)
        if any(type(layer) is not DynamicLayer for layer in self.layers):
            raise ValueError(f"config of {text_config.model_type!r}: layers without full attention cannot drop tokens")
        self.layers = [
            DroppingLayer(budget, protocol, at_random, index) for index in range(text_config.num_hidden_layers)
        ]
