"""Reading attention masks: which new tokens are padding, and whether a mask shows padding that is not stored."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from weakref import ref

import numpy as np
import torch

from hf_kvcache.kernels.padding import NO_PADDING, PaddingPlaces
from hf_kvcache.kernels.visibility import visible

# Attributes that are set on masks. The layers of a model share their mask, so it is read only once.
_PADDING = "_hf_kvcache_padding"
_VALID = "_hf_kvcache_valid"
_CHECKED = "_hf_kvcache_checked"
#: Dtypes of masks that numpy reads where they are.
_READ_IN_PLACE = (torch.bool, torch.int64, torch.int32, torch.float32)


class _Attached(threading.local):
    """The masks of this thread whose padding is known, as long as they are in use: those of a forward pass."""

    def __init__(self) -> None:
        self.masks: list[ref[torch.Tensor]] = []


_attached = _Attached()


@dataclass
class Padding:
    """The padding that a mask hides, of a mask that hides nothing else by itself than causality and a window do.

    Padding are the tokens that a mask hides at either end of an update, in the order of its tokens. A token that the
    mask hides between others is no padding: it is stored, and each later mask says whether it is seen.

    Attributes:
        attention_mask: the 2D mask ``[B, tokens seen]``, True or nonzero for tokens to be seen; None if all are.
        start: index of the first new token in the mask.
        length: number of new tokens.
        window: tokens a query sees, itself included; None for all.
    """

    attention_mask: torch.Tensor | None
    start: int
    length: int
    window: int | None = None
    _compared: tuple[PaddingPlaces, bool] | None = field(default=None, repr=False, compare=False)
    _shown_new: np.ndarray | None = field(default=None, repr=False, compare=False)
    _found: tuple[np.ndarray | None, bool] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def none(self) -> bool:
        """Whether the mask hides nothing; raises ValueError if it is too short for the tokens."""
        if self.attention_mask is None:
            return True
        self._check_length(self.attention_mask)
        return bool(self.attention_mask.all())

    @property
    def _new(self) -> tuple[np.ndarray | None, bool]:
        """Which new tokens are no padding, and whether the mask hides some of these."""
        if self._found is None:
            self._found = self._find_new()
        return self._found

    def _find_new(self) -> tuple[np.ndarray | None, bool]:
        mask, shown = self.attention_mask, self._shown_new
        if mask is None:
            return None, False
        self._check_length(mask)
        if shown is None:
            shown = mask[:, self.start : self.start + self.length].bool().cpu().numpy()
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
            ValueError: if the mask is too short for the tokens.
        """
        return self._new[0]

    def hides_only(self, places: PaddingPlaces) -> bool:
        """Whether the mask hides the padding of earlier updates, which is at ``places``, and nothing else.

        Raises:
            ValueError: if the mask shows some of this padding, of which nothing is stored.
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
        if mask is None or (places is NO_PADDING and self.none):
            if places is not NO_PADDING:
                raise _shows(int(places.rows[0]), int(places.positions[0]))
            return True
        self._check_length(mask)
        if mask.device.type == "cpu" and mask.dtype in _READ_IN_PLACE:
            array = (mask.detach() if mask.requires_grad else mask).numpy()[:, : self.start + self.length]
            # All hidden tokens are the padding: the new ones are shown, too.
            alone = np.count_nonzero(array) == array.size - len(places.rows)
            if alone and not array[places.rows, places.positions].any():
                self._found = None, False
                return True
        count, seen_padding, self._shown_new = _read(mask[:, : self.start + self.length].bool(), self.start, places)
        if wrong := np.flatnonzero(seen_padding).tolist():
            raise _shows(int(places.rows[wrong[0]]), int(places.positions[wrong[0]]))
        # All padding is hidden, so that as many tokens as that are hidden only if nothing else is.
        return count == len(mask) * self.start - len(places.rows) and not self._new[1]


def _read(shown: torch.Tensor, start: int, places: PaddingPlaces) -> tuple[int, np.ndarray, np.ndarray]:
    """What a mask ``[B, tokens]`` says, by one transfer at most.

    Returns:
        How many of the first ``start`` tokens of all sequences are shown; which of the ``places`` among them are; and
        which of the tokens behind them are, bool ``[B, tokens - start]``.
    """
    earlier, new = shown[:, :start], shown[:, start:]
    parts = earlier.sum()[None], earlier[places.on_device(shown.device)].long(), new.flatten().long()
    count, padding, rest = np.split(torch.cat(parts).cpu().numpy(), [1, 1 + len(places.rows)])
    return int(count[0]), padding, rest.reshape(new.shape).astype(bool)


def attach_padding(mask: torch.Tensor, padding: Padding) -> None:
    """Take note that ``mask`` says nothing but ``padding``, causality and a window."""
    setattr(mask, _PADDING, padding)
    _attached.masks = [known for known in _attached.masks if known() is not None] + [ref(mask)]


def _padding_of_copy(mask: torch.Tensor, kind: tuple[int, int, int | None]) -> Padding | None:
    """The padding of the mask of a ``(start, length, window)`` that ``mask`` is a copy of on another device, or None.

    Where layers lie on several devices, accelerate copies the mask to the device of each of them. A copy has no
    attributes. Its elements are compared, since a model may also have added something to them; this waits for a GPU.
    """
    for known in _attached.masks:
        original = known()
        if original is None or (original.shape, original.dtype) != (mask.shape, mask.dtype):
            continue
        padding: Padding = getattr(original, _PADDING)
        if (padding.start, padding.length, padding.window) != kind or original.device == mask.device:
            continue
        if torch.equal(original.to(mask.device), mask):
            return padding
    return None


def padding_of(mask: torch.Tensor | None, seen: int, length: int, window: int | None) -> Padding | None:
    """The padding, if ``mask`` is known to say only that, causality and the window; None if it may say more.

    Args:
        mask: the mask that the attention function was given.
        seen: tokens seen before the new ones.
        length: number of new tokens.
        window: tokens a query sees in the layer, itself included; None for all.
    """
    if mask is None:
        return Padding(None, seen, length, window)
    padding = getattr(mask, _PADDING, None)
    only_padding = mask.dim() == 2  # flash attention's masks, which layers with and without a window share
    if padding is None and only_padding:
        padding = Padding(mask, seen, length, window)
        attach_padding(mask, padding)
    elif padding is None:
        padding = _padding_of_copy(mask, (seen, length, window))
        if padding is not None:
            setattr(mask, _PADDING, padding)
    if padding is None or (padding.start, padding.length) != (seen, length):
        return None
    return padding if only_padding or padding.window == window else None


def valid_in(mask: torch.Tensor, length: int) -> np.ndarray | None:
    """Which new tokens are no padding by a 4D mask ``[B, H, 1 or length, T]``; None if all are tokens.

    Padding sees nothing, and none of the new tokens sees it. A token is stored whatever else a mask says: it need not
    even see itself.
    """
    known = getattr(mask, _VALID, None)
    if known is None:
        known = (_valid_in(mask, length),)
        setattr(mask, _VALID, known)
    return known[0]


def shown_tokens(shown: torch.Tensor) -> np.ndarray | None:
    """A mask of the new tokens ``[B, q]`` on the host; None if it hides none. It is read once, by the first layer."""
    known = getattr(shown, _VALID, None)
    if known is None:
        on_host = shown.cpu().numpy()
        known = (None if on_host.all() else on_host,)
        setattr(shown, _VALID, known)
    return known[0]


def _valid_in(mask: torch.Tensor, length: int) -> np.ndarray | None:
    new = visible(mask[..., -length:]).any(1)
    if mask.shape[2] == length:
        if bool(new.diagonal(dim1=1, dim2=2).all()):
            return None  # the usual case, without reading the whole mask
        valid = new.any(1) | visible(mask).any(3).any(1)
    else:
        valid = new.any(1)  # all queries see the same
    on_host = valid.cpu().numpy()
    return None if on_host.all() else on_host


def check_hidden(mask: torch.Tensor, mask_start: int, places: PaddingPlaces, valid: np.ndarray | None) -> None:
    """Raise ValueError if a 4D mask shows one of the new tokens some of the padding, of which nothing is stored.

    Args:
        mask: ``[B, H, q, T]``.
        mask_start: position of the mask's first column.
        places: the padding of earlier updates.
        valid: which new tokens ``[B, q]`` are no padding. What padding sees does not matter.
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


def _shows(row: int, position: int) -> ValueError:
    return ValueError(
        f"the attention mask shows token {position} of sequence {row}, which was padding when it came (hidden at "
        "an end of its update) and is not held; accepted: masks that go on hiding padding. To use one that shows it, "
        "fill the cache under a mask that does"
    )
