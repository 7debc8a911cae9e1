"""Random contexts, as the engine would show them to a policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from hf_kvcache.eviction import Context, Policy
from hf_kvcache.eviction.base import ALL_QUERIES
from hf_kvcache.kernels.inputs import Scoring
from tests.eviction import brute_force

#: What stands for the position of a place without a token.
NO_POSITION = torch.iinfo(torch.int64).max
KEY_DIM, VALUE_DIM, HIDDEN = 8, 6, 12


@dataclass(frozen=True)
class Shape:
    """What a random context looks like.

    Attributes:
        tokens: places of a head.
        ratio: query heads per KV head.
        queries: latest queries that are there to be observed.
        ragged: whether heads hold different tokens and different numbers of them.
        gaps: whether tokens were dropped before.
        quota: tokens that a head keeps.
        sinks: protected at the start.
        recent: protected at the end.
        capped: whether scores are soft-capped and heads have sink logits.
    """

    tokens: int = 40
    ratio: int = 3
    queries: int = 16
    ragged: bool = False
    gaps: bool = False
    quota: int = 17
    sinks: int = 2
    recent: int = 3
    capped: bool = False
    batch: int = 2
    heads: int = 2
    seed: int = 0


SHAPES = {
    "ratio 1": Shape(ratio=1),
    "ratio 3": Shape(),
    "ratio 4": Shape(ratio=4, batch=1),
    "ratio 8": Shape(ratio=8, batch=1),
    "one token": Shape(tokens=1, queries=1, quota=1, sinks=0, recent=0),
    "one query": Shape(queries=1),
    "few tokens": Shape(tokens=4, queries=4, quota=2, sinks=0, recent=1),
    "all queries": Shape(tokens=24, queries=24, quota=9),
    "gaps": Shape(gaps=True),
    "ragged": Shape(ragged=True, gaps=True),
    "ragged, ratio 8": Shape(ragged=True, gaps=True, ratio=8, heads=3, seed=1),
    "ragged, few": Shape(tokens=6, queries=2, ragged=True, gaps=True, quota=3, sinks=0, recent=1),
    "capped": Shape(capped=True, ragged=True, gaps=True, seed=2),
    "more protected than quota": Shape(quota=4, sinks=4, recent=5),
}


@cache
def random_context(shape: Shape) -> Context:
    """A context of that shape, with all that policies can ask for but replays and rotary positions."""
    generator = torch.Generator().manual_seed(shape.seed)
    seen = shape.tokens * 2 if shape.gaps else shape.tokens
    positions = _positions(shape, seen, generator)
    held = positions != NO_POSITION
    keys = torch.randn(*held.shape, KEY_DIM, generator=generator) * held[..., None]
    values = torch.randn(*held.shape, VALUE_DIM, generator=generator) * held[..., None]
    query_heads = shape.heads * shape.ratio
    sink_logits = torch.randn(query_heads, generator=generator) if shape.capped else None
    ctx = Context(
        keys=keys,
        values=values,
        positions=positions,
        held=held if shape.ragged else None,
        protected=_protected(shape, held),
        seen=seen,
        quota=shape.quota,
        scoring=Scoring(KEY_DIM**-0.5, 2.0 if shape.capped else None, sink_logits),
        layer=1,
        layers=4,
        queries=2 * torch.randn(shape.batch, query_heads, seen, KEY_DIM, generator=generator),
        query_positions=torch.arange(seen),
        output_weight=torch.randn(HIDDEN, query_heads * VALUE_DIM, generator=generator),
    )
    return replace(latest(ctx, shape.queries), accumulated=_accumulated(ctx))


def latest(ctx: Context, queries: int) -> Context:
    """The same context with the latest queries only; with none of them for 0."""
    assert ctx.queries is not None and ctx.query_positions is not None
    if queries == 0:
        return replace(ctx, queries=None, query_positions=None)
    return replace(ctx, queries=ctx.queries[:, :, -queries:], query_positions=ctx.query_positions[..., -queries:])


def shown(ctx: Context, policy: Policy) -> Context:
    """What of a context a policy has asked for."""
    if policy.observed != ALL_QUERIES:
        ctx = latest(ctx, policy.observed)
    accumulated = ctx.accumulated if policy.needs_accumulated else None
    return replace(ctx, accumulated=accumulated, output_weight=ctx.output_weight if policy.needs_output else None)


def row(ctx: Context, index: int) -> Context:
    """One sequence of a context."""
    part = slice(index, index + 1)
    return replace(
        ctx,
        keys=ctx.keys[part],
        values=ctx.values[part],
        positions=ctx.positions[part],
        held=None if ctx.held is None else ctx.held[part],
        protected=ctx.protected[part],
        queries=None if ctx.queries is None else ctx.queries[part],
        accumulated=None if ctx.accumulated is None else ctx.accumulated[part],
    )


def head(ctx: Context, index: int, kv_head: int) -> Context:
    """The tokens that one KV head of one sequence holds, and its group's query heads."""
    ctx = row(ctx, index)
    heads = ctx.keys.shape[1]
    present = slice(None) if ctx.held is None else ctx.held[0, kv_head]

    def of_head(x: torch.Tensor) -> torch.Tensor:
        return x[:, kv_head : kv_head + 1][:, :, present]

    def of_group(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.chunk(heads, dim)[kv_head]

    logits = ctx.scoring.sink_logits
    return replace(
        ctx,
        keys=of_head(ctx.keys),
        values=of_head(ctx.values),
        positions=of_head(ctx.positions),
        held=None,
        protected=of_head(ctx.protected),
        scoring=replace(ctx.scoring, sink_logits=None if logits is None else of_group(logits, 0)),
        queries=None if ctx.queries is None else of_group(ctx.queries, 1),
        accumulated=None if ctx.accumulated is None else of_head(ctx.accumulated),
        output_weight=None if ctx.output_weight is None else of_group(ctx.output_weight, 1),
    )


def _positions(shape: Shape, seen: int, generator: torch.Generator) -> torch.Tensor:
    """The first and the newest tokens of each head, and of the others as many as it holds, drawn at random."""
    positions = torch.full((shape.batch, shape.heads, shape.tokens), NO_POSITION)
    always = torch.cat([torch.arange(shape.sinks), torch.arange(seen - shape.recent, seen)])
    optional = torch.arange(shape.sinks, seen - shape.recent)
    drawn = optional[: shape.tokens - len(always)]
    for index in range(shape.batch):
        for kv_head in range(shape.heads):
            count = shape.tokens - len(always)
            if shape.ragged and (index, kv_head) != (0, 0):
                count = int(torch.randint(count // 2, count + 1, (), generator=generator))
            # Without ragged heads, all drop the same tokens.
            if shape.ragged or (shape.gaps and (index, kv_head) == (0, 0)):
                drawn = optional[torch.randperm(len(optional), generator=generator)[:count]]
            chosen = torch.cat([always, drawn]).sort().values
            positions[index, kv_head, : len(chosen)] = chosen
    return positions


def _protected(shape: Shape, held: torch.Tensor) -> torch.Tensor:
    place, count = torch.arange(shape.tokens), held.sum(-1, keepdim=True)
    return held & ((place < shape.sinks) | (place >= count - shape.recent))


def _accumulated(ctx: Context) -> torch.Tensor:
    """Attention summed over the queries of all positions and averaged over the group's heads."""
    accumulated = torch.zeros(ctx.positions.shape)
    for index, kv_head in brute_force.heads_of(ctx):
        tokens = brute_force.Head(ctx, index, kv_head)
        total = sum(sum(tokens.attention(q, query) for query in range(len(tokens.at))) for q in range(tokens.group))
        accumulated[index, kv_head, : tokens.count] = torch.as_tensor(total / tokens.group)
    return accumulated
