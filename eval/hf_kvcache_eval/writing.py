"""Text that a model writes through a cache, and what the full cache makes of each of its tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from hf_kvcache_eval.protocol import Reader

#: Tokens that the full cache reads in one block, to say what it makes of them: nothing of it is packed.
BLOCK = 16
#: A text is in a loop if it ends in this many equal periods or more, which are this many tokens or more together.
LOOP_PERIODS, LOOP_TOKENS = 3, 16


@dataclass
class Choice:
    """How the next token of each row is chosen.

    Attributes:
        never: tokens that are not chosen.
        generators: random numbers of each row, to draw a token; None to take the likeliest.
    """

    never: Sequence[int]
    generators: list[torch.Generator] | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens ``[B, 1]`` from logits ``[B, vocabulary]``."""
        logits = logits.clone()
        logits[:, list(self.never)] = -torch.inf
        if self.generators is not None:
            # The largest of logits plus Gumbel noise is a draw from their softmax. Noise of a CPU, equal everywhere.
            waits = [torch.empty(logits.shape[1]).exponential_(generator=one) for one in self.generators]
            logits -= torch.stack(waits).log().to(logits.device)
        return logits.argmax(-1, keepdim=True)

    def of(self, rows: Sequence[int]) -> Choice:
        """The same for some of the rows."""
        return self if self.generators is None else replace(self, generators=[self.generators[row] for row in rows])


@dataclass
class Written:
    """Texts, and what the full cache says of each of their tokens; ``kl`` and ``agree`` are empty if it was not asked.

    Attributes:
        tokens: ``[B, length]``.
        kl: KL(full || cache) of the distribution that each token was chosen from, float64.
        agree: 1 where both find the same token likeliest.
    """

    tokens: torch.Tensor
    kl: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    agree: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def write(
    reader: Reader, full: Reader | None, tokens: torch.Tensor, choose: Choice, length: int, timing: dict[str, float]
) -> Written:
    """Write ``length`` tokens behind ``tokens [B, 1]``; ``full`` reads the same tokens, a block behind."""
    written, kl, agree = [], [], []
    for start in range(0, length, BLOCK):
        fed, own = [], []
        started = time.perf_counter()
        for _ in range(min(BLOCK, length - start)):
            (logits,) = reader.logits(tokens)
            fed.append(tokens)
            tokens = choose(logits[:, -1])
            written.append(tokens)
            own.append(logits)
        timing["decode_seconds"] += time.perf_counter() - started
        timing["decode_calls"] += len(fed)
        if full is not None:
            mine = torch.cat(own, 1).log_softmax(-1)
            theirs = torch.cat(list(full.logits(torch.cat(fed, 1))), 1).log_softmax(-1)
            kl.append((theirs.exp() * (theirs - mine)).sum(-1).double())
            agree.append(mine.argmax(-1) == theirs.argmax(-1))
    if full is None:
        return Written(torch.cat(written, 1))
    return Written(torch.cat(written, 1), torch.cat(kl, 1), torch.cat(agree, 1).double())


def equal_tokens(
    reader: Reader, tokens: torch.Tensor, choose: Choice, texts: torch.Tensor, timing: dict[str, float]
) -> list[int]:
    """How many tokens of ``texts [B, length]`` each row writes behind ``tokens [B, 1]`` before a different one.

    Rows that have written a different token are let go, so that few are left soon.
    """
    same, rows = [texts.shape[1]] * len(texts), list(range(len(texts)))
    started = time.perf_counter()
    for at in range(texts.shape[1]):
        (logits,) = reader.logits(tokens)
        timing["decode_calls"] += 1
        tokens = choose(logits[:, -1])
        equal = (tokens[:, 0].cpu() == texts[rows, at].cpu()).tolist()
        if all(equal):
            continue
        same = [at if row in rows and not equal[rows.index(row)] else one for row, one in enumerate(same)]
        left = [place for place, still in enumerate(equal) if still]
        if not left:
            break
        reader.fork([int(still) for still in equal])
        tokens, choose, rows = tokens[left], choose.of(left), [rows[place] for place in left]
    timing["decode_seconds"] += time.perf_counter() - started
    return same


def loop_start(tokens: Sequence[int]) -> int | None:
    """Where the loop begins that a text ends in; None if it ends in none.

    A loop is a stretch up to the end in which every token is the one a period before, of at least ``LOOP_PERIODS``
    periods and ``LOOP_TOKENS`` tokens. Of several periods the one with the longest stretch counts.
    """
    text = torch.tensor(tokens)
    best: int | None = None
    for period in range(1, len(text) // LOOP_PERIODS + 1):
        other = (text[period:] != text[:-period]).nonzero()
        # The first token that repeats, and the period before it.
        start = int(other[-1]) + 1 if len(other) else 0
        long = len(text) - start >= max(LOOP_PERIODS * period, LOOP_TOKENS)
        if long and (best is None or start < best):
            best = start
    return best
