"""What pages in a folder take of a process's memory, and of the time of a decode step, without a model.

    python -m benchmarks.bench_offload [--folder DIRECTORY] [--layers 12] [--tokens 16384 32768] [--codecs none int4]

Each cache runs in a process of its own. It is filled with random keys and values in chunks of 512 tokens, layer by
layer as a model would, and then takes single tokens: of each layer, its attention over all that it holds. *anonymous*
is memory that only this process can give back, *file* is what it holds of mapped files (the libraries among them); both
are those behind the last step, less those before the cache was made, in MiB. *page cache* are the pages in the folder,
which the system keeps in memory as long as nobody else needs it. Times are medians of 15 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

_HEADS, _QUERY_HEADS, _DIM, _CHUNK, _STEPS = 8, 32, 128, 512, 15


def held() -> dict[str, float]:
    """Resident memory of this process in MiB, by kind."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {kind: int(found[name].split()[0]) / 1024 for kind, name in (("anonymous", "RssAnon"), ("file", "RssFile"))}


def measure(codec: str, folder: str | None, layers: int, tokens: int) -> dict[str, Any]:
    """Fill a cache and take steps; see above."""
    from transformers import LlamaConfig

    from hf_kvcache import KVCache
    from hf_kvcache.integration.attention_call import AttentionCall
    from hf_kvcache.kernels.inputs import Scoring

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=_QUERY_HEADS * _DIM,
        num_attention_heads=_QUERY_HEADS,
        num_key_value_heads=_HEADS,
    )
    shape = 1, _HEADS, _CHUNK, _DIM
    keys, values, query = torch.randn(shape), torch.randn(shape), torch.randn(1, _QUERY_HEADS, _CHUNK, _DIM)

    def step(cache: Any, count: int) -> None:
        for index, layer in enumerate(cache.layers):
            cache.update(keys[:, :, :count], values[:, :, :count], index)
            call = AttentionCall(query[:, :, :count], None, Scoring(_DIM**-0.5))
            layer.note_attended(call) if count > 1 else layer.attend(call)

    warm = KVCache(config, codec)
    for count in (_CHUNK, 1, 1):
        step(warm, count)
    del warm
    before = held()
    cache = KVCache(config, codec, offload=folder)
    for _ in range(tokens // _CHUNK):
        step(cache, _CHUNK)
    times = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        step(cache, 1)
        times.append(time.perf_counter() - started)
    after, memory = held(), cache.memory()
    grown = {kind: round(after[kind] - before[kind], 1) for kind in after}
    return {"MiB of pages": round((memory.parts["codes"] + memory.parts["scales"]) / 2**20), **grown} | {
        "ms a step": round(1e3 * median(times), 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--codecs", nargs="+", default=["none", "unbiased4"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    for codec in options.codecs:
        for tokens in options.tokens:
            for folder in (None, options.folder):
                one = json.dumps([codec, folder, options.layers, tokens])
                command = [sys.executable, "-m", "benchmarks.bench_offload", "--one", one]
                done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
                print(codec, tokens, "folder" if folder else "memory", json.loads(done.stdout), flush=True)


if __name__ == "__main__":
    main()
