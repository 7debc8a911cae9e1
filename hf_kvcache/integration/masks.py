"""The mask function registered with transformers under ``hf_kvcache``, and the mask that was made last."""

from __future__ import annotations

import threading
from typing import Any
from weakref import ref

import torch
from torch.compiler import is_dynamo_compiling
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from hf_kvcache.integration.binding import previous_implementation
from hf_kvcache.integration.compiling import outside_graphs
from hf_kvcache.integration.padding import Padding, attach_padding


class _Latest(threading.local):
    """The mask that this thread made last.

    Attributes:
        owner: the options of the cache that was asked for the mask's sizes.
        asked: whether the cache was asked since the mask before: the next mask is for it, and not for a cache that is
            not of this package.
        padding: the padding that the mask hides; None if the mask says more than padding, causality and a window, or
            was not made yet.
    """

    owner: ref[Any] | None = None
    asked: bool = False
    padding: Padding | None = None


_latest = _Latest()


def expect_mask(owner: Any) -> None:
    """Take note that a mask is about to be made for the cache with the options ``owner``."""
    _latest.owner, _latest.asked, _latest.padding = ref(owner), True, None


def mask_is_expected(owner: Any) -> bool:
    """Whether the latest mask of this thread is for the cache with the options ``owner``: a model runs with it."""
    return _latest.owner is not None and _latest.owner() is owner


def latest_padding(owner: Any, start: int, length: int, batch: int) -> Padding | None:
    """The padding that the latest mask hides among ``length`` new tokens from ``start`` on.

    None if the mask was not made for these tokens. It is needed where keys and values are read as dense tensors: their
    reader does not say under which mask.
    """
    padding = _latest.padding
    if padding is None or not mask_is_expected(owner) or (padding.start, padding.length) != (start, length):
        return None
    mask = padding.attention_mask
    return padding if mask is None or (mask.dim() == 2 and mask.shape[0] == batch) else None


def mask_function(**kwargs: Any) -> torch.Tensor | None:
    """The mask of the implementation set before the binding, with its padding attached if it is plainly causal.

    Any other cache needs just this mask. The padding that is attached only spares this package's attention from reading
    the mask.
    """
    if is_dynamo_compiling() and isinstance(kwargs["q_offset"], torch.Tensor):
        return _previous_mask(kwargs)  # for a cache with a maximum length: the mask is part of the graph
    return _mask_with_padding(kwargs)


@outside_graphs
def _mask_with_padding(kwargs: dict[str, Any]) -> torch.Tensor | None:
    mask = _previous_mask(kwargs)
    if mask is None and not _makes_masks(kwargs):
        return None
    known, window = _causal_window(kwargs.get("mask_function"))
    if known:
        padding = Padding(kwargs.get("attention_mask"), int(kwargs["q_offset"]), kwargs["q_length"], window)
        _refuse_padding(padding)
        _latest.padding = padding
        if isinstance(mask, torch.Tensor):
            attach_padding(mask, padding)
    return mask


def _refuse_padding(padding: Padding) -> None:
    """Raise ValueError if a mask hides new tokens from a cache that takes none: its model compresses tokens unmasked.

    A single token is not asked for, because the answer would make a GPU wait at every step.
    """
    owner = _latest.owner() if _latest.asked and _latest.owner is not None else None
    mask, _latest.asked = padding.attention_mask, False
    if mask is None or getattr(owner, "takes_padding", True) or padding.length == 1:
        return
    shown = mask[:, padding.start : padding.start + padding.length].bool().all(1)
    if not bool(shown.all()):
        raise ValueError(
            f"attention_mask hides tokens of sequences {(~shown).nonzero().flatten().tolist()}: the model compresses "
            "its tokens without a mask, so padding would become part of compressed entries; accepted: sequences of one "
            "length, or one sequence at a time"
        )


def _makes_masks(kwargs: dict[str, Any]) -> bool:
    """Whether the implementation set before the binding has a mask function; transformers makes no masks without."""
    return previous_implementation(kwargs["config"]) in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping


def _previous_mask(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The mask of the implementation set before the binding."""
    if not _makes_masks(kwargs):
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[previous_implementation(kwargs["config"])](**kwargs)


def _causal_window(function: Any) -> tuple[bool, int | None]:
    """Whether a mask function is known to be plainly causal, and its sliding window.

    transformers combines causality and a window in a closure, whose variables are read here. A closure of another form
    is not known, and its mask is read in full.
    """
    if function is causal_mask_function:
        return True, None
    parts = _enclosed(function, "and_masks.<locals>.and_mask", "mask_functions")
    if isinstance(parts, tuple) and len(parts) == 2 and parts[1] is causal_mask_function:
        window = _enclosed(parts[0], "sliding_window_overlay.<locals>.inner_mask", "sliding_window")
        return isinstance(window, int), window
    return False, None


def _enclosed(function: Any, qualified_name: str, variable: str) -> Any:
    """The value of a ``variable`` of the closure of that name in transformers' file of masks.

    None if ``function`` is another function, or the closure has no such variable.
    """
    if getattr(function, "__qualname__", None) != qualified_name or function.__module__ != masking_utils.__name__:
        return None
    kept = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return kept[variable].cell_contents if variable in kept else None
