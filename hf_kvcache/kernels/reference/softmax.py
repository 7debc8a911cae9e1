"""Softmax over keys that come in parts, and attention over full-precision keys, in plain torch."""

from __future__ import annotations

import torch


class OnlineSoftmax:
    """Softmax-weighted sum of values over keys that come in chunks, in float32.

    Args:
        rows: independent attention problems (sequences times KV heads).
        queries: query vectors of each, i.e. query heads per KV head times query tokens.
        value_dim: width of a value.
        device: where it runs.
    """

    def __init__(self, rows: int, queries: int, value_dim: int, device: torch.device) -> None:
        self._max = torch.full((rows, queries), -torch.inf, dtype=torch.float32, device=device)
        self._sum = torch.zeros(rows, queries, dtype=torch.float32, device=device)
        self._out = torch.zeros(rows, queries, value_dim, dtype=torch.float32, device=device)

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Turn the scores of ``C`` blocks of ``n`` keys into weights. :meth:`add` takes their weighted values next.

        Args:
            scores: ``[C, rows, queries, n]`` float32, ``-inf`` where masked; overwritten.

        Returns:
            The weights of the values, in the memory of the scores.
        """
        peak = torch.maximum(self._max, scores.amax((0, 3)))
        # Before its first visible key a query has a maximum of -inf, and -inf - -inf is not a number.
        shift = peak.masked_fill(peak == -torch.inf, 0.0)
        probs = scores.sub_(shift[None, :, :, None]).exp_()
        decay = (self._max - shift).exp_()
        self._sum.mul_(decay).add_(probs.sum((0, 3)))
        self._out.mul_(decay.unsqueeze(-1))
        self._max = peak
        return probs

    def add(self, weighted: torch.Tensor) -> None:
        """Add the weighted values of the blocks, ``[C, rows, queries, value_dim]`` float32."""
        self._out.add_(weighted.sum(0) if weighted.shape[0] > 1 else weighted[0])

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention output ``[rows, queries, value_dim]`` and the log-sum-exp ``[rows, queries]``.

        A query without a visible key has output 0 and log-sum-exp ``-inf``.
        """
        total = self._sum.clamp_min(torch.finfo(torch.float32).tiny)
        return self._out / total.unsqueeze(-1), self._max + self._sum.log()


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over two disjoint sets of keys from the (output, log-sum-exp) of each."""
    total = torch.logaddexp(first[1], second[1])
    shift = total.masked_fill(total == -torch.inf, 0.0)
    weights = (first[1] - shift).exp().unsqueeze(-1), (second[1] - shift).exp().unsqueeze(-1)
    return first[0] * weights[0] + second[0] * weights[1], total


def dense_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    kept_scores: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over full-precision keys.

    Args:
        query: float32 ``[B * Hkv, g * q, Dk]``, scaled.
        keys: ``[B, Hkv, n, Dk]`` of any float dtype.
        values: ``[B, Hkv, n, Dv]``.
        bias: float32 ``[B, 1 or Hkv, 1 or g, q, n]``, or None.
        softcap: logit soft-capping; the query is then scaled by ``1 / softcap`` too.
        kept_scores: where to append the scores ``[B * Hkv, g * q, n]``, if they are wanted.

    Returns:
        Output ``[B * Hkv, g * q, Dv]`` and log-sum-exp ``[B * Hkv, g * q]``, as :meth:`OnlineSoftmax.result`.
    """
    batch, heads = keys.shape[:2]
    scores = torch.matmul(query.unflatten(0, (batch, heads)), keys.float().transpose(-1, -2))
    if softcap is not None:
        scores = scores.tanh_().mul_(softcap)
    if bias is not None:
        scores.unflatten(2, (-1, bias.shape[3])).add_(bias)
    if kept_scores is not None:
        kept_scores.append(scores.flatten(0, 1).clone())
    log_sum_exp = scores.logsumexp(-1)
    shift = log_sum_exp if bias is None else log_sum_exp.masked_fill(log_sum_exp == -torch.inf, 0.0)
    output = torch.matmul(scores.sub_(shift.unsqueeze(-1)).exp_(), values.float())
    return output.flatten(0, 1), log_sum_exp.flatten(0, 1)
