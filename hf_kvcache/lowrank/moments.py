"""Means and second moments of a model's keys, values and queries, from which the bases are solved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_kvcache.integration.output_projection import output_weight
from hf_kvcache.integration.recording import read
from hf_kvcache.integration.rope import LayerRope, rope_of
from hf_kvcache.lowrank.distances import over_distances
from hf_kvcache.lowrank.identity import identity, weights_sketch


@dataclass(frozen=True)
class States:
    """Of the keys or the values of one layer; ``s`` neighbouring KV heads stand side by side, ``W = s * D``.

    Attributes:
        mean: float64 ``[Hkv / s, W]``.
        second: float64 ``[Hkv / s, W, W]``, the mean of ``x x^T``.
    """

    mean: torch.Tensor
    second: torch.Tensor

    def grouped(self, beside: int, heads: int, centered: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Second moments of fewer heads side by side, and the mean about which they are taken.

        Args:
            beside: how many heads, ``g``; a divisor of ``s``.
            heads: KV heads, ``Hkv``.
            centered: whether the mean is taken out first.

        Returns:
            ``[G, g * D, g * D]`` and ``[G, g * D]`` (None where it is not taken out), ``G = Hkv / g``.

        Raises:
            ValueError: if fewer than ``g`` heads were measured side by side.
        """
        together = heads // self.mean.shape[0]
        if together % beside:
            raise ValueError(f"group={beside!r}: the moments are of {together} heads side by side; collect more")
        mean = self.mean.reshape(heads // beside, -1)
        split = self.second.unflatten(1, (together // beside, -1)).unflatten(3, (together // beside, -1))
        second = split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)
        if not centered:
            return second, None
        return second - mean[:, :, None] * mean[:, None, :], mean


@dataclass(frozen=True)
class LayerMoments:
    """Of one attention layer. Everything is float64 and on the CPU.

    Attributes:
        heads: KV heads, ``Hkv``.
        query_heads: ``Hq``.
        scaling: factor of the scores.
        keys: after their rotary embedding.
        values: as they are cached.
        queries: ``[Hkv, Dk, Dk]``, the mean of ``q q^T`` over the tokens, summed over the query heads of a KV head.
        scored: of the values of each KV head, a token counting as much as ``k Sq k^T``, the sum of its squared scores
            (OSCAR, arXiv:2605.17757); ``Sq`` is that of the queries of the same chunk of text.
        output: ``[Hkv, Dv, Dv]``, ``W W^T`` of the output projection of each query head, summed like the queries; None
            where it has no plain weight.
        keys_before: of keys before their rotary embedding; None where it cannot be undone.
        queries_before: ``[Hkv, Dk, Dk]``, what the queries ask of keys before their rotary embedding, averaged over
            their distances; None where ``keys_before`` is.
    """

    heads: int
    query_heads: int
    scaling: float
    keys: States
    values: States
    queries: torch.Tensor
    scored: States
    output: torch.Tensor | None = None
    keys_before: States | None = None
    queries_before: torch.Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """Of a model.

    Attributes:
        layers: by index of the layer.
        tokens: how many were counted.
        fingerprint: of the model.
        weights: some numbers of its weights, by layer.
    """

    layers: dict[int, LayerMoments] = field(repr=False)
    tokens: int
    fingerprint: dict[str, Any]
    weights: dict[int, list[float]]


def collect(
    model: Any,
    texts: Iterable[str],
    tokenizer: Any,
    tokens: int = 100_000,
    length: int = 2048,
    sinks: int = 4,
    group: int | None = None,
    progress: bool = True,
) -> Moments:
    """Sum up what a model's attention layers see while it reads texts.

    Held at a time: one chunk's activations, and per layer some matrices of ``[Hkv, D, D]`` and three of
    ``[Hkv / s, s * D, s * D]``, in float64.

    Args:
        model: a causal language model; of a vision-language model the text part is measured.
        texts: read from the first one on until there are enough tokens; each is cut into chunks.
        tokenizer: the model's.
        tokens: how many are read.
        length: tokens of a chunk; what is asked of un-rotated keys is averaged over distances below it.
        sinks: first tokens of each chunk that do not count. They are attention sinks, many times longer than the
            others, and caches keep them in full precision.
        group: most neighbouring KV heads ``s`` that are put side by side; all if None. Where it does not divide the
            heads of a layer, the next smaller number that does.
        progress: draw a bar on stderr.

    Raises:
        ValueError: for a number out of range, texts without tokens enough, or a model in which no layer has keys,
            values and queries of its own (latent attention has none that are cached).
    """
    if sinks < 0 or length <= sinks:
        raise ValueError(f"sinks={sinks!r}; accepted: from 0 to below length={length!r}")
    if group is not None and group < 1:
        raise ValueError(f"group={group!r}; accepted: whole numbers from 1, or None for all heads")
    sums: dict[int, _Sums] = {}

    def note(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if query.shape[2] > sinks and _has_own_keys(module, query, key):
            if module.layer_idx not in sums:
                sums[module.layer_idx] = _Sums(module, (query.shape[1], key.shape[1]), group, length)
            sums[module.layer_idx].add(query, key, value, sinks)

    with _bar(tokens) if progress else nullcontext() as advance:
        read(model, texts, tokenizer, tokens, length, note, advance)
    if not sums:
        raise ValueError(
            f"model of type {model.config.model_type!r}, chunks of up to length={length}; accepted: models whose "
            f"attention caches keys and values, and texts of more than sinks={sinks} tokens"
        )
    layers = {index: sums[index].moments() for index in sorted(sums)}
    counted = next(iter(sums.values())).count
    return Moments(layers, counted, identity(model.config), weights_sketch(model))


def divisor(heads: int, most: int | None) -> int:
    """The largest number of heads, up to ``most``, that divides ``heads``."""
    return max(g for g in range(1, min(heads, most or heads) + 1) if heads % g == 0)


def _has_own_keys(module: Any, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the keys are those that a cache would hold for this layer."""
    latent = hasattr(module, "kv_b_proj") or hasattr(module, "expand_kv")
    return not latent and key.shape[2] == query.shape[2] and query.shape[1] % key.shape[1] == 0


@contextmanager
def _bar(tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, moved by calls; without rich there is none."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda count: None
        return

    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=tokens)
        yield lambda count: bar.advance(task, count)


class _Total:
    """Running sums over states ``[N, n, W]``, with or without a weight for each."""

    def __init__(self) -> None:
        self.weight: torch.Tensor | float = 0.0
        self.first: torch.Tensor | float = 0.0
        self.second: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """``x [N, n, W]`` and ``weights [N, n]``, float64."""
        weights = torch.ones_like(x[..., 0]) if weights is None else weights
        weighted = x * weights[..., None]
        self.weight = self.weight + weights.sum(1).cpu()
        self.first = self.first + weighted.sum(1).cpu()
        self.second = self.second + (weighted.mT @ x).cpu()

    def states(self) -> States:
        weight = torch.as_tensor(self.weight).clamp_min(torch.finfo(torch.float64).tiny)
        first, second = torch.as_tensor(self.first), torch.as_tensor(self.second)
        return States(first / weight[:, None], second / weight[:, None, None])


class _Sums:
    """Those of one layer."""

    def __init__(self, module: Any, heads: tuple[int, int], group: int | None, length: int) -> None:
        self.module = module
        self.query_heads, self.heads = heads
        self.ratio, self.group = self.query_heads // self.heads, divisor(self.heads, group)
        window = getattr(module, "sliding_window", None)
        self.length = min(length, window) if isinstance(window, int) else length
        self.keys, self.values, self.queries, self.scored = _Total(), _Total(), _Total(), _Total()
        self.keys_before, self.queries_before = _Total(), _Total()
        self.count = 0
        self.rope: LayerRope | None
        try:
            self.rope = rope_of(module)
        except ValueError:
            self.rope = None

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: int) -> None:
        """``[1, H, n, D]`` each, of which the first ``sinks`` tokens do not count."""
        positions = torch.arange(sinks, key.shape[2], device=key.device)
        query, key, value = (x[:, :, sinks:] for x in (query, key, value))
        asked, heads = _per_head(query, self.heads), (_wide(key), _wide(value))
        self.count += key.shape[2]
        self.keys.add(_beside(heads[0], self.group))
        self.values.add(_beside(heads[1], self.group))
        self.queries.add(asked)
        # Not that of all chunks: these are the queries that read these keys, and one reading of the texts is enough.
        in_chunk = asked.mT @ asked / asked.shape[1]
        self.scored.add(heads[1], ((heads[0] @ in_chunk) * heads[0]).sum(-1))
        if self.rope is not None:
            self.keys_before.add(_beside(_wide(self.rope.unrotate(key, positions)), self.group))
            self.queries_before.add(_per_head(self.rope.unrotate(query, positions), self.heads))

    def moments(self) -> LayerMoments:
        before = None
        if self.rope is not None:
            before = over_distances(self.ratio * self.queries_before.states().second, self.rope, self.length)
        return LayerMoments(
            heads=self.heads,
            query_heads=self.query_heads,
            scaling=getattr(self.module, "scaling", None) or self.queries.states().mean.shape[1] ** -0.5,
            keys=self.keys.states(),
            values=self.values.states(),
            queries=self.ratio * self.queries.states().second,
            scored=self.scored.states(),
            output=self._output(),
            keys_before=None if self.rope is None else self.keys_before.states(),
            queries_before=before,
        )

    def _output(self) -> torch.Tensor | None:
        value_dim = self.values.states().mean.shape[1] // self.group
        try:
            weight = output_weight(self.module, value_dim)
        except ValueError:
            return None
        if weight.is_meta or weight.shape[1] != self.query_heads * value_dim:
            return None
        by_head = weight.to("cpu", torch.float64).unflatten(1, (self.heads, -1, value_dim))
        return torch.einsum("ohrd,ohre->hde", by_head, by_head)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """``[1, H, n, D] -> [H, n, D]`` in float64."""
    x = x[0].detach()
    return (x.cpu() if x.device.type == "mps" else x).double()  # mps has no float64


def _beside(x: torch.Tensor, group: int) -> torch.Tensor:
    """``[H, n, D] -> [H / g, n, g * D]``."""
    return x.unflatten(0, (-1, group)).transpose(1, 2).flatten(2)


def _per_head(query: torch.Tensor, heads: int) -> torch.Tensor:
    """``[1, Hq, n, D] -> [Hkv, ratio * n, D]`` in float64."""
    return _wide(query).unflatten(0, (heads, -1)).flatten(1, 2)
