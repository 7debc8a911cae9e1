"""Cache layers of models that cache latents themselves (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.mla import Expansion
from hf_kvcache.integration.padding import shown_tokens
from hf_kvcache.integration.picks import Picked
from hf_kvcache.kernels.attention import attend, without_gradient
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring, UpProjections
from hf_kvcache.kernels.latent_decode import absorb, expand, latent_attend
from hf_kvcache.kernels.reference.decode import side_buffer
from hf_kvcache.kernels.reference.softmax import merge
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.indexer_keys import IndexerKeys
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.layers.picked_reads import attend_picked
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
    prepares_blocks = False

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
        expansion = self._expansion_of(call)
        up = expansion.up_projections()
        # Sums of probabilities are by stored token, and a stored token is a latent.
        if up is None or (query.shape[2] > _most_absorbed(up) and not sums):
            return self._read_expanded(expansion, query, pages, dense, visibility, call.scoring)
        self.absorbed += 1
        result = latent_attend(in_latent_space(query.detach(), up), pages, dense, visibility, call.scoring, sums)
        return without_gradient(query, result._replace(output=expand(result.output, up.values)))

    def _expansion_of(self, call: AttentionCall) -> Expansion:
        """The expansion of the latents by the module that attends."""
        if self.expansion is None:
            raise RuntimeError(
                f"layer {self.index} caches latents, and {type(call.module).__name__} attends to them as if they were "
                "keys; accepted: attention modules that call expand_kv"
            )
        return self.expansion

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
    """A latent layer of a model whose indexer picks the tokens to attend to (DeepSeek sparse attention).

    A few queries read only the tokens that were picked for them. Many queries read all tokens under the model's mask.
    The layer also holds the keys of the indexer, which reads all of them at every step.
    """

    optional_tensors = ("indexer.",)
    #: Tells the wrapped indexer that this layer can read single tokens.
    reads_picked = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._handles: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        super().__init__(*args, **kwargs)
        self.indexer = IndexerKeys()
        #: Number of attention calls that read only the tokens that an indexer picked.
        self.gathered = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._handles = super().update(key_states, value_states, *args, **kwargs)
        return self._handles

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.picked is not None and call.picked.alone:
            self._note_shown(call.picked)
        if call.picked is not None and not self._gathers(call, call.picked):
            call = replace(call, mask=call.picked.mask.dense(), picked=None)
        return super().attend(call)

    def attend_tokens(self, new: NewTokens, storage: PagedStorage, call: AttentionCall) -> torch.Tensor | None:
        return None if call.picked is not None else super().attend_tokens(new, storage, call)

    def _gathers(self, call: AttentionCall, picked: Picked) -> bool:
        """Whether the picked tokens are read one by one: they are fewer than all, and the latents need no expansion."""
        batch, queries, most = picked.indices.shape
        return (
            queries * most < self._seen
            and batch == self.batch_size
            and queries == call.count == self._latest()[0].length
            and self._expansion_of(call).up_projections() is not None
        )

    def read(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        pages: Pages | None,
        dense: DenseTokens,
        visibility: Visibility,
        sums: bool = False,
    ) -> Attention:
        if call.picked is None:
            return super().read(call, query, pages, dense, visibility, sums)
        assert self.storage is not None and not sums
        up = self._expansion_of(call).up_projections()
        assert up is not None
        new, _ = self._latest()
        if dense.positions is None:
            held = dense.keys.shape[2]
            dense = replace(dense, positions=self.storage.dense.positions_on_device()[:, :held])
        first = visibility.start - new.position
        indices = call.picked.indices[:, first : first + query.shape[2]].long()
        # The model's mask begins at the oldest token that the queries may see.
        positions = torch.where(indices < 0, -1, indices + self.rollback.start(new.position))
        self.absorbed += 1
        self.gathered += 1
        latent_query = in_latent_space(query.detach(), up)
        result = attend_picked(latent_query, positions, pages, dense, visibility, call.scoring)
        return without_gradient(query, result._replace(output=expand(result.output, up.values)))

    def _note_shown(self, picked: Picked) -> None:
        """Record which new tokens are padding, where nothing but the picks says what a query sees.

        Padding picks nothing, and nothing picks padding. So a single token, which is padding in no model, is not asked
        for: the answer would make a GPU wait at every step. Stored, padding would take room and nothing else.
        """
        new, storage = self._latest()
        if new.earlier_padding is not None or picked.indices.shape[:2] != (storage.batch, new.length):
            return
        if new.length > 1:
            new.valid = shown_tokens((picked.indices >= 0).any(2) if picked.shown is None else picked.shown)
        new.earlier_padding = self.padding
        self.padding = self.padding.extend(new.position, new.valid)

    def visibility(self, new: NewTokens, call: AttentionCall, skip: int) -> Visibility:
        if call.picked is None or not call.picked.alone:
            return super().visibility(new, call, skip)
        return Visibility(new.position, new.length, mask=None, mask_start=0, causal=True, window=None)

    def held_states(self, side: str) -> torch.Tensor | None:
        return self._handles[0 if side == "keys" else 1]  # an indexer asks for their shapes at every step

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Add the new keys of the indexer ``[B, T, d]``; returns all of its keys."""
        if not self.indexer.batch:
            self.indexer = IndexerKeys(self._packs_indexer(indexer_key_states))
        return self.indexer.append(indexer_key_states)

    def _packs_indexer(self, keys: torch.Tensor) -> bool:
        """Whether the keys of the indexer are packed: with the latents, unless a model keeps more than keys there."""
        packed = self.options.codec.keys.method != "dense"
        return packed and keys.shape[2] == getattr(self.options.config, "index_head_dim", None)

    def check_tensors(self, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
        super().check_tensors(tensors, progress)
        names = {name for name in tensors if name.startswith("indexer.")}
        if names not in (set(), {"indexer.keys"}, {"indexer.codes", "indexer.scale"}):
            raise ValueError(f"{sorted(names)} of an indexer; accepted: its keys, or its codes and their scale")
        for name in names:
            x, dims = tensors[name], 2 if name == "indexer.scale" else 3
            if x.dim() != dims or x.shape[:2] != (tensors["dense.keys"].shape[0], progress["seen"]):
                raise ValueError(f"{name!r} is {list(x.shape)}; accepted: {dims} sizes, first those of all tokens seen")

    @property
    def complete_length(self) -> int:
        # The model gives the keys of the indexer after the latents; a layer without an indexer of its own has none.
        seen = super().complete_length
        return min(seen, self.indexer.length) if self.indexer.batch else seen

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
        stored = {f"indexer.{name}": x.clone() for name, x in self.indexer.stored().items()}
        return super().stored_tensors() | stored

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, int], device: Device = None, owned: bool = False
    ) -> None:
        indexer = {name.removeprefix("indexer."): x for name, x in tensors.items() if name.startswith("indexer.")}
        others = {name: x for name, x in tensors.items() if not name.startswith("indexer.")}
        super().restore(others, progress, device, owned)
        if indexer:
            self.indexer = IndexerKeys("codes" in indexer)
            # The dtype of packed keys is not saved; new keys will tell it.
            dtype = indexer["keys"].dtype if "keys" in indexer else self.dtype
            self.indexer.extend({name: x.to(self.device) for name, x in indexer.items()}, dtype)


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
