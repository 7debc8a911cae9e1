"""Attention masks as the cache sees them: which new tokens are padding, and which held tokens a query may see."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import ref

import numpy as np
import torch
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from hf_kvcache.integration.binding import previous_implementation
from hf_kvcache.integration.compiling import outside_graphs
from hf_kvcache.kernels.padding import NO_PADDING, PaddingPlaces
from hf_kvcache.kernels.visibility import visible

_TAG = "_hf_kvcache_padding"
_VALID = "_hf_kvcache_valid"
_CHECKED = "_hf_kvcache_checked"


@dataclass
class Padding:
    """What a mask says of padding when it says nothing else than that, causality and a sliding window.

    Padding is what a mask hides at either end of an update, in the order of its tokens. A token that it hides between
    others is a token like them: it is stored, and whether it is seen is for each later mask to say.

    Attributes:
        attention_mask: the 2D mask ``[B, tokens seen]``, True or nonzero for tokens to be seen; None if all are.
        start: index of the first new token in it.
        length: number of new tokens.
        window: tokens a query sees, itself included; None for all.
    """

    attention_mask: torch.Tensor | None
    start: int
    length: int
    window: int | None = None
    _compared: tuple[PaddingPlaces, bool] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def none(self) -> bool:
        """Whether the mask hides nothing; raises ValueError if it has no place for some of the tokens."""
        if self.attention_mask is None:
            return True
        self._check_length(self.attention_mask)
        return bool(self.attention_mask.all())

    @cached_property
    def _new(self) -> tuple[np.ndarray | None, bool]:
        """Which new tokens are no padding, and whether the mask hides others than padding among them."""
        mask, stop = self.attention_mask, self.start + self.length
        if mask is None:
            return None, False
        self._check_length(mask)
        shown = mask[:, self.start : stop].bool().cpu().numpy()
        if shown.all():
            return None, False
        after_first = np.logical_or.accumulate(shown, 1)
        before_last = np.logical_or.accumulate(shown[:, ::-1], 1)[:, ::-1]
        valid = after_first & before_last
        return None if valid.all() else valid, bool((valid & ~shown).any())

    @property
    def valid(self) -> np.ndarray | None:
        """bool ``[B, length]`` on the host, False for padding; None if there is none. One transfer per mask.

        Raises:
            ValueError: if the mask has no place for some of the tokens.
        """
        return self._new[0]

    def hides_only(self, places: PaddingPlaces) -> bool:
        """Whether the mask hides the padding, which earlier updates had at ``places``, and nothing else.

        Raises:
            ValueError: if it shows some of the padding, of which nothing is stored.
        """
        if self._compared is None or self._compared[0] is not places:
            self._compared = places, self._compare(places)
        return self._compared[1]

    def _check_length(self, mask: torch.Tensor) -> None:
        if mask.shape[1] < self.start + self.length:
            raise ValueError(
                f"attention_mask of {mask.shape[1]} tokens with a cache that has seen {self.start}, and {self.length} "
                f"new ones; accepted: a place for each of them, {self.start + self.length} in all. If the cache holds "
                "another prompt than this one, call reset() first"
            )

    def _compare(self, places: PaddingPlaces) -> bool:
        mask = self.attention_mask
        if self.none or mask is None:
            if places is not NO_PADDING:
                raise _shows(int(places.rows[0]), int(places.positions[0]))
            return True
        earlier = mask[:, : self.start].bool()
        rows, positions = (torch.from_numpy(x).to(mask.device) for x in (places.rows, places.positions))
        shown = earlier[rows, positions]
        # One transfer: what each sequence is shown, then what is shown of the padding.
        counts = torch.cat([earlier.sum(1), shown.long()]).cpu().numpy()
        if wrong := np.flatnonzero(counts[len(mask) :]).tolist():
            raise _shows(int(places.rows[wrong[0]]), int(places.positions[wrong[0]]))
        as_many = np.array_equal(counts[: len(mask)], self.start - places.counts(len(mask)))
        return as_many and not self._new[1]


def _shows(row: int, position: int) -> ValueError:
    return ValueError(
        f"the attention mask shows token {position} of sequence {row}, which was padding when it came (hidden at "
        "an end of its update) and is not held; accepted: masks that go on hiding padding. To use one that shows it, "
        "fill the cache under a mask that does"
    )


class _Latest(threading.local):
    """The mask that this thread made last: for which cache, and what it says of padding.

    Attributes:
        owner: the options of the cache that was asked for the mask's sizes.
        padding: None if the mask says more than padding, causality and a window, or was not made yet.
    """

    owner: ref[Any] | None = None
    padding: Padding | None = None


_latest = _Latest()


def expect_mask(owner: Any) -> None:
    """Take note that a mask is about to be made for the cache with the options ``owner``."""
    _latest.owner, _latest.padding = ref(owner), None


def mask_is_expected(owner: Any) -> bool:
    """Whether the latest mask of this thread is for the cache with the options ``owner``: a model runs with it."""
    return _latest.owner is not None and _latest.owner() is owner


def latest_padding(owner: Any, start: int, length: int, batch: int) -> Padding | None:
    """What the mask made last says of ``length`` new tokens from ``start`` on; None if it was not made for them.

    For keys and values that are read as dense tensors: by someone who does not say under which mask.
    """
    padding = _latest.padding
    if padding is None or not mask_is_expected(owner) or (padding.start, padding.length) != (start, length):
        return None
    mask = padding.attention_mask
    return padding if mask is None or (mask.dim() == 2 and mask.shape[0] == batch) else None


@outside_graphs
def mask_function(**kwargs: Any) -> torch.Tensor | None:
    """The mask of the implementation that was set before the binding, tagged if it is plainly causal.

    Registered under ``hf_kvcache``. The result is the very mask that any other cache needs; the tag only spares our
    attention the reading of it.
    """
    previous = previous_implementation(kwargs["config"])
    if previous not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        return None  # as transformers does for an implementation without a mask function
    mask = ALL_MASK_ATTENTION_FUNCTIONS[previous](**kwargs)
    known, window = _causal_window(kwargs.get("mask_function"))
    if known:
        padding = Padding(kwargs.get("attention_mask"), int(kwargs["q_offset"]), kwargs["q_length"], window)
        _latest.padding = padding
        if isinstance(mask, torch.Tensor):
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


def valid_in(mask: torch.Tensor, length: int) -> np.ndarray | None:
    """Which new tokens are no padding by a 4D mask ``[B, H, 1 or length, T]``; None if all are tokens.

    Padding sees nothing and is seen by none of the new tokens. Whatever else a mask says, a token is kept: to see
    oneself is not asked for.
    """
    known = getattr(mask, _VALID, None)
    if known is None:
        known = (_valid_in(mask, length),)
        setattr(mask, _VALID, known)  # the layers of a model share their mask: one transfer serves them all
    return known[0]


def _valid_in(mask: torch.Tensor, length: int) -> np.ndarray | None:
    new = visible(mask[..., -length:]).any(1)
    if mask.shape[2] == length:
        if bool(new.diagonal(dim1=1, dim2=2).all()):
            return None  # the usual case, without a look at the whole mask
        valid = new.any(1) | visible(mask).any(3).any(1)
    else:
        valid = new.any(1)  # all queries see the same
    on_host = valid.cpu().numpy()
    return None if on_host.all() else on_host


def check_hidden(mask: torch.Tensor, mask_start: int, places: PaddingPlaces, valid: np.ndarray | None) -> None:
    """Raise ValueError if a 4D mask shows one of the new tokens some of the padding, of which nothing is stored.

    Args:
        mask: ``[B, H, q, T]``.
        mask_start: position of its first column.
        places: the padding of earlier updates.
        valid: which new tokens ``[B, q]`` are no padding; what others are shown does not matter.
    """
    if places is NO_PADDING or getattr(mask, _CHECKED, None) is places:
        return
    columns = places.positions - mask_start
    inside = (columns >= 0) & (columns < mask.shape[-1])
    rows, columns = places.rows[inside], columns[inside]
    at_row = rows if mask.shape[0] > 1 else np.zeros_like(rows)
    shown = visible(mask[torch.from_numpy(at_row).to(mask.device), :, :, torch.from_numpy(columns).to(mask.device)])
    shown = shown.any(1)  # [n, q]
    if valid is not None and shown.shape[1] == valid.shape[1]:
        shown = shown & torch.from_numpy(valid[rows]).to(shown.device)
    if wrong := torch.nonzero(shown.any(1)).flatten().tolist():
        raise _shows(int(rows[wrong[0]]), int(places.positions[inside][wrong[0]]))
    setattr(mask, _CHECKED, places)
