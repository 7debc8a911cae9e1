"""The time of a token without a cache and with several, behind texts of several lengths.

Without a cache each new token takes a forward pass over the whole text. With one, the text is read once, and then each
token takes a pass over one token. All ways take turns, so that a machine that is busy for a while slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.cli.reading import attend_as_with, decoded, read_prompt, timed

#: The name of the way without a cache.
NO_CACHE = "no cache"
#: Tokens that are decoded in each round, and those before them that are not timed.
_STEPS, _UNTIMED = 5, 1
#: How many times longer a round is thought to take at the next length, before two lengths have told.
_GROWTH = 4.0


@dataclass(frozen=True)
class Measured:
    """The times of one way at one length.

    Attributes:
        way: name of the cache, or ``"no cache"``.
        tokens: length of the text in tokens.
        prompt_ms: milliseconds to read the text at once, median of the rounds.
        token_ms: milliseconds of a token behind it, median of the rounds and steps.
        quartiles_ms: the first and third quartile of the same times.
        times: how many times of a token the median is of.
        total_s: seconds of a text of this length that begins with the shortest one as its prompt. It is a sum over
            tokens, with the times of those between two measured lengths on a straight line between the medians.
    """

    way: str
    tokens: int
    prompt_ms: float
    token_ms: float
    quartiles_ms: tuple[float, float]
    times: int
    total_s: float


@dataclass
class Stop:
    """Says when to stop.

    Attributes:
        seconds: time that all lengths together may take.
        clock: gives the time in seconds.
    """

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.start + self.seconds - self.clock()


@dataclass
class _Times:
    """The times of one way at one length, in milliseconds."""

    prompt: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)


@torch.inference_mode()
def measure(
    model: Any,
    ids: torch.Tensor,
    makers: Mapping[str, Callable[[PreTrainedConfig], Cache]],
    lengths: Sequence[int],
    rounds: int,
    stop: Stop,
    advance: Callable[[str], None] = lambda _: None,
) -> Iterator[Measured]:
    """Measure all ways at each length.

    Args:
        model: the model.
        ids: tokens ``[1, T]``, at least as many as the longest length.
        makers: functions that make the caches, by name.
        lengths: numbers of tokens, growing. The first one is measured whatever it takes.
        rounds: how many times each is measured, while there is time.
        stop: no length is begun that would probably end too late.
        advance: called with what is measured before each round.

    Yields:
        For each length that there was time for, one result for each way.
    """
    advance("warming up")
    _round(model, ids[:, : lengths[0]], makers)  # the first passes of a process take longer
    before: dict[str, list[Measured]] = {}
    last_round, growth = 0.0, _GROWTH
    for length in lengths:
        if last_round and last_round * growth > stop.left:
            return
        times: dict[str, _Times] = {}
        earlier_round = last_round
        for _ in range(rounds):
            if times and last_round > stop.left:
                break
            advance(f"{length:,} tokens")
            started = stop.clock()
            for way, (prompt_ms, token_ms) in _round(model, ids[:, :length], makers).items():
                own = times.setdefault(way, _Times())
                own.prompt.append(prompt_ms)
                own.token += token_ms
            last_round = stop.clock() - started
        if earlier_round:
            growth = max(last_round / earlier_round, 1.0)
        for way, own in times.items():
            earlier = before.setdefault(way, [])
            earlier.append(_summed_up(way, length, own, earlier))
            yield earlier[-1]


def _round(
    model: Any, ids: torch.Tensor, makers: Mapping[str, Callable[[PreTrainedConfig], Cache]]
) -> dict[str, tuple[float, list[float]]]:
    """Milliseconds to read ``ids [1, T]``, and those of single tokens behind them, for each way once."""
    attend_as_with(model, None)
    output, took = timed(lambda: model(ids, use_cache=False, logits_to_keep=1), model.device)
    # Without a cache, the pass that reads the text is also the one that gives the next token.
    found = {NO_CACHE: (took, [took])}
    following = output.logits[0, -1].argmax().repeat(_UNTIMED + _STEPS)
    for name, make in makers.items():
        cache = make(decoder_config(model.config))
        attend_as_with(model, cache)
        _, took = timed(lambda cache=cache: read_prompt(model, ids, cache), model.device)  # type: ignore[misc]
        steps = [milliseconds for _, milliseconds in decoded(model, following, cache)]
        found[name] = took, steps[_UNTIMED:]
    attend_as_with(model, None)
    return found


def _summed_up(way: str, tokens: int, own: _Times, earlier: Sequence[Measured]) -> Measured:
    token_ms = median(own.token)
    low, _, high = quantiles(own.token, n=4, method="inclusive") if len(own.token) > 1 else (token_ms,) * 3
    prompt_ms = median(own.prompt)
    if earlier:
        last = earlier[-1]
        total = last.total_s + (tokens - last.tokens) * (last.token_ms + token_ms) / 2e3
    else:
        total = prompt_ms / 1e3
    return Measured(way, tokens, prompt_ms, token_ms, (low, high), len(own.token), total)
