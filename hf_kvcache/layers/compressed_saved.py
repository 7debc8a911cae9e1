"""Saving a layer of DeepSeek V4 as tensors and counters, and restoring it."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.layers.compressed_state import CompressedState
from hf_kvcache.layers.saved_state import Device
from hf_kvcache.storage import IntegrityError

#: What the counters of a saved state are called that say where the rows of a buffer begin.
_START = "{}.start"


class CompressedSaved(CompressedState):
    """A layer that can be saved and restored. Saving does not change the layer."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The content of the layer as tensors by name."""
        states = {name: buffer.state() for name, buffer in self._buffers().items()}
        return {name: rows for name, rows in states.items() if rows is not None}

    def progress(self) -> dict[str, Any]:
        """The counters that are saved beside :meth:`tensors`, by name."""
        own = {"seen": self._seen, "unconfirmed": self.rollback.unconfirmed, "keep_from": self._keep_from}
        packed = {name: rows for name, rows in self._packed().items() if rows.dtype is not None}
        kinds: dict[str, Any] = {f"{name}.width": rows.width for name, rows in packed.items()}
        kinds |= {f"{name}.dtype": str(rows.dtype).removeprefix("torch.") for name, rows in packed.items()}
        return own | kinds | {_START.format(name): buffer.start for name, buffer in self._buffers().items()}

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, Any], device: Device = None, owned: bool = False
    ) -> None:
        """Replace the content of the layer by a saved one; the arguments are those of ``SavedState.restore``."""
        self.reset()
        for name, packed in self._packed().items():
            if f"{name}.width" in progress:
                packed.prepare(progress[f"{name}.width"], _dtype(progress[f"{name}.dtype"]))
        for name, buffer in self._buffers().items():
            if name in tensors:
                rows = tensors[name]
                buffer.restore(rows if device is None else rows.to(device), progress[_START.format(name)])
        self._seen, self._keep_from = progress["seen"], progress["keep_from"]
        self.rollback.unconfirmed, self.rollback.kept_from = progress["unconfirmed"], self.window.start
        if tensors:
            assert self.window.dtype is not None
            self.dtype = self.window.dtype
            self.device = tensors["window"].device if device is None else torch.device(device)
            self.is_initialized = True

    def check(self) -> None:
        """Raise IntegrityError unless the counters and the rows of the layer go together."""
        if not self.is_initialized:
            return
        rows = {name: (buffer.start, buffer.stop) for name, buffer in self._buffers().items()}
        if rows != (right := self._right_rows()) or len({b.batch for b in self._buffers().values()} - {-1}) > 1:
            raise IntegrityError(f"rows {rows} of layer {self.index}; accepted after {self._seen} tokens: {right}")
        for name, packed in self._packed().items():
            width = packed.width if packed.encoder is None else packed.encoder.layout.record_bytes
            if packed.buffer.width != width or packed.start < 0:
                raise IntegrityError(f"{name} has rows of {packed.buffer.width}; accepted: {width}, from position 0 on")
        keep_from = self._keep_from
        counters = 0 <= keep_from <= self._seen and 0 <= self.rollback.unconfirmed <= self._seen
        if not (counters and self._can_return(keep_from) and self.window.start <= self.rollback.start(keep_from)):
            raise IntegrityError(f"keep_from={keep_from!r} does not go with {rows}; accepted: from 0 to {self._seen}")

    def _right_rows(self) -> dict[str, tuple[int, int]]:
        """Start and stop of each row buffer, as far as they follow from the tokens seen."""
        right = {"window": (self.window.start, self._seen)}
        for name, c in self.compressions.items():
            windows = self._seen // c.rate
            right |= {f"{name}.entries": (0, windows)}
            right |= {f"{name}.{raw}": (c.raw_kv.start, self._seen) for raw in ("raw_kv", "raw_gate")}
            last = windows if c.overlap_kv.batch > 0 else 0
            right |= {f"{name}.{part}": (c.overlap_kv.start, last) for part in ("overlap_kv", "overlap_gate")}
        return right

    def _move(self, device: torch.device) -> None:
        """Move a restored layer to the device of the first update."""
        recording = self.rollback.recording
        self.restore(self.tensors(), self.progress(), device)
        self.rollback.recording = recording


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name!r}; accepted: the name of a dtype of torch")
    return found
