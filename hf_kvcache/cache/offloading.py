"""The part of transformers' cache contract that concerns layers whose pages lie outside of their device."""

from __future__ import annotations

from typing import Any, cast

from hf_kvcache.cache.other_states import OtherStates
from hf_kvcache.layers.base import KVCacheLayer


class Offloading(OtherStates):
    """A transformers cache whose pages may lie outside of the device. They are fetched a layer ahead.

    Attributes:
        offloading: whether they do.
        only_non_sliding: False: the pages of sliding layers lie outside too.
    """

    def begin_offloading(self, offloading: bool) -> None:
        """Number the layers whose pages lie outside, in the order in which a model comes to them."""
        self.offloading, self.only_non_sliding = offloading, False
        #: For each of these layers the one before it and the one behind it; the first follows the last.
        self._neighbors: dict[int, tuple[int, int]] = {}
        if not offloading:
            return
        outside = [index for index, layer in enumerate(self.layers) if isinstance(layer, KVCacheLayer)]
        for place, index in enumerate(outside):
            layer: Any = self.layers[index]
            layer.offload_place = place
            self._neighbors[index] = outside[place - 1], outside[(place + 1) % len(outside)]

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Give up what was fetched of a layer. Its pages are outside of the device since they were packed.

        Args:
            layer_idx: number of the layer. Nothing is done for layers of transformers' own.
            only_non_sliding: whether nothing is done for a sliding layer.

        Raises:
            NotImplementedError: if the cache was built without ``offload``.
        """
        layer: Any = self._checked_layer("offload()", layer_idx)
        if layer_idx in self._neighbors and not (only_non_sliding and layer.is_sliding):
            layer.offload()

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Begin to fetch the pages of the next layer from ``layer_idx`` on; the first layer follows the last.

        Args:
            layer_idx: number of the layer, up to the number of layers.
            only_non_sliding: whether sliding layers are passed over.

        Raises:
            NotImplementedError: if the cache was built without ``offload``.
        """
        self._checked_layer("prefetch()", layer_idx % len(self.layers))
        for index in (*range(layer_idx, len(self.layers)), *range(layer_idx)):
            layer: Any = self.layers[index]
            if index in self._neighbors and not (only_non_sliding and layer.is_sliding):
                layer.prefetch()
                return

    def _fetch_ahead(self, layer_idx: int) -> None:
        """A forward pass has come to a layer: the pages of the one before are done with, the next one's come now."""
        before, behind = self._neighbors.get(layer_idx, (layer_idx, layer_idx))
        own, last, following = (cast(Any, self.layers[index]) for index in (layer_idx, before, behind))
        if before not in (layer_idx, behind):
            last.offload()
        # With an odd number of layers the first and the last share a buffer, which is in use now.
        if (own.offload_place - following.offload_place) % 2:
            following.prefetch()

    def _checked_layer(self, what: str, layer_idx: int) -> Any:
        if not self.offloading:
            raise NotImplementedError(
                f"{what}: the pages of this cache stay on the device; accepted: a cache that was built with "
                "offload='cpu' or offload=<folder>"
            )
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(f"layer_idx={layer_idx!r}; accepted: 0 to {len(self.layers) - 1}")
        return self.layers[layer_idx]
