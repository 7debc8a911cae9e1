"""The basis in which the keys of a sequence are packed: what its first packed tokens fix of it."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.storage.transfers import is_run, rows_of, to_device

#: Queries of a sequence from which their power is taken; fewer say too little.
_LEAST_QUERIES = 16
#: The largest exponent of a scale. Scaled keys stay in the range of half precision.
_LARGEST_EXPONENT = 4
#: Share of the mean power that every channel has at least.
_LEAST_POWER = 1e-6
_TINY = 1e-30


class KeyBasis:
    """The mean and the scale of the keys of each sequence; they never change while the sequence has pages.

    Keys are packed as ``rotation(key / scale) - mean``, and scores are those of ``rotation(query * scale)``. The scale
    of a channel is the square root of the keys' standard deviation divided by that of the queries, which makes the mean
    squared error of the scores least where the error of the rotated keys is the same in all channels. Without it, a
    rotation spreads the error of a few large channels, the biases of Qwen2's keys for instance, over channels that
    weigh more in the scores.

    Args:
        encoder: makes page records.
        batch: number of sequences.
        heads: page heads of a sequence.
        device: of the pages.

    Attributes:
        mean: float32 ``[B, page heads, dim]``, in the rotated basis; None if the codec subtracts none.
        scale: float32 ``[B, Hkv, Dk]``, powers of two, so that scaling is exact; None if the codec has none.
        power: float32 ``[B, Hkv, Dk]``, the mean square of the queries of the first update; 1 where they were too few.
        known: bool ``[B]``, whether the first page of a sequence has fixed mean and scale.
    """

    def __init__(self, encoder: PageEncoder, batch: int, heads: int, device: torch.device) -> None:
        self.encoder = encoder
        self.known = np.zeros(batch, dtype=bool)
        self.mean: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None
        self.power: torch.Tensor | None = None
        if encoder.centered:
            self.mean = torch.zeros(batch, heads, encoder.layout.sides["keys"].dim, device=device)
        if encoder.balanced:
            self.scale = torch.ones(batch, heads, encoder.layout.sides["keys"].dim, device=device)
            self.power = torch.ones_like(self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.mean, self.scale, self.power) if t is not None)

    def of(self, rows: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Mean and scale of the sequences ``rows``, ``[b, page heads, dim]`` each; None what there is not."""
        mean, scale = self.mean, self.scale
        return None if mean is None else rows_of(mean, rows), None if scale is None else rows_of(scale, rows)

    def note_queries(self, query: torch.Tensor, valid: np.ndarray | None) -> None:
        """Take the power of the queries of a first update.

        Args:
            query: ``[B, Hq, T, Dk]``, of all tokens of the update.
            valid: bool ``[B, T]``, False for padding; None if no token is padding.
        """
        if self.power is None or query.shape[2] < _LEAST_QUERIES:
            return
        counts = np.full(len(query), query.shape[2]) if valid is None else valid.sum(1)
        if valid is not None:
            query = query.masked_fill(~to_device(valid, query.device)[:, None, :, None], 0)
        squares = torch.linalg.vector_norm(query, dim=2, dtype=torch.float32).square_()
        squares = squares.unflatten(1, (self.power.shape[1], -1)).mean(2)
        if valid is None:
            self.power = squares / query.shape[2]
            return
        by_sequence = to_device(counts.astype(np.float32), query.device)[:, None, None]
        self.power = torch.where(by_sequence >= _LEAST_QUERIES, squares / by_sequence.clamp_min(1), 1.0)

    def fix(self, rows: np.ndarray, keys: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take mean and scale of ``keys`` for those of the sequences ``rows`` that have none yet.

        Args:
            rows: numbers of sequences.
            keys: the first keys that are packed, ``[b, Hkv, n, Dk]``.
            weights: ``[b, Hkv, n]``, which of them count; None if all do.
        """
        if self.mean is None or self.known[rows].all():
            return
        unknown = not self.known[rows].any()
        # Of sequences side by side the rows are a view, which can be written to.
        if weights is None and unknown and is_run(rows) and self.encoder.write_key_mean(keys, rows_of(self.mean, rows)):
            self.known[rows] = True
            return
        mean, variance = _moments(keys, weights)
        scale = None if self.power is None else balance(variance, rows_of(self.power, rows))
        self._fix(rows, self.encoder.key_mean_of(mean, scale), scale)

    def note_truncated(self, held: np.ndarray) -> None:
        """Take note which sequences still have pages, bool ``[B]``: the others have no basis any more."""
        self.known &= held

    def select(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them, which may repeat."""
        for name in ("mean", "scale", "power"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor[to_device(rows, tensor.device)])
        self.known = self.known[rows]

    def fork(self) -> KeyBasis:
        """An independent copy."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name in ("mean", "scale", "power"):
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else tensor.clone())
        other.known = self.known.copy()
        return other

    def join(self, others: list[KeyBasis]) -> None:
        """Become the bases of these, one after the other."""
        for name in ("mean", "scale", "power"):
            if getattr(self, name) is not None:
                setattr(self, name, torch.cat([getattr(other, name) for other in others]))
        self.known = np.concatenate([other.known for other in others])

    def state(self) -> dict[str, torch.Tensor]:
        """The contents as tensors by name; empty if nothing is fixed by the first tokens."""
        if self.mean is None:
            return {}
        state = {"center": self.mean.clone(), "center_known": torch.from_numpy(self.known.copy())}
        if self.scale is not None and self.power is not None:
            state |= {"key_scale": self.scale.clone(), "query_power": self.power.clone()}
        return state

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take what :meth:`state` returned. Files of earlier versions have no scale: their keys were not divided."""
        if self.mean is None:
            return
        device = self.mean.device
        self.mean, self.known = state["center"].to(device), state["center_known"].numpy().copy()
        if self.scale is not None and self.power is not None:
            ones = torch.ones(self.mean.shape, device=device)
            self.scale, self.power = (state[name].to(device) if name in state else ones.clone() for name in _BALANCE)

    def _fix(self, rows: np.ndarray, mean: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Take ``mean`` and ``scale``, of ``rows``, for those of them that have none yet."""
        assert self.mean is not None
        new = np.flatnonzero(~self.known[rows])
        index = to_device(rows[new], self.mean.device)
        self.mean[index] = rows_of(mean, new).to(self.mean.dtype)
        if self.scale is not None and scale is not None:
            self.scale[index] = rows_of(scale, new)
        self.known[rows] = True


_BALANCE = ("key_scale", "query_power")


def balance(variance: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """The scale of the keys of each channel: a power of two near ``(variance / power) ** (1 / 4)``.

    Its geometric mean over the channels is near 1, and it is between 1/16 and 16.

    Args:
        variance: of the keys, float32 ``[..., Dk]``.
        power: mean square of the queries, of the same shape.
    """
    ratio = [x + _LEAST_POWER * x.mean(-1, keepdim=True) + _TINY for x in (variance, power)]
    exponent = (ratio[0].log2() - ratio[1].log2()) / 4
    exponent = (exponent - exponent.mean(-1, keepdim=True)).nan_to_num_(0.0)
    exponent = exponent.clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).round_().to(torch.int32)
    return ((exponent + 127) << 23).view(torch.float32)  # the bits of a power of two


def _moments(keys: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance over the tokens of ``keys [b, Hkv, n, Dk]``, float32 ``[b, Hkv, Dk]`` each."""
    if weights is None:
        mean = keys.mean(2, dtype=torch.float32)
        squares = torch.linalg.vector_norm(keys, dim=2, dtype=torch.float32).square_() / keys.shape[2]
    else:
        count = weights.sum(2, keepdim=True).clamp_min(1)
        counted = keys.float() * weights.unsqueeze(-1)
        mean, squares = counted.sum(2) / count, counted.square().sum(2) / count
    return mean, (squares - mean.square()).clamp_min_(0)
