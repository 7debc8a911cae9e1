"""A cache layer whose pages hold low-rank coefficients of keys and values in a calibrated basis."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.model_identity import check_weights
from hf_kvcache.integration.rope import rope_of
from hf_kvcache.kernels.attention import attend
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.lowrank.attention import HeadMaps, attend_coefficients, attend_tiles
from hf_kvcache.lowrank.encoder import LowRankEncoder
from hf_kvcache.lowrank.pre_rope_storage import PreRopeStorage
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.storage import PagedStorage


class LowRankLayer(KVCacheLayer):
    """The cache of one attention layer whose pages hold low-rank coefficients. Sinks and tail stay dense.

    The projection counts as a part of the model. Its bytes are not counted as bytes of the cache, and forks share it.

    Args:
        index: number of the layer in the model.
        options: the settings that all layers of the cache share; the codec stores the coefficients.
        projection: the bases of this layer.
        sliding_window: number of tokens that a query sees, its own included; None for full attention.
    """

    can_prepare = False

    def __init__(
        self, index: int, options: LayerOptions, projection: LayerProjection, sliding_window: int | None = None
    ) -> None:
        super().__init__(index, options, sliding_window)
        self.projection = projection
        self._maps: HeadMaps | None = None  # on the device of the storage
        self._weights_checked = projection.weights is None

    def make_storage(
        self, key_states: torch.Tensor, value_states: torch.Tensor, sink_length: int, spare: int | None = None
    ) -> PagedStorage:
        """An empty storage of coefficients; raises ValueError if the projection has other heads or widths."""
        options = self.options
        projection = _on_device(self.projection, key_states.device)
        encoder = LowRankEncoder(options.codec, projection, options.page_size, key_states.dtype)
        shape = key_states.shape[1], {"keys": key_states.shape[3], "values": value_states.shape[3]}
        if shape != (projection.heads, encoder.widths):
            raise ValueError(
                f"layer {self.index} got {shape[0]} KV heads of widths {shape[1]}; accepted by its projection: "
                f"{projection.heads} of widths {encoder.widths}. Use a projection calibrated on the model that runs."
            )
        self._maps = HeadMaps.of(projection)
        storage = PreRopeStorage if projection.before_rope else PagedStorage
        outside = self.outside(key_states.device)
        return storage(encoder, key_states, value_states, sink_length, options.tail_length, spare, outside)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self._note_module(call.module)
        return super().attend(call)

    def note_attended(self, call: AttentionCall) -> None:
        self._note_module(call.module)
        super().note_attended(call)

    def read(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        pages: Pages | None,
        dense: DenseTokens,
        visibility: Visibility,
        sums: bool = False,
    ) -> Attention:
        scoring = call.scoring
        if pages is None:
            return attend(query, None, dense, visibility, scoring, sums)
        storage, maps = self.storage, self._maps
        assert storage is not None and maps is not None
        shifted_cap = scoring.softcap is not None and maps.key_mean is not None
        if self.projection.before_rope or shifted_cap or sums:
            return attend_tiles(query, pages, dense, visibility, scoring, maps, storage, sums)
        return attend_coefficients(query, pages, dense, visibility, scoring, maps)

    def flush(self) -> None:
        new, storage = self._new, self.storage
        if new is not None and isinstance(storage, PreRopeStorage):
            count = new.length if new.valid is None else new.valid.sum(1)
            if (storage.due(storage.dense.lengths + (0 if new.stored else count)) > 0).any():
                storage.known_rope()  # raises before anything is stored, not in the middle of packing
            storage.note(new.position, new.valid)
        super().flush()

    def _note_module(self, module: torch.nn.Module | None) -> None:
        """Check that the projection fits the weights of the attention module, and record its rotary embedding."""
        storage = self.storage
        if not self._weights_checked and module is not None and self.projection.weights is not None:
            check_weights("projection", self.projection.weights, module, self.index)
            self._weights_checked = True
        if module is None or not isinstance(storage, PreRopeStorage) or storage.rope is not None:
            return
        try:
            storage.rope = rope_of(module)
        except ValueError as error:
            raise ValueError(
                f"layer {self.index} has a projection of keys from before the rotary embedding (before_rope=True): "
                f"{error}"
            ) from error


def _on_device(projection: LayerProjection, device: torch.device) -> LayerProjection:
    keys, values = (
        replace(
            side,
            down=side.down.to(device, torch.float32),
            up=side.up.to(device, torch.float32),
            mean=None if side.mean is None else side.mean.to(device, torch.float32),
        )
        for side in (projection.keys, projection.values)
    )
    return replace(projection, keys=keys, values=values)
