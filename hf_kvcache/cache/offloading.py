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
        #: For each of these layers the one whose pages are fetched while it runs; the first follows the last.
        self._following: dict[int, int] = {}
        if not offloading:
            return
        outside = [index for index, layer in enumerate(self.layers) if isinstance(layer, KVCacheLayer)]
        for place, index in enumerate(outside):
            layer: Any = self.layers[index]
            layer.offload_place = place
            following = (place + 1) % len(outside)
            # Layers take two buffers in turn. With an odd number the last and the first share one, which is in use.
            if (following - place) % 2:
                self._following[index] = outside[following]

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Let go of what was fetched of a layer. Its pages are outside of the device since they were packed.

        Args:
            layer_idx: number of the layer. Nothing is done for layers of transformers' own.
            only_non_sliding: whether nothing is done for a sliding layer.

        Raises:
            NotImplementedError: if the cache was built without ``offload``.
            ValueError: if there is no such layer.
        """
        layer: Any = self._checked_layer("offload()", layer_idx)
        if isinstance(layer, KVCacheLayer) and not (only_non_sliding and layer.is_sliding):
            layer.offload()

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Begin to fetch the pages of the next layer from ``layer_idx`` on; the first layer follows the last.

        Args:
            layer_idx: number of the layer, up to the number of layers.
            only_non_sliding: whether sliding layers are passed over.

        Raises:
            NotImplementedError: if the cache was built without ``offload``.
            ValueError: if there is no such layer.
        """
        self._checked_layer("prefetch()", layer_idx, len(self.layers))
        for index in (*range(layer_idx, len(self.layers)), *range(layer_idx)):
            layer: Any = self.layers[index]
            if isinstance(layer, KVCacheLayer) and not (only_non_sliding and layer.is_sliding):
                layer.prefetch()
                return

    def _fetch_ahead(self, layer_idx: int, tokens: int) -> None:
        """A forward pass of so many tokens has come to a layer: the pages of the next one begin to come."""
        following = self._following.get(layer_idx)
        if following is not None:
            cast(KVCacheLayer, self.layers[following]).fetch_ahead(tokens)

    def _checked_layer(self, what: str, layer_idx: int, last: int | None = None) -> Any:
        if not self.offloading:
            raise NotImplementedError(
                f"{what}: the pages of this cache stay on the device; accepted: a cache that was built with "
                "offload='cpu' or offload=<folder>"
            )
        last = len(self.layers) - 1 if last is None else last
        if not 0 <= layer_idx <= last:
            raise ValueError(f"layer_idx={layer_idx!r}; accepted: 0 to {last}")
        return self.layers[layer_idx % len(self.layers)]
