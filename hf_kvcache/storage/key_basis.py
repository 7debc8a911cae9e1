"""The basis in which the keys of a sequence are packed: what its first packed tokens fix of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels import key_scale as kernels
from hf_kvcache.storage.transfers import is_run, rows_of, to_device


class _FirstUpdate(NamedTuple):
    """The arguments of :meth:`KeyBasis.balance`, as long as the scale is not computed."""

    query: torch.Tensor
    keys: torch.Tensor
    valid: np.ndarray | None
    sinks: int


class KeyBasis:
    """The scale and the mean of the keys of each sequence. They never change while the sequence holds tokens in pages.

    Keys are packed as ``rotation(key / scale) - mean``, and their scores are those of ``rotation(query * scale)``. The
    first update fixes the scale: that of a channel is the square root of the keys' standard deviation divided by that
    of the queries. An error that is the same in all rotated channels then adds least to the squared error of the
    scores. Without it, the rotation spreads the error of a few large channels, such as the biases of Qwen2's keys make,
    over channels that weigh more in the scores. The first page fixes the mean.

    The scale is computed once it is asked for: where the first pages are packed in the same update, a GPU then computes
    scale and mean together. :meth:`settle` ends the waiting.

    Args:
        encoder: makes page records.
        batch: number of sequences.
        heads: page heads of a sequence.
        device: of the pages.

    Attributes:
        mean: float32 ``[B, page heads, dim]``, in the rotated basis; None if the codec subtracts none.
        known: bool ``[B]``, whether the first page of a sequence has fixed its mean.
        scale: float32 ``[B, Hkv, Dk]``, powers of two, so that scaling is exact; None if the codec has none.
    """

    def __init__(self, encoder: PageEncoder, batch: int, heads: int, device: torch.device) -> None:
        self.encoder = encoder
        self.known = np.zeros(batch, dtype=bool)
        self.mean: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        self._first_update: _FirstUpdate | None = None
        if encoder.centered:
            self.mean = torch.zeros(batch, heads, encoder.layout.sides["keys"].dim, dtype=torch.float32, device=device)
        if encoder.balanced:
            self._scale = torch.ones(batch, heads, encoder.layout.sides["keys"].dim, dtype=torch.float32, device=device)

    @property
    def scale(self) -> torch.Tensor | None:
        self.settle()
        return self._scale

    @scale.setter
    def scale(self, scale: torch.Tensor | None) -> None:
        self._first_update, self._scale = None, scale

    def settle(self) -> None:
        """Compute the scale now, if that is still to be done. The first update's tensors are not needed any more."""
        if self._first_update is not None:
            self.scale = key_scale(*self._first_update)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.mean, self.scale) if t is not None)

    def of(self, rows: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Mean and scale of the sequences ``rows``, ``[b, page heads, dim]`` each; None what there is not."""
        mean, scale = self.mean, self.scale
        return None if mean is None else rows_of(mean, rows), None if scale is None else rows_of(scale, rows)

    def by_row(self, rows: np.ndarray | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Mean and scale by rows of the page table, ``[b * page heads, dim]`` each, of all sequences or of ``rows``."""
        mean, scale = (self.mean, self.scale) if rows is None else self.of(rows)
        return None if mean is None else mean.flatten(0, 1), None if scale is None else scale.flatten(0, 1)

    def balance(self, query: torch.Tensor, keys: torch.Tensor, valid: np.ndarray | None, sinks: int) -> None:
        """Fix the scale by a first update, before any of its tokens is packed; :meth:`settle` once they are stored.

        Args:
            query: ``[B, Hq, T, Dk]``, of all tokens of the update.
            keys: ``[B, Hkv, T, Dk]``.
            valid: bool ``[B, T]``, False for padding; None if no token is padding.
            sinks: first tokens of each sequence that are no example of the others.
        """
        if self._scale is not None:
            self._first_update = _FirstUpdate(query, keys, valid, sinks)

    def fix_mean(self, rows: np.ndarray, keys: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take the mean of ``keys`` for those of the sequences ``rows`` that have none yet.

        Args:
            rows: numbers of sequences.
            keys: the first keys that are packed, ``[b, Hkv, n, Dk]``.
            weights: bool ``[b, Hkv, n]``, which of them count; None if all do.
        """
        if self.mean is None:
            return
        if weights is None and self._fix_together(rows, keys):
            return
        write_key_mean(self.encoder, rows, keys, self.mean, self.scale, self.known, weights)

    def _fix_together(self, rows: np.ndarray, keys: torch.Tensor) -> bool:
        """Fix scale and mean of all sequences by one operation of a backend, if both are to be fixed and it can."""
        first, mean = self._first_update, self.mean
        if first is None or mean is None or self.known.any() or not np.array_equal(rows, np.arange(len(self.known))):
            return False
        if first.valid is not None or first.keys.shape[2] - first.sinks < kernels.LEAST_TOKENS:
            return False
        scale = self.encoder.write_key_basis(first.query, first.keys, first.sinks, keys, mean)
        if scale is None:
            return False
        self.scale = scale
        self.known[rows] = True
        return True

    def note_truncated(self, held: np.ndarray) -> None:
        """Take note which sequences still have pages, bool ``[B]``: the others have no mean any more."""
        self.known &= held

    def select(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them, which may repeat."""
        for name in ("mean", "scale"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[to_device(rows, tensor.device)])
        self.known = self.known[rows]

    def fork(self) -> KeyBasis:
        """An independent copy."""
        self.settle()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name in ("mean", "scale"):
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor.clone())
        other.known = self.known.copy()
        return other

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return self.__dict__

    def join(self, others: list[KeyBasis]) -> None:
        """Become the bases of these, one after the other."""
        for name in ("mean", "scale"):
            if getattr(self, name) is not None:
                setattr(self, name, torch.cat([getattr(other, name) for other in others]))
        self.known = np.concatenate([other.known for other in others])

    def state(self) -> dict[str, torch.Tensor]:
        """The contents as tensors by name; empty if nothing is fixed by the first tokens."""
        if self.mean is None:
            return {}
        state = {"center": self.mean.clone(), "center_known": torch.from_numpy(self.known.copy())}
        return state if self.scale is None else state | {"key_scale": self.scale.clone()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take what :meth:`state` returned. Files of earlier versions have no scale: their keys were not divided."""
        if self.mean is None:
            return
        device = self.mean.device
        # A copy: the means of later sequences are written into it, and others may restore the same state.
        self.mean, self.known = state["center"].to(device, copy=True), state["center_known"].numpy().copy()
        if self.scale is not None and "key_scale" in state:
            self.scale = state["key_scale"].to(device)


def write_key_mean(
    encoder: PageEncoder,
    rows: np.ndarray,
    keys: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor | None,
    known: np.ndarray,
    weights: torch.Tensor | None = None,
) -> None:
    """Write the mean of ``keys`` for those of the sequences ``rows`` that have none yet.

    Args:
        encoder: makes page records.
        rows: numbers of sequences.
        keys: the first keys that are packed, ``[b, Hkv, n, Dk]``.
        mean: float32 ``[B, page heads, dim]``, of all sequences; written.
        scale: float32 ``[B, Hkv, Dk]``, by what keys are divided; None if they are not.
        known: ``[B]``, not 0 for the sequences that have a mean; written.
        weights: bool ``[b, Hkv, n]``, which of the keys count; None if all do.
    """
    missing = known[rows] == 0
    if not missing.any():
        return
    own_scale = None if scale is None else rows_of(scale, rows)
    # Of sequences side by side the rows are a view, which can be written to.
    at_once = weights is None and missing.all() and is_run(rows)
    if not (at_once and encoder.write_key_mean(keys, own_scale, rows_of(mean, rows))):
        if weights is None:
            found = keys.float().mean(2)
        else:
            found = (keys.float() * weights.unsqueeze(-1)).sum(2) / weights.sum(2, keepdim=True).clamp_min(1)
        new = np.flatnonzero(missing)
        rotated = encoder.key_mean_of(found, own_scale)
        mean[to_device(rows[new], mean.device)] = rows_of(rotated, new).to(mean.dtype)
    known[rows] = 1


def key_scale(query: torch.Tensor, keys: torch.Tensor, valid: np.ndarray | None, sinks: int) -> torch.Tensor:
    """The scale of the keys of each sequence, head and channel; 1 where there are too few tokens.

    Args:
        query: ``[B, Hq, T, Dk]``, of the tokens.
        keys: ``[B, Hkv, T, Dk]``.
        valid: bool ``[B, T]``, False for padding; None if no token is padding.
        sinks: first tokens of each sequence that do not count.

    Returns:
        Float32 ``[B, Hkv, Dk]``, contiguous.
    """
    if valid is None:
        if keys.shape[2] - sinks < kernels.LEAST_TOKENS:
            return torch.ones(*keys.shape[:2], keys.shape[3], dtype=torch.float32, device=keys.device)
        return kernels.key_scale(query, keys, sinks, None)
    return kernels.key_scale(query, keys, sinks, to_device(valid & (valid.cumsum(1) > sinks), keys.device))
