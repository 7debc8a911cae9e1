"""End to end: ms per token of greedy decoding, and of prefill, with each cache in one model.

    python -m benchmarks.bench_model [--quick] [--contexts 512 4096 8000] [--models smollm2 llama8b]

*smollm2*: SmolLM2-135M, float32, on a real text. Prefill is timed with every cache at ``--prefill`` tokens. For the
decode steps the longest context is prefilled once, with DynamicCache; every other cache is filled with its keys and
values layer by layer: ours by ``update`` and the layer's attention function, behind which it packs, as in a prefill,
and the last 512 tokens one at a time, as in decoding. *llama8b*: four layers of Llama-3-8B's attention and MLP shape
with random weights and a small vocabulary, over random keys and values.

Then all caches decode in turns, one token each (A B C, A B C, ...), medians. They are fed the tokens that DynamicCache
decodes greedily, so that their next-token distributions can be compared: mean KL in nats and agreement of the
likeliest token. A step in which our cache packs a page in every layer is slower; where one falls into the rounds, its
surplus, spread over the page's tokens, is shown as *packing* and is part of the ms (elsewhere the surplus seen at
another context of the same model is used: it does not depend on the context). hqq requantizes all tokens every 128;
its packing is the time of its first quantization, spread likewise. Before another library's cache decodes,
the model is unbound from this package's attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.methods import CODECS, DYNAMIC, PEERS, STATIC, UnavailableError, held_bytes, peer_cache, recent_start
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from benchmarks.timing import cpu_clock
from hf_kvcache import KVCache, bind, unbind
from hf_kvcache.cli.models import load_default_model
from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache.integration.versions import with_cache

METHODS = (DYNAMIC, STATIC, PEERS[0], PEERS[2], "ours none", "ours 8-bit", "ours 4-bit")
#: These hold the very keys and values of DynamicCache.
LOSSLESS = (STATIC, "ours none")
_LOSSLESS_KL = 1e-6
#: KV heads and head_dim of Llama-3-8B.
RANDOM_HEADS = (8, 128)
_WARM_UP = 2
_RESIDUAL = 128


def make_cache(name: str, config: Any, capacity: int) -> Any:
    """An empty cache with room for ``capacity`` tokens; UnavailableError if a peer cannot be built."""
    if name == DYNAMIC:
        return DynamicCache(config=config)
    if name == STATIC:
        return StaticCache(config, max_cache_len=capacity)
    return peer_cache(name, config) if name in PEERS else KVCache(config, CODECS[name])


def set_attention(config: Any, cache: Any) -> None:
    """Bind the model to this package for its own caches, and to nothing for the others."""
    if isinstance(cache, KVCache):
        bind(config)
    else:
        unbind(config)


def forward(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits ``[vocabulary]`` behind the last of ``tokens [1, n]``."""
    return model(tokens, **with_cache(model, cache), logits_to_keep=1).logits[0, -1]


def fill(model: Any, cache: Any, states: Sequence[tuple[torch.Tensor, torch.Tensor]], tokens: int) -> None:
    """Give each layer the first ``tokens`` of its keys and values ``[1, Hkv, T, D]``, as a prefill would."""
    set_attention(model.config, cache)
    function = ALL_ATTENTION_FUNCTIONS["hf_kvcache"]
    first = recent_start(tokens) if isinstance(cache, KVCache) else tokens
    for index, (keys, values) in enumerate(states):
        module = model.model.layers[index].self_attn
        held = cache.update(keys[:, :, :first].contiguous(), values[:, :, :first].contiguous(), index)
        if isinstance(cache, KVCache):
            # Only one query: what is stored does not depend on the queries.
            query = torch.zeros(1, keys.shape[1] * module.num_key_value_groups, 1, keys.shape[3])
            function(module, query, *held, None, dropout=0.0, scaling=module.scaling)
    for at in range(first, tokens):
        for index, (keys, values) in enumerate(states):
            cache.update(keys[:, :, at : at + 1], values[:, :, at : at + 1], index)


class Pace:
    """The decode steps of one cache: their times, and how its distributions lie from DynamicCache's."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.times: list[float] = []
        self.packed: list[int] = []
        self.kl: list[float] = []
        self.agree: list[bool] = []

    def step(self, model: Any, token: torch.Tensor) -> torch.Tensor:
        """Decode one token, timed; returns the log-probabilities ``[vocabulary]``."""
        set_attention(model.config, self.cache)
        out: list[torch.Tensor] = []
        self.times.append(cpu_clock(lambda: out.append(forward(model, token, self.cache))) / 1e3)
        if isinstance(self.cache, KVCache):
            self.packed.append(self.cache.memory().packed_elements)
        return out[0].double().log_softmax(-1)

    def compare(self, log_probs: torch.Tensor, expected: torch.Tensor) -> None:
        """Note how a step's distribution lies from ``expected``."""
        self.kl.append((expected.exp() * (expected - log_probs)).sum().clamp_min(0).item())
        self.agree.append(bool(log_probs.argmax() == expected.argmax()))

    def packing_ms(self) -> float | None:
        """The surplus of the step in which pages were packed, spread over a page's tokens; None if there was none."""
        for at in range(_WARM_UP, len(self.packed)):
            if self.packed[at] > self.packed[at - 1]:
                behind = self.times[at : at + 2]  # the step behind it finds new pages
                return max(sum(behind) - len(behind) * self.median(), 0.0) / self.cache.options.page_size
        return None

    def median(self) -> float:
        """Median ms of a step, warm-up left out."""
        return median(self.times[_WARM_UP:])


def decode_in_turns(model: Any, paces: dict[str, Pace], token: torch.Tensor, steps: int, seconds: float) -> None:
    """Let every cache decode the same tokens, DynamicCache's own greedy ones, in turns."""
    end = time.perf_counter() + seconds
    for number in range(steps + _WARM_UP):
        expected = paces[DYNAMIC].step(model, token)
        for name, pace in paces.items():
            if name != DYNAMIC:
                pace.compare(pace.step(model, token), expected)
        token = expected.argmax().view(1, 1)
        if number >= _WARM_UP + 4 and time.perf_counter() > end:
            break


@torch.inference_mode()
def measure_decode(
    model: Any,
    label: str,
    states: Sequence[tuple[torch.Tensor, torch.Tensor]],
    first: torch.Tensor,
    tokens: int,
    names: Sequence[str],
    args: argparse.Namespace,
    report: Report,
) -> list[Row]:
    """The rows of all caches for one model and context; ``first [1, 1]`` is the token that follows it."""
    paces: dict[str, Pace] = {}
    fill_ms: dict[str, float] = {}
    for name in names:
        if name == PEERS[0] and tokens > args.peer_tokens:
            report.note(f"hqq is left out above {args.peer_tokens:,} tokens of context (--peer-tokens).")
            continue
        try:
            paces[name] = Pace(make_cache(name, model.config, tokens + args.steps + _WARM_UP))
        except UnavailableError as error:
            report.note(str(error))
            continue
        cache = paces[name].cache
        fill_ms[name] = cpu_clock(partial(fill, model, cache, states, tokens)) / 1e3
    decode_in_turns(model, paces, first, args.steps, args.seconds)
    rows = []
    for name, pace in paces.items():
        row: Row = {"model": label, "tokens": tokens, "cache": name, "median_ms": pace.median()}
        row |= {"steps": len(pace.times) - _WARM_UP, "bytes_held": held_bytes(pace.cache)}
        if isinstance(pace.cache, KVCache) and (packing := pace.packing_ms()) is not None:
            row["packing_ms"] = packing
        if name == PEERS[0]:
            row["packing_ms"] = fill_ms[name] / _RESIDUAL
        if name != DYNAMIC:
            row["mean_kl"] = sum(pace.kl) / len(pace.kl)
            if name in LOSSLESS and row["mean_kl"] > _LOSSLESS_KL:
                raise AssertionError(f"{name} does not decode as DynamicCache does: mean KL {row['mean_kl']:.1e}")
            row["top1_agreement"] = sum(pace.agree) / len(pace.agree)
        rows.append(row)
    return rows


def add_packing(rows: list[Row]) -> None:
    """Set ms and speedup of one model's rows: the median and what packing adds, wherever it was seen."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        if "packing_ms" in row:
            seen.setdefault(row["cache"], []).append(row["packing_ms"])
    for row in rows:
        ours = row["cache"] in CODECS
        if ours and row["cache"] not in seen:
            raise RuntimeError(f"{row['cache']}: no step packed a page; give one context that is a multiple of 128")
        row["packing_ms"] = row.get("packing_ms", median(seen[row["cache"]]) if ours else 0.0)
        row["ms"] = row["median_ms"] + row["packing_ms"]
    for row in rows:
        dynamic = next(r for r in rows if r["cache"] == DYNAMIC and r["tokens"] == row["tokens"])
        row["speedup_dynamic"] = dynamic["ms"] / row["ms"]


@torch.inference_mode()
def measure_prefill(
    model: Any, label: str, tokens: torch.Tensor, names: Sequence[str], rounds: int, report: Report
) -> list[Row]:
    """The rows of prefilling ``tokens [1, T]`` into each empty cache, in turns."""
    times: dict[str, list[float]] = {}
    forward(model, tokens, make_cache(DYNAMIC, model.config, 0))  # the first pass is slower than any other
    for _ in range(rounds):
        for name in names:
            try:
                cache = make_cache(name, model.config, tokens.shape[1])
            except UnavailableError as error:
                report.note(str(error))
                continue
            set_attention(model.config, cache)
            times.setdefault(name, []).append(cpu_clock(partial(forward, model, tokens, cache)) / 1e3)
    best = {name: median(values) for name, values in times.items()}
    return [
        {
            "model": label,
            "tokens": tokens.shape[1],
            "cache": name,
            "prefill_ms": value,
            "prefill_over_dynamic": value / best[DYNAMIC],
            "rounds": rounds,
        }
        for name, value in best.items()
    ]


def text_tokens(tokenizer: Any, length: int) -> torch.Tensor:
    """The first ``length`` tokens ``[1, length]`` of the packaged text, repeated where it ends."""
    tokens = tokenizer(packaged_text()[0], return_tensors="pt", verbose=False).input_ids
    return tokens.repeat(1, -(-length // tokens.shape[1]))[:, :length]


@torch.inference_mode()
def prefilled_states(model: Any, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's keys and values ``[1, Hkv, T, D]`` after a prefill of ``tokens [1, T]`` with DynamicCache."""
    cache = make_cache(DYNAMIC, model.config, 0)
    set_attention(model.config, cache)
    forward(model, tokens, cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def run_text_model(
    model: Any, label: str, tokens: torch.Tensor, args: argparse.Namespace, report: Report, console: Console
) -> None:
    """Prefill and decode of a model on ``tokens [1, at least the longest context + 1]``."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{label}: prefill", total=len(args.contexts) + 2)
        prefill = measure_prefill(model, label, tokens[:, : args.prefill], args.methods, args.prefill_rounds, report)
        progress.update(task, advance=1, description=f"{label}: the longest context")
        states = prefilled_states(model, tokens[:, : max(args.contexts)])
        rows: list[Row] = []
        for count in args.contexts:
            progress.update(task, advance=1, description=f"{label}: {count:,} tokens of context")
            rows += measure_decode(
                model, label, states, tokens[:, count : count + 1], count, args.methods, args, report
            )
    add_packing(rows)
    show(report.script, prefill + rows, console)
    report.rows += prefill + rows


def llama8b_layers(layers: int, positions: int) -> LlamaForCausalLM:
    """A random Llama with Llama-3-8B's attention and MLP shape, few layers and a vocabulary of 1,024."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=RANDOM_HEADS[0],
        head_dim=RANDOM_HEADS[1],
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def run_random_model(args: argparse.Namespace, report: Report, console: Console) -> None:
    """Decode steps of the random Llama over random keys and values."""
    label = f"{args.layers} layers of Llama-3-8B's shape"
    with console.status(f"making {label}"):
        model = llama8b_layers(args.layers, args.random_context + args.steps + _WARM_UP)
        heads, dim = RANDOM_HEADS
        size = (1, heads, args.random_context, dim)
        states = [(torch.randn(size), torch.randn(size)) for _ in range(args.layers)]
    with console.status(f"{label}: {args.random_context:,} tokens of context"):
        names = [name for name in args.methods if name not in PEERS]
        first = torch.zeros(1, 1, dtype=torch.long)
        rows = measure_decode(model, label, states, first, args.random_context, names, args, report)
    add_packing(rows)
    report.note("The Llama of random weights runs without the peers: QuantizedCache decodes all tokens at every step.")
    show(report.script, rows, console)
    report.rows += rows


def make_args() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=("smollm2", "llama8b"), default=["smollm2", "llama8b"])
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens of context; default: 512 4096 8000")
    parser.add_argument("--prefill", type=int, help="tokens of the timed prefill; default: 2048")
    parser.add_argument("--prefill-rounds", type=int, help="default: 2")
    parser.add_argument("--steps", type=int, help="decode steps at most; default: 32")
    parser.add_argument("--seconds", type=float, default=12.0, help="for the steps of one context, at most")
    parser.add_argument("--peer-tokens", type=int, default=8192, help="longest context at which hqq runs")
    parser.add_argument("--random-context", type=int, help="context of the random Llama; default: 32768")
    parser.add_argument("--layers", type=int, help="layers of the random Llama; default: 4")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = start(make_args(), argv)
    args.contexts = pick(args.contexts, args.quick, [512, 4096, 8000], [512])
    for name, default, small in (
        ("prefill", 2048, 256),
        ("prefill_rounds", 2, 1),
        ("steps", 32, 8),
        ("random_context", 32768, 1024),
        ("layers", 4, 1),
    ):
        setattr(args, name, getattr(args, name) or (small if args.quick else default))
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_model")
    if "smollm2" in args.models:
        model, tokenizer = load_default_model(dtype=torch.float32)
        tokens = text_tokens(tokenizer, max(*args.contexts, args.prefill) + 1)
        run_text_model(model, "SmolLM2-135M", tokens, args, report, console)
        del model
    if "llama8b" in args.models:
        run_random_model(args, report, console)
    return report.finish(args, console)


if __name__ == "__main__":
    main()
