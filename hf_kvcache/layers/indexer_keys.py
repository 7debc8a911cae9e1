"""The keys of a sparse-attention indexer, which reads all of them at every step."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.integration.packed_keys import PackedKeys

#: Number of tokens for which a buffer has room at first.
_ROOM = 256
#: The largest code of 8 bits.
_LARGEST = 127


class IndexerKeys:
    """Keys ``[B, T, d]`` of an indexer, in buffers with spare room.

    A full buffer grows by half of its size, so most steps append a token without copying the earlier ones.

    Args:
        packed: whether keys are stored in 8 bits, with a float32 scale per token. Otherwise they are stored as they
            are.
    """

    def __init__(self, packed: bool = False) -> None:
        self.packed = packed
        #: Number of tokens held.
        self.length = 0
        #: By name: ``keys [B, room, d]``, or ``codes [B, room, d]`` and ``scale [B, room]``.
        self._buffers: dict[str, torch.Tensor] = {}
        self._dtype = torch.float32

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first keys."""
        return next((len(x) for x in self._buffers.values()), 0)

    def append(self, keys: torch.Tensor) -> torch.Tensor:
        """Add new keys ``[B, T, d]``.

        Returns:
            All keys ``[B, tokens, d]``, valid until the next change. Packed keys are decoded as they are used, to the
            dtype of the new ones.

        Raises:
            ValueError: if batch, width or dtype differ from those of the keys held. Packed keys have no dtype.
        """
        held = next(iter(self._buffers.values()), None)
        kind = keys.shape[0], keys.shape[2:], keys.dtype
        if held is not None and kind != (held.shape[0], held.shape[2:], keys.dtype if self.packed else self._dtype):
            raise ValueError(
                f"indexer_key_states {list(keys.shape)} {keys.dtype} do not go with those held; accepted: batch "
                f"{held.shape[0]}, dim {held.shape[2]}, {self._dtype}. Call reset() before another batch."
            )
        self._dtype = keys.dtype
        keys = keys.detach()
        self.extend(_packed(keys) if self.packed else {"keys": keys}, keys.dtype)
        return self._all()

    def extend(self, tokens: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Add tokens as :meth:`stored` gives them, of keys of this dtype."""
        self._dtype, length = dtype, self.length
        for name, new in tokens.items():
            buffer = self._reserve(name, length + new.shape[1], new)
            buffer[:, length : length + new.shape[1]] = new
        self.length = length + next((x.shape[1] for x in tokens.values()), 0)

    def _reserve(self, name: str, length: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer with room for ``length`` tokens."""
        held = self._buffers.get(name)
        if held is not None and held.shape[1] >= length:
            return held
        room = max(length, held.shape[1] * 3 // 2 if held is not None else _ROOM)
        with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
            grown = torch.zeros(like.shape[0], room, *like.shape[2:], dtype=like.dtype, device=like.device)
        if held is not None:
            grown[:, : self.length] = held[:, : self.length]
        self._buffers[name] = grown
        return grown

    def stored(self) -> dict[str, torch.Tensor]:
        """Views of what is stored of each token, by name: ``keys``, or ``codes`` and ``scale``."""
        return {name: x[:, : self.length] for name, x in self._buffers.items()}

    def keys(self) -> torch.Tensor | None:
        """All keys, ``[B, T, d]``; None before the first."""
        return self._all() if self._buffers else None

    def _all(self) -> torch.Tensor:
        stored = self.stored()
        return PackedKeys(stored["codes"], stored["scale"], self._dtype) if self.packed else stored["keys"]

    def drop_last(self, count: int) -> None:
        """Drop the newest ``count`` keys of each sequence."""
        self.length = max(0, self.length - count)

    def select(self, rows: np.ndarray) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``, for every ``i``."""
        for name, buffer in self._buffers.items():
            index = torch.from_numpy(rows).to(buffer.device)
            with torch.inference_mode(False):
                self._buffers[name] = buffer[index]

    def fork(self) -> IndexerKeys:
        """An independent copy."""
        other = IndexerKeys(self.packed)
        other.extend(self.stored(), self._dtype)
        return other

    def tensors(self) -> list[torch.Tensor]:
        """The allocated tensors, spare room included, for the memory report."""
        return list(self._buffers.values())


def _packed(keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keys ``[B, T, d]`` as int8 codes of the same shape, and a float32 scale of each token ``[B, T]``."""
    numbers = keys.float()
    scale = numbers.abs().amax(2) / _LARGEST
    codes = (numbers / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]).round_()
    return {"codes": codes.clamp_(-_LARGEST, _LARGEST).to(torch.int8), "scale": scale}
