"""Projections made by hand, a layer that stores given states with them, and the expected outputs in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention

from hf_kvcache import KVCache
from hf_kvcache.codecs import Codec
from hf_kvcache.integration.attention import attention_function
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.low_rank import LowRankLayer
from hf_kvcache.lowrank.projection import LayerProjection, SideProjection
from tests.families import WINDOW
from tests.generation.layers import States
from tests.running import PAGE, SINKS, TAIL, small_cache

HEADS, DIM = 2, 16


def oblique(
    groups: int, ranks: tuple[int, int] = (8, 5), before_rope: bool = False, mean: bool = True, seed: int = 0
) -> LayerProjection:
    """Maps of two heads of width 16 to ``ranks`` and back. They are neither orthonormal nor inverse to each other."""
    draw = torch.Generator().manual_seed(seed)
    width = HEADS // groups * DIM
    sides = [
        SideProjection(
            torch.randn(groups, width, rank, generator=draw) * width**-0.5,
            torch.randn(groups, rank, width, generator=draw) * rank**-0.5,
            torch.randn(groups, width, generator=draw) if mean else None,
        )
        for rank in ranks
    ]
    return LayerProjection(sides[0], sides[1], HEADS, before_rope)


def rotation(
    heads: int, dims: tuple[int, int], groups: int, before_rope: bool = False, seed: int = 0, mean: bool = True
) -> LayerProjection:
    """Orthonormal maps of full rank, which lose nothing but rounding errors."""
    sides = []
    for side, dim in enumerate(dims):
        draw = torch.Generator().manual_seed(2 * seed + side)
        width = heads // groups * dim
        basis = torch.linalg.qr(torch.randn(groups, width, width, generator=draw, dtype=torch.float64))[0].float()
        shift = torch.randn(groups, width, generator=draw) if mean else None
        sides.append(SideProjection(basis, basis.mT.contiguous(), shift))
    return LayerProjection(sides[0], sides[1], heads, before_rope)


def with_projections(cache: KVCache, make: Callable[[int], LayerProjection]) -> KVCache:
    """The empty ``cache`` with low-rank layers; ``make`` returns the projection of each layer by its index."""
    cache.layers = [
        LowRankLayer(layer.index, layer.options, make(layer.index), layer.sliding_window) for layer in cache.own_layers
    ]
    return cache


def rotated_cache(model: PreTrainedModel, groups: int | None = None, before_rope: bool = False) -> KVCache:
    """A small cache for ``model`` whose pages hold rotated keys and values: it has to equal any exact cache."""
    cache = small_cache(model)
    config: Any = cache.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return with_projections(
        cache, lambda index: rotation(heads, (width, width), groups or heads, before_rope, seed=index)
    )


class OneLayer:
    """A model of a single attention layer without weights, and its low-rank cache.

    Args:
        kind: ``"full"`` or ``"sliding"``.
        projection: of the layer.
        codec: of the pages.
        masks: whether attention is given 4D masks, as models do that mask more than padding.
        **call: further arguments of the attention function.
    """

    def __init__(
        self,
        kind: str,
        projection: LayerProjection,
        codec: str | Codec = "none",
        masks: bool = False,
        **call: Any,
    ) -> None:
        shape: dict[str, Any] = {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": HEADS,
        }
        shape |= {"head_dim": DIM, "intermediate_size": 8, "vocab_size": 8}
        sliding = kind == "sliding"
        config: Any = MistralConfig(**shape, sliding_window=WINDOW) if sliding else LlamaConfig(**shape)
        self.attention = (MistralAttention if sliding else LlamaAttention)(config, 0)
        cache = KVCache(config, codec, page_size=PAGE, tail_length=TAIL, sink_length=SINKS)
        self.cache = with_projections(cache, lambda _: projection)
        self.masks, self.call = masks, call

    @property
    def layer(self) -> KVCacheLayer:
        return self.cache.own_layers[0]

    def fork(self) -> OneLayer:
        """The same layer with a fork of the cache."""
        other = copy.copy(self)
        other.cache = self.cache.fork()
        return other

    def __call__(self, new: States, real: torch.Tensor | None = None) -> torch.Tensor:
        """Attention output ``[B, T, 4, 16]`` of new tokens; ``real [B, tokens]`` is False for padding."""
        seen = self.cache.get_seq_length()
        mask = real
        if self.masks or not seen:  # the first attention is transformers' own, which knows no other masks
            length, offset = self.cache.get_mask_sizes(new.length, 0)
            mask = seen_by(seen, new.length, offset + length, self.layer.sliding_window)[:, offset:]
            mask = mask.expand(len(new.query), 1, -1, -1)
            if real is not None:
                mask = mask & real[:, None, None, offset : offset + length]
                if seen:  # what a 4D mask calls padding sees nothing, and is seen by none
                    mask = mask & real[:, None, seen : seen + new.length, None]
        key, value = self.cache.update(new.key, new.value, 0)
        return attention_function(self.attention, new.query, key, value, mask, **(self.call if seen else {}))[0]


def seen_by(start: int, length: int, keys: int, window: int | None) -> torch.Tensor:
    """bool ``[length, keys]``: which keys the tokens from ``start`` on see by causality and a window."""
    at, key = torch.arange(start, start + length)[:, None], torch.arange(keys)[None]
    visible = key <= at
    return visible if window is None else visible & (key > at - window)


@dataclass
class Token:
    """A stored token: its key and value as attention reads them, float64 ``[Hkv, D]``."""

    position: int
    number: int  # among the non-padding tokens of its sequence
    key: torch.Tensor
    value: torch.Tensor
    packed: bool = False


class ByHand:
    """The same layer in float64: every token is kept, and tokens that would be packed are projected and projected back.

    Args:
        kind: ``"full"`` or ``"sliding"``.
        projection: of the layer.
        batch: sequences.
    """

    def __init__(self, kind: str, projection: LayerProjection, batch: int) -> None:
        self.projection, self.window = projection, WINDOW if kind == "sliding" else None
        self.sinks = 0 if self.window else SINKS
        self.rows: list[list[Token]] = [[] for _ in range(batch)]
        self.seen = 0

    def __call__(
        self, new: States, real: torch.Tensor | None = None, softcap: float | None = None, s_aux: Any = None
    ) -> torch.Tensor:
        """The output that :class:`OneLayer` should have; zeros for padding."""
        output = torch.zeros(len(self.rows), new.length, 4, DIM, dtype=torch.float64)
        for b, row in enumerate(self.rows):
            for t in range(new.length):
                if real is None or real[b, self.seen + t]:
                    key, value = new.key[b, :, t].double(), new.value[b, :, t].double()
                    row.append(Token(self.seen + t, len(row), key, value))
                    output[b, t] = self._attend(row, new.query[b, :, t].double(), softcap, s_aux)
        self.seen += new.length
        self.pack()
        return output

    def pack(self) -> None:
        """Project and project back the tokens that the tail has no room for."""
        for row in self.rows:
            loose = [token for token in row if not token.packed][self.sinks :]
            for token in loose[: max(len(loose) - TAIL, 0) // PAGE * PAGE]:
                token.key = self._approximate("keys", token.key, token.number)
                token.value = self._approximate("values", token.value, token.number)
                token.packed = True

    def crop(self, tokens: int) -> None:
        self.seen -= tokens
        self.rows = [[token for token in row if token.position < self.seen] for row in self.rows]

    def select(self, rows: list[int]) -> None:
        self.rows = [[copy.copy(token) for token in self.rows[row]] for row in rows]

    def fork(self) -> ByHand:
        other = copy.copy(self)
        other.select(list(range(len(self.rows))))
        return other

    @property
    def packed(self) -> int:
        return sum(token.packed for row in self.rows for token in row)

    def _attend(self, row: list[Token], query: torch.Tensor, softcap: float | None, s_aux: Any) -> torch.Tensor:
        at = row[-1].position
        visible = [token for token in row if self.window is None or token.position > at - self.window]
        keys, values = (torch.stack([getattr(t, side) for t in visible]) for side in ("key", "value"))
        scores = torch.einsum("hd,thd->ht", query, keys.repeat_interleave(2, 1)) * DIM**-0.5
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.exp()
        total = weights.sum(1) + (0 if s_aux is None else s_aux.double().exp())
        return torch.einsum("ht,thd->hd", weights, values.repeat_interleave(2, 1)) / total[:, None]

    def _approximate(self, side: str, x: torch.Tensor, number: int) -> torch.Tensor:
        turns = self.projection.before_rope and side == "keys"
        maps: SideProjection = getattr(self.projection, side)
        x = turn(x, -number) if turns else x
        out = []
        for group, vector in enumerate(x.reshape(len(maps.down), -1)):
            mean = torch.zeros_like(vector) if maps.mean is None else maps.mean[group].double()
            out.append(mean + (vector - mean) @ maps.down[group].double() @ maps.up[group].double())
        x = torch.stack(out).view(HEADS, DIM)
        return turn(x, number) if turns else x


def turn(x: torch.Tensor, position: int) -> torch.Tensor:
    """``x [..., D]`` rotated by Llama's rotary embedding at ``position``, backwards for a negative position."""
    half = x.shape[-1] // 2
    angles = position * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    real, imaginary = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)


#: Tolerance for outputs of order 1 after a rotary embedding in float32, whose angles are of order 100.
ROTARY = 2e-4
FORMS = {
    "each head": oblique(2),
    "both heads": oblique(1),
    "no mean": oblique(2, mean=False),
    "before rope": oblique(2, before_rope=True),
    "both heads before rope": oblique(1, before_rope=True),
}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = ROTARY) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)
