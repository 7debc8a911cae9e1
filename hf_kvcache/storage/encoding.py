"""Records of many pages, a bounded number of them at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_kvcache.codecs.pages import PageEncoder

#: Elements encoded at a time: few enough that a codec's many passes over them stay in a core's cache.
_ELEMENTS = 1 << 19


def encoded_in_parts(
    encoder: PageEncoder,
    keys: torch.Tensor,
    values: torch.Tensor,
    mean: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Records of whole pages, column by column.

    Args:
        encoder: makes page records of ``P`` tokens.
        keys: ``[b, Hkv, n * P, Dk]`` in the model's basis.
        values: ``[b, Hkv, n * P, Dv]``.
        mean: what to subtract from the rotated keys, ``[b, page heads, dim]``; or None.
        scale: by what to divide the keys before the rotation, ``[b, page heads, dim]``; or None.

    Yields:
        The first column, the column behind the last one, and the records of these, uint8 ``[columns * b * page heads,
        record_bytes]``, page by page and for each page row by row.
    """
    size = encoder.layout.page_size
    pages = keys.shape[2] // size
    basis = [None if t is None else t.flatten(0, 1) for t in (mean, scale)]
    step = pages if keys.is_meta else max(1, _ELEMENTS // (keys.shape[0] * keys.shape[1] * size * keys.shape[3]))
    for start in range(0, pages, step):
        stop = min(start + step, pages)
        span = slice(start * size, stop * size)
        columns = [x[:, :, span].unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4).flatten(0, 2) for x in (keys, values)]
        repeated = [None if t is None else t.repeat(stop - start, 1) for t in basis]
        yield start, stop, encoder.encode(columns[0], columns[1], *repeated)
