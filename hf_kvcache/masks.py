"""Attention masks as the cache sees them: which new tokens are real, and which held tokens a query may see."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from hf_kvcache.binding import previous_implementation

_TAG = "_hf_kvcache_padding"
_DIAGONAL = "_hf_kvcache_diagonal"


@dataclass
class Padding:
    """What a mask says of padding when it says nothing else than that and causality.

    Attributes:
        attention_mask: the 2D mask ``[B, tokens seen]``, True or nonzero for real tokens; None if all are real.
        start: index of the first new token in it.
        length: number of new tokens.
    """

    attention_mask: torch.Tensor | None
    start: int
    length: int

    @cached_property
    def held(self) -> np.ndarray | None:
        """How many earlier tokens of each sequence the mask calls real, ``[B]`` on the host; None if all."""
        return None if self.attention_mask is None else self.attention_mask[:, : self.start].sum(1).cpu().numpy()

    @cached_property
    def valid(self) -> np.ndarray | None:
        """bool ``[B, length]`` on the host, False for padding; None if there is none. One transfer per mask."""
        if self.attention_mask is None:
            return None
        new = self.attention_mask[:, self.start : self.start + self.length].bool()
        return _none_if_all(new)


def mask_function(**kwargs: Any) -> torch.Tensor | None:
    """The mask of the implementation that was set before the binding, tagged if it is plainly causal.

    Registered under ``hf_kvcache``. The result is the very mask that any other cache needs; the tag only spares our
    attention the reading of it.
    """
    previous = previous_implementation(kwargs["config"])
    if previous not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        return None  # as transformers does for an implementation without a mask function
    mask = ALL_MASK_ATTENTION_FUNCTIONS[previous](**kwargs)
    if isinstance(mask, torch.Tensor) and kwargs.get("mask_function") is causal_mask_function:
        padding = Padding(kwargs.get("attention_mask"), int(kwargs["q_offset"]), kwargs["q_length"])
        setattr(mask, _TAG, padding)
    return mask


def padding_of(mask: torch.Tensor | None, seen: int, length: int) -> Padding | None:
    """The padding, if ``mask`` is known to say nothing but that and causality; None if it may say more.

    Args:
        mask: what the attention function was given.
        seen: tokens seen before the new ones.
        length: number of new tokens.
    """
    if mask is None:
        return Padding(None, seen, length)
    padding = getattr(mask, _TAG, None)
    if padding is None and mask.dim() == 2:  # flash attention's masks
        padding = Padding(mask, seen, length)
        setattr(mask, _TAG, padding)
    return padding if padding is not None and (padding.start, padding.length) == (seen, length) else None


def valid_on_diagonal(mask: torch.Tensor, length: int) -> np.ndarray | None:
    """Which new tokens are real according to a 4D mask ``[B, H, length, T]``: those that may see themselves."""
    known = getattr(mask, _DIAGONAL, None)
    if known is None:
        diagonal = mask[:, 0, :, -length:].diagonal(dim1=1, dim2=2)
        known = (_none_if_all(visible(diagonal)),)
        setattr(mask, _DIAGONAL, known)  # the layers of a model share their mask: one transfer serves them all
    return known[0]


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Where a boolean or additive mask lets a query see."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A boolean or additive mask as float32 to be added to scores, ``-inf`` where nothing is to be seen."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.float().masked_fill(~visible(mask), -torch.inf)


def _none_if_all(valid: torch.Tensor) -> np.ndarray | None:
    on_host = valid.cpu().numpy()
    return None if on_host.all() else on_host


@dataclass
class Visibility:
    """What the queries of one attention call may see.

    Attributes:
        start: position of the first query.
        length: number of queries.
        mask: boolean or additive mask ``[B, 1 or Hq, 1 or length, T]`` to obey; None if causality says it all.
        mask_start: position of the mask's first column.
        causal: whether a query sees no later token, apart from what the mask says.
        window: tokens a query sees, itself included (sliding windows); None for all.
    """

    start: int
    length: int
    mask: torch.Tensor | None
    mask_start: int
    causal: bool
    window: int | None

    def part(self, queries: slice) -> Visibility:
        """The same for some of the queries."""
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, queries]
        return replace(self, start=self.start + queries.start, length=queries.stop - queries.start, mask=mask)

    def sees_all(self, first_position: int) -> bool:
        """Whether every query sees every earlier token from ``first_position`` on."""
        in_window = self.window is None or first_position > self.start + self.length - 1 - self.window
        return self.mask is None and in_window

    def bias(self, positions: torch.Tensor, unused: torch.Tensor | None, heads: int, queries: slice) -> torch.Tensor:
        """What to add to the scores of keys at ``positions``.

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
            return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
        mask = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, first:last]
        # [B, 1 or Hq, q, T] -> [B, 1 or Hkv, 1 or g, q, T], then the columns of the keys
        mask = mask.unflatten(1, (1, 1) if mask.shape[1] == 1 else (heads, -1))
        column = at - self.mask_start
        outside = (column < 0) | (column >= mask.shape[-1])
        column = column.clamp(0, mask.shape[-1] - 1)
        shape = torch.broadcast_shapes(mask.shape[:-1], column.shape[:-1])
        gathered = mask.expand(*shape, -1).gather(-1, column.expand(*shape, -1))
        return additive(gathered).masked_fill(hidden | outside, -torch.inf)
