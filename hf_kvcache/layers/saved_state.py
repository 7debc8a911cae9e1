"""Saving a layer as tensors and counters, and restoring it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.kernels.padding import padding_places
from hf_kvcache.layers.decode_step import DecodeSteps
from hf_kvcache.layers.new_tokens import check_update
from hf_kvcache.storage.checking import check_like, check_storage

#: Where tensors are to lie; None leaves them where they are.
Device = torch.device | str | None


class SavedState(DecodeSteps):
    """A layer that can be saved and restored. Saving does not change the layer."""

    #: Prefixes of the names of tensors that a saved layer may lack.
    optional_tensors: tuple[str, ...] = ()

    def progress(self) -> dict[str, int]:
        """The counters that are saved beside :meth:`tensors`, by name."""
        rollback = self.flushed().rollback
        return {"seen": self._seen, "unconfirmed": rollback.unconfirmed, "kept_from": rollback.kept_from}

    def own_tensors(self) -> list[torch.Tensor]:
        """The tensors that the layer holds beside its storage, for the memory report."""
        return []

    def tensors(self) -> dict[str, torch.Tensor]:
        """The content of the layer as tensors by name."""
        return self.flushed().stored_tensors()

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """:meth:`tensors` of a layer whose tokens are all stored."""
        if self.storage is None:
            return {}
        places = np.stack([self.padding.rows, self.padding.positions])
        return self.storage.state() | {"padding_places": torch.from_numpy(places)}

    def blank(self) -> Any:
        """An empty layer with the same settings."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.reset()
        return other

    def reset(self) -> None:
        """Drop all tokens. The next update may have another batch size."""
        self.clear()
        self.version += 1

    def check_tensors(self, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
        """Raise ValueError unless a layer with these settings can have saved these tensors and counters."""
        keys, values = tensors["dense.keys"], tensors["dense.values"]
        check_update(self.index, None, keys[:, :, :1], values[:, :, :1], False, least=0)
        empty = self.blank()
        empty.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        check_like(tensors, empty.tensors(), self.optional_tensors)
        counters = {name: progress.get(name) for name in empty.progress()}
        for name, count in counters.items():
            if type(count) is not int or not 0 <= count <= progress["seen"]:
                raise ValueError(f"{name}={count!r}; accepted: a whole number from 0 to seen={progress['seen']!r}")
        check_storage(empty.storage, tensors, progress["seen"])

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, int], device: Device = None, owned: bool = False
    ) -> None:
        """Replace the content of the layer by a saved one.

        Args:
            tensors: what :meth:`tensors` returned.
            progress: what :meth:`progress` returned.
            device: where the layer is to lie. None leaves the tensors where they are until the first update, which
                moves them to its own device.
            owned: whether nobody else has the tensors; then those that need not move are not copied.
        """
        self.reset()
        if tensors:
            to = tensors["dense.keys"].device if device is None else device
            # Tables and counters lie on the host.
            tensors = {n: x.to(to if x.is_floating_point() or n == "records" else "cpu") for n, x in tensors.items()}
            self.lazy_initialization(tensors["dense.keys"], tensors["dense.values"])
            assert self.storage is not None
            self.storage.restore(tensors, owned)
            self.padding = padding_places(*tensors["padding_places"].numpy())
            self._movable = device is None
        self._seen = progress["seen"]
        self.rollback.unconfirmed, self.rollback.kept_from = progress["unconfirmed"], progress["kept_from"]
        if self.storage is not None:
            self.storage.writer.lost_before = self.rollback.kept_from

    def _move(self, device: torch.device) -> None:
        """Move a restored layer to the device of the first update."""
        self._movable = False
        if self.device != device:
            recording = self.rollback.recording
            self.restore(self.tensors(), self.progress(), device)
            self.rollback.recording = recording
