"""Attention to single tokens of a layer, which a model's indexer has picked for each query."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.kernels import latent_picked
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.visibility import Visibility, visible
from hf_kvcache.storage.transfers import to_device

#: A position behind all tokens.
_BEHIND = torch.iinfo(torch.int64).max
_TABLE = "picked"


def attend_picked(
    query: torch.Tensor,
    positions: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
) -> Attention:
    """Attention of each query to tokens of its own. Only these are read and decoded.

    Args:
        query: ``[B, H, q, r + dr]``, taken into latent space.
        positions: int64 ``[B, q, k]``, the positions of the tokens of each query; negative for none. No position
            occurs twice for a query.
        pages: the packed latents; None if there are none.
        dense: the full-precision latents, with their positions.
        visibility: what the queries may see beside that. A mask has one head.
        scoring: how scores are made.

    Returns:
        As :func:`hf_kvcache.kernels.latent_decode.latent_attend`. Positions that the query may not see, and those of
        which nothing is stored, count as none.
    """
    places = places_of(positions.flatten(1), pages, dense).view(positions.shape)
    places.masked_fill_(_hidden(positions, visibility), -1)
    return latent_picked.attend_picked(query, places, pages, dense, scoring)


def places_of(positions: torch.Tensor, pages: Pages | None, dense: DenseTokens) -> torch.Tensor:
    """Where tokens lie, as :func:`hf_kvcache.kernels.latent_picked.attend_picked` takes it.

    Args:
        positions: int64 ``[B, n]``.
        pages: the pages, of one KV head; None if there are none.
        dense: the full-precision tokens with their positions, which ascend where tokens are.

    Returns:
        int64 ``[B, n]``, -1 where no token has the position.
    """
    places = _slots_of(positions, dense)
    if pages is None:
        return places
    column, place = _in_pages(positions, pages)
    slots = dense.keys.shape[2]
    return torch.where(place >= 0, slots + column * pages.layout.page_size + place, places)


def _slots_of(positions: torch.Tensor, dense: DenseTokens) -> torch.Tensor:
    at, slots = dense.positions, dense.keys.shape[2]
    assert at is not None
    if not slots:
        return torch.full_like(positions, -1)
    if dense.unused is not None:
        # A slot without a token repeats the position before it, of which the search finds the first.
        at = at.masked_fill(dense.unused, -1).cummax(1).values
    slot = torch.searchsorted(at.contiguous(), positions).clamp_(max=slots - 1)
    found = (at.gather(1, slot) == positions) & (positions >= 0)
    return slot.masked_fill_(~found, -1)


def _in_pages(positions: torch.Tensor, pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
    """The column and the place behind its beginning of each position; the place is -1 where no page has it."""
    table = pages.prepared.get(_TABLE)
    if table is None:
        table = pages.prepared[_TABLE] = _first_and_count(pages)
    first, count = table
    if first is None:  # the positions of a row have no gaps, and all of its pages are full
        offset = positions - count
        inside = (offset >= 0) & (offset < pages.columns * pages.layout.page_size)
        return torch.zeros_like(offset), offset.masked_fill_(~inside, -1)
    column = (torch.searchsorted(first, positions, right=True) - 1).clamp_(min=0)
    held = count.gather(1, column)
    if not pages.scattered:
        place = positions - first.gather(1, column)
        return column, place.masked_fill_((place < 0) | (place >= held), -1)
    stored = pages.on_device(positions=True).positions
    assert stored is not None
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    inside = torch.arange(pages.layout.page_size, device=positions.device) < held[:, :, None]
    same = (stored[rows, column] == positions[:, :, None]) & inside
    return column, torch.where(same.any(2), same.long().argmax(2), -1)


def _first_and_count(pages: Pages) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Position of the first token and number of tokens of each page, int64 ``[rows, columns]``.

    If the pages of each row stand side by side and are full, None and the position of each row's first token,
    ``[rows, 1]``.
    """
    size, there = pages.layout.page_size, pages.counts > 0
    begin = pages.first[:, :1]
    if pages.full and not pages.scattered and (pages.first == begin + np.arange(pages.columns) * size).all():
        with torch.inference_mode(False):
            return None, to_device(begin.copy(), pages.device)
    first = np.where(there, pages.first, _BEHIND)
    with torch.inference_mode(False):
        both = to_device(np.stack([first, pages.counts.astype(np.int64)]), pages.device)
    return both[0], both[1]


def _hidden(positions: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    """Which of the positions ``[B, q, k]`` the queries may not see."""
    hidden = positions < 0
    length = positions.shape[1]
    if visibility.causal or visibility.window is not None:
        query_at = torch.arange(visibility.start, visibility.start + length, device=positions.device)[:, None]
        if visibility.causal:
            hidden |= positions > query_at
        if visibility.window is not None:
            hidden |= positions <= query_at - visibility.window
    if visibility.mask is None:
        return hidden
    mask = visibility.mask[:, 0].expand(positions.shape[0], length, -1)
    column = positions - visibility.mask_start
    hidden |= (column < 0) | (column >= mask.shape[-1])
    return hidden | ~visible(mask.gather(2, column.clamp(0, mask.shape[-1] - 1)))
