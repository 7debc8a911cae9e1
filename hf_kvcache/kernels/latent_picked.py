"""Absorbed latent attention to picked tokens, which are others for each query, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.latent_decode import latent_attend
from hf_kvcache.kernels.latent_gather import gather_latents
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.visibility import EVERYTHING

__all__ = ["attend_picked"]


def attend_picked(
    query: torch.Tensor, places: torch.Tensor, pages: Pages | None, dense: DenseTokens, scoring: Scoring
) -> Attention:
    """Attention of each query to tokens of its own. Only these are read and decoded.

    This is the gathering of the tokens and the attention to them, one after the other. On a CPU one kernel does both.

    Args:
        query: ``[B, H, q, r + dr]``, taken into latent space.
        places: int64 ``[B, q, k]``, where the tokens of each query lie: a slot of ``dense``, or
            ``slots + column * P + place`` in a page, or -1 for none. No place occurs twice for a query.
        pages: the packed latents, of one KV head and without a key mean; None if there are none.
        dense: the full-precision latents.
        scoring: how scores are made.

    Returns:
        As :func:`hf_kvcache.kernels.latent_decode.latent_attend`.
    """
    faster = implementation("latent_picked", query.device)
    if faster is not None and faster.supports(query, pages, dense, scoring):
        return faster.attend_picked(query, places, pages, dense, scoring)
    batch, heads, length, width = query.shape
    latents, rotary = gather_latents(pages, dense, places.flatten(1))
    if pages is not None:
        # Queries are rotated, and not the many tokens back.
        formats, rank = pages.layout.sides, latents.shape[3]
        parts = _rotated(query[..., :rank], formats["keys"]), _rotated(query[..., rank:], formats["values"])
        query = torch.cat(parts, -1) if parts[0].shape[3] < width else parts[0]
    if length > 1:  # every query is a sequence of its own
        query = query.transpose(1, 2).reshape(batch * length, heads, 1, width)
        latents, rotary = (x.view(batch * length, 1, places.shape[2], x.shape[3]) for x in (latents, rotary))
    gathered = DenseTokens(latents, rotary, unused=(places < 0).view(len(query), -1))
    # The order of the gathered tokens says nothing, so nothing but `unused` hides any.
    output, log_sum_exp, _, _ = latent_attend(query, None, gathered, EVERYTHING, scoring)
    if pages is not None:
        output = _rotated(output, pages.layout.sides["keys"], inverse=True)
    log_sum_exp = log_sum_exp.view(batch, length, heads).transpose(1, 2)
    return Attention(output.view(batch, length, heads, output.shape[3]), log_sum_exp)


def _rotated(x: torch.Tensor, fmt: SideFormat, inverse: bool = False) -> torch.Tensor:
    """Vectors ``[..., D]`` in the rotated basis of ``fmt``, or back from it, in their own dtype."""
    return x if fmt.rotation == "none" else rotate(x.float(), fmt, inverse).to(x.dtype)
