"""Reading the masks of a layer with a fixed maximum length, on the host: what is padding, and whether a mask says more.

Such masks are dense, ``[B, 1, T, max_length]``: transformers makes them before the compiled step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from hf_kvcache.kernels.static_state import FIRST, GAPS, LAST
from hf_kvcache.kernels.visibility import visible
from hf_kvcache.layers.static_contents import StaticContents


class MaskReading(NamedTuple):
    """What a mask says of the new tokens.

    Attributes:
        valid: bool ``[B, T]``, False for padding, which is not stored; None if no token is padding.
        mask: the mask where attention has to read it; None if it hides only padding, later tokens, and tokens outside
            of the window.
    """

    valid: np.ndarray | None
    mask: torch.Tensor | None


def read_mask(mask: torch.Tensor | None, storage: StaticContents, length: int) -> MaskReading:
    """Read the mask of ``length`` new tokens.

    Padding are the new tokens at either end of the update that none of them sees, as in the layers without a maximum.

    Args:
        mask: boolean or additive ``[B or 1, 1 or Hq, 1 or T, L]``, 2D ``[B, L]``, or None.
        storage: the tokens before the new ones.
        length: number of new tokens.

    Raises:
        ValueError: if the mask has no place for some of the tokens, or shows padding, of which nothing is held.
    """
    counters, seen = storage.numbers.counters, storage.seen
    if mask is None:
        padded = (counters[FIRST] > 0) | (counters[GAPS] > 0) | ((counters[LAST] < 0) & (seen > 0))
        if padded.any():
            raise _shows(int(np.flatnonzero(padded)[0]), "of an earlier update")
        return MaskReading(None, None)
    if mask.shape[-1] < seen + length:
        raise ValueError(
            f"attention_mask of {mask.shape[-1]} tokens with a cache that has seen {seen}, and {length} new ones; "
            f"accepted: a place for each of them, {seen + length} in all"
        )
    given, mask = mask, mask.cpu()
    shown = visible(mask) if mask.dim() == 4 else mask.bool()[:, None, None]
    # A bias that hides nothing (ALiBi) must be added to the scores, and so must a mask that differs between heads.
    plain = shown.shape[1] == 1 and not (mask.is_floating_point() and bool((shown & (mask != 0)).any()))
    shown = shown.any(1) if shown.shape[1] > 1 else shown[:, 0]  # [B, T, L]
    if plain and length == 1 and (one := _read_one(shown[:, 0], storage)) is not None:
        return one
    read = _read_block(mask, shown, storage, length, plain)
    return read if read.mask is None else read._replace(mask=given)


def new_valid(mask: torch.Tensor | None, length: int, start: int, batch: int) -> np.ndarray | None:
    """Which of ``length`` new tokens from position ``start`` on are no padding, bool ``[B, T]``; None if all are not.

    The arguments and the rule are those of :func:`read_mask`; nothing else of the mask is read.
    """
    if mask is None:
        return None
    mask = mask.cpu()
    shown = visible(mask) if mask.dim() == 4 else mask.bool()[:, None, None]
    shown = shown.any(1) if shown.shape[1] > 1 else shown[:, 0]
    return _valid(shown[:, :, start : start + length].numpy(), batch)


def _valid(new: np.ndarray, batch: int) -> np.ndarray | None:
    """Which new tokens are no padding, from what their queries see of them, ``[B or 1, T or 1, T]``."""
    # Nearly every token sees itself, so that few columns have to be read.
    own: np.ndarray = np.array(new.diagonal(0, 1, 2) if new.shape[1] == new.shape[2] else new.any(1))
    if own.all():
        return None
    columns = np.flatnonzero(~own.all(0))
    own[:, columns] = new[:, :, columns].any(1)
    between = np.logical_or.accumulate(own, 1) & np.logical_or.accumulate(own[:, ::-1], 1)[:, ::-1]
    return None if between.all() else np.broadcast_to(between, (batch, between.shape[1])).copy()


def _read_one(shown: torch.Tensor, storage: StaticContents) -> MaskReading | None:
    """What a mask ``[B or 1, L]`` of one new token says if that is plain; else None, and it is read in full."""
    rows, seen, counters = shown.numpy(), storage.seen, storage.numbers.counters
    start = storage.settings.start(seen)
    own = np.broadcast_to(rows[:, seen], storage.batch)
    if counters[GAPS].any():
        return None
    for row in range(storage.batch):
        if not own[row]:
            continue  # a query of padding may see anything
        line = rows[row if len(rows) > 1 else 0]
        first = int(counters[FIRST, row])
        low = max(first if first >= 0 else seen, start)
        expected = seen + 1 - low
        if np.count_nonzero(line[low : seen + 1]) != expected or np.count_nonzero(line) != expected:
            return None
    return MaskReading(None if own.all() else own[:, None].copy(), None)


def _read_block(
    mask: torch.Tensor, shown: torch.Tensor, storage: StaticContents, length: int, plain: bool
) -> MaskReading:
    """Read ``shown [B or 1, 1 or T, L]`` in full: compare it with what the tokens held and the new ones would show."""
    found, seen, width = shown.numpy(), storage.seen, shown.shape[-1]
    valid = _valid(found[:, :, seen : seen + length], storage.batch)
    queries = np.ones((storage.batch, length), dtype=bool) if valid is None else valid
    held = storage.held_places(width)
    if plain:
        everything = held.copy()
        everything[:, seen : seen + length] = queries
        columns, at = np.arange(width), np.arange(seen, seen + length)[:, None]
        causal = columns <= at
        if storage.settings.window is not None:
            causal &= columns > at - storage.settings.window
        # What a query of padding sees does not matter.
        if ((found == (causal & everything[:, None])) | ~queries[:, :, None]).all():
            return MaskReading(valid, None)
    hidden = ~held
    hidden[:, seen:] = False
    hidden[:, : storage.settings.start(seen)] = False  # what has left the window is not known any more
    wrong = (found & hidden[:, None] & queries[:, :, None]).any(1)
    if wrong.any():
        row, position = np.argwhere(wrong)[0].tolist()
        raise _shows(row, str(position))
    return MaskReading(valid, mask)


def _shows(row: int, which: str) -> ValueError:
    return ValueError(
        f"the attention mask shows padding of sequence {row} (token {which}), which is not held; accepted: masks that "
        "go on hiding padding"
    )
