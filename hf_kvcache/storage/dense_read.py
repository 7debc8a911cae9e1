"""The dense fallback: all tokens of a layer as plain tensors, for code that cannot read pages."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.kernels.reference.decode import CHUNK_TOKENS
from hf_kvcache.storage import PagedStorage


def dense_side(storage: PagedStorage, side: str, start: int, length: int) -> torch.Tensor:
    """All keys or all values at positions ``start ... start + length - 1`` as a dense tensor.

    Returns:
        ``[B, Hkv, length, D]`` in the model's basis and dtype, zeros where a token is not held.
    """
    width = storage.encoder.widths[side]
    rows, group = storage.batch * storage.heads, storage.encoder.group
    # One more place, which takes tokens that are not asked for and places without a token.
    out = torch.zeros(rows, length + 1, width, dtype=storage.dtype, device=storage.device)

    def place(tokens: torch.Tensor, positions: torch.Tensor, unused: torch.Tensor | None) -> None:
        index = positions - start
        elsewhere = (index < 0) | (index >= length)
        index = index.masked_fill(elsewhere if unused is None else elsewhere | unused, length)
        out.scatter_(1, index.unsqueeze(-1).expand(-1, -1, width), tokens.to(out.dtype))

    pages = storage.pages()
    step = max(1, CHUNK_TOKENS // storage.page_size)
    for first in range(0, 0 if pages is None else pages.columns, step):
        assert pages is not None
        last = min(first + step, pages.columns)
        tokens = storage.decoded(side, pages, pages.records(first, last), first)
        unused = pages.unused(first, last)
        place(
            tokens,
            pages.positions(first, last).flatten(1).repeat_interleave(group, 0),
            None if unused is None else unused.flatten(1).repeat_interleave(group, 0),
        )
    dense, held = storage.dense, storage.dense.longest
    if held:
        positions = torch.from_numpy(dense.positions[:, :held]).to(out.device).repeat_interleave(storage.heads, 0)
        used = np.arange(held) < dense.lengths[:, None]
        unused = torch.from_numpy(~used).to(out.device).repeat_interleave(storage.heads, 0)
        place(getattr(dense, side)[:, :, :held].flatten(0, 1), positions, unused)
    return out.view(storage.batch, storage.heads, length + 1, width)[:, :, :length]
