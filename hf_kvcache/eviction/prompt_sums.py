"""The attention that the keys of a prompt receive, where something else computed the prompt's attention."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.context import Context
from hf_kvcache.kernels.attention import attend
from hf_kvcache.kernels.column_sums import column_sums
from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.visibility import Visibility


def prompt_sums(query: torch.Tensor, keys: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Probability of each key of a prompt, summed over its queries and averaged over the heads of a group.

    Args:
        query: ``[B, Hq, n, Dk]``, of the non-padding tokens, not scaled.
        keys: ``[B, Hkv, n, Dk]``, of the same tokens.
        scoring: how the model scores.

    Returns:
        Float32 ``[B, Hkv, n]``.
    """
    # Sums need the log-sum-exp of every query, which whoever computed the attention did not hand on. One pass over
    # strips of scores gives both. Two passes, of which `column_sums` is the second, compute all scores twice: they are
    # for devices where they have kernels that keep no scores. On two cores of an AMD EPYC, with 8 heads, 2,048 tokens
    # and a head dimension of 64, strips take 252 ms and two passes 317 ms (of which the log-sum-exp 162 ms).
    length = keys.shape[2]
    # The values are of no account: keys stand in for them.
    dense = DenseTokens(keys, keys, torch.arange(length, device=keys.device).expand(len(keys), -1).contiguous())
    visibility = Visibility(0, length, None, 0, True, None)
    faster = implementation("column_sums", query.device)
    if faster is not None and faster.supports(query, None, dense, visibility):
        sums = sums_in_two_passes(query, dense, visibility, scoring)
    else:
        # A sequence at a time: its sums are those that it would have alone.
        alone = zip(query.split(1), keys.split(1), strict=True)
        sums = torch.cat([sums_in_strips(one_query, one_keys, scoring) for one_query, one_keys in alone])
    return sums.unflatten(1, (keys.shape[1], -1)).mean(2)


def sums_in_strips(query: torch.Tensor, keys: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """``[1, Hq, n]``, from probabilities of a few queries at a time."""
    positions = torch.arange(keys.shape[2], device=keys.device)
    by_head = positions.expand(*keys.shape[:3])
    keys = keys.float()
    context = Context(
        keys=keys,
        values=keys,
        positions=by_head,
        held=None,
        protected=torch.zeros(by_head.shape, dtype=torch.bool, device=keys.device),
        seen=keys.shape[2],
        quota=0,
        scoring=scoring,
        layer=0,
        layers=1,
        queries=query,
        query_positions=positions,
        reach=lambda query: query + 1,
        reach_of=query,
    )
    return context.received().flatten(1, 2)


def sums_in_two_passes(
    query: torch.Tensor, dense: DenseTokens, visibility: Visibility, scoring: Scoring
) -> torch.Tensor:
    """``[B, Hq, n]``, from the log-sum-exp that attention returns and a second pass over the keys."""
    log_sum_exp = attend(query, None, dense, visibility, scoring).log_sum_exp
    return column_sums(query, log_sum_exp, None, dense, visibility, scoring)[1]
