"""Step d: one attention layer: decoding steps against DynamicCache and SDPA in place, then ``layer_parts.py``.

Steps go round over as many caches as exceed the L2 cache. Three times are taken of each: see ``measuring.Timed``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu import layer_parts
from benchmarks.gpu.measuring import add_kernels, attempt, kernels_of, relative, time_steps
from benchmarks.gpu.methods import Dynamic, InPlace, Method, Ours, Token, exact
from benchmarks.gpu.results import Results
from benchmarks.gpu.settings import Settings

CODECS = {"none": "none", "8 bits": "rotated8", "4 bits": "unbiased4", "2 bits": "unbiased2"}
DYNAMIC = "DynamicCache"
#: Tokens held and batch. The first two are also profiled.
POINTS = [(16384, 1), (131072, 1), (16384, 8), (65536, 1), (131072, 8), (4096, 1), (4096, 8), (65536, 8)]
TINY_POINTS = [(256, 1), (256, 2)]
#: Tokens past the nominal number: the tail has then about the length that it has on average, and no page fills.
OFFSET = 40
#: Bytes that the caches of a round hold together, at least: several times the L2 cache.
ROUND_BYTES, MOST_CACHES = 200e6, 16
#: The most tokens, over all sequences, at which results are checked: in float64 more would take too long.
MOST_CHECKED = 300_000


class Layer:
    """The measurements of one layer.

    Attributes:
        copy_rate: GB/s of a copy within the device, its reads and writes both counted.
    """

    def __init__(self, settings: Settings, results: Results) -> None:
        self.settings, self.results = settings, results
        self.heads, self.dim = (2, 32) if settings.tiny else (8, 128)
        self.query_heads = (4, 8) if settings.tiny else (32, 64)
        self.steps, self.warm_up = (2, 1) if settings.tiny else (12, 4)
        self.copy_rate = self._copy_rate()

    def _copy_rate(self) -> float:
        if not self.settings.cuda:
            return 1.0
        source = torch.randint(0, 255, (2**20 if self.settings.tiny else 2**30,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        best = min(time_steps(self.settings, lambda number: target.copy_(source), 3).gpu for _ in range(3))
        rate = 2 * source.numel() / best / 1e3
        self.results.add("copy", gb_per_s=rate)
        return rate

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, dtype=self.settings.dtype, device=self.settings.device)

    def tokens(self, batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random keys and values."""
        return self.random(batch, self.heads, count, self.dim), self.random(batch, self.heads, count, self.dim)

    def new(self, batch: int, query_heads: int, count: int = 1) -> Token:
        """The query of new tokens, their keys and their values."""
        return self.random(batch, query_heads, count, self.dim), *self.tokens(batch, count)

    def methods(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, Callable[[], Method]]:
        """How each side is made."""
        room = 4 * (self.steps + self.warm_up + MOST_CACHES) * len(self.query_heads) + 16
        return {
            DYNAMIC: partial(Dynamic, keys, values),
            "sdpa in place, gqa": partial(InPlace, keys, values, room, False),
            "sdpa in place, grouped": partial(InPlace, keys, values, room, True),
            **{
                f"ours {name}": partial(Ours.filled, self.settings, codec, keys, values)
                for name, codec in CODECS.items()
            },
        }

    def point(self, tokens: int, batch: int, profiled: bool) -> None:
        """All sides at one number of tokens and one batch."""
        torch.manual_seed(tokens + batch)
        keys, values = self.tokens(batch, tokens + OFFSET)
        new = {n: self.new(batch, n) for n in self.query_heads}
        eager: dict[int, float] = {}
        for name, make in self.methods(keys, values).items():
            case = f"T={tokens} B={batch} {name}"
            if self.settings.left() < 8:
                self.results.leave_out(case)
                continue
            attempt(
                self.settings,
                self.results,
                case,
                lambda name=name, make=make: self.side(  # type: ignore[misc]
                    name, make, keys, values, new, tokens, eager, profiled
                ),
            )
            if self.settings.cuda:
                torch.cuda.empty_cache()

    def side(
        self,
        name: str,
        make: Callable[[], Method],
        keys: torch.Tensor,
        values: torch.Tensor,
        new: dict[int, Token],
        tokens: int,
        eager: dict[int, float],
        profiled: bool,
    ) -> None:
        """One side, with each number of query heads; ``eager`` keeps DynamicCache's times."""
        batch, first = keys.shape[0], make()
        held = first.bytes_read()
        most, wanted = (2, 1.0) if self.settings.tiny else (MOST_CACHES, ROUND_BYTES)
        caches = [first, *(make() for _ in range(int(min(most, -(-wanted // held))) - 1))]
        for query_heads, (query, key, value) in new.items():
            error = None
            if query_heads == self.query_heads[0] and tokens * batch <= MOST_CHECKED:
                truth = exact(query, torch.cat([keys, key], 2), torch.cat([values, value], 2))
                error = relative(first.step(query, key, value), truth)

            def step(number: int, token: Token = (query, key, value)) -> Any:
                return caches[number % len(caches)].step(*token)

            for number in range(max(self.warm_up, len(caches))):
                step(number)
            timed = time_steps(self.settings, step, max(self.steps, len(caches)))
            if name == DYNAMIC:
                eager[query_heads] = timed.eager
            rate = held / timed.gpu / 1e3
            case = f"T={tokens} B={batch} Hq={query_heads} {name}"
            self.results.add(
                case,
                **timed.figures(),
                gb_per_s=rate,
                share_of_copy=rate / self.copy_rate,
                times_dynamic=eager[query_heads] / timed.eager if query_heads in eager else None,
                error=error,
                bytes_read=held,
                caches=len(caches),
                fill_ms=first.fill_ms if isinstance(first, Ours) else None,
            )
            if profiled and query_heads == self.query_heads[0]:
                add_kernels(self.results, case, kernels_of(self.settings, lambda: step(0)))


def run(settings: Settings, results: Results) -> None:
    layer, points = Layer(settings, results), TINY_POINTS if settings.tiny else POINTS
    with torch.inference_mode():
        for tokens, batch in points[:2]:
            layer.point(tokens, batch, True)
        for part in layer_parts.first(layer):
            part()
        for tokens, batch in points[2:3]:
            layer.point(tokens, batch, True)
        for part in layer_parts.then(layer):
            part()
        for tokens, batch in points[3:]:
            layer.point(tokens, batch, False)
        for part in layer_parts.at_last(layer):
            part()
