"""The scale of the keys of each head and channel, in plain torch."""

from __future__ import annotations

import torch

#: Tokens that fix a scale; fewer say too little.
LEAST_TOKENS = 8
#: The largest exponent of a scale.
LARGEST_EXPONENT = 4
#: Root mean squares of keys in half precision are at most two to the power of this after scaling, far from infinity.
HALF_EXPONENT = 12
#: Share of the mean over the channels that every channel has at least.
LEAST_POWER = 1e-6
TINY = 1e-30


def key_scale(query: torch.Tensor, keys: torch.Tensor, first: int, counted: torch.Tensor | None) -> torch.Tensor:
    """The scale of the keys of each sequence, head and channel; 1 where fewer than :data:`LEAST_TOKENS` tokens count.

    Args:
        query: ``[B, Hq, T, Dk]``, of the tokens.
        keys: ``[B, Hkv, T, Dk]``.
        first: the first token that counts, unless ``counted`` says which do.
        counted: bool ``[B, T]``, which tokens count; None if all from ``first`` on do.

    Returns:
        Float32 ``[B, Hkv, Dk]``, contiguous, as :func:`balanced` says.
    """
    batch, heads, length, dim = keys.shape
    if counted is None:
        count: torch.Tensor | int = length - first
        if length - first < LEAST_TOKENS:
            return torch.ones(batch, heads, dim, dtype=torch.float32, device=keys.device)
        query, keys = query[:, :, first:], keys[:, :, first:]
    else:
        absent = ~counted[:, None, :, None]
        # What stands at padding may be NaN, and 0 * NaN is not 0.
        query, keys = query.masked_fill(absent, 0), keys.masked_fill(absent, 0)
        count = counted.sum(1, dtype=torch.float32)[:, None, None]
        enough, count = count >= LEAST_TOKENS, count.clamp_min(1)
    power = _squares(query).unflatten(1, (heads, -1)).mean(2) / count
    squares = _squares(keys) / count
    variance = squares - (keys.sum(2, dtype=torch.float32) / count).square()
    # Kernels divide in the dtype of the keys.
    lowest = (squares.log2() / 2 - HALF_EXPONENT).ceil() if keys.dtype == torch.float16 else None
    scale = balanced(variance.clamp_min_(0), power, lowest)
    return scale if counted is None else torch.where(enough, scale, 1.0)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of the squares over tokens, float32 ``[B, H, D]``, of ``x [B, H, T, D]``."""
    wider = torch.promote_types(x.dtype, torch.float32)  # numbers of 64 bits cannot be summed in 32
    return torch.linalg.vector_norm(x, dim=2, dtype=wider).float().square_()


def balanced(variance: torch.Tensor, power: torch.Tensor, lowest: torch.Tensor | None = None) -> torch.Tensor:
    """The scale of the keys of each channel: a power of two near ``(variance / power) ** (1 / 4)``.

    Its geometric mean over the channels is near 1, and it is between 1/16 and 16.

    Args:
        variance: of the keys, float32 ``[..., Dk]``.
        power: mean square of the queries, of the same shape.
        lowest: the smallest exponents, of the same shape; None where nothing but the range bounds them.
    """
    ratio = [x + LEAST_POWER * x.mean(-1, keepdim=True) + TINY for x in (variance, power)]
    exponent = (ratio[0].log2() - ratio[1].log2()) / 4
    exponent = (exponent - exponent.mean(-1, keepdim=True)).nan_to_num_(0.0).round_()
    if lowest is not None:
        exponent = torch.maximum(exponent, lowest.nan_to_num(0.0))
    exponent = exponent.clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int32)
    return ((exponent + 127) << 23).view(torch.float32)  # the bits of a power of two
