"""One decode step of one latent-attention layer (DeepSeek-V2-Lite's shape): transformers' own path against ours.

    python -m benchmarks.bench_latent [--quick] [--tokens 1024 4096 16384] [--dtypes fp32 bf16] [--picked-of 65536]
    python -m benchmarks.bench_latent --threads 1 --cpu-time     beside other work

16 heads, 128 + 64 query and key dimensions, 128 value dimensions, latents of 512 with rotary keys of 64; batch of 1,
random weights, latents and rotary keys as the layer's own projections give them for random normal states. *step*: from
``update`` to the attention output, the new token's own projections left out; *layer*: the whole attention module. The
methods hold the same tokens in one process and take turns; medians over the rounds. ``DynamicCache`` holds the same
latents: transformers expands all of them at every step. Each method's step is checked against float64 attention over
the expanded latents before it is timed. Layers with an indexer come last (:mod:`benchmarks.indexed_latent`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import DeepseekV2Config, DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

from benchmarks import exact, indexed_latent
from benchmarks.bench_sparse import thread_clock
from benchmarks.methods import DTYPES, DYNAMIC
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from benchmarks.timing import Clock, cpu_clock, read_bandwidth, take_turns
from hf_kvcache import LatentKVCache
from hf_kvcache.integration.versions import with_cache
from hf_kvcache_eval.caches import held_bytes

#: Our methods: how latents are stored.
CODECS: dict[str, dict[str, Any]] = {"ours none": {}, "ours 8-bit": {"bits": 8}, "ours 4-bit": {"bits": 4}}
#: Relative errors that are allowed against float64, by what a method stores; the codecs' are those of README.
_TOLERANCES = {"ours 8-bit": 1e-2, "ours 4-bit": 1e-1}
_HIDDEN, _HEADS = 2048, 16
_LEAST_ROUNDS, _WARM_UP = 5, 2
#: Tokens past the nominal T: the tail has then about the length that it has on average, and no page fills.
_OFFSET = 40


class LatentMethod:
    """One attention module with a cache of its own; modules of different methods share their weights.

    Args:
        name: of the method.
        weights: the module whose weights it takes.
        latents: ``[1, 1, T, r]``, what the cache is filled with.
        rotary_keys: ``[1, 1, T, dr]``.
    """

    def __init__(
        self, name: str, weights: DeepseekV2Attention, latents: torch.Tensor, rotary_keys: torch.Tensor
    ) -> None:
        config = make_config()
        self.name = name
        self.cache: Cache = DynamicCache() if name == DYNAMIC else LatentKVCache(config, **CODECS[name])
        with torch.device("meta"):
            self.module = DeepseekV2Attention(config, 0).eval()
        self.module.load_state_dict(weights.state_dict(), assign=True)
        self.cache.update(latents, rotary_keys, 0)
        self.attention = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, None)

    def step(self, query: torch.Tensor, latents: torch.Tensor, rotary_keys: torch.Tensor) -> torch.Tensor:
        """Take in a token; attention of its query ``[1, H, 1, dn + dr]`` to all held, ``[1, 1, H, dv]``."""
        held = self.cache.update(latents, rotary_keys, 0)
        keys, values = self.module.expand_kv(*held)
        return self.attention(self.module, query, keys, values, None, scaling=self.module.scaling)[0]

    def layer(self, hidden: torch.Tensor, position_embeddings: torch.Tensor) -> torch.Tensor:
        """The whole module on a token's state ``[1, 1, hidden]``."""
        return self.module(
            hidden, None, **with_cache(self.module, self.cache), position_embeddings=position_embeddings
        )[0]

    def bytes_held(self) -> int:
        """Bytes of the cache."""
        return held_bytes(self.cache)


def make_config() -> DeepseekV2Config:
    """A config of DeepSeek-V2-Lite's attention, with one layer."""
    config = DeepseekV2Config(
        hidden_size=_HIDDEN,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        num_hidden_layers=1,
        q_lora_rank=None,
    )
    config._attn_implementation = "sdpa"
    return config


def projected(module: DeepseekV2Attention, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query ``[1, H, 1, dn + dr]`` of a random state, and latents and rotary keys ``[1, 1, tokens, .]`` of others."""
    weight = module.o_proj.weight
    hidden = torch.randn(1, tokens, _HIDDEN).to(weight)
    latents, rotary = module.kv_a_proj_with_mqa(hidden).split([module.kv_lora_rank, module.qk_rope_head_dim], -1)
    query = module.q_proj(hidden[:, -1:]).view(1, 1, _HEADS, -1).transpose(1, 2)
    return query, module.kv_a_layernorm(latents)[:, None], rotary[:, None].contiguous()


def expected(
    module: DeepseekV2Attention, query: torch.Tensor, latents: torch.Tensor, rotary: torch.Tensor
) -> torch.Tensor:
    """The step in float64, every token expanded."""
    by_head = module.kv_b_proj.weight.view(_HEADS, -1, module.kv_lora_rank).double()
    width = module.qk_nope_head_dim
    out = torch.empty(1, 1, _HEADS, module.v_head_dim, dtype=torch.float64)
    c, k = latents[0, 0].double(), rotary[0, 0].double()
    for head, (q, up) in enumerate(zip(query[0, :, 0].double(), by_head, strict=True)):
        scores = (c @ (up[:width].T @ q[:width]) + k @ q[width:]) * module.scaling
        out[0, 0, head] = up[width:] @ (scores.softmax(0) @ c)
    return out


@torch.inference_mode()
def measure(dtype: str, tokens: int, bandwidth: float, args: argparse.Namespace, clock: Clock) -> list[Row]:
    """The rows of all methods for one dtype and number of tokens."""
    torch.manual_seed(tokens)
    weights = DeepseekV2Attention(make_config(), 0).to(DTYPES[dtype]).eval()
    for weight in weights.parameters():
        if weight.dim() == 2:  # of the size that keeps states of their size
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    _, latents, rotary = projected(weights, tokens + _OFFSET)
    methods = {name: LatentMethod(name, weights, latents, rotary) for name in (DYNAMIC, *CODECS)}
    token = projected(weights, 1)
    truth = expected(weights, token[0], torch.cat([latents, token[1]], 2), torch.cat([rotary, token[2]], 2))
    rows: dict[str, Row] = {}
    for name, method in methods.items():
        error = exact.relative_error(method.step(*token), truth)
        allowed = max(_TOLERANCES.get(name, 0.0), exact.TOLERANCES[dtype])
        shape = f"{_HEADS}/{weights.kv_lora_rank} + {weights.qk_rope_head_dim}, {dtype}"
        rows[name] = {"shape": shape, "dtype": dtype, "tokens": tokens, "cache": name}
        rows[name] |= {"error": exact.check(name, error, allowed), "bytes_held": method.bytes_held()}
    rotate = DeepseekV2RotaryEmbedding(make_config())
    position = rotate(torch.empty(0), torch.tensor([[tokens + _OFFSET]]))
    hidden = torch.randn(1, 1, _HIDDEN).to(DTYPES[dtype])

    def one_round(number: int) -> dict[str, float]:
        new = projected(weights, 1)
        times = {f"step {name}": clock(partial(method.step, *new)) for name, method in methods.items()}
        return times | {
            f"layer {name}": clock(partial(method.layer, hidden, position)) for name, method in methods.items()
        }

    for number in range(_WARM_UP):
        one_round(number)
    times = take_turns(one_round, args.rounds, min(args.rounds, _LEAST_ROUNDS), args.seconds)
    latent_bytes = 2 * (tokens + _OFFSET + 1) * (weights.kv_lora_rank + weights.qk_rope_head_dim)
    for name, row in rows.items():
        row |= {"rounds": len(times[f"step {name}"]), "of_bf16": row["bytes_held"] / latent_bytes}
        for kind in ("step", "layer"):
            row[f"{kind}_us"] = median(times[f"{kind} {name}"])
            row[f"{kind}_speedup"] = median(times[f"{kind} {DYNAMIC}"]) / row[f"{kind}_us"]
        row["gb_per_s"] = row["bytes_held"] / row["step_us"] / 1e3
        row["bandwidth_share"] = row["gb_per_s"] / bandwidth
    return list(rows.values())


def run(report: Report, args: argparse.Namespace, clock: Clock, console: Console) -> None:
    """Measure and show every dtype and number of tokens."""
    rates = read_bandwidth(64 << 20 if args.quick else 512 << 20)
    report.facts["read_gb_per_s"] = rates
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("latent attention", total=len(args.dtypes) * (len(args.tokens) + len(args.picked_of)))
        for dtype in args.dtypes:
            for tokens in args.tokens:
                rows = measure(dtype, tokens, max(rates.values()), args, clock)
                progress.advance(task)
                show("bench_latent", rows, console)
                report.rows += rows
            for tokens in args.picked_of:
                rows = indexed_latent.measure(dtype, tokens, args.picked, args, clock)
                progress.advance(task)
                show("bench_latent", rows, console)
                report.rows += rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens held; default: 1024 4096 16384")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: fp32 bf16")
    parser.add_argument("--picked-of", type=int, nargs="*", help="tokens held beside an indexer; default: 65536")
    parser.add_argument("--picked", type=int, help="tokens that the indexer picks; default: 2048")
    parser.add_argument("--picked-heads", type=int, default=16, help="heads beside the indexer; default: 16")
    parser.add_argument("--rounds", type=int, help="rounds at most; default: 15")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of one dtype and T, at most")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread in place of wall time")
    args = start(parser, argv)
    if args.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time counts one thread; accepted with --threads 1")
    args.tokens = pick(args.tokens, args.quick, [1024, 4096, 16384], [512])
    args.picked_of = pick(args.picked_of, args.quick, [65536], [512])
    args.picked = args.picked or (32 if args.quick else 2048)
    args.dtypes = pick(args.dtypes, args.quick, ["fp32", "bf16"], ["fp32"])
    args.rounds = args.rounds or (3 if args.quick else 15)
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_latent")
    run(report, args, thread_clock if args.cpu_time else cpu_clock, console)
    if args.cpu_time:
        report.note("Times are CPU times of one thread.")
    return report.finish(args, console)


if __name__ == "__main__":
    main()
