"""Keys, values and queries with a structure like that of real models, and their moments by plain sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.lowrank.moments import LayerMoments, States

TOKENS = 200
SCALING = 0.3


@dataclass
class Layer:
    """Float64: ``keys [Hkv, n, D]``, ``values [Hkv, n, Dv]``, ``queries [Hq, n, D]``, ``output [hidden, Hq * Dv]``."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    output: torch.Tensor

    @property
    def heads(self) -> int:
        return self.keys.shape[0]

    def readers(self, head: int) -> list[int]:
        """The indices of the query heads that read a KV head."""
        ratio = len(self.queries) // self.heads
        return list(range(head * ratio, (head + 1) * ratio))

    def asked(self, head: int) -> torch.Tensor:
        """All queries of a KV head ``[ratio * n, D]``, scaled so that second moments are sums over the query heads."""
        return torch.cat([self.queries[q] for q in self.readers(head)]) / TOKENS**0.5

    def projected(self, head: int) -> torch.Tensor:
        """The output projection of the values of a KV head, ``[Dv, ratio * hidden]``."""
        dim = self.values.shape[2]
        return torch.cat([self.output[:, q * dim : (q + 1) * dim].T for q in self.readers(head)], 1)

    def side_by_side(self, side: str, group: int) -> list[torch.Tensor]:
        """States of each group of heads, ``[n, g * D]``."""
        x = getattr(self, side)
        return [torch.cat(list(x[first : first + group]), 1) for first in range(0, self.heads, group)]


def make(heads: int = 2, ratio: int = 3, dim: int = 16, value_dim: int | None = None, seed: int = 0) -> Layer:
    """States with decaying spectra in random bases, a common part in all heads, and means far from zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def states(count: int, width: int) -> torch.Tensor:
        spectrum = torch.logspace(0.5, -1.5, width, dtype=torch.float64)
        common = normal(TOKENS, width) @ normal(width, width)
        parts = [(normal(TOKENS, width) * spectrum) @ normal(width, width) + 0.3 * common for _ in range(count)]
        return torch.stack(parts) / 3 + 2 * normal(count, 1, width)

    value_dim = value_dim or dim
    hidden = 2 * dim
    output = normal(hidden, heads * ratio * value_dim) * torch.logspace(0, -1, hidden, dtype=torch.float64)[:, None]
    return Layer(states(heads, dim), states(heads, value_dim), states(heads * ratio, dim), output)


def moments_of(layer: Layer, together: int | None = None) -> LayerMoments:
    """The moments that ``collect`` would measure, token by token; ``together`` heads side by side (all if None)."""
    together = together or layer.heads
    queries = torch.stack([sum_of_squares(layer.asked(head)) for head in range(layer.heads)])
    return LayerMoments(
        heads=layer.heads,
        query_heads=len(layer.queries),
        scaling=SCALING,
        keys=_states(layer.side_by_side("keys", together)),
        values=_states(layer.side_by_side("values", together)),
        queries=queries,
        output=torch.stack([sum_of_squares(layer.projected(head).T) for head in range(layer.heads)]),
    )


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """``[n, W] -> [W, W]``."""
    return torch.stack([torch.outer(row, row) for row in x]).sum(0)


def _states(parts: list[torch.Tensor]) -> States:
    return States(
        torch.stack([part.mean(0) for part in parts]), torch.stack([sum_of_squares(part) / len(part) for part in parts])
    )
