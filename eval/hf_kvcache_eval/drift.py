"""Drift: how far the text that a model writes through a compressed cache moves away from the full cache's.

Fidelity feeds a given text, so that an error of one step never reaches the next one's input. Here each cache goes on
writing from its own tokens, as users do: what it wrote under an error is packed, with its own error, and read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

import torch

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Memory, Metric, Series
from hf_kvcache_eval.fidelity import by_distance, memory_of
from hf_kvcache_eval.kept_texts import KeptTexts
from hf_kvcache_eval.protocol import Reader
from hf_kvcache_eval.retrieval.task import end_tokens
from hf_kvcache_eval.statistics import mean_metric
from hf_kvcache_eval.task import Bench, Outcome, Piece, TaskInPieces
from hf_kvcache_eval.text import running_text, text_windows
from hf_kvcache_eval.writing import BLOCK, Choice, Written, equal_tokens, loop_start, write

_RESAMPLES = 2000
_POSITION = "tokens generated"
#: What can stand behind the length in the name of such a task.
MODES = ("sampled", "first")


@dataclass
class Drift(TaskInPieces):
    """Prefix, compress, then ``length`` tokens that the model writes on its own through the compressed cache.

    Two things are compared:

    - The text with the one that the full cache writes: how many tokens are the same before the first different one.
    - The distributions, position by position: KL(full || cache), where the full cache is given the tokens that this
      cache wrote. So both have read the same text. From the first different token on, a comparison with the full
      cache's own text would be one of two texts, both of which may be good. Up to it both texts are the same, and so is
      the KL along either.

    Text does not end: tokens that end it are never chosen, by any cache, as with ``min_new_tokens`` of ``generate``.
    Small models that choose the likeliest token soon repeat themselves, and such a loop hides errors; the share of
    texts that end in one is told. With ``sampled`` tokens are drawn at temperature 1 with the same random numbers for
    every cache (Gumbel noise, by prompt and position): caches with equal distributions write equal texts, and they
    differ the sooner the further their distributions are apart.

    Attributes:
        prefix: tokens of each prompt; all but the last are prefilled, and the last is decoded.
        length: tokens that are written.
        prompts: windows of the text, spread over it evenly; they are the samples.
        batch: prompts written together.
        sampled: draw tokens in place of taking the likeliest.
        first: go on with each text only up to its first different token, and find nothing but where that is.

    Raises:
        ValueError: naming the argument.
    """

    prefix: int = 512
    length: int = 2000
    prompts: int = 20
    batch: int = 20
    sampled: bool = False
    first: bool = False

    def __post_init__(self) -> None:
        for name, least in (("prefix", 2), ("length", 1), ("prompts", 1), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}; accepted: whole numbers from {least}")

    @property
    def name(self) -> str:  # type: ignore[override]
        modes = "".join(f":{mode}" for mode in MODES if getattr(self, mode))
        return f"drift@{self.prefix}:{self.length}{modes}"

    @property
    def _text_name(self) -> str:
        """What the full cache writes, which is the same with ``first``."""
        return self.name.removesuffix(":first")

    def count(self, bench: Bench) -> int:
        return len(self._rows(bench))

    def measure(self, bench: Bench, method: Method, index: int) -> Piece:
        _check_fits(bench.model(method.dtype).config, self.prefix + self.length)
        if self.first:
            return self._parting(bench, method, index)
        found, memory, timing = self._written(bench, method, index)
        full = self._full(bench, index, found.tokens if _is_full(method) else None)
        texts = found.tokens.tolist()
        same = [_equal_tokens(a, b) for a, b in zip(texts, full.tolist(), strict=True)]
        loops = [-1 if (start := loop_start(text)) is None else start for text in texts]
        columns: dict[str, list[Any]] = {"kl": found.kl.tolist(), "agree": found.agree.tolist()}
        return Piece(columns | {"same": same, "loop": loops}, memory, timing)

    def outcome(self, bench: Bench, found: Piece) -> Outcome:
        same = torch.tensor(found.found["same"])
        # 1 where a text is still the full cache's, by position.
        still = (torch.arange(1, self.length + 1) <= same[:, None]).double()
        return Outcome(
            metrics=self._metrics(found.found, bench.protocol.seed),
            series=self._series(found.found, still),
            memory=found.memory,
            protocol={
                "prefix": self.prefix,
                "length": self.length,
                "prompts": len(same),
                "sampled": self.sampled,
                "text": running_text(bench)[1],
                "what": "KL(full || cache) in nats per generated token; the reference reads, through DynamicCache in "
                "float32, the tokens that the cache wrote; same_tokens: median of the tokens before the first one that "
                "the full cache does not write, the length where there is none; same_text: share of texts without one; "
                "loops: share of texts that end in a repetition",
            },
            timing=found.timing,
        )

    def _metrics(self, found: dict[str, list[Any]], seed: int) -> dict[str, Metric]:
        same, last = found["same"], max(1, self.length // 4)
        texts = {
            "same_tokens": median_metric(same, "tokens", seed),
            "same_text": mean_metric([float(one == self.length) for one in same], unit="share"),
        }
        if self.first:
            return texts
        kl, agree = (torch.tensor(found[name], dtype=torch.float64) for name in ("kl", "agree"))
        return {
            "kl": mean_metric(kl.mean(1), higher_is_better=False, unit="nats"),
            "kl_last_quarter": mean_metric(kl[:, -last:].mean(1), higher_is_better=False, unit="nats"),
            "top1": mean_metric(agree.mean(1), unit="share"),
            **texts,
            "loops": mean_metric([float(one >= 0) for one in found["loop"]], False, "share"),
        }

    def _series(self, found: dict[str, list[Any]], still: torch.Tensor) -> dict[str, Series]:
        """Curves over the position; ``still [n, length]`` is 1 where a text is still the full cache's."""
        of_texts = {"same": by_distance(still, _POSITION, "share of texts that are still the full cache's")}
        if self.first:
            return of_texts
        kl = torch.tensor(found["kl"], dtype=torch.float64)
        return {"kl": by_distance(kl, _POSITION, "KL (nats)"), **of_texts}

    def _rows(self, bench: Bench) -> tuple[torch.Tensor, ...]:
        """The prompts ``[n, prefix]`` of each piece."""
        return text_windows(bench, self.prefix, self.prompts).split(self.batch)

    def _full(self, bench: Bench, index: int, written: torch.Tensor | None) -> torch.Tensor:
        """The texts ``[n, length]`` of the full cache on a piece: ``written`` if that is it, else kept or written."""
        texts = bench.memo.setdefault((self._text_name, self.prompts, self.batch, bench.protocol.seed, "texts"), {})
        kept = self._kept_texts(bench, index)
        if index not in texts and written is None:
            texts[index] = kept.read()
        if texts.get(index) is None:
            if written is None:
                written = self._written(bench, Method("full"), index, compare=False)[0].tokens
            kept.write(written)
            texts[index] = written
        return texts[index]

    def _kept_texts(self, bench: Bench, index: int) -> KeptTexts:
        """Where the full cache's texts on a piece are kept for other runs, and what they depend on."""
        model = bench.model()
        of = {
            "model": model.name_or_path,
            "prompts": self._rows(bench)[index].tolist(),
            "never": sorted(end_tokens(model, bench.tokenizer)),
            "seed": bench.protocol.seed if self.sampled else None,
            "length": self.length,
        }
        return KeptTexts(bench.folder, f"{self._text_name}-{self.batch}-{index}", of)

    def _parting(self, bench: Bench, method: Method, index: int) -> Piece:
        """Where the texts of ``method`` part from the full cache's; nothing is written behind that."""
        texts, same = self._full(bench, index, None), []
        if _is_full(method):
            return Piece({"same": [self.length] * len(texts)})
        timing = {"decode_seconds": 0.0, "decode_calls": 0}
        for start, part, reader, choose in self._parts(bench, method, index):
            memory = memory_of(reader.caches[0], reader.model.config, len(part), self.prefix - 1)
            same += equal_tokens(reader, part[:, -1:], choose, texts[start : start + len(part)], timing)
        return Piece({"same": same}, memory, timing)

    def _written(
        self, bench: Bench, method: Method, index: int, compare: bool = True
    ) -> tuple[Written, Memory, dict[str, float]]:
        """What ``method`` writes on a piece, with its memory after the prefills and what it took."""
        parts, timing = [], {"decode_seconds": 0.0, "decode_calls": 0}
        for _, part, reader, choose in self._parts(bench, method, index):
            memory = memory_of(reader.caches[0], reader.model.config, len(part), self.prefix - 1)
            full = _prefilled(bench, Method("full"), part, BLOCK) if compare else None
            parts.append(write(reader, full, part[:, -1:], choose, self.length, timing))
        joined = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "kl", "agree"))
        return Written(*joined), memory, timing

    def _parts(self, bench: Bench, method: Method, index: int) -> Iterator[tuple[int, torch.Tensor, Reader, Choice]]:
        """Rows of a piece that are written together: the first one's place, prompts, a reader of them, its choice."""
        rows = self._rows(bench)[index].to(bench.model(method.dtype).device)
        step = self.batch if method.kind.rows else 1
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            reader = _prefilled(bench, method, part, 1)
            never = sorted(end_tokens(reader.model, bench.tokenizer))
            yield start, part, reader, Choice(never, self._generators(bench, index, start, len(part)))

    def _generators(self, bench: Bench, index: int, start: int, count: int) -> list[torch.Generator] | None:
        """Random numbers of each of ``count`` rows of a piece from row ``start`` on; None where none are drawn."""
        if not self.sampled:
            return None
        first = index * self.batch + start
        seeds = [Random(f"drift/{bench.protocol.seed}/{first + row}").getrandbits(63) for row in range(count)]
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def median_metric(samples: Sequence[float], unit: str, seed: int = 0) -> Metric:
    """The median of independent samples, more being better; its standard error is that of a seeded bootstrap."""
    numbers = torch.tensor(samples, dtype=torch.float64)
    if len(numbers) < 2:
        return Metric(float(numbers[0]), None, True, unit, numbers.tolist())
    draws = torch.randint(len(numbers), (_RESAMPLES, len(numbers)), generator=torch.Generator().manual_seed(seed))
    error = numbers[draws].quantile(0.5, dim=1).std().item()
    return Metric(median(numbers.tolist()), error, True, unit, numbers.tolist())


def _prefilled(bench: Bench, method: Method, rows: torch.Tensor, block: int) -> Reader:
    """A reader that holds ``rows [B, prefix]`` but for their last tokens, and decodes ``block`` tokens at a time."""
    reader = bench.reader(method)
    reader.block = block
    reader.prefill(rows[:, :-1].tolist())
    return reader


def _equal_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs; all if none does."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _is_full(method: Method) -> bool:
    return method.full and method.dtype in (None, torch.float32)


def _check_fits(config: Any, tokens: int) -> None:
    """ValueError if the model has no positions for ``tokens``."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"prefix and length take {tokens} tokens together, and the model has {limit} positions")
