"""Gathering of single latents and rotary keys in plain torch: the definition for every backend."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.inputs import DenseTokens, Pages
from hf_kvcache.kernels.reference.hadamard import rotate
from hf_kvcache.kernels.reference.levels import decode_side


def gather_latents(pages: Pages | None, dense: DenseTokens, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Single tokens in the rotated basis of the pages. Only the pages that hold some of them are decoded.

    Without pages, and for codecs that do not rotate, this is the basis of the model.

    Args:
        pages: the packed tokens, of one KV head and without a key mean; or None.
        dense: the full-precision tokens: latents ``[B, 1, slots, r]`` as keys, rotary keys ``[B, 1, slots, dr]`` as
            values. Their positions are not read.
        places: int64 ``[B, n]``: a slot of ``dense``, or ``slots + column * P + place`` in a page, or -1 for no token.

    Returns:
        Latents ``[B, 1, n, r]`` and rotary keys ``[B, 1, n, dr]`` of the dtype of ``dense``; 0 where there is no token.
        They may be valid until the next call on this thread only.
    """
    slots = dense.keys.shape[2]
    out = []
    for side, held in (("keys", dense.keys), ("values", dense.values)):
        tokens = held.new_zeros(*places.shape, held.shape[3])
        row, at = torch.nonzero((places >= 0) & (places < slots), as_tuple=True)
        full = held[row, 0, places[row, at]]
        tokens[row, at] = full if pages is None else rotate(full.float(), pages.layout.sides[side]).to(held.dtype)
        row, at = torch.nonzero(places >= slots, as_tuple=True)
        if pages is not None and len(row):
            tokens[row, at] = _from_pages(pages, side, row, places[row, at] - slots).to(held.dtype)
        out.append(tokens[:, None])
    return out[0], out[1]


def _from_pages(pages: Pages, side: str, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens ``column * P + place`` of some rows, float32 ``[n, D]``."""
    size, fmt = pages.layout.page_size, pages.layout.sides[side]
    columns, inverse = torch.unique(tokens // size, return_inverse=True)
    decoded = torch.empty(len(columns), pages.rows, size, fmt.dim, dtype=torch.float32, device=tokens.device)
    for i, column in enumerate(columns.tolist()):
        decoded[i] = decode_side(pages.layout, side, pages.records(column, column + 1)[0], decoded[i])
    return decoded[inverse, rows, tokens % size]
