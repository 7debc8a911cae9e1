"""What the queries of one attention call may see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


def visible(mask: torch.Tensor) -> torch.Tensor:
    """A boolean mask of what queries see, from a boolean or additive one."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A float32 mask to be added to scores, ``-inf`` where a query does not see, from a boolean or additive one."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.float().masked_fill(~visible(mask), -torch.inf)


@dataclass
class Visibility:
    """What the queries of one attention call may see.

    Attributes:
        start: position of the first query.
        length: number of queries.
        mask: boolean or additive mask ``[B, 1 or Hq, 1 or length, T]``; None if causality and the window say it all.
        mask_start: position of the mask's first column.
        causal: whether a query sees no later token. The mask can hide more.
        window: tokens a query sees, itself included (sliding windows); None for all.
    """

    start: int
    length: int
    mask: torch.Tensor | None
    mask_start: int
    causal: bool
    window: int | None

    def part(self, queries: slice) -> Visibility:
        """The visibility of some of the queries."""
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, queries]
        return replace(self, start=self.start + queries.start, length=queries.stop - queries.start, mask=mask)

    def sees_all(self, first_position: int) -> bool:
        """Whether every query sees every earlier token from ``first_position`` on."""
        in_window = self.window is None or first_position > self.start + self.length - 1 - self.window
        return self.mask is None and in_window

    def bias(self, positions: torch.Tensor, unused: torch.Tensor | None, heads: int, queries: slice) -> torch.Tensor:
        """A mask to be added to the scores of keys at ``positions``.

        Args:
            positions: int64 ``[B, H', n]``, ``H'`` 1 or the number of KV heads.
            unused: bool of the same shape, True where there is no key.
            heads: number of KV heads.
            queries: which of the queries.

        Returns:
            float32 ``[B, H', 1 or query heads per KV head, queries, n]``.
        """
        at = positions[:, :, None, None, :]
        first, last = queries.start, queries.stop
        query_at = torch.arange(self.start + first, self.start + last, device=positions.device)[:, None]
        hidden = at > query_at if self.causal else torch.zeros_like(at, dtype=torch.bool)
        if self.window is not None:
            hidden = hidden | (at <= query_at - self.window)
        if unused is not None:
            hidden = hidden | unused[:, :, None, None, :]
        if self.mask is None:
            return torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device).masked_fill_(hidden, -torch.inf)
        mask = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, first:last]
        # [B, 1 or Hq, q, T] -> [B, 1 or Hkv, 1 or g, q, T], then the columns of the keys
        mask = mask.unflatten(1, (1, 1) if mask.shape[1] == 1 else (heads, -1))
        column = at - self.mask_start
        outside = (column < 0) | (column >= mask.shape[-1])
        column = column.clamp(0, mask.shape[-1] - 1)
        shape = torch.broadcast_shapes(mask.shape[:-1], column.shape[:-1])
        gathered = mask.expand(*shape, -1).gather(-1, column.expand(*shape, -1))
        return additive(gathered).masked_fill(hidden | outside, -torch.inf)


#: One query that sees whatever it is given: what it may not see is not among it, or marked as unused.
EVERYTHING = Visibility(start=0, length=1, mask=None, mask_start=0, causal=False, window=None)
