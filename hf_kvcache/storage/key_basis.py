"""The basis in which the keys of a sequence are packed: what its first packed tokens fix of it."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels import pack as kernels
from hf_kvcache.storage.transfers import is_run, rows_of, to_device

#: Tokens of a first update that fix a scale; fewer say too little.
_LEAST_TOKENS = 8
#: The largest exponent of a scale.
_LARGEST_EXPONENT = 4
#: Root mean squares of keys in half precision are at most two to the power of this after scaling, far from infinity.
_HALF_EXPONENT = 12
#: Share of the mean over the channels that every channel has at least.
_LEAST_POWER = 1e-6
_TINY = 1e-30


class KeyBasis:
    """The scale and the mean of the keys of each sequence. They never change while the sequence holds tokens in pages.

    Keys are packed as ``rotation(key / scale) - mean``, and their scores are those of ``rotation(query * scale)``. The
    first update fixes the scale: that of a channel is the square root of the keys' standard deviation divided by that
    of the queries. An error that is the same in all rotated channels then adds least to the squared error of the
    scores. Without it, the rotation spreads the error of a few large channels, such as the biases of Qwen2's keys make,
    over channels that weigh more in the scores. The first page fixes the mean.

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
        self.scale: torch.Tensor | None = None
        if encoder.centered:
            self.mean = torch.zeros(batch, heads, encoder.layout.sides["keys"].dim, device=device)
        if encoder.balanced:
            self.scale = torch.ones(batch, heads, encoder.layout.sides["keys"].dim, device=device)

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
        """Fix the scale by a first update, before any of its tokens is packed.

        Args:
            query: ``[B, Hq, T, Dk]``, of all tokens of the update.
            keys: ``[B, Hkv, T, Dk]``.
            valid: bool ``[B, T]``, False for padding; None if no token is padding.
            sinks: first tokens of each sequence that are no example of the others.
        """
        if self.scale is not None:
            self.scale = key_scale(query, keys, valid, sinks)

    def fix_mean(self, rows: np.ndarray, keys: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take the mean of ``keys`` for those of the sequences ``rows`` that have none yet.

        Args:
            rows: numbers of sequences.
            keys: the first keys that are packed, ``[b, Hkv, n, Dk]``.
            weights: bool ``[b, Hkv, n]``, which of them count; None if all do.
        """
        if self.mean is None or self.known[rows].all():
            return
        unknown, (own, scale) = not self.known[rows].any(), self.of(rows)
        # Of sequences side by side the rows are a view, which can be written to.
        assert own is not None
        if weights is None and unknown and is_run(rows) and self.encoder.write_key_mean(keys, scale, own):
            self.known[rows] = True
            return
        if weights is None:
            mean = keys.float().mean(2)
        else:
            mean = (keys.float() * weights.unsqueeze(-1)).sum(2) / weights.sum(2, keepdim=True).clamp_min(1)
        new = np.flatnonzero(~self.known[rows])
        rotated = self.encoder.key_mean_of(mean, scale)
        self.mean[to_device(rows[new], self.mean.device)] = rows_of(rotated, new).to(self.mean.dtype)
        self.known[rows] = True

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
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name in ("mean", "scale"):
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor.clone())
        other.known = self.known.copy()
        return other

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
    batch, heads, length, dim = keys.shape
    if valid is None:
        count: torch.Tensor | int = length - sinks
        if length - sinks < _LEAST_TOKENS:
            return torch.ones(batch, heads, dim, device=keys.device)
        query, keys = query[:, :, sinks:], keys[:, :, sinks:]
        at_once = kernels.key_scale(query, keys)
        if at_once is not None:
            return at_once
    else:
        counted = valid & (valid.cumsum(1) > sinks)
        there = to_device(counted, keys.device)[:, None, :, None]
        count = to_device(counted.sum(1).astype(np.float32), keys.device)[:, None, None]
        # What stands at padding may be NaN, and 0 * NaN is not 0.
        query, keys = query.masked_fill(~there, 0), keys.masked_fill(~there, 0)
        least, count = count >= _LEAST_TOKENS, count.clamp_min(1)
    power = _squares(query).unflatten(1, (heads, -1)).mean(2) / count
    squares = _squares(keys) / count
    variance = squares - (keys.sum(2, dtype=torch.float32) / count).square()
    # Kernels divide in the dtype of the keys.
    lowest = (squares.log2() / 2 - _HALF_EXPONENT).ceil() if keys.dtype == torch.float16 else None
    scale = balanced(variance.clamp_min_(0), power, lowest)
    return scale if valid is None else torch.where(least, scale, 1.0)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of the squares over tokens, float32 ``[B, H, D]``, of ``x [B, H, T, D]``."""
    wider = torch.promote_types(x.dtype, torch.float32)  # numbers of 64 bits cannot be summed in 32
    return torch.linalg.vector_norm(x, dim=2, dtype=wider).float().square_()


def balanced(variance: torch.Tensor, power: torch.Tensor, lowest: torch.Tensor | None = None) -> torch.Tensor:
    """The scale of the keys of each channel: a power of two near ``(variance / power) ** (1 / 4)``.

    Its geometric mean over the channels is near 1, and it is between 1/16 and 16.

    Args:
        variance: of the keys, float32 ``[..., Dk]``.
        power: mean square of the queries, of the same shape.
        lowest: the smallest exponents, of the same shape; None where nothing but the range bounds them.
    """
    ratio = [x + _LEAST_POWER * x.mean(-1, keepdim=True) + _TINY for x in (variance, power)]
    exponent = (ratio[0].log2() - ratio[1].log2()) / 4
    exponent = (exponent - exponent.mean(-1, keepdim=True)).nan_to_num_(0.0).round_()
    if lowest is not None:
        exponent = torch.maximum(exponent, lowest.nan_to_num(0.0))
    exponent = exponent.clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).to(torch.int32)
    return ((exponent + 127) << 23).view(torch.float32)  # the bits of a power of two
