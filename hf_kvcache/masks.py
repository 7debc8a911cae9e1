"""Attention masks as the cache sees them: which new tokens are real, and which held tokens a query may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from hf_kvcache.binding import previous_implementation
from hf_kvcache.kernels.visibility import visible

_TAG = "_hf_kvcache_padding"
_DIAGONAL = "_hf_kvcache_diagonal"


@dataclass
class Padding:
    """What a mask says of padding when it says nothing else than that, causality and a sliding window.

    Attributes:
        attention_mask: the 2D mask ``[B, tokens seen]``, True or nonzero for real tokens; None if all are real.
        start: index of the first new token in it.
        length: number of new tokens.
        window: tokens a query sees, itself included; None for all.
    """

    attention_mask: torch.Tensor | None
    start: int
    length: int
    window: int | None = None

    @cached_property
    def none(self) -> bool:
        """Whether the mask calls every token real."""
        return self.attention_mask is None or bool(self.attention_mask.all())

    @cached_property
    def held(self) -> np.ndarray:
        """How many earlier tokens of each sequence the mask calls real, ``[B]`` on the host."""
        return self._earlier().sum(1).cpu().numpy()

    def held_from(self, first: np.ndarray) -> np.ndarray:
        """The same, counted from position ``first [B]`` on."""
        return (self._earlier_on_host & (np.arange(self.start) >= first[:, None])).sum(1)

    @cached_property
    def _earlier_on_host(self) -> np.ndarray:
        return self._earlier().cpu().numpy()

    def _earlier(self) -> torch.Tensor:
        assert self.attention_mask is not None
        return self.attention_mask[:, : self.start].bool()

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
    if isinstance(mask, torch.Tensor):
        known, window = _causal_window(kwargs.get("mask_function"))
        if known:
            padding = Padding(kwargs.get("attention_mask"), int(kwargs["q_offset"]), kwargs["q_length"], window)
            setattr(mask, _TAG, padding)
    return mask


def _causal_window(function: Any) -> tuple[bool, int | None]:
    """Whether a mask function is known to be plainly causal, and the sliding window that it has.

    transformers puts causality and a window together in a closure, which is looked into: one that looks otherwise is
    not known, and its mask is read as it is.
    """
    if function is causal_mask_function:
        return True, None
    parts = _enclosed(function, "and_masks.<locals>.and_mask", "mask_functions")
    if isinstance(parts, tuple) and len(parts) == 2 and parts[1] is causal_mask_function:
        window = _enclosed(parts[0], "sliding_window_overlay.<locals>.inner_mask", "sliding_window")
        return isinstance(window, int), window
    return False, None


def _enclosed(function: Any, qualified_name: str, variable: str) -> Any:
    """What a closure of that name in transformers' file of masks has kept under ``variable``; None if it is another."""
    if getattr(function, "__qualname__", None) != qualified_name or function.__module__ != masking_utils.__name__:
        return None
    kept = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return kept[variable].cell_contents if variable in kept else None


def padding_of(mask: torch.Tensor | None, seen: int, length: int, window: int | None) -> Padding | None:
    """The padding, if ``mask`` is known to say nothing but that, causality and the window; None if it may say more.

    Args:
        mask: what the attention function was given.
        seen: tokens seen before the new ones.
        length: number of new tokens.
        window: tokens a query sees in the layer, itself included; None for all.
    """
    if mask is None:
        return Padding(None, seen, length, window)
    padding = getattr(mask, _TAG, None)
    only_padding = mask.dim() == 2  # flash attention's masks: layers with a window and without may share one
    if padding is None and only_padding:
        padding = Padding(mask, seen, length, window)
        setattr(mask, _TAG, padding)
    if padding is None or (padding.start, padding.length) != (seen, length):
        return None
    return padding if only_padding or padding.window == window else None


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
