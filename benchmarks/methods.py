"""The sides of a comparison: one attention layer that takes in new tokens and attends to all it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, QuantizedCache, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_kvcache import KVCache
from hf_kvcache_eval.caches import grouped_cache, held_bytes

DYNAMIC, STATIC, DENSE32 = "DynamicCache", "StaticCache", "dense fp32"
#: QuantizedCache's group-wise integers, and its fp8 cast.
PEERS = ("hqq 4-bit", "quanto 4-bit", "fp8 QuantizedCache")
#: Our codecs by the names that tables show; the 4-, 3- and 2-bit ones are what ``QuantizedKVCache(bits=...)`` takes.
CODECS = {
    "ours none": "none",
    "ours 8-bit": "rotated8",
    "ours fp8": "fp8",
    "ours 4-bit": "unbiased4",
    "ours 4-bit rotated": "rotated4",
    "ours 3-bit": "unbiased3",
    "ours 2-bit": "unbiased2",
}
#: Float32 on the CPU, which tensors are like where nothing else is said.
PLAIN = torch.empty(0)
#: The last tokens of what our cache holds come as they do in decoding (or in chunked prefill), not in one prefill.
RECENT = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shape:
    """An attention layer: query heads, KV heads, head dimension."""

    query_heads: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query_heads}/{self.heads}/{self.dim}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``"32/8/128"``: query heads, KV heads, head dimension."""
        return cls(*(int(number) for number in text.split("/")))

    def tokens(self, count: int, like: torch.Tensor = PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
        """Random normal keys and values ``[1, Hkv, count, D]``, of the dtype and on the device of ``like``."""
        size = (1, self.heads, count, self.dim)
        return (
            torch.randn(size, dtype=like.dtype, device=like.device),
            torch.randn(size, dtype=like.dtype, device=like.device),
        )

    def queries(self, count: int, like: torch.Tensor = PLAIN) -> torch.Tensor:
        """Random normal queries ``[1, Hq, count, D]``."""
        return torch.randn((1, self.query_heads, count, self.dim), dtype=like.dtype, device=like.device)

    def config(self) -> LlamaConfig:
        """The config of a one-layer Llama with this attention, set to sdpa."""
        config = LlamaConfig(
            hidden_size=self.query_heads * self.dim,
            head_dim=self.dim,
            num_hidden_layers=1,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.heads,
        )
        config._attn_implementation = "sdpa"
        return config


LLAMA_8B, SMOLLM2 = Shape(32, 8, 128), Shape(9, 3, 64)


class Method(ABC):
    """One side of a comparison.

    Attributes:
        name: what tables call it.
        stored: what it stores, a key of ``exact.TOLERANCES``.
        attention: how it attends, where there was a choice.
    """

    attention = ""

    def __init__(self, name: str, stored: str) -> None:
        self.name, self.stored = name, stored

    def mask(self, queries: int) -> torch.Tensor | None:
        """The mask that a model makes for that many new tokens, once for all its layers."""
        return None

    @abstractmethod
    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Take in keys and values ``[1, Hkv, n, D]``, attend with ``query [1, Hq, n, D]``.

        Returns ``[1, n, Hq, D]``.
        """

    @abstractmethod
    def bytes_held(self) -> int:
        """Bytes of what is held, unused room included."""

    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes that a step has to read at least: the tokens held, in the form in which they are held."""


class CacheMethod(Method):
    """A transformers cache with the attention function that a Llama layer calls on it.

    Args:
        name: what tables call it.
        stored: what it stores.
        shape: the attention layer.
        make: builds the cache from the config.
        device: where its tokens lie.
    """

    implementation = "sdpa"

    def __init__(
        self, name: str, stored: str, shape: Shape, make: Callable[[LlamaConfig], Any], device: torch.device
    ) -> None:
        super().__init__(name, stored)
        self.device = device
        self.config = shape.config()
        with torch.device("meta"):  # a real attention module, of which only the attributes are used
            self.module = LlamaAttention(self.config, 0).eval()
        self.cache = make(self.config)
        self.function = ALL_ATTENTION_FUNCTIONS[self.implementation]
        self._kept: Any = None

    def fill(self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, at_a_time: int = 1) -> None:
        """Hold the tokens ``[1, Hkv, T, D]``.

        Args:
            keys: the first tokens.
            values: the same.
            query: ``[1, Hq, 1, D]``; attention of one query is enough for ours to store tokens.
            at_a_time: in what portions the last ``RECENT`` tokens come into our cache (for the others it is all one).
        """
        self.step(query, keys, values, None)

    def mask(self, queries: int) -> torch.Tensor | None:
        embeddings = torch.empty(1, queries, 1, device=self.device)
        mask = create_causal_mask(self.config, embeddings, None, self.cache)
        assert mask is None or isinstance(mask, torch.Tensor)  # flex attention alone has others
        return mask

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        keys, values = self.cache.update(key, value, 0)
        return self.function(self.module, query, keys, values, mask, dropout=0.0, scaling=self.module.scaling)[0]

    def bytes_held(self) -> int:
        return held_bytes(self.cache)

    def bytes_read(self) -> int:
        return self.bytes_held()

    def keep(self) -> None:
        """Remember the state now, for :meth:`restore`."""
        self._kept = _frozen(vars(self.cache.layers[0]))

    def restore(self) -> None:
        """Go back to the state remembered: the same tensors, nothing is copied but counters."""
        vars(self.cache.layers[0]).update(_frozen(self._kept))


class UnavailableError(RuntimeError):
    """A peer that this machine or this release of transformers cannot build or fill; the message says why."""


@contextmanager
def _or_left_out(name: str) -> Iterator[None]:
    """Turn whatever goes wrong inside with another library's cache into :class:`UnavailableError`."""
    try:
        yield
    except UnavailableError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnavailableError(f"{name} is left out: {reason}") from error


class PeerMethod(CacheMethod):
    """One of transformers' quantized caches, which need other packages, a compiler or another release."""

    def fill(self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, at_a_time: int = 1) -> None:
        with _or_left_out(self.name):
            super().fill(keys, values, query, at_a_time)


class StaticCacheMethod(CacheMethod):
    """StaticCache, of which only the tokens held so far have to be read."""

    def bytes_read(self) -> int:
        layer = self.cache.layers[0]
        return self.bytes_held() * int(layer.get_seq_length()) // layer.max_cache_len


class PackedMethod(CacheMethod):
    """A KVCache with the attention registered as ``hf_kvcache``."""

    implementation = "hf_kvcache"

    def fill(self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, at_a_time: int = 1) -> None:
        # Pages packed one after the other lie elsewhere in memory than those of one long prefill, and a cache in use
        # has both kinds.
        first = recent_start(keys.shape[2])
        self.step(query, keys[:, :, :first], values[:, :, :first], None)
        for at in range(first, keys.shape[2], at_a_time):
            span = slice(at, at + at_a_time)
            self.cache.update(keys[:, :, span], values[:, :, span], 0)

    def bytes_read(self) -> int:
        parts = self.cache.memory().parts
        return sum(parts[part] for part in ("codes", "scales", "sinks", "tail"))

    def keep(self) -> None:
        self._kept = self.cache.fork()

    def restore(self) -> None:
        self.cache = self._kept.fork()

    def step_and_decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A step, and all keys and values ``[1, Hkv, T, D]`` as the cache decodes them."""
        keys, values = self.cache.update(key, value, 0)
        dense = keys.clone(), values.clone()
        out = self.function(self.module, query, keys, values, None, dropout=0.0, scaling=self.module.scaling)[0]
        return out, *dense


class DenseMethod(Method):
    """The best that plain torch does: preallocated keys and values, the query packed by KV head, no copy, no repeat.

    Args:
        name: what tables call it.
        dtype: dtype of what is stored and computed.
        keys: the first tokens ``[1, Hkv, T, D]``.
        values: the same for values.
        room: tokens that may follow.
    """

    def __init__(self, name: str, dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        super().__init__(name, _DTYPE_NAMES[dtype])
        self.dtype, self.length = dtype, keys.shape[2]
        size = (*keys.shape[:2], self.length + room, keys.shape[3])
        self.keys = torch.zeros(size, dtype=dtype, device=keys.device)
        self.values = torch.zeros(size, dtype=dtype, device=keys.device)
        self.keys[:, :, : self.length].copy_(keys)
        self.values[:, :, : self.length].copy_(values)
        self.attention = "matmul"

    def choose(self, query: torch.Tensor, time: Callable[[Callable[[], Any]], float], repeats: int = 5) -> None:
        """Time every way on ``query`` and keep the fastest."""
        packed = query.to(self.dtype)
        best = {}
        for way, attend in ATTENTIONS.items():
            action = partial(attend, packed, *self._held())
            action()
            best[way] = min(time(action) for _ in range(repeats))
        self.attention = min(best, key=lambda way: best[way])

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        self.keys[:, :, self.length : self.length + 1].copy_(key)
        self.values[:, :, self.length : self.length + 1].copy_(value)
        self.length += 1
        out = ATTENTIONS[self.attention](query.to(self.dtype), *self._held())
        return out.reshape(1, 1, -1, out.shape[-1])

    def bytes_held(self) -> int:
        return 2 * self.keys.numel() * self.dtype.itemsize

    def bytes_read(self) -> int:
        return 2 * self.keys[:, :, : self.length].numel() * self.dtype.itemsize

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def _matmul(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    packed = query.view(keys.shape[1], -1, query.shape[3]) * query.shape[3] ** -0.5
    return torch.bmm(torch.bmm(packed, keys[0].transpose(1, 2)).softmax(-1), values[0])


def _matmul_keys_first(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    packed = query.view(keys.shape[1], -1, query.shape[3]) * query.shape[3] ** -0.5
    return torch.bmm(torch.bmm(keys[0], packed.transpose(1, 2)).transpose(1, 2).softmax(-1), values[0])


def _sdpa_packed(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query.view(1, keys.shape[1], -1, query.shape[3]), keys, values)


#: Ways of one token's dense attention: query ``[1, Hq, 1, D]``, keys and values ``[1, Hkv, T, D]``.
ATTENTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "matmul": _matmul,
    "matmul, keys first": _matmul_keys_first,
    "sdpa, packed query": _sdpa_packed,
    "sdpa, enable_gqa": partial(scaled_dot_product_attention, enable_gqa=True),
}


def empty_method(name: str, shape: Shape, capacity: int, like: torch.Tensor) -> CacheMethod:
    """The cache method ``name`` without any tokens.

    Args:
        name: ``DYNAMIC``, ``STATIC``, one of ``PEERS`` or a key of ``CODECS``.
        shape: the attention layer.
        capacity: tokens that a StaticCache has room for.
        like: a tensor of the dtype and on the device of the tokens that it will hold.

    Raises:
        UnavailableError: if a peer cannot be built.
    """
    plain, device = _DTYPE_NAMES[like.dtype], like.device
    if name == DYNAMIC:
        return CacheMethod(name, plain, shape, lambda config: DynamicCache(config=config), device)
    if name == STATIC:
        return StaticCacheMethod(name, plain, shape, lambda config: StaticCache(config, max_cache_len=capacity), device)
    if name in PEERS:
        return PeerMethod(name, "fp8" if "fp8" in name else "4", shape, partial(peer_cache, name), device)
    codec = CODECS[name]
    stored = plain if codec == "none" else codec if codec == "fp8" else codec[-1]
    return PackedMethod(name, stored, shape, lambda config: KVCache(config, codec), device)


def filled_method(
    name: str, shape: Shape, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor, room: int
) -> Method:
    """The method ``name`` that holds ``keys`` and ``values [1, Hkv, T, D]`` and has room for ``room`` more tokens."""
    if name.startswith("dense "):
        return DenseMethod(name, DTYPES[name.removeprefix("dense ")], keys, values, room)
    method = empty_method(name, shape, keys.shape[2] + room, keys)
    method.fill(keys, values, query)
    return method


def try_peer(name: str, shape: Shape, like: torch.Tensor, tokens: int = 256) -> None:
    """Let a peer quantize a few tokens and take a step: its first calls import and compile, and any of them may fail.

    Raises:
        UnavailableError: if anything goes wrong.
    """
    with _or_left_out(name):
        method = filled_method(name, shape, *shape.tokens(tokens, like), shape.queries(1, like), 1)
        method.step(shape.queries(1, like), *shape.tokens(1, like), method.mask(1))


def peer_cache(name: str, config: Any) -> QuantizedCache:
    """One of transformers' quantized caches; UnavailableError if it cannot be built."""
    with _or_left_out(name):
        return QuantizedCache("fp8", config) if "fp8" in name else grouped_cache(name.split()[0], 4, config)


def recent_start(tokens: int) -> int:
    """Index of the first of the tokens that come one at a time, when a cache of ours is filled with ``tokens``."""
    return max(tokens - RECENT, tokens // 2)


def _frozen(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a transformers layer; its one tensor that is changed in place (StaticCache's count) copied."""
    return {k: v.clone() if k == "cumulative_length" and torch.is_tensor(v) else v for k, v in state.items()}
