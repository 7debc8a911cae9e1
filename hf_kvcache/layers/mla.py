"""Cache layers of models that cache latents themselves (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.mla import Expansion
from hf_kvcache.kernels.attention import attend, without_gradient
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring, UpProjections
from hf_kvcache.kernels.latent_decode import absorb, expand, latent_attend
from hf_kvcache.kernels.reference.decode import side_buffer
from hf_kvcache.kernels.reference.softmax import merge
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.indexer_keys import IndexerKeys
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.layers.saved_state import Device
from hf_kvcache.storage import PagedStorage

#: Tokens of each sequence that are expanded in one call.
_TILE_TOKENS = 1024


class LatentLayer(KVCacheLayer):
    """The cache of one latent-attention layer.

    Its keys are latents ``[B, 1, T, r]``. Its values are rotary keys ``[B, 1, T, dr]``. :meth:`attend` takes queries
    ``[B, H, T, dn + dr]`` and returns ``[B, T, H, dv]``, in one of two ways. A few queries are taken into latent space
    and attend there (the absorbed form). For many queries, or if the up-projection is not a plain matrix, the latents
    are expanded to keys and values, tile by tile.
    """

    #: Handles on latents may be replaced by handles on the keys and values that the latents expand to.
    takes_expansion = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Number of attention calls that were computed in latent space.
        self.absorbed = 0
        #: The expansion of the latents by the module that attended last.
        self.expansion: Expansion | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Under autocast the norm before the latents returns float32, and rotary keys have the narrower dtype.
        return super().update(key_states, value_states.to(key_states.dtype), *args, **kwargs)

    def _copy(self) -> Any:
        other = super()._copy()
        other.expansion = None  # it refers to this layer
        return other

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"expansion": None}

    def step(self, new: NewTokens, storage: PagedStorage, call: AttentionCall) -> torch.Tensor | None:
        up = None if self.expansion is None else self.expansion.up_projections()
        if up is None or self.prepared is None:
            return None
        output = self.prepared.attend(storage, new, call.queries, call.scoring, up)
        self.absorbed += output is not None
        return output

    def read(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        pages: Pages | None,
        dense: DenseTokens,
        visibility: Visibility,
        sums: bool = False,
    ) -> Attention:
        expansion = self.expansion
        if expansion is None:
            raise RuntimeError(
                f"layer {self.index} caches latents, and {type(call.module).__name__} attends to them as if they were "
                "keys; accepted: attention modules that call expand_kv"
            )
        up = expansion.up_projections()
        # Sums of probabilities are by stored token, and a stored token is a latent.
        if up is None or (query.shape[2] > _most_absorbed(up) and not sums):
            return self._read_expanded(expansion, query, pages, dense, visibility, call.scoring)
        self.absorbed += 1
        result = latent_attend(in_latent_space(query.detach(), up), pages, dense, visibility, call.scoring, sums)
        return without_gradient(query, result._replace(output=expand(result.output, up.values)))

    def _read_expanded(
        self,
        expansion: Expansion,
        query: torch.Tensor,
        pages: Pages | None,
        dense: DenseTokens,
        visibility: Visibility,
        scoring: Scoring,
    ) -> Attention:
        """Attention over expanded keys and values. Packed tokens are expanded in tiles, which bounds the memory."""
        keys, values = expansion.expand(dense.keys, dense.values)
        total = attend(query, None, replace(dense, keys=keys, values=values), visibility, scoring)
        # Sink logits count once, with the dense tokens. All packed tokens come before the queries.
        scoring, earlier = replace(scoring, sink_logits=None), replace(visibility, causal=False)
        step = max(1, _TILE_TOKENS // self.options.page_size)
        for start in range(0, 0 if pages is None else pages.columns, step):
            assert pages is not None
            tile = self._expanded_tile(expansion, pages, start, min(start + step, pages.columns))
            part = attend(query, None, tile, earlier, scoring)
            output, log_sum_exp = merge(*((x.output.transpose(1, 2), x.log_sum_exp) for x in (total, part)))
            total = Attention(output.transpose(1, 2).to(query.dtype), log_sum_exp)
        return total

    def _expanded_tile(self, expansion: Expansion, pages: Pages, start: int, stop: int) -> DenseTokens:
        storage, records = self.storage, pages.records(start, stop)
        assert storage is not None
        latents, rotary = (
            storage.encoder.decode(side, records, None, side_buffer(pages.layout, side, records))[:, None]
            for side in ("keys", "values")
        )
        keys, values = expansion.expand(latents.to(storage.dtype), rotary.to(storage.dtype))
        unused = pages.unused(start, stop)
        return DenseTokens(
            keys, values, pages.positions(start, stop).flatten(1), None if unused is None else unused.flatten(1)
        )


class IndexedLatentLayer(LatentLayer):
    """A latent layer of a model whose indexer chooses the tokens to attend to (DeepSeek sparse attention).

    The layer also holds the keys of the indexer. They stay dense, because the indexer reads all of them at every step.
    """

    optional_tensors = ("indexer",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._handles: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        super().__init__(*args, **kwargs)
        self.indexer = IndexerKeys()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._handles = super().update(key_states, value_states, *args, **kwargs)
        return self._handles

    def held_states(self, side: str) -> torch.Tensor | None:
        return self._handles[0 if side == "keys" else 1]  # an indexer asks for their shapes at every step

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Add the new keys of the indexer ``[B, T, d]``; returns all of its keys."""
        return self.indexer.append(indexer_key_states)

    def check_crop(self, tokens_to_remove: int) -> None:
        # A layer that reads the latents of another layer may have its own indexer. Such a layer has seen no tokens.
        if self.storage is not None or not self.indexer.length:
            super().check_crop(tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.indexer.drop_last(-tokens_to_remove)

    def take_back(self, length: int) -> None:
        super().take_back(length)
        self.indexer.drop_last(max(self.indexer.length - length, 0))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.storage is None:
            self.indexer.select(np.arange(self.indexer.batch).repeat(repeats))

    def select_rows(self, rows: np.ndarray) -> None:
        super().select_rows(rows)
        self.indexer.select(rows)

    def reset(self) -> None:
        super().reset()
        self.indexer = IndexerKeys()
        self._handles = (None, None)

    def _copy(self) -> Any:
        other = super()._copy()
        other.indexer = self.indexer.fork()
        other._handles = (None, None)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_handles": (None, None)}

    def own_tensors(self) -> list[torch.Tensor]:
        return [*super().own_tensors(), *self.indexer.tensors()]

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        state, keys = super().stored_tensors(), self.indexer.keys()
        return state if keys is None else state | {"indexer": keys.clone()}

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, int], device: Device = None, owned: bool = False
    ) -> None:
        super().restore({name: x for name, x in tensors.items() if name != "indexer"}, progress, device, owned)
        if "indexer" in tensors:
            self.indexer.append(tensors["indexer"].to(self.device))


def in_latent_space(query: torch.Tensor, up: UpProjections) -> torch.Tensor:
    """Queries ``[B, H, q, dn + dr]`` taken into latent space, ``[B, H, q, r + dr]``.

    Their dot products with latents and rotary keys are the scores of the expanded keys.
    """
    width = up.keys.shape[1]
    return torch.cat([absorb(query[..., :width], up.keys), query[..., width:]], -1)


def _most_absorbed(up: UpProjections) -> int:
    """Largest number of queries for which attention in latent space takes fewer operations than expanding first."""
    rank, expanded = up.keys.shape[2], up.keys.shape[1] + up.values.shape[1]
    saved = 2 * rank - expanded
    # Multiplications per token and head for n queries: n (2 r) absorbed, (n + r) (dn + dv) expanded.
    return max(16, rank * expanded // saved) if saved > 0 else 1 << 30
