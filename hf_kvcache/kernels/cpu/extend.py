"""Attention of long blocks of queries on the CPU, by torch's flash kernel over pages that the C++ kernels decode.

For many queries the time is that of arithmetic, which torch's kernel does well. The pages are decoded and attended to
one chunk after the other. The log-sum-exp of each chunk merges it with the others and with the full-precision tokens.
"""

from __future__ import annotations

import torch

from hf_kvcache.kernels.attention import read_pages
from hf_kvcache.kernels.column_sums import column_sums
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.page import BIAS
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.reference.hadamard import rotate
from hf_kvcache.kernels.reference.softmax import merge
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

#: Tokens of each row that are decoded at a time.
_CHUNK_TOKENS = 4096
_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def supports(query: torch.Tensor, pages: Pages | None, dense: DenseTokens, visibility: Visibility) -> bool:
    """Whether every query sees every token in pages, and this torch has the flash kernel."""
    return _flash is not None and visibility.mask is None and visibility.window is None


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """As :func:`hf_kvcache.kernels.reference.decode.attend`.

    The reference does calls with soft-capping, which torch's kernel has no argument for. Sums of probabilities are
    computed in a second pass.
    """
    if scoring.softcap is not None:
        return reference.attend(query, pages, dense, visibility, scoring, sums, read_pages)
    result = reference.attend(query, pages, dense, visibility, scoring, read_pages=_read_pages)
    if sums:
        page_sums, dense_sums = column_sums(query, result.log_sum_exp, pages, dense, visibility, scoring)
        result = result._replace(page_sums=page_sums, dense_sums=dense_sums)
    return result


def _read_pages(
    rows: torch.Tensor,
    pages: Pages,
    visibility: Visibility,
    scoring: Scoring,
    queries: slice,
    kept_scores: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of scaled queries ``[B * Hkv, g * q, Dk]`` over all pages, and its log-sum-exp."""
    assert _flash is not None
    layout = pages.layout
    rotated = rotate(pages.scale_queries(rows), layout.sides["keys"])
    # The kernel takes keys and values of one width. Zeros add nothing to scores, and the output is cut to its width.
    width = max(fmt.dim for fmt in layout.sides.values())
    wide = _widened(rotated, width)[:, None]
    result = None
    step = max(1, _CHUNK_TOKENS // layout.page_size)
    for start in range(0, pages.columns, step):
        stop = min(start + step, pages.columns)
        records = pages.records(start, stop)
        keys, values = (_widened(_dense(pages, side, records), width) for side in ("keys", "values"))
        added = _added(pages, records, start, stop)
        output, log_sum_exp = _flash(wide, keys[:, None], values[:, None], 0.0, False, attn_mask=added, scale=1.0)
        part = output[:, 0, :, : layout.sides["values"].dim], log_sum_exp.reshape(rows.shape[:2])
        result = part if result is None else merge(result, part)
    assert result is not None
    output, log_sum_exp = result
    empty = torch.from_numpy(pages.counts.sum(1) == 0)
    if empty.any():  # some rows have pages and others have none
        output, log_sum_exp = (
            output.masked_fill(empty[:, None, None], 0.0),
            log_sum_exp.masked_fill(empty[:, None], -torch.inf),
        )
    if pages.key_mean is not None:
        # The mean that was subtracted from the packed keys changes all scores of a query alike.
        log_sum_exp = log_sum_exp + (rotated @ pages.key_mean.unsqueeze(-1)).squeeze(-1)
    return rotate(output, layout.sides["values"], inverse=True), log_sum_exp


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """``x [..., D]`` padded with zeros to ``width``."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def _added(pages: Pages, records: torch.Tensor, start: int, stop: int) -> torch.Tensor | None:
    """What is added to the scores of page columns: the bias of tokens, and what hides places without a token.

    The latter is not ``-inf``, by which a row without any token would become NaN. Such a row gets a very low
    log-sum-exp.

    Args:
        pages: the pages.
        records: those of the columns, ``[C, rows, record_bytes]``.
        start: the first of the columns.
        stop: the column behind the last one.

    Returns:
        float32 ``[rows, 1, 1, C * P]``; None if there is nothing to add.
    """
    unused, bias = pages.unused(start, stop), pages.layout.view(records, BIAS)
    if bias is not None:
        added = bias.float().transpose(0, 1)
    elif unused is not None:
        added = torch.zeros(unused.shape, dtype=torch.float32, device=unused.device)
    else:
        return None
    return (added if unused is None else added.masked_fill(unused, -1e30)).flatten(1)[:, None, None]


def _dense(pages: Pages, side: str, records: torch.Tensor) -> torch.Tensor:
    """One side of pages ``[C, rows, record_bytes]`` as float32 ``[rows, C * P, D]``."""
    shape = (*records.shape[:2], pages.layout.page_size, pages.layout.sides[side].dim)
    buffer = scratch(f"extend.{side}", shape, torch.float32, records.device)
    return decode_side(pages.layout, side, records, buffer).float().transpose(0, 1).flatten(1, 2)
