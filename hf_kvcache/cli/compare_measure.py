"""Measuring caches on a text: the text's beginning is read and compressed, and what follows is decoded through it.

A single forward pass over a whole text never reads what a cache has packed or kept, so every cache would seem lossless.
Here each scored token is predicted by a decoding step that reads the compressed cache, the first one included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean, median, stdev
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.cli.reading import (
    attend_as_with,
    compress,
    decoded,
    held_bytes,
    kl_by_token,
    read_prompt,
    timed,
    top1_agreement,
)
from hf_kvcache.planning.caches import maker

#: The name of the cache with which the others are compared.
FULL = "full"
#: Distributions that are compared at once.
_AT_ONCE = 16
#: Called with the cache and the number of tokens that were read or decoded.
Advance = Callable[[str, int], None]


@dataclass
class Compared:
    """What was measured of one cache so far. Lists have one entry for each window, if not said otherwise.

    Attributes:
        name: name of the cache.
        kl: mean KL divergence from the full cache, in nats a token.
        same: share of tokens for which the likeliest one is that of the full cache.
        nll: mean negative log-likelihood of the text, in nats a token.
        bytes: bytes held behind the last token.
        full_bytes: bytes that the full cache held there.
        token_ms: milliseconds of each decoded token but the first of each window, which prepares what the others use.
        prompt_ms: milliseconds to read the prefix, compression included.
    """

    name: str
    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    full_bytes: list[int] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    prompt_ms: list[float] = field(default_factory=list)

    @property
    def windows(self) -> int:
        """How many windows were measured."""
        return len(self.kl)

    @property
    def share(self) -> float:
        """Bytes held, as a share of the full cache's."""
        return sum(self.bytes) / sum(self.full_bytes)

    @property
    def kl_error(self) -> float | None:
        """Standard error of the mean of ``kl`` over windows; None for a single window."""
        return stdev(self.kl) / self.windows**0.5 if self.windows > 1 else None

    def summary(self) -> dict[str, Any]:
        """The figures of the table, and the lists behind them."""
        return {
            "cache": self.name,
            "windows": self.windows,
            "kl_mean": fmean(self.kl),
            "kl_standard_error": self.kl_error,
            "same_top_token": fmean(self.same),
            "nll_mean": fmean(self.nll),
            "bytes_mean": fmean(self.bytes),
            "bytes_share": self.share,
            "token_ms_median": median(self.token_ms),
            "prompt_ms_median": median(self.prompt_ms),
            "by_window": {name: values for name, values in asdict(self).items() if isinstance(values, list)},
        }


@dataclass(frozen=True)
class Reading:
    """What decoding a window through a cache gave.

    Attributes:
        logits: of each token of the continuation, ``[n, vocabulary]``.
        bytes: bytes that the cache held at the end.
        token_ms: milliseconds of each token.
        prompt_ms: milliseconds to read the prefix.
    """

    logits: torch.Tensor
    bytes: int
    token_ms: list[float]
    prompt_ms: float


@torch.inference_mode()
def compare(
    model: Any,
    tokenizer: Any,
    windows: torch.Tensor,
    prefix: int,
    makers: Mapping[str, Callable[[PreTrainedConfig], Cache]],
    advance: Advance = lambda *_: None,
) -> Iterator[Compared]:
    """Measure the full cache and each of ``makers`` on every window, window after window.

    Args:
        model: the model.
        tokenizer: its tokenizer, for policies that ask the model to repeat the prefix.
        windows: tokens ``[n, prefix + m]``; ``m`` is at least 2.
        prefix: how many tokens of each window are read at once.
        makers: functions that make the caches, by name.
        advance: told of each step.

    Yields:
        For each window and cache, the cache with this window in it; the full cache first. The same object comes again
        with the next window, so whoever stops early has whole windows only.
    """
    rows = {name: Compared(name) for name in (FULL, *makers)}
    for window in windows:
        full: Reading | None = None
        for name, row in rows.items():
            make = maker(FULL) if name == FULL else makers[name]
            reading = _read(model, tokenizer, window, prefix, make, lambda n, name=name: advance(name, n))  # type: ignore[misc]
            full = full or reading
            _add(row, reading, full, window[prefix:])
            yield row


def _read(
    model: Any,
    tokenizer: Any,
    window: torch.Tensor,
    prefix: int,
    make: Callable[[PreTrainedConfig], Cache],
    advance: Callable[[int], None],
) -> Reading:
    """Read the first ``prefix`` tokens of ``window [n]`` into a new cache, and decode the others through it.

    The last token of the prefix is the first one that is decoded, since it gives the first distribution.
    """
    cache = make(decoder_config(model.config))
    attend_as_with(model, cache)
    prompt = window[None, : prefix - 1]

    def read() -> None:
        read_prompt(model, prompt, cache)
        compress(model, tokenizer, prompt, cache)

    advance(0)
    _, prompt_ms = timed(read, prompt.device)
    advance(prefix)
    logits, times = [], []
    for found, took in decoded(model, window[prefix - 1 : -1], cache):
        logits.append(found)
        times.append(took)
        advance(1)
    return Reading(torch.stack(logits), held_bytes(cache), times, prompt_ms)


def _add(row: Compared, reading: Reading, full: Reading, continuation: torch.Tensor) -> None:
    """Add a window to a cache's row."""
    log_probs = reading.logits.log_softmax(-1)
    nll = -log_probs.gather(-1, continuation[:, None]).mean().item()
    # A few tokens at a time: a large vocabulary in float64 takes much memory.
    pairs = zip(full.logits.split(_AT_ONCE), reading.logits.split(_AT_ONCE), strict=True)
    kl = 0.0 if reading is full else torch.cat([kl_by_token(a, b) for a, b in pairs]).mean().item()
    row.kl.append(kl)
    row.nll.append(nll)
    row.same.append(top1_agreement(full.logits, reading.logits))
    row.bytes.append(reading.bytes)
    row.full_bytes.append(full.bytes)
    row.token_ms += reading.token_ms[1:]
    row.prompt_ms.append(reading.prompt_ms)
