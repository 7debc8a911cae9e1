"""New page records from tokens of old records, without decoding them: packed tokens are never packed again."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.page import BIAS, PageLayout, SideFormat


def is_tokenwise(layout: PageLayout) -> bool:
    """Whether no two tokens of a page share a scale, so that tokens can move between pages."""
    return not any(_shared_names(fmt) for fmt in layout.sides.values())


def can_drop_tokens(layout: PageLayout) -> bool:
    """Whether a page can lose tokens: not if some of them, but not all, share a scale."""
    return all(
        fmt.level == "dense" or fmt.axis == "token" or fmt.group == layout.page_size for fmt in layout.sides.values()
    )


def gather_tokens(layout: PageLayout, records: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """New pages made of tokens of ``records``.

    Args:
        layout: of all the records.
        records: uint8 ``[n, record_bytes]``.
        index: int64 ``[m, P]``, the source ``page * P + place`` of every token. Where tokens share scales, all tokens
            of a new page must come from one old page, whose scales it takes over.

    Returns:
        uint8 ``[m, record_bytes]``.
    """
    out = torch.zeros(len(index), layout.record_bytes, dtype=torch.uint8, device=records.device)
    page, place = index // layout.page_size, index % layout.page_size
    for side, fmt in layout.sides.items():
        shared = _shared_names(fmt)
        for name in ("codes", "scale", "zero", "other"):
            source, target = layout.view(records, f"{side}.{name}"), layout.view(out, f"{side}.{name}")
            if source is None or target is None:
                continue
            if name in shared:
                target.copy_(source[page[:, 0]])
            else:
                target.copy_(source[page, place])
    before, after = layout.view(records, BIAS), layout.view(out, BIAS)
    if before is not None and after is not None:
        after.copy_(before[page, place])
    return out


def _shared_names(fmt: SideFormat) -> tuple[str, ...]:
    """The fields that tokens of a page share."""
    if fmt.level == "dense":
        return ()
    if fmt.axis == "channel":
        return ("scale", "zero")
    return ("other",) if fmt.other else ()
