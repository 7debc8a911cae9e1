"""The textbook formula of a KV cache, with its terms filled in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from hf_kvcache.planning.model import NotTold


@dataclass(frozen=True)
class Textbook:
    """``2 x layers x heads x head_dim x tokens x bytes``: right for plain full attention, and only for that.

    Attributes:
        layers: number of layers.
        kv_heads: number of KV heads.
        query_heads: number of query heads; as many KV heads there would be without sharing (GQA).
        head_dim: width of a head.
        dtype: of keys and values.
    """

    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token_unshared(self) -> int:
        """The same if each query head had keys and values of its own."""
        return self.bytes_per_token // self.kv_heads * self.query_heads

    def bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of ``tokens`` tokens of each of ``batch`` sequences."""
        return self.bytes_per_token * tokens * batch

    def __str__(self) -> str:
        return (
            f"2 x {self.layers} layers x {self.kv_heads} KV heads x {self.head_dim} x {self.dtype.itemsize} bytes = "
            f"{self.bytes_per_token:,} bytes a token"
        )


def textbook(config: PreTrainedConfig, dtype: torch.dtype) -> Textbook:
    """The formula for the decoder of a model.

    Raises:
        NotTold: if the config does not name its heads.
    """
    config = config.get_text_config(decoder=True)
    try:
        queries = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, "head_dim", None) or config.hidden_size // queries
        return Textbook(config.num_hidden_layers, heads, queries, width, dtype)
    except (AttributeError, TypeError, RuntimeError) as error:  # or different for each layer
        raise NotTold(f"textbook formula: {' '.join(str(error).split())[:120]}") from error
