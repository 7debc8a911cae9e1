"""The sides of the comparison of one attention layer on a GPU, for any batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DeepseekV3Config, DynamicCache, LlamaConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaAttention

from benchmarks.gpu.measuring import wall_ms
from benchmarks.gpu.settings import Settings
from hf_kvcache import KVCache
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.layers.static_ops import static_attend

Token = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attention_module(query_heads: int, heads: int, dim: int) -> tuple[Any, LlamaConfig]:
    """A Llama attention module, of which only the attributes are used, and its config."""
    config = LlamaConfig(
        hidden_size=query_heads * dim,
        head_dim=dim,
        num_hidden_layers=1,
        num_attention_heads=query_heads,
        num_key_value_heads=heads,
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return LlamaAttention(config, 0).eval(), config


def latent_module(heads: int, rank: int, rotary: int, width: int) -> tuple[Any, DeepseekV3Config]:
    """A DeepSeek-V3 attention module with random weights, always the same, and its config."""
    config = DeepseekV3Config(
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=rank,
        qk_rope_head_dim=rotary,
        qk_nope_head_dim=width,
        v_head_dim=width,
        hidden_size=64,
        q_lora_rank=64,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(3)
    return DeepseekV3Attention(config, 0).eval(), config


class Method(ABC):
    """One side of the comparison, with all its tokens."""

    @abstractmethod
    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Take in keys and values ``[B, Hkv, n, D]`` and attend with ``query [B, Hq, n, D]``: ``[B, n, Hq, D]``."""

    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes that a step has to read at least: the tokens held, in the form in which they are held."""


class OfCache(Method):
    """A transformers cache with the attention function that a Llama layer calls on it."""

    def __init__(self, cache: Any, implementation: str, heads: int) -> None:
        self.cache, self.heads = cache, heads
        self.function = ALL_ATTENTION_FUNCTIONS[implementation]
        self._modules: dict[int, Any] = {}

    def module(self, query_heads: int, dim: int) -> Any:
        if query_heads not in self._modules:
            self._modules[query_heads] = attention_module(query_heads, self.heads, dim)[0]
        return self._modules[query_heads]

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        module = self.module(query.shape[1], query.shape[3])
        held = self.cache.update(key, value, 0)
        return self.function(module, query, *held, mask, dropout=0.0, scaling=module.scaling)[0]


class Dynamic(OfCache):
    """transformers' DynamicCache with its own sdpa function."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(DynamicCache(), "sdpa", keys.shape[1])
        self.cache.update(keys, values, 0)

    def bytes_read(self) -> int:
        layer = self.cache.layers[0]
        return layer.keys.nbytes + layer.values.nbytes


class Static(OfCache):
    """transformers' StaticCache with its own sdpa function, which reads all the room that the cache has.

    Args:
        room: tokens that may follow.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        heads, length, dim = keys.shape[1:]
        config = attention_module(heads, heads, dim)[1]
        super().__init__(StaticCache(config=config, max_cache_len=length + room), "sdpa", heads)
        self.cache.update(keys, values, 0)
        self.place = torch.arange(length + room, device=keys.device)
        self.seen = torch.tensor(length, device=keys.device)

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.seen += key.shape[2]
        return super().step(query, key, value, (self.place < self.seen)[None, None, None])

    def bytes_read(self) -> int:
        layer = self.cache.layers[0]
        return layer.keys.nbytes + layer.values.nbytes


class Ours(OfCache):
    """A KVCache of one layer with the package's attention function; nothing is in it yet.

    Attributes:
        fill_ms: what the first tokens took, attention of one query included.
    """

    #: Tokens that come one at a time when the cache is filled.
    RECENT = 8
    fill_ms: float

    def __init__(self, codec: str, heads: int, dim: int) -> None:
        super().__init__(KVCache(attention_module(heads, heads, dim)[1], codec), "hf_kvcache", heads)

    @classmethod
    def filled(cls, settings: Settings, codec: str, keys: torch.Tensor, values: torch.Tensor) -> Ours:
        """One that holds these tokens."""
        heads, dim, first = keys.shape[1], keys.shape[3], keys.shape[2] - cls.RECENT
        method = cls(codec, heads, dim)
        query = torch.randn(keys.shape[0], heads, 1, dim, dtype=keys.dtype, device=keys.device)
        method.fill_ms = wall_ms(settings, lambda: method.step(query, keys[:, :, :first], values[:, :, :first]))
        for at in range(first, keys.shape[2]):
            method.step(query, keys[:, :, at : at + 1], values[:, :, at : at + 1])
        return method

    def bytes_read(self) -> int:
        parts = self.cache.memory().parts
        return sum(parts[part] for part in ("codes", "scales", "sinks", "tail"))


class OursStatic(Method):
    """A KVCache with ``max_length``, whose step is the operator that a compiled model calls.

    Args:
        codec: of the pages.
        keys: the tokens that it holds, ``[B, Hkv, n, D]``.
        values: likewise.
        room: tokens that may follow.
    """

    def __init__(self, codec: str, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        _, heads, length, dim = keys.shape
        cache: Any = KVCache(attention_module(heads, heads, dim)[1], codec, max_length=length + room)
        self.cache, self.layer = cache, cache.layers[0]
        self.scoring = Scoring(dim**-0.5)
        self.layer.update(keys, values)
        self.layer.note_attended(AttentionCall(keys, None, self.scoring))

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        held, scaling = self.layer.tensors, self.scoring.scaling
        fixed = self.layer.settings_key, True, scaling, None, None
        return static_attend(query, key, value, None, *held, held.state, *fixed)

    def bytes_read(self) -> int:
        parts = self.cache.memory().parts
        return sum(parts[part] for part in ("codes", "scales", "sinks", "tail"))


class InPlace(Method):
    """SDPA over preallocated keys and values, no copy of what is held: the best that plain torch does.

    Args:
        room: tokens that may follow.
        grouped: whether the query heads of a KV head are packed as queries; else torch's ``enable_gqa``.
        growing: whether a step's token is added; else it replaces the last one.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, room: int, grouped: bool, growing: bool = True
    ) -> None:
        self.length, self.grouped, self.growing = keys.shape[2], grouped, growing
        self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, room)) for x in (keys, values))

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        at = self.length if self.growing else self.length - 1
        self.keys[:, :, at : at + 1].copy_(key)
        self.values[:, :, at : at + 1].copy_(value)
        self.length = at + 1
        keys, values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
        if self.grouped:
            batch, query_heads, _, dim = query.shape
            packed = query.reshape(batch, keys.shape[1], -1, dim)
            return scaled_dot_product_attention(packed, keys, values).reshape(batch, 1, query_heads, dim)
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True).transpose(1, 2)

    def bytes_read(self) -> int:
        return 2 * self.keys[:, :, : self.length].numel() * self.keys.dtype.itemsize


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one token ``[B, 1, Hq, D]`` in float64, head by head."""
    batch, query_heads, _, dim = query.shape
    heads = keys.shape[1]
    group = query_heads // heads
    out = torch.empty(batch, 1, query_heads, dim, dtype=torch.float64, device=query.device)
    for row in range(batch):
        for head in range(heads):
            span = slice(head * group, (head + 1) * group)
            scores = query[row, span, 0].double() @ keys[row, head].double().T * dim**-0.5
            out[row, 0, span] = scores.softmax(-1) @ values[row, head].double()
    return out
