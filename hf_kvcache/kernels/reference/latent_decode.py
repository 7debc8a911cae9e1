"""Absorbed multi-head latent attention in plain torch: the definition for every backend."""

from __future__ import annotations

from functools import partial

import torch

from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.reference.decode import side_buffer, walk_pages
from hf_kvcache.kernels.reference.hadamard import rotate
from hf_kvcache.kernels.reference.levels import SideDecoder, decode_side
from hf_kvcache.kernels.reference.softmax import OnlineSoftmax
from hf_kvcache.kernels.visibility import Visibility

#: Tokens of each sequence that are read at a time: few enough that a chunk, which is read twice, stays in the cache.
CHUNK_TOKENS = 512


def latent_attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
    decode: SideDecoder = decode_side,
) -> Attention:
    """Attention over latents that all heads share (DeepSeek-V2, arXiv:2405.04434, in the absorbed form).

    The score of a token is ``scaling * (query[:r] . latent + query[r:] . rotary_key)``, its value is its latent. In the
    pages and in the full-precision tokens, keys are latents here and values are rotary keys.

    Args:
        query: ``[B, H, q, r + dr]``: the query in latent space, then its rotary part; ``dr`` may be 0.
        pages: the packed tokens, of one KV head and without a key mean; or None.
        dense: the full-precision tokens, including those of the queries: latents ``[B, 1, n, r]`` as keys, rotary keys
            ``[B, 1, n, dr]`` as values.
        visibility: what the queries may see.
        scoring: how scores are made.
        sums: whether to return the probability of each token as well.
        decode: decodes the sides of pages.

    Returns:
        See :class:`~hf_kvcache.kernels.inputs.Attention`; the output is the weighted latents ``[B, q, H, r]``.
    """
    joined = DenseTokens(torch.cat([dense.keys, dense.values], -1), dense.keys, dense.positions, dense.unused)
    return reference.attend(query, pages, joined, visibility, scoring, sums, partial(_attend_pages, decode=decode))


def _attend_pages(
    rows: torch.Tensor,
    pages: Pages,
    visibility: Visibility,
    scoring: Scoring,
    queries: slice,
    kept_scores: list[torch.Tensor] | None,
    decode: SideDecoder,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = pages.layout
    latent_format, rotary_format = layout.sides["keys"], layout.sides["values"]
    rank = latent_format.dim
    wide, turned = rotate(rows[..., :rank], latent_format), rotate(rows[..., rank:], rotary_format)
    # Latents are keys and values: `score` decodes them, and `combine` uses them again.
    latents = torch.empty(0, dtype=torch.float32, device="cpu")

    def score(records: torch.Tensor) -> torch.Tensor:
        nonlocal latents
        latents = decode(layout, "keys", records, side_buffer(layout, "keys", records))
        scores = torch.matmul(wide, latents.transpose(-1, -2))
        if rotary_format.dim:
            rotary = decode(layout, "values", records, side_buffer(layout, "values", records))
            scores.add_(torch.matmul(turned, rotary.transpose(-1, -2)))
        return scores

    def combine(records: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.matmul(weights, latents)

    state = OnlineSoftmax(rows.shape[0], rows.shape[1], rank, rows.device)
    walk_pages(state, pages, visibility, scoring, queries, kept_scores, score, combine, CHUNK_TOKENS)
    output, log_sum_exp = state.result()
    return rotate(output, latent_format, inverse=True), log_sum_exp


def absorb(query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Queries ``[B, H, q, dn]`` in latent space, ``[B, H, q, r]``, by the key up-projection ``weight [H, dn, r]``."""
    batch, heads, length, _ = query.shape
    # By head: a product that broadcasts the weight over a batch would copy it for every sequence.
    absorbed = torch.bmm(query.transpose(0, 1).flatten(1, 2), weight)
    return absorbed.view(heads, batch, length, -1).transpose(0, 1)


def expand(latents: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted latents ``[B, q, H, r]`` as outputs ``[B, q, H, dv]``, by the value up-projection ``[H, dv, r]``."""
    batch, length, heads, _ = latents.shape
    expanded = torch.bmm(latents.permute(2, 0, 1, 3).flatten(1, 2), weight.transpose(1, 2))
    return expanded.view(heads, batch, length, -1).permute(1, 2, 0, 3)
