"""Reread: the attention that tokens would get if the context were read a second time, without reading it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hf_kvcache.eviction.base import ALL_QUERIES, Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import whole

#: Scores computed at a time: on a CPU as many as stay in a core's cache, elsewhere as many as take 64 MiB.
_STRIP_ELEMENTS = 1 << 19
_STRIP_ELEMENTS_ELSEWHERE = 1 << 24
_FEWEST_QUERIES = 16
#: Powers of probabilities, and how often they are squared for that. The eighth would be 0 for many that count.
_SQUARINGS = {1: 0, 2: 1, 4: 2}


@register("reread")
class Reread(Policy):
    """Mean, of some power, of the attention that queries of the prompt give when they are moved behind the context.

    KVzip (arXiv:2505.23416) lets the model read the context again and keeps what this second reading attends to. Here
    the queries of the first reading stand in for those of the second: only their rotary positions change. Moved behind
    the context, a query sees the tokens that came after it, among them the one that followed its own. So heads that
    copy show what they would copy. As in a second reading, the query also sees the tokens before it once more, near it:
    what attention they take is no attention to the context.

    The scores are probabilities, of one scale in all heads and layers: see ``"ada-reread"`` and ``"across-reread"``.

    Args:
        chunk: tokens that are read again at a time. Each chunk is read directly behind the context, and does not see
            the chunks before it a second time.
        power: of the mean over the queries, ``mean(p ** power) ** (1 / power)``: 1, 2 (the root mean square) or 4. A
            larger one favors what a few queries look at, such as a number that is said once, over what many look at a
            little.

    Raises:
        ValueError: if ``chunk`` is below 1, or ``power`` another number.
    """

    observed = ALL_QUERIES
    needs_rope = True
    needs_values = False

    def __init__(self, chunk: int = 2048, power: int = 2) -> None:
        self.chunk, self.power = whole("chunk", chunk), whole("power", power)
        if power not in _SQUARINGS:
            raise ValueError(f"power={power!r}; accepted: {', '.join(map(str, _SQUARINGS))}")

    def score(self, ctx: Context) -> torch.Tensor:
        total = torch.zeros(ctx.keys.shape[:3], dtype=torch.float32, device=ctx.keys.device)
        if ctx.queries is None or ctx.query_positions is None or ctx.keys.shape[2] == 0:
            return total
        for probabilities in self._reread(ctx, ctx.queries, ctx.query_positions.expand(len(ctx.queries), -1)):
            for _ in range(_SQUARINGS[self.power]):
                probabilities.square_()
            total += probabilities.sum(2)
        return (total / max(ctx.queries.shape[2] * ctx.groups, 1)).pow_(1 / self.power)

    def _reread(self, ctx: Context, queries: torch.Tensor, at: torch.Tensor) -> Iterator[torch.Tensor]:
        """Probabilities ``[B, Hkv, g * n', T]`` of queries ``[B, Hq, n, D]`` from positions ``at [B, n]``, in parts."""
        assert ctx.rope is not None
        heads, tokens = ctx.keys.shape[1:3]
        elements = _STRIP_ELEMENTS if ctx.keys.device.type == "cpu" else _STRIP_ELEMENTS_ELSEWHERE
        step = max(_FEWEST_QUERIES, elements // (len(queries) * queries.shape[1] * tokens))
        absent = None if ctx.held is None else ~ctx.held[:, :, None]
        done = 0
        for query, place in zip(queries.split(step, 2), at.split(step, 1), strict=True):
            done += query.shape[2]
            inside = place % self.chunk
            plain = ctx.rope.unrotate(query, place[:, None])
            moved = ctx.rope.rotate(plain, ctx.seen + inside[:, None])
            # The tokens of the query's chunk up to its own; places without a token are at none of these positions.
            first, last = ((x[:, None, None, :, None]) for x in (place - inside, place))
            reached = _reached(ctx, done - 1)
            positions = ctx.positions[:, :, None, None, :reached]
            apart = (positions < first) | (positions > last)
            near = _scores(ctx, query.float(), ctx.keys[:, :, :reached]).masked_fill_(apart, -torch.inf).flatten(2, 3)
            scores = _scores(ctx, moved, ctx.keys).flatten(2, 3)
            if absent is not None:
                scores = scores.masked_fill_(absent, -torch.inf)
            others = torch.logaddexp(near.logsumexp(-1), _sinks(ctx, heads, query.shape[2], near))
            sums = torch.logaddexp(scores.logsumexp(-1), others)[..., None]
            yield scores.sub_(sums.masked_fill(sums == -torch.inf, 0.0)).exp_()


def _reached(ctx: Context, query: int) -> int:
    """How many places, from the first on, hold all that a query sees, at least 1; all where only the device knows."""
    if ctx.reach is None or ctx.queries is not ctx.reach_of:
        return ctx.keys.shape[2]
    return max(1, ctx.reach(query))


def _scores(ctx: Context, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores ``[B, Hkv, g, n, T]`` of queries ``[B, Hq, n, D]`` against ``keys [B, Hkv, T, D]``, as the model's.

    The keys are those of the first ``T`` places of the context, which has the bias that is added.
    """
    # The heads of a group as rows of one matrix: broadcasting would copy the keys for each of them.
    rows = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3) * ctx.scoring.inner
    scores = (rows @ keys.mT).unflatten(2, (-1, queries.shape[2]))
    if ctx.scoring.softcap is not None:
        scores = scores.tanh_().mul_(ctx.scoring.softcap)
    if ctx.bias is not None:
        scores = scores.add_(ctx.bias[:, :, None, None, : keys.shape[2]])
    return scores


def _sinks(ctx: Context, heads: int, count: int, like: torch.Tensor) -> torch.Tensor:
    """The logits that only take probability away, for ``count`` queries, to be broadcast to ``[B, Hkv, g * n]``."""
    if ctx.scoring.sink_logits is None:
        return like.new_full((), -torch.inf)
    return ctx.scoring.sink_logits.float().view(heads, -1).repeat_interleave(count, 1)
