"""Absorbed multi-head latent attention in plain torch: the definition of every faster twin."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.decode.softmax import OnlineSoftmax
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

#: Tokens of each sequence that are read at a time: few enough that a chunk, which is read twice, stays in the cache.
CHUNK_TOKENS = 512


def latent_decode(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotary_keys: torch.Tensor,
    scaling: float,
    visibility: Visibility | None = None,
    positions: torch.Tensor | None = None,
    unused: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries over latents that all heads share (DeepSeek-V2, arXiv:2405.04434, absorbed form).

    The score of a token is ``scaling * (query[:r] . latent + query[r:] . rotary_key)``, its value is its latent.

    Args:
        query: ``[B, H, q, r + dr]``: the query in latent space first, its rotary part last.
        latents: ``[B, T, r]`` of any float dtype; the last dimension is contiguous.
        rotary_keys: ``[B, T, dr]``, of the dtype of ``latents``; the last dimension is contiguous.
        scaling: factor of the scores.
        visibility: what the queries may see; read only if ``positions`` are given.
        positions: int64 ``[B, T]``; None if every query sees every token.
        unused: bool ``[B, T]``, True where there is no token; None if all are tokens.

    Returns:
        The weighted latents ``[B, q, H, r]`` in the dtype of the query, and the log-sum-exp, float32 ``[B, H, q]``. A
        query that sees nothing has output 0 and log-sum-exp ``-inf``.

    Raises:
        ValueError: if ``positions`` are given without ``visibility``.
    """
    if positions is not None and visibility is None:
        raise ValueError("positions were given without a visibility; accepted: both or no positions")
    batch, heads, length, _ = query.shape
    tokens, rank = latents.shape[1:]
    rows = query.float().reshape(batch, heads * length, -1) * scaling
    state = OnlineSoftmax(batch, heads * length, rank, query.device)
    for start in range(0, tokens, CHUNK_TOKENS):
        part = slice(start, min(start + CHUNK_TOKENS, tokens))
        chunk = _float(latents[:, part], "latents")
        scores = torch.bmm(rows[..., :rank], chunk.transpose(1, 2))
        scores.baddbmm_(rows[..., rank:], _float(rotary_keys[:, part], "rotary").transpose(1, 2))
        _hide(scores.view(batch, heads, length, -1), part, visibility, positions, unused)
        state.add(torch.bmm(state.weigh(scores.unsqueeze(0))[0], chunk).unsqueeze(0))
    output, log_sum_exp = state.result()
    output = output.view(batch, heads, length, rank).transpose(1, 2).to(query.dtype)
    return output.contiguous(), log_sum_exp.view(batch, heads, length)


def _float(part: torch.Tensor, tag: str) -> torch.Tensor:
    """A chunk in float32: itself, or a copy that is valid until the next one with this tag."""
    if part.dtype == torch.float32:
        return part
    return scratch(f"latent_decode.{tag}", tuple(part.shape), torch.float32, part.device).copy_(part)


def _hide(
    scores: torch.Tensor,
    part: slice,
    visibility: Visibility | None,
    positions: torch.Tensor | None,
    unused: torch.Tensor | None,
) -> None:
    """Set the scores ``[B, H, q, n]`` of the tokens ``part`` that are not to be seen to ``-inf``."""
    hidden = None if unused is None else unused[:, part]
    if positions is not None and visibility is not None:
        at = positions[:, None, part]
        bias = visibility.bias(at, None if hidden is None else hidden[:, None], 1, slice(0, scores.shape[2]))
        scores.add_(bias[:, 0])
    elif hidden is not None:
        scores.masked_fill_(hidden[:, None, None], -torch.inf)
