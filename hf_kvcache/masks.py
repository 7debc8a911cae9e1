"""Attention masks as the cache sees them: which new tokens are real, and which held tokens a query may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from hf_kvcache.binding import previous_implementation
from hf_kvcache.kernels.visibility import visible

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


def rows_that_see(mask: torch.Tensor) -> np.ndarray | None:
    """Which new tokens are real by a mask ``[B, H, q, T]`` that hides everything from padding: those that see any."""
    return _none_if_all(visible(mask[:, 0]).any(-1))


def _none_if_all(valid: torch.Tensor) -> np.ndarray | None:
    on_host = valid.cpu().numpy()
    return None if on_host.all() else on_host
