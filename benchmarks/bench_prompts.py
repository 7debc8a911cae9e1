"""Time to the first token with a stored prefix, and the bytes of requests that share one.

    python -m benchmarks.bench_prompts [--quick] [--prefix 2048] [--rounds 3]

A request is a prefix and a question of 16 other tokens, answered by one token. The first one reads all of it. The next
ones find the prefix in memory, with other questions; the fastest of so many rounds counts, for the first one too. Then
a new process opens the store's directory, and its first request counts, opening included: the model is loaded, and has
read a short prompt. Bytes are those of the store after eight requests, against one prefix and what eight caches hold
beside their pages. With the package zstandard installed, the file of the prefix is compressed too, as a whole.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.cli.models import load_default_model
from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.prompts import PromptStore
from hf_kvcache.prompts.accounting import bytes_beside_pages

CACHES = ("none", "8-bit", "4-bit")
_QUESTION, _REQUESTS = 16, 8


def empty(model: Any, cache: str) -> KVCache:
    """An empty cache by its name in the table."""
    return KVCache(model.config) if cache == "none" else QuantizedKVCache(model.config, bits=int(cache[0]))


def open_store(model: Any, cache: str, directory: Path | None) -> PromptStore:
    return PromptStore(lambda: empty(model, cache), directory=directory, model=model)


def question(prefix: torch.Tensor, number: int) -> torch.Tensor:
    """The prefix, and the tokens of one question."""
    draw = torch.Generator().manual_seed(number)
    low, high = int(prefix.min()), int(prefix.max())
    return torch.cat([prefix, torch.randint(low, high, (1, _QUESTION), generator=draw)], 1)


def first_token(store: PromptStore, model: Any, ids: torch.Tensor) -> float:
    """Milliseconds until a request has its first token."""
    begin = time.perf_counter()
    store.generate(model, ids, max_new_tokens=1, do_sample=False)
    return 1000 * (time.perf_counter() - begin)


def in_new_process(model_name: str | None, cache: str, directory: Path, prefix: torch.Tensor, threads: int) -> Row:
    """What :func:`child` prints in a process of its own."""
    request = {"model": model_name, "cache": cache, "directory": str(directory), "prefix": prefix[0].tolist()}
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_prompts", "--child"],
        input=json.dumps(request | {"threads": threads}),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout.splitlines()[-1])


def child() -> None:
    """Answer a request in a process that has only loaded the model."""
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    model, _ = load_default_model(request["model"])
    prefix = torch.tensor([request["prefix"]])
    open_store(model, request["cache"], None).generate(model, prefix[:, :32], max_new_tokens=2, do_sample=False)
    ids = question(prefix, 99)
    begin = time.perf_counter()
    store = open_store(model, request["cache"], Path(request["directory"]))
    store.generate(model, ids, max_new_tokens=1, do_sample=False)
    took = 1000 * (time.perf_counter() - begin)
    print(json.dumps({"ms": took, "saved": store.stats().tokens_saved, "tier": store.stats().hits_by_tier["disk"]}))


def compressed(directory: Path) -> Row:
    """Size and times of the largest file under zstd; nothing without the package."""
    if importlib.util.find_spec("zstandard") is None:
        return {}
    zstandard: Any = importlib.import_module("zstandard")
    content = max(directory.rglob("*.safetensors"), key=lambda path: path.stat().st_size).read_bytes()
    begin = time.perf_counter()
    small = zstandard.ZstdCompressor(level=3).compress(content)
    middle = time.perf_counter()
    assert zstandard.ZstdDecompressor().decompress(small) == content
    end = time.perf_counter()
    return {
        "zstd_share": len(small) / len(content),
        "zstd_ms": 1000 * (middle - begin),
        "unzstd_ms": 1000 * (end - middle),
    }


def measure(model: Any, name: str | None, cache: str, prefix: torch.Tensor, rounds: int) -> Row:
    """The row of one kind of cache."""
    plain = open_store(model, cache, None)
    plain.generate(model, prefix[:, :32], max_new_tokens=2, do_sample=False)
    first = min(first_token(open_store(model, cache, None), model, question(prefix, 0)) for _ in range(rounds))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "store"
        with open_store(model, cache, directory) as store:
            store.generate(model, torch.cat([prefix, prefix[:, :1]], 1), max_new_tokens=1, do_sample=False)
            store.flush()
            one, on_disk = store.stats().bytes["memory"], store.stats().bytes["disk"]
            memory = min(first_token(store, model, question(prefix, 1 + number)) for number in range(rounds))
            store.flush()
        disk = in_new_process(name, cache, directory, prefix, torch.get_num_threads())
        assert disk["saved"] >= prefix.shape[1] - 1 and disk["tier"] == 1, disk
        packed = compressed(directory)
    shared = open_store(model, cache, None)
    shared.generate(model, torch.cat([prefix, prefix[:, :1]], 1), max_new_tokens=1, do_sample=False)
    for number in range(_REQUESTS):
        shared.generate(model, question(prefix, number), max_new_tokens=1, do_sample=False)
    assert shared.stats().entries["memory"] == 1 + _REQUESTS
    alone = empty(model, cache)
    with torch.inference_mode():
        model(question(prefix, 0)[:, :-1], **with_cache(model, alone), logits_to_keep=1)
    tails = _REQUESTS * bytes_beside_pages(alone)
    return {
        "cache": cache,
        "prefix": prefix.shape[1],
        "first_ms": first,
        "memory_ms": memory,
        "memory_share": memory / first,
        "disk_ms": disk["ms"],
        "disk_share": disk["ms"] / first,
        "prefix_bytes": one,
        "file_bytes": on_disk,
        "bytes_of_8": shared.stats().bytes["memory"],
        "share_of_8": shared.stats().bytes["memory"] / (one + tails),
        **packed,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="hub id or path; default: the packaged model")
    parser.add_argument("--prefix", type=int, nargs="+", help="tokens; default: 2048")
    parser.add_argument("--caches", nargs="+", help=f"default: {' '.join(CACHES)}")
    parser.add_argument("--rounds", type=int, help="repeats, of which the fastest counts; default: 3")
    args = start(parser, argv)
    args.prefix = pick(args.prefix, args.quick, [2048], [512])
    args.caches = pick(args.caches, args.quick, list(CACHES), ["4-bit"])
    args.rounds = args.rounds or (1 if args.quick else 3)
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_prompts")
    report.note("Time of one generated token; the fastest of the rounds, and one request in a new process.")
    model, tokenizer = load_default_model(args.model)
    text = tokenizer(packaged_text()[0], return_tensors="pt").input_ids
    for count in args.prefix:
        report.rows += [measure(model, args.model, cache, text[:, :count], args.rounds) for cache in args.caches]
    show(report.script, report.rows, console)
    return report.finish(args, console)


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()
