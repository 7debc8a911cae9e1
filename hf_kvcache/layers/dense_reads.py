"""The keys and values of a layer as dense tensors, for code that cannot read pages."""

from __future__ import annotations

import torch
from transformers.utils import logging

from hf_kvcache.integration.handle import HeldStates
from hf_kvcache.integration.masks import latest_padding
from hf_kvcache.layers.state import LayerState
from hf_kvcache.storage.dense_read import dense_side

logger = logging.get_logger(__name__)


class DenseReads(LayerState):
    """A layer whose handles can be read as dense tensors."""

    def note_dense_read(self) -> None:
        """Record that the keys and values are read as dense tensors.

        The attention function that reads them is not this package's and passes no mask. So the padding of the new
        tokens is taken from the mask that was made last for this cache.
        """
        new = self._new
        if new is not None and not new.read:
            new.read = True
            padding = latest_padding(self.options, new.position, new.length, new.keys.shape[0])
            if padding is not None and new.earlier_padding is None and not new.stored:
                padding.hides_only(self.padding)  # raises if the mask shows padding
                new.valid, new.earlier_padding = padding.valid, self.padding
                self.padding = self.padding.extend(new.position, new.valid)
            elif padding is None and len(new.keys) > 1 and self.options.codec.name != "none":
                logger.warning_once(
                    "A KVCache is read by a model that makes its own attention masks: padding is stored like other "
                    "tokens, and with a codec that rounds, a padded sequence may differ from the same sequence alone."
                )

    def is_unread(self) -> bool:
        """Whether nothing has read the handles of the latest update, although they cover earlier tokens."""
        new = self._new
        return new is not None and new.position > 0 and not (new.read or new.stored or self.options.deferred)

    def dense_side(self, side: str) -> torch.Tensor:
        """All keys or all values that attention may see, dense ``[B, Hkv, T, D]``; zeros stand for padding.

        Args:
            side: ``"keys"`` or ``"values"``.
        """
        new, storage = self._new, self.storage
        assert storage is not None
        fresh = new.length if new is not None and not new.stored else 0
        length = self._visible_length(new.length if new is not None else 1)
        if new is not None and length == fresh:
            return getattr(new, side)
        logger.warning_once(
            "A KVCache is read by code that needs dense keys and values: the whole cache is decompressed at every "
            "step, which is correct but slow. With attn_implementation='hf_kvcache' the pages are read as they are."
        )
        dense = dense_side(storage, side, self._seen - length, length)
        if new is not None and fresh:
            dense[:, :, length - fresh :] = getattr(new, side)
        return dense

    def held_states(self, side: str) -> torch.Tensor | None:
        """All stored keys or values, as a tensor that is decompressed when it is used; None before the first update.

        Args:
            side: ``"keys"`` or ``"values"``.
        """
        if self.storage is None:
            return None
        length = self._seen - self.rollback.start(self._seen)
        sizes = (self.storage.batch, self.storage.heads, length, self.storage.encoder.widths[side])
        return HeldStates(self, side, sizes, getattr(self.storage.dense, side))

    def decompressed(self, side: str) -> torch.Tensor:
        """All stored keys or values, decompressed, ``[B, Hkv, T, D]``; zeros stand for padding.

        Args:
            side: ``"keys"`` or ``"values"``.
        """
        new, storage, start = self._new, self.storage, self.rollback.start(self._seen)
        assert storage is not None
        dense = dense_side(storage, side, start, self._seen - start)
        if new is not None and not new.stored:
            fresh = getattr(new, side)[:, :, -dense.shape[2] :]
            dense[:, :, dense.shape[2] - fresh.shape[2] :] = fresh
        return dense
