"""Decode steps of a batch: without padding, left-padded, and with beams that are exchanged before every step.

    python -m benchmarks.bench_batch [--quick] [--batch 8] [--shapes 9/3/64] [--tokens 1024] [--model-layers 30]

Float32. *layer*: ``update`` and attention of one layer, whose mask an earlier layer of the model has read, as is so in
all layers but the first; the time of reading it is given apart. *model*: a forward pass of a random model in
SmolLM2-135M's shape with a small vocabulary, mask included. The batches hold as many tokens a sequence, padding
included, and take turns; medians. The time of exchanging beams is given apart. Of beams the halves of a batch are two
prompts, one of them padded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask

from benchmarks.methods import CODECS, PackedMethod, Shape
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from benchmarks.timing import Clock, cpu_clock, take_turns, thread_clock
from hf_kvcache import KVCache
from hf_kvcache.integration.padding import padding_of
from hf_kvcache.integration.versions import with_cache

KINDS = ("no padding", "left padding", "beams")
#: Tokens past the nominal number at the start, so that few pages fill in the rounds.
OFFSET, WARM_UP = 40, 3


def first_mask(kind: str, batch: int, tokens: int) -> torch.Tensor:
    """The 2D mask of a prompt: rows of different lengths for left padding, halves of the batch for beams."""
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(batch):
        padding = {"left padding": 7 * row, "beams": 29 * (row >= batch // 2)}.get(kind, 0)
        mask[row, :padding] = 0
    return mask


#: Parts of a step in their order, by name.
Timed = dict[str, Callable[[], Any]]


class Batch:
    """A cache with a prompt in it, and what a step of its batch is.

    Args:
        kind: one of ``KINDS``.
        cache: the cache, with ``tokens`` tokens a sequence.
        mask: the mask of the prompt.
        run: makes a step: given the cache and the 2D mask, what is to be timed, by name.
    """

    def __init__(
        self, kind: str, cache: KVCache, mask: torch.Tensor, run: Callable[[KVCache, torch.Tensor], Timed]
    ) -> None:
        self.kind, self.cache, self.mask, self.run = kind, cache, mask, run

    def step(self, clock: Clock) -> dict[str, float]:
        """Microseconds of the parts of one step, and of the exchange of beams before it."""
        times = {}
        if self.kind == "beams":
            half = len(self.mask) // 2
            order = torch.cat([torch.randint(half, (half,)), half + torch.randint(half, (len(self.mask) - half,))])
            times["reorder/beams"] = clock(partial(self.cache.reorder_cache, order))
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return times | {f"{name}/{self.kind}": clock(part) for name, part in self.run(self.cache, self.mask).items()}


def layer_batches(shape: Shape, tokens: int, batch: int, codec: str) -> list[Batch]:
    """One attention layer for each kind of batch."""
    method = PackedMethod("", "", shape, lambda config: KVCache(config, codec), torch.device("cpu"))

    def states(count: int) -> tuple[torch.Tensor, ...]:
        heads = shape.query_heads, shape.heads, shape.heads
        return tuple(torch.randn(batch, each, count, shape.dim) for each in heads)

    def attend(cache: KVCache, new: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> None:
        query, key, value = new
        keys, values = cache.update(key, value, 0)
        method.function(method.module, query, keys, values, mask, dropout=0.0, scaling=method.module.scaling)

    def read(cache: KVCache, mask: torch.Tensor | None, count: int) -> None:
        layer = cache.layers[0]
        padding = padding_of(mask, layer.get_seq_length(), count, layer.sliding_window)
        if mask is not None and padding is not None:
            padding.hides_only(layer.padding)

    def run(cache: KVCache, mask: torch.Tensor, count: int = 1) -> Timed:
        made = create_causal_mask(method.config, torch.empty(batch, count, 1), mask, cache)
        return {"mask": partial(read, cache, made, count), "step": partial(attend, cache, states(count), made)}

    batches = []
    for kind in KINDS:
        cache, mask = KVCache(method.config, codec), first_mask(kind, batch, tokens)
        run(cache, mask, tokens)["step"]()
        batches.append(Batch(kind, cache, mask, run))
    return batches


def model_batches(layers: int, tokens: int, batch: int, codec: str) -> list[Batch]:
    """A model of that many layers in SmolLM2-135M's shape for each kind of batch."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=tokens + 1024,
    )
    model = LlamaForCausalLM(config).eval()

    def run(cache: KVCache, mask: torch.Tensor, count: int = 1) -> Timed:
        ids = torch.randint(256, (batch, count))
        return {"step": partial(model, ids, attention_mask=mask, logits_to_keep=1, **with_cache(model, cache))}

    batches = []
    for kind in KINDS:
        cache, mask = KVCache(config, codec), first_mask(kind, batch, tokens)
        run(cache, mask, tokens)["step"]()
        batches.append(Batch(kind, cache, mask, run))
    return batches


def measure(batches: list[Batch], clock: Clock, args: argparse.Namespace, about: Row) -> list[Row]:
    """The rows of some batches, which take turns."""

    def one_round(number: int) -> dict[str, float]:
        return {name: time for batch in batches for name, time in batch.step(clock).items()}

    for number in range(WARM_UP):
        one_round(number)
    times = take_turns(one_round, args.rounds, min(args.rounds, 5), args.seconds)
    plain = median(times[f"step/{KINDS[0]}"])
    rows = []
    for kind in KINDS:
        step = median(times[f"step/{kind}"])
        row = about | {
            "batch_of": kind,
            "batch_us": step,
            "over_plain": step / plain,
            "rounds": len(times["reorder/beams"]),
        }
        parts = {"reorder_us": f"reorder/{kind}", "mask_us": f"mask/{kind}"}
        rows.append(row | {column: median(times[part]) for column, part in parts.items() if part in times})
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 9/3/64 32/8/128")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens held; default: 256 1024 4096")
    parser.add_argument("--batch", type=int, default=8, help="sequences; default: %(default)s")
    parser.add_argument("--caches", nargs="+", choices=list(CODECS), default=["ours none", "ours 4-bit"])
    parser.add_argument("--model-layers", type=int, help="layers of the model, 0 for none; default: 30")
    parser.add_argument("--rounds", type=int, default=40, help="rounds at most; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=15, help="for the rounds of a table's rows, at most")
    parser.add_argument("--cpu-time", action="store_true", help="count the time of the thread, not that of the clock")
    args = start(parser, argv)
    if args.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time counts one thread; accepted with --threads 1")
    if args.batch < 2:
        parser.error(f"--batch {args.batch}: accepted: 2 or more, since beams are exchanged")
    args.shapes = pick(args.shapes, args.quick, ["9/3/64", "32/8/128"], ["9/3/64"])
    args.tokens = pick(args.tokens, args.quick, [256, 1024, 4096], [256])
    args.model_layers = (2 if args.quick else 30) if args.model_layers is None else args.model_layers
    return args


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_batch")
    clock = thread_clock if args.cpu_time else cpu_clock
    report.note(f"Steps of {args.batch} sequences, in turns; medians of {args.rounds} rounds at most.")
    torch.manual_seed(0)
    for name in args.caches:
        for tokens in args.tokens:
            about = {"tokens": tokens, "cache": name}
            for shape in args.shapes:
                batches = layer_batches(Shape.parse(shape), tokens + OFFSET, args.batch, CODECS[name])
                report.rows += measure(batches, clock, args, about | {"what": f"one layer, {shape}"})
        if args.model_layers:
            tokens = min(args.tokens)
            batches = model_batches(args.model_layers, tokens + OFFSET, args.batch, CODECS[name])
            what = f"{args.model_layers} layers in SmolLM2-135M's shape"
            report.rows += measure(batches, clock, args, {"tokens": tokens, "cache": name, "what": what})
    show(report.script, report.rows, console)
    return report.finish(args, console)


if __name__ == "__main__":
    main()
