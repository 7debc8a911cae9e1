"""How long values are behind the output projection: what several policies weigh attention by."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.context import Context

#: Output elements computed at a time.
_BLOCK_ELEMENTS = 1 << 22


def output_lengths(ctx: Context, order: int) -> torch.Tensor:
    """The norm of each value behind the output projection of each query head, float32 ``[B, Hkv, g, T]``.

    Args:
        ctx: with ``output_weight``.
        order: 1 for the sum of absolute values, 2 for the Euclidean length.
    """
    assert ctx.output_weight is not None
    batch, heads, tokens, dim = ctx.values.shape
    weight = ctx.output_weight.float().unflatten(1, (heads, -1, dim)).permute(2, 1, 3, 0)
    lengths = torch.zeros(batch, heads, len(weight), tokens, dtype=torch.float32, device=ctx.values.device)
    step = max(1, _BLOCK_ELEMENTS // (batch * heads * weight.shape[-1]))
    for part in (slice(start, start + step) for start in range(0, tokens, step)):
        for head, of_head in enumerate(weight):
            lengths[:, :, head, part] = (ctx.values[:, :, part].float() @ of_head).norm(order, -1)
    return lengths
