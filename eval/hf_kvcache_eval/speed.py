"""Speed: milliseconds a token while decoding through each cache, for plots of loss against speed.

The times are in the cell's timing file, not in the cell: no second run gives them again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

from hf_kvcache import KVCache, bind, unbind
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.fidelity import memory_of
from hf_kvcache_eval.protocol import Reader
from hf_kvcache_eval.task import Bench, Outcome, Task
from hf_kvcache_eval.text import WIKITEXT, read_text


@dataclass
class Speed(Task):
    """One sequence, prefilled and then decoded greedily one token at a time.

    Methods run one after the other, so a machine that is busy in between shows; the paired timings are in
    `benchmarks/`.

    Attributes:
        prefix: tokens that are prefilled.
        steps: decoding steps that are timed, after two that are not.
    """

    prefix: int = 2048
    steps: int = 24

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"speed@{self.prefix}"

    def run(self, bench: Bench, method: Method) -> Outcome:
        text, name = read_text(bench.data, WIKITEXT)
        tokens = bench.tokenizer(text, verbose=False).input_ids[: self.prefix + 1]
        if len(tokens) <= self.prefix:
            raise ValueError(f"{name} has {len(tokens)} tokens; {self.name} takes {self.prefix + 1}")
        reader = bench.reader(method, block=1, share=False)
        cache, config = reader.caches[0], reader.model.config
        # The others are timed without this package's attention in between.
        (bind if isinstance(cache, KVCache) else unbind)(config)
        started = time.perf_counter()
        reader.prefill([tokens[:-1]])
        prefill = time.perf_counter() - started
        memory = memory_of(cache, config, 1, self.prefix)
        times = self._decode(bench, reader, tokens[-1])
        return Outcome(
            metrics={"bytes": Metric(float(memory.bytes), None, False, "bytes")},
            memory=memory,
            protocol={"what": "one sequence, one token at a time; times are in the timings folder", "text": name},
            timing={
                "prefill_seconds": prefill,
                "compress_seconds": reader.compress_seconds,
                "decode_ms_per_token": median(times),
                "decode_ms": times,
            },
        )

    def _decode(self, bench: Bench, reader: Reader, token: int) -> list[float]:
        times, last = [], torch.tensor([[token]])
        for step in range(self.steps + 2):
            started = time.perf_counter()
            (logits,) = reader.logits(last)
            last = logits[:, -1:].argmax(-1)
            times.append((time.perf_counter() - started) * 1e3)
            bench.advance((step + 1) / (self.steps + 2))
        return times[2:]
