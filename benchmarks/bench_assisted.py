"""Drafts: what taking them back costs, and how many tokens a second they give.

    python -m benchmarks.bench_assisted [--quick] [--tokens 512 4096] [--model ID] [--draft ID]

Two parts. *Rollback*, on a random model of two layers in SmolLM2's shape: a pass over a draft, the ``crop`` that takes
some of its tokens back, and a plain step of the same cache. The cost must not grow with the tokens held. *Tokens a
second*, on a real model: greedy decoding alone, with drafts looked up in the prompt, and with drafts of a model whose
cache is packed in 2 bits. By default that is the model itself: most drafts are then right, and each costs what it
saves, so the number of passes is what the row shows, and not the speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from benchmarks.timing import cpu_clock, take_turns
from hf_kvcache import HeavyHitterCache, KVCache, QuantizedKVCache
from hf_kvcache.cli.models import load_default_model
from hf_kvcache.cli.reading import attend_as_with
from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache.integration.versions import CACHE_ARGUMENT, with_cache

DYNAMIC = "DynamicCache"
CACHES: dict[str, Callable[[Any], Cache]] = {
    DYNAMIC: lambda config: DynamicCache(config=config),
    "ours none": KVCache,
    "ours 8-bit": lambda config: QuantizedKVCache(config, bits=8),
    "ours 4-bit": lambda config: QuantizedKVCache(config, bits=4),
    "ours snapkv 25%": lambda config: HeavyHitterCache(config, budget=0.25),
}
#: Tokens of a draft; the pass that checks it has one more.
DRAFT = 8


def random_model(positions: int) -> LlamaForCausalLM:
    """Two layers in the shape of SmolLM2-135M, with a small vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval()


def rollback_rows(model: Any, tokens: int, names: Sequence[str], rounds: int, seconds: float) -> list[Row]:
    """Microseconds of a draft's pass and of taking it back, for each cache that holds ``tokens`` tokens."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    draft = ids[:, : DRAFT + 1]
    caches = {name: CACHES[name](model.config) for name in names}
    plain = {}
    for name, cache in caches.items():
        attend_as_with(model, cache)
        model(ids, **with_cache(model, cache), logits_to_keep=1)
        plain[name] = CACHES[name](model.config)
        model(ids, **with_cache(model, plain[name]), logits_to_keep=1)
        cache.activate_past_recording()

    def one_round(number: int) -> dict[str, float]:
        found = {}
        for name, cache in caches.items():
            attend_as_with(model, cache)
            step = plain[name]
            found[f"step/{name}"] = cpu_clock(
                lambda step=step: model(draft[:, :1], **with_cache(model, step))  # type: ignore[misc]
            )
            for kept in (0, DRAFT // 2, DRAFT):
                found[f"pass/{name}"] = cpu_clock(
                    lambda cache=cache: model(draft, **with_cache(model, cache))  # type: ignore[misc]
                )
                found[f"crop{kept}/{name}"] = cpu_clock(lambda cache=cache, n=DRAFT - kept: cache.crop(-n))  # type: ignore[misc]
        return found

    times = {key: median(values) for key, values in take_turns(one_round, rounds, 3, seconds).items()}
    return [
        {
            "tokens": tokens,
            "cache": name,
            "step_us": times[f"step/{name}"],
            "pass_us": times[f"pass/{name}"],
            **{f"crop_{kept}_us": times[f"crop{kept}/{name}"] for kept in (0, DRAFT // 2, DRAFT)},
        }
        for name in names
    ]


def with_own_cache(draft: Any) -> Any:
    """Let the drafting model read a cache of 2 bits, which ``generate`` has no argument for."""
    plain = draft.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get(CACHE_ARGUMENT) is None:
            kwargs[CACHE_ARGUMENT] = QuantizedKVCache(draft.config, bits=2)
            kwargs[CACHE_ARGUMENT].activate_past_recording()
        return plain(*args, **kwargs)

    draft.generate = generate
    return draft


def generation_rows(
    model: Any, ids: torch.Tensor, draft: Any, names: Sequence[str], new: int, repeats: int
) -> list[Row]:
    """Tokens a second with each way of drafting and each cache of the model that checks; medians, in turns."""
    ways: dict[str, dict[str, Any]] = {
        "no drafts": {},
        "prompt lookup": {"prompt_lookup_num_tokens": DRAFT},
        "model, 2 bits": {"assistant_model": draft},
    }
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    rows: list[Row] = []
    for name in names:
        written: dict[str, torch.Tensor] = {}
        found: dict[str, tuple[list[float], list[float], int]] = {way: ([], [], 0) for way in ways}
        for way in list(ways) * repeats:
            cache = CACHES[name](model.config)
            attend_as_with(model, cache)
            passes.clear()
            wall, busy = time.perf_counter(), time.process_time()
            output = model.generate(
                ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=new, min_new_tokens=new, do_sample=False, **ways[way]
            )
            walls, busies, _ = found[way]
            busies.append(time.process_time() - busy)
            walls.append(time.perf_counter() - wall)
            found[way] = walls, busies, len(passes)
            written[way] = output[0, ids.shape[1] :]
        alone = median(found["no drafts"][0])
        for way, (walls, busies, count) in found.items():
            row = {
                "prompt": ids.shape[1],
                "cache": name,
                "drafts": way,
                "passes": count,
                "tokens_per_pass": new / count,
                "tokens_per_s": new / median(walls),
                "over_no_drafts": alone / median(walls),
                "cpu_ms_per_token": 1e3 * median(busies) / new,
                "same_share": (written[way] == written["no drafts"]).double().mean().item(),
            }
            rows.append(row)
    hook.remove()
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens held; default: 512 and 4096")
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), help="default: all")
    parser.add_argument("--rounds", type=int, default=30, help="repeats at most; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="a length at most; default: %(default)s")
    parser.add_argument("--model", help="hub id or path; default: the packaged model")
    parser.add_argument("--draft", help="hub id or path of the model that drafts; default: the model itself")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt; default: 512")
    parser.add_argument("--new", type=int, help="tokens generated; default: 64")
    parser.add_argument("--repeats", type=int, help="of each way of generating; default: 3")
    args = start(parser, argv)
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.tokens = pick(args.tokens, args.quick, [512, 4096], [512])
    args.caches = pick(args.caches, args.quick, list(CACHES), [DYNAMIC, "ours 4-bit"])
    args.prompt = args.prompt or (128 if args.quick else 512)
    args.new = args.new or (16 if args.quick else 64)
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_assisted")
    report.note(
        f"Drafts of {DRAFT} tokens. Rollback: medians of {args.rounds} rounds at most, in turns; "
        f"generation: medians of {args.repeats}, in turns."
    )
    with torch.inference_mode():
        for tokens in args.tokens:
            model = random_model(tokens + 1024)
            report.rows += rollback_rows(model, tokens, args.caches, args.rounds, args.seconds)
        model, tokenizer = load_default_model(args.model)
        draft = with_own_cache(load_default_model(args.draft or args.model)[0])
        ids = tokenizer(packaged_text()[0], return_tensors="pt").input_ids[:, : args.prompt]
        report.rows += generation_rows(model, ids, draft, args.caches, args.new, args.repeats)
    show(report.script, report.rows, console)
    return report.finish(args, console)


if __name__ == "__main__":
    main()
