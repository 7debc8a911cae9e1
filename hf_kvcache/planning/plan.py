"""``plan``: what the caches of a model hold and cost at some length, and what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.compressed_config import compresses
from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.integration.binding import unbind
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.planning import low_rank
from hf_kvcache.planning.caches import DEFAULT, LowRank, Make, maker
from hf_kvcache.planning.formula import Textbook, textbook
from hf_kvcache.planning.holding import Holding
from hf_kvcache.planning.model import LayerCall, ModelOnMeta, NotTold
from hf_kvcache.planning.sizes import parse_bytes, parse_count
from hf_kvcache.utils.validation import whole

#: Longest context and largest batch that are looked for. A cache keeps 8 bytes for each token of a prompt on the host.
_MOST_TOKENS, _MOST_SEQUENCES = 1 << 26, 1 << 16


@dataclass(frozen=True)
class CachePlan:
    """One cache at the context and batch of the plan.

    Attributes:
        name: the name by which it was asked for.
        bytes: bytes that it holds after a prompt of that length, as its ``memory().total`` says, with what the first
            step makes to choose pages by (``sparse:...``). Where heads compete for tokens, this is the most that it can
            be.
        bytes_per_token: what the last tokens added, averaged over 1,024 tokens, in bytes a token of one sequence.
        longest_context: tokens of each sequence that fit beside the weights at the peak, up to 67,108,864; None without
            ``memory``, 0 if none fit.
        largest_batch: sequences of that context that fit so, up to 65,536; None without ``memory``.
        step_floor_ms: the time in which a decode step can read weights and cache, or the part of the cache that it
            reads; None without ``bandwidth``.
        curve: bytes at each of the ``lengths`` that were asked for, up to its ``max_length`` if it has one.
        peak: the most bytes that it holds while the prompt is read in one forward pass. A cache that evicts holds all
            tokens of a layer until that layer has attended.
        note: what the figures rest on, in words; empty if they are what will be held.
    """

    name: str
    bytes: int
    bytes_per_token: float
    longest_context: int | None = None
    largest_batch: int | None = None
    step_floor_ms: float | None = None
    curve: dict[int, int] = field(default_factory=dict)
    peak: int = 0
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What the caches of a model would hold.

    Attributes:
        model_type: the model's type.
        context: tokens of each sequence.
        batch: number of sequences.
        dtype: dtype of the weights, keys and values.
        parameters: number of the model's weights (of a vision-language model, those of its language model).
        weight_bytes: bytes of these weights.
        active_bytes: bytes of the weights that one token reads: of routed experts, only those that are chosen.
        textbook: the textbook formula; None if the config does not name its terms.
        caches: a row for each cache.
        unknown: what the config does not tell and which caches there are not for the model, in words.
    """

    model_type: str
    context: int
    batch: int
    dtype: torch.dtype
    parameters: int
    weight_bytes: int
    active_bytes: int
    textbook: Textbook | None
    caches: list[CachePlan]
    unknown: list[str] = field(default_factory=list)


def plan(
    config: PreTrainedConfig,
    context: int | str = 131072,
    batch: int = 1,
    caches: Sequence[str] = DEFAULT,
    dtype: torch.dtype | None = None,
    memory: int | str | None = None,
    bandwidth: int | float | str | None = None,
    lengths: Sequence[int] = (),
) -> Plan:
    """Plan the memory of a model's caches from its config.

    Args:
        config: the model's config.
        context: tokens of each sequence, ``"128k"`` for 131,072.
        batch: number of sequences.
        caches: names of caches; see :mod:`hf_kvcache.planning.caches`.
        dtype: dtype of weights, keys and values; by default the config's, or bfloat16.
        memory: bytes of the device, ``"80GB"``; with it the plan says what fits beside the weights.
        bandwidth: bytes a second that the device reads, ``"3350GB/s"``; with it the plan has the least time of a step.
        lengths: other numbers of tokens for which bytes are wanted, for a plot.

    Raises:
        ValueError: if an argument is out of range, or the config does not tell enough.
        TypeError: if ``config`` is not a model's config.
    """
    tokens, room = parse_count("context", context), None if memory is None else parse_bytes("memory", memory)
    speed = None if bandwidth is None else parse_bytes("bandwidth", bandwidth)
    whole("batch", batch, 1)
    makers = {name: maker(name) for name in caches}
    decoder = deepcopy(decoder_config(config))  # caches bind the config that they are made for
    own = getattr(decoder, "dtype", None)
    dtype = dtype or (own if isinstance(own, torch.dtype) else torch.bfloat16)
    model = ModelOnMeta(decoder, dtype)
    active, unknown = _active_bytes(model)
    fitting = None if room is None else room - model.bytes
    rows = []
    for name, (holding, note) in _holdings(model, makers, unknown).items():
        try:
            row = _row(name, holding, batch, tokens, active, fitting, speed)
            most = holding.longest or max(lengths, default=0)
            curve = {n: holding.bytes(batch, n).total for n in lengths if n <= most}
            rows.append(replace(row, note=note, curve=curve))
        except ValueError as error:  # found at the first update
            unknown.append(f"{name}: {error}")
    try:
        formula = textbook(decoder, dtype)
    except NotTold as error:
        formula = None
        unknown.append(str(error))
    return Plan(decoder.model_type, tokens, batch, dtype, model.parameters, model.bytes, active, formula, rows, unknown)


def _holdings(model: ModelOnMeta, makers: dict[str, Make], unknown: list[str]) -> dict[str, tuple[Holding, str]]:
    """What each cache holds, and the note, by its name; reasons why there is no such cache go to ``unknown``."""
    found: dict[str, tuple[Holding, str]] = {}
    # Caches of this package are given the same by a model. transformers' own are given keys and values for latents.
    calls: dict[bool, list[tuple[LayerCall, ...]]] = {}
    told: dict[bool, bool] = {}
    config = model.config
    for name, make in makers.items():
        try:
            empty: Callable[[], Cache] = partial(make, config)
            ours = isinstance(make, LowRank) or isinstance(empty(), KVCache)
            any_of_it: Make = KVCache if ours else make
            if ours not in calls:
                calls[ours] = model.calls(any_of_it)
                told[ours] = model.tell_all(any_of_it, calls[ours])
            if isinstance(make, LowRank):
                empty = low_rank.planned(config, make, calls[ours])
            # Layers of a model that compresses its tokens pack what they hold; others that are filled hold it as it is.
            packs = ours and compresses(config)
            fill = None if told[ours] else partial(model.filled, make if packs else any_of_it)
            found[name] = Holding(empty, calls[ours], model.queries, fill), _note(make, empty())
        except (ValueError, TypeError) as error:
            unknown.append(f"{name}: {error}")
        finally:
            unbind(config)
    return found


def _note(make: Make, cache: Cache) -> str:
    """What the figures of a cache rest on."""
    if isinstance(make, LowRank) and make.file is None:
        return low_rank.NOTE
    layer = next((layer for layer in cache.layers if isinstance(layer, EvictingLayer)), None)
    if layer is None:
        return ""
    policy = layer.eviction.policy
    waits = "bytes after compress()" if policy.waits else ""
    if policy.needs_replay:
        waits = "bytes after compress(model, input_ids), which reads the prompt again on a copy"
    shared = policy.head_floor is not None or policy.across_layers
    most = "at most: heads compete for tokens, and how many pages they fill depends on the text" if shared else ""
    if policy.keeps_above is not None:
        most = "at most: tokens that score too little go too, and how many these are depends on the text"
    return "; ".join(part for part in (waits, most) if part)


def _row(
    name: str, holding: Holding, batch: int, tokens: int, active: int, room: int | None, speed: int | None
) -> CachePlan:
    held = holding.bytes(batch, tokens)
    before = max(tokens - 1024, 0)
    earlier = holding.bytes(batch, before).total if before else 0
    longest = largest = None
    if room is not None:
        most = holding.longest or _MOST_TOKENS
        longest = _most(lambda n: holding.bytes(batch, n).peak, room, most)
        largest = _most(lambda n: holding.bytes(n, tokens).peak, room, _MOST_SEQUENCES)
    return CachePlan(
        name,
        held.total,
        (held.total - earlier) / (tokens - before) / batch,
        longest,
        largest,
        None if speed is None else 1e3 * (active + held.read) / speed,
        peak=held.peak,
    )


def _most(size: Callable[[int], int], room: int, limit: int) -> int:
    """The largest number up to ``limit`` whose ``size`` is at most ``room``, 0 if that of 1 is not.

    Sizes grow with the number, nearly in proportion from some number on: so the next guess is on the line through the
    two that enclose the answer, and in their middle where that does not help.
    """
    low, high = 0, 1
    while size(high) <= room:
        if high >= limit:
            return limit
        # No further beyond the answer than it takes: the longer the context, the longer its size is computed.
        growth = (size(high) - size(low)) / (high - low) if low else 0.0
        ahead = 1 + int(1.1 * (room - size(high)) / growth) if growth > 0 else 3 * high
        low, high = high, min(high + min(ahead, 3 * high), limit)
    halve = False
    while high - low > 1:
        middle = (low + high) // 2
        if low and not halve:
            below, above = size(low), size(high)
            middle = low + (room - below) * (high - low) // max(above - below, 1)
        guess = min(max(middle, low + 1), high - 1)
        before = high - low
        low, high = (guess, high) if size(guess) <= room else (low, guess)
        halve = (high - low) * 2 > before and not halve
    return low


def _active_bytes(model: ModelOnMeta) -> tuple[int, list[str]]:
    """Bytes of the weights that one token reads, and what is not known of them."""
    if not model.expert_bytes:
        return model.bytes, []
    chosen = _first_number(model.config, "num_experts_per_tok", "top_k_experts", "moe_top_k", "num_experts_per_token")
    experts = _first_number(model.config, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    if chosen is None or experts is None:
        return model.bytes, ["how many experts a token reads; the floor of a step counts all of them"]
    return model.bytes - model.expert_bytes + model.expert_bytes * chosen // experts, []


def _first_number(config: PreTrainedConfig, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
