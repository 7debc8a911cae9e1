"""Measuring the moments of a model's keys, values and queries while the model reads texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from hf_kvcache.integration.model_identity import model_identity, sample_weights
from hf_kvcache.integration.output_projection import output_weight
from hf_kvcache.integration.recording import record_attention
from hf_kvcache.integration.rope import LayerRope, rope_of
from hf_kvcache.lowrank.distances import average_over_distances
from hf_kvcache.lowrank.moments import LayerMoments, Moments, States, largest_divisor
from hf_kvcache.utils.processes import ALONE, Processes


def collect(
    model: Any,
    texts: Iterable[str],
    tokenizer: Any,
    tokens: int = 100_000,
    length: int = 2048,
    sinks: int = 4,
    group: int | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Moments:
    """Measure the moments of a model's attention layers while it reads texts.

    In memory at a time are one chunk's activations, and per layer some matrices of ``[Hkv, D, D]`` and three of
    ``[Hkv / s, s * D, s * D]``, in float64.

    Args:
        model: a causal language model; of a vision-language model the text part is measured.
        texts: read from the first one on until there are enough tokens; each is cut into chunks.
        tokenizer: the model's.
        tokens: number of tokens that are read.
        length: tokens of a chunk; the queries' moments for keys before their rotary embedding are averaged over
            distances below it.
        sinks: first tokens of each chunk that do not count. They are attention sinks: their keys are many times longer
            than others, and caches keep them in full precision.
        group: largest number of neighbouring KV heads ``s`` side by side; None for all heads. In a layer whose heads
            it does not divide, the next smaller number that does is taken.
        progress: show a progress bar on stderr.
        processes: that each read their share of the chunks; the moments are those of all chunks, for all of them.

    Raises:
        ValueError: for a number out of range, texts without a chunk for each process, texts without tokens enough, or a
            model in which no layer caches its keys and values (latent attention caches latents).
    """
    if sinks < 0 or length <= sinks:
        raise ValueError(f"sinks={sinks!r}; accepted: from 0 to below length={length!r}")
    if group is not None and group < 1:
        raise ValueError(f"group={group!r}; accepted: whole numbers from 1, or None for all heads")
    sums: dict[int, _LayerSums] = {}

    def record(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if query.shape[2] > sinks and _has_own_keys(module, query, key):
            if module.layer_idx not in sums:
                sums[module.layer_idx] = _LayerSums(module, (query.shape[1], key.shape[1]), group, length)
            sums[module.layer_idx].add(query, key, value, sinks)

    with progress_bar(tokens) if progress else nullcontext() as advance:
        record_attention(model, texts, tokenizer, tokens, length, record, advance, processes)
    processes.add_up({index: layer.tensors() for index, layer in sums.items()})
    if not sums:
        raise ValueError(
            f"model of type {model.config.model_type!r}, chunks of up to length={length}; accepted: models whose "
            f"attention caches keys and values, and texts of more than sinks={sinks} tokens"
        )
    layers = {index: sums[index].moments() for index in sorted(sums)}
    counted = next(iter(sums.values())).count
    return Moments(layers, counted, model_identity(model.config), sample_weights(model))


def _has_own_keys(module: Any, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the layer caches these keys, and not latents or the keys of another layer."""
    latent = hasattr(module, "kv_b_proj") or hasattr(module, "expand_kv")
    return not latent and key.shape[2] == query.shape[2] and query.shape[1] % key.shape[1] == 0


@contextmanager
def progress_bar(tokens: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal, advanced by calls; without rich there is none."""
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


class _Sums:
    """Running sums over states ``[N, n, W]``."""

    def __init__(self) -> None:
        self.count: torch.Tensor | float = 0.0
        self.first: torch.Tensor | float = 0.0
        self.second: torch.Tensor | float = 0.0

    def tensors(self) -> list[torch.Tensor]:
        """The sums, to be changed in place; none if nothing was added."""
        return [x for x in (self.count, self.first, self.second) if isinstance(x, torch.Tensor)]

    def add(self, x: torch.Tensor) -> None:
        """Add float64 states ``x [N, n, W]``."""
        self.count = self.count + torch.full([1], x.shape[1], dtype=torch.float64, device="cpu")
        self.first = self.first + x.sum(1).cpu()
        self.second = self.second + (x.mT @ x).cpu()

    def states(self) -> States:
        """The mean and the second moments of all states that were added."""
        count = torch.as_tensor(self.count, device="cpu")
        first, second = torch.as_tensor(self.first, device="cpu"), torch.as_tensor(self.second, device="cpu")
        return States(first / count, second / count)


class _LayerSums:
    """The running sums of one layer."""

    def __init__(self, module: Any, heads: tuple[int, int], group: int | None, length: int) -> None:
        self.module = module
        self.query_heads, self.heads = heads
        self.ratio, self.group = self.query_heads // self.heads, largest_divisor(self.heads, group)
        window = getattr(module, "sliding_window", None)
        self.length = min(length, window) if isinstance(window, int) else length
        self.keys, self.values, self.queries = (_Sums() for _ in range(3))
        self.keys_before, self.queries_before = _Sums(), _Sums()
        self.counted = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.rope: LayerRope | None
        try:
            self.rope = rope_of(module)
        except ValueError:
            self.rope = None

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: int) -> None:
        """Add the states ``[1, H, n, D]`` of a chunk, of which the first ``sinks`` tokens do not count."""
        positions = torch.arange(sinks, key.shape[2], device=key.device)
        query, key, value = (x[:, :, sinks:] for x in (query, key, value))
        asked, keys, values = _per_head(query, self.heads), _float64(key), _float64(value)
        self.counted += key.shape[2]
        self.keys.add(_group_heads(keys, self.group))
        self.values.add(_group_heads(values, self.group))
        self.queries.add(asked)
        if self.rope is not None:
            self.keys_before.add(_group_heads(_float64(self.rope.unrotate(key, positions)), self.group))
            self.queries_before.add(_per_head(self.rope.unrotate(query, positions), self.heads))

    @property
    def count(self) -> int:
        """Tokens that were added."""
        return int(self.counted)

    def tensors(self) -> list[torch.Tensor]:
        """All sums, to be changed in place."""
        parts = self.keys, self.values, self.queries, self.keys_before, self.queries_before
        return [self.counted, *(tensor for part in parts for tensor in part.tensors())]

    def moments(self) -> LayerMoments:
        """The moments of all states that were added."""
        before = None
        if self.rope is not None:
            before = average_over_distances(self.ratio * self.queries_before.states().second, self.rope, self.length)
        return LayerMoments(
            heads=self.heads,
            query_heads=self.query_heads,
            scaling=getattr(self.module, "scaling", None) or self.queries.states().mean.shape[1] ** -0.5,
            keys=self.keys.states(),
            values=self.values.states(),
            queries=self.ratio * self.queries.states().second,
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


def _float64(x: torch.Tensor) -> torch.Tensor:
    """``[1, H, n, D] -> [H, n, D]`` in float64."""
    x = x[0].detach()
    return (x.cpu() if x.device.type == "mps" else x).double()  # mps has no float64


def _group_heads(x: torch.Tensor, group: int) -> torch.Tensor:
    """``[H, n, D] -> [H / g, n, g * D]``."""
    return x.unflatten(0, (-1, group)).transpose(1, 2).flatten(2)


def _per_head(query: torch.Tensor, heads: int) -> torch.Tensor:
    """``[1, Hq, n, D] -> [Hkv, ratio * n, D]`` in float64."""
    return _float64(query).unflatten(0, (heads, -1)).flatten(1, 2)
