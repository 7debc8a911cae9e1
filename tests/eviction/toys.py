"""One attention layer that evicts, with given queries, keys and values: what it keeps can be compared exactly."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_kvcache import HeavyHitterCache
from hf_kvcache.eviction import available, resolve
from hf_kvcache.eviction.gates import Gate, LayerGate
from hf_kvcache.eviction.registry import option_names, wrappers
from hf_kvcache.integration.attention import attention_function
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.storage.token_view import TokenView
from tests.generation.layers import States

PAGE, SINKS, TAIL, BUDGET, INTERVAL = 8, 2, 4, 32, 8
HEADS, DIM = 2, 16
#: Options that let short sequences show what a policy does.
_SMALL = {"window": 8, "lag": 8, "chunk": 16, "future": 16, "offset": 64, "length": 4, "tau": 0.01}
CODECS: dict[str, dict[str, Any]] = {
    "none": {"codec": "none"},
    "rotated8": {"codec": "rotated8", "key_axis": "token"},
    "int8": {"codec": "int8"},
    "turboquant4": {"codec": "turboquant4"},
    "unbiased4": {"codec": "unbiased4"},
}
#: Those whose tokens cannot move between pages, so that heads may keep less than their budget.
PAGEWISE = ("int8", "unbiased4")
RATIOS = [1, 3, 4, 8]


def policies() -> list[str]:
    """Every registered policy, and every wrapper in front of one."""
    return [*available(), *(f"{name}-snapkv" for name in wrappers())]


def reading_once() -> list[str]:
    """Those that evict by themselves: what a single layer can show."""
    return [name for name in policies() if not resolve(name).waits]


def small_options(policy: str) -> dict[str, Any]:
    """Options of ``policy`` that suit some dozens of tokens."""
    return {name: value for name, value in _SMALL.items() if name in option_names(policy)}


def gate_option(policy: str, config: PreTrainedConfig) -> dict[str, Any]:
    """A gate of random maps for a model with this ``config``, as the option of a policy that takes one."""
    if "gate" not in option_names(policy):
        return {}
    text: Any = config.get_text_config(decoder=True)
    draw, (heads, width) = torch.Generator().manual_seed(0), (text.num_key_value_heads, text.hidden_size)
    layers = {
        index: LayerGate(
            [torch.randn(heads, width, generator=draw), torch.randn(heads, generator=draw)],
            torch.randn(16, generator=draw).sort().values,
        )
        for index in range(text.num_hidden_layers)
    }
    return {"gate": Gate(layers, {})}


def grid() -> list[Any]:
    """``policy, codec, ratio`` for parametrization: a diagonal on which each of them appears, the rest ``slow``."""
    names, codecs = reading_once(), list(CODECS)
    return [
        pytest.param(
            policy,
            codec,
            ratio,
            id=f"{policy}-{codec}-{ratio}",
            marks=() if (p - c) % len(codecs) == 0 and (p - r) % len(RATIOS) == 0 else pytest.mark.slow,
        )
        for p, policy in enumerate(names)
        for c, codec in enumerate(codecs)
        for r, ratio in enumerate(RATIOS)
    ]


def states(length: int, batch: int = 1, seed: int = 0, ratio: int = 2) -> States:
    """Random states; keys have a mean of their own in each channel, and some tokens draw more attention than others."""
    draw = torch.Generator().manual_seed(seed)
    offset = torch.randn(1, HEADS, 1, DIM, generator=draw)
    query, key, value = (
        torch.randn(batch, heads, length, DIM, generator=draw) for heads in (ratio * HEADS, HEADS, HEADS)
    )
    return States(1.5 * query, key * (0.5 + torch.rand(batch, HEADS, length, 1, generator=draw)) + offset, value)


class Kept(NamedTuple):
    """What one sequence holds, by head: positions, and keys and values as they are decoded."""

    positions: list[list[int]]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


class Toy:
    """A model of a single attention layer, whose projections are not used, and its cache.

    Args:
        policy: name of the policy.
        codec: a name in ``CODECS``.
        ratio: query heads per KV head.
        **options: of the cache.
    """

    def __init__(self, policy: str, codec: str = "none", ratio: int = 2, **options: Any) -> None:
        config = LlamaConfig(
            num_hidden_layers=1,
            hidden_size=DIM * HEADS * ratio,
            num_attention_heads=HEADS * ratio,
            num_key_value_heads=HEADS,
            head_dim=DIM,
            intermediate_size=8,
            vocab_size=8,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attention = LlamaAttention(config, 0)
        options = gate_option(policy, config) | options
        sizes = {"budget": BUDGET, "page_size": PAGE, "sink_length": SINKS, "tail_length": TAIL, "interval": INTERVAL}
        self.cache = HeavyHitterCache(
            config, policy=policy, **{**sizes, **CODECS[codec], **small_options(policy), **options}
        )

    @property
    def layer(self) -> EvictingLayer:
        layer = self.cache.layers[0]
        assert isinstance(layer, EvictingLayer)
        return layer

    def fork(self) -> Toy:
        """The same layer with a fork of the cache."""
        other = object.__new__(Toy)
        other.attention, other.cache = self.attention, self.cache.fork()
        return other

    @torch.no_grad()
    def __call__(self, new: States, real: torch.Tensor | None = None) -> torch.Tensor:
        """Attention output ``[B, T, Hq, D]`` of new tokens; ``real [B, tokens seen then]`` is False for padding."""
        seen = self.cache.get_seq_length()
        queries = torch.arange(seen, seen + new.length)[:, None]
        mask = (torch.arange(seen + new.length)[None] <= queries).expand(len(new.query), 1, -1, -1)
        if real is not None:
            mask = mask & real[:, None, None, : seen + new.length]
        # What a hook on the attention module of a whole model does.
        self.layer.see_hidden(self.attention, new.query.transpose(1, 2).flatten(2))
        key, value = self.cache.update(new.key, new.value, 0)
        return attention_function(self.attention, new.query, key, value, mask)[0]

    def run(self, new: States, cuts: list[int] | None = None, real: torch.Tensor | None = None) -> torch.Tensor:
        """Output of all tokens: up to each of ``cuts`` in one update, those behind the last one by one."""
        first = cuts or []
        edges = [0, *first, *range((first[-1] if first else 0) + 1, new.length + 1)]
        return torch.cat([self(new.at(a, b), real) for a, b in pairwise(edges)], 1)

    def positions(self, row: int = 0) -> list[list[int]]:
        """Positions that sequence ``row`` holds, by head."""
        return [[at for at in head if at >= 0] for head in self.layer.kept_positions()[row].tolist()]

    def kept(self, row: int = 0) -> Kept:
        """What sequence ``row`` holds."""
        self.layer.flush()
        storage = self.layer.storage
        assert storage is not None
        storage.check()
        held = TokenView.of(storage, np.array([row]))
        keys, values = held.states("keys")[0], held.states("values")[0]
        exists = list(held.exists[0])
        return Kept(
            [held.positions[0, h][held.exists[0, h]].tolist() for h in range(storage.heads)],
            [keys[h][real] for h, real in enumerate(exists)],
            [values[h][real] for h, real in enumerate(exists)],
        )


def assert_same_kept(ours: Kept, theirs: Kept, shift: int = 0) -> None:
    """The same tokens of every head, bit by bit; ``ours`` at positions that are ``shift`` later."""
    assert [[at - shift for at in head] for head in ours.positions] == theirs.positions
    for mine, other in zip([*ours.keys, *ours.values], [*theirs.keys, *theirs.values], strict=True):
        assert torch.equal(mine, other)
