"""Runs of ``generate()`` on the pretended H100: does every path launch, and what does it ask of a GPU?

    python -m benchmarks.gpu.pretended_runs                          all runs, kernels compiled for sm_90
    python -m benchmarks.gpu.pretended_runs --uncompiled --only h2o  without compiling: seconds
    python -m benchmarks.gpu.pretended_runs --uncompiled --check     fail where a count is above ``pretended.csv``
    python -m benchmarks.gpu.pretended_runs --uncompiled --write     write that file: today's counts are the budget

Two layers, tiny otherwise. Counted is what the package asks for, not what the model does: operators in prefilling
attention that transformers computes are the model's. See ``pretended_device.py`` for what is not seen; since kernels
write nothing, the tokens mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.gpu import pretended  # first: it takes Triton out of the interpreter

# isort: split
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.gpu.pretended_device import DEVICE, KINDS, Counted, PretendedDevice, moved
from benchmarks.gpu.settings import be_quiet
from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, QuantizedKVCache, SlidingWindowCache, SparseReadCache
from hf_kvcache.integration.versions import CACHE_ARGUMENT
from hf_kvcache.kernels import workspace

BUDGET = Path(__file__).with_name("pretended.csv")
Make = Callable[[Any], Any]
VOCABULARY, PROMPT, NEW, PAGE = 97, 75, 26, 16
#: Moments of a run. ``first step`` makes small tables. ``step behind`` follows a pass that changed pages, and sends
#: what changed. ``between`` is what happens between two forward passes: cropping, reordering.
MOMENTS = ("prompt", "first step", "step", "step behind", "chunk", "page event", "eviction", "between")
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_WINDOW: dict[str, Any] = {"sliding_window": 24}


def config_of(family: str) -> Any:
    """A config of two tiny layers."""
    if family == "deepseek":
        sizes = {"kv_lora_rank": 256, "q_lora_rank": 32, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32}
        experts: dict[str, Any] = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
        own = {"v_head_dim": 32, "moe_intermediate_size": 32, "first_k_dense_replace": 2, "num_key_value_heads": 4}
        shared = {name: value for name, value in _SHARED.items() if name != "head_dim"}
        return transformers.DeepseekV3Config(**shared | sizes | experts | own)
    if family in ("deepseek_v32", "glm5"):
        return _indexed(family)
    if family == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        layers = ["sliding_attention", "full_attention"]
        config = transformers.GptOssConfig(**_SHARED, **_WINDOW, **experts, layer_types=layers)
        config._experts_implementation = "eager"  # grouped products ask the CPU for a histogram that it does not have
        return config
    if family == "gemma2":
        return transformers.Gemma2Config(**_SHARED, **_WINDOW, query_pre_attn_scalar=64)
    if family == "mistral":
        return transformers.MistralConfig(**_SHARED, **_WINDOW)
    return transformers.LlamaConfig(**_SHARED | {"head_dim": {"llama": 128, "llama 64": 64}[family]})


def _indexed(family: str) -> Any:
    """A config of two tiny layers with an indexer that picks 16 tokens; in GLM 5 they share it."""
    sizes = {"kv_lora_rank": 256, "q_lora_rank": 32, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    indexer = {"index_topk": 16, "index_head_dim": 64, "index_n_heads": 4}
    own = sizes | experts | indexer | {"moe_intermediate_size": 32, "num_key_value_heads": 4}
    shared = {name: value for name, value in _SHARED.items() if name != "head_dim"} | own
    if family == "deepseek_v32":
        return transformers.DeepseekV32Config(**shared, first_k_dense_replace=2)
    layers = {"layer_types": ["indexed_attention"] * 2, "mlp_layer_types": ["dense"] * 2}
    own = {"qk_rope_head_dim": 0, "indexer_types": ["full", "shared"], "index_kpool": 4, "hc_mult": 2}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    vision["projection_intermediate_size"] = 32
    tokens = {f"{kind}_{what}": 0 for kind in ("image", "video") for what in ("token_id", "start_token_id")}
    config = transformers.Glm5NextConfig(
        text_config=shared | own | layers | {"pad_token_id": 0}, vision_config=vision, **tokens
    )
    config.text_config._attn_implementation = "sdpa"
    return config


def model_of(family: str, attention: str | None = None) -> Any:
    """A random model of that family on the CPU, bfloat16."""
    config = config_of(family)
    config._attn_implementation = attention or ("eager" if family in ("gemma2", "gpt_oss") else "sdpa")
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16).eval()
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.disable_compile = None, 0, True
    return model


class Run(NamedTuple):
    """One run.

    Attributes:
        options: further arguments of ``generate``.
        rows: sequences; with more than one, they are padded on the left.
        turns: calls of ``generate`` with the same cache, each with what came before and a few tokens more.
    """

    name: str
    family: str
    make: Make
    options: Mapping[str, Any] = MappingProxyType({})
    rows: int = 1
    turns: int = 1


def runs() -> list[Run]:
    """All runs."""
    small: dict[str, Any] = {"page_size": PAGE, "tail_length": PAGE}
    four: Make = partial(QuantizedKVCache, bits=4, **small)
    none: Make = partial(KVCache, codec="none", **small)

    def evicting(policy: str, **options: Any) -> Make:
        return partial(HeavyHitterCache, budget=40, policy=policy, interval=8, **small | options)

    sparse: Make = partial(SparseReadCache, read_budget=0.5, bits=4, dense_layers=0, **small)
    window: Make = partial(SlidingWindowCache, window=40, sinks=4, reindex=True)
    latents = partial(LatentKVCache, **small)
    return [
        Run("4 bits", "llama", four),
        Run("4 bits, head dimension 64", "llama 64", four),
        Run("8 bits", "llama", partial(QuantizedKVCache, bits=8, **small)),
        Run("none", "llama", none),
        Run("4 bits, padded batch", "llama", four, rows=3),
        Run("4 bits, windows", "mistral", four),
        Run("none, windows, padded batch", "mistral", none, rows=2),
        Run("4 bits, windows and soft-capping", "gemma2", four),
        Run("4 bits, windows and sink logits", "gpt_oss", four),
        Run("snapkv, 4 bits", "llama", evicting("snapkv", bits=4)),
        Run("h2o", "llama", evicting("h2o")),
        Run("ada-expected, padded batch", "llama", evicting("ada-expected"), rows=2),
        Run("compactor, 8 bits", "llama", evicting("compactor", bits=8)),
        Run("window, re-indexed", "llama", window),
        Run("latents", "deepseek", latents),
        Run("latents, 4 bits", "deepseek", partial(latents, bits=4)),
        Run("latents, 8 bits, padded batch", "deepseek", partial(latents, bits=8), rows=2),
        Run("picked latents, 4 bits", "deepseek_v32", partial(latents, bits=4)),
        Run("picked latents of GLM 5, 4 bits", "glm5", partial(latents, bits=4)),
        Run("low rank, 4 bits", "llama", low_rank),
        Run("4 bits, prompt lookup", "llama", four, {"prompt_lookup_num_tokens": 3}),
        Run("4 bits, offloaded", "llama", partial(four, offload="cpu")),
        Run("4 bits, offloaded to files, padded batch", "llama", partial(four, offload=tempfile.gettempdir()), rows=3),
        Run("snapkv, offloaded", "llama", evicting("snapkv", offload="cpu")),
        Run("4 bits, beams", "llama", four, {"num_beams": 2}),
        Run("4 bits, prefill in chunks", "llama", four, {"prefill_chunk_size": 32}),
        Run("4 bits, two turns", "llama", four, turns=2),
        Run("4 bits, sparse", "llama", sparse),
        Run("4 bits, sparse, padded batch", "llama", sparse, rows=3),
        Run("4 bits, sparse, offloaded", "llama", partial(sparse, offload="cpu")),
        Run("4 bits, sparse, prompt lookup", "llama", sparse, {"prompt_lookup_num_tokens": 3}),
    ]


def low_rank(config: Any) -> Any:
    """A cache of low-rank coefficients, calibrated on the CPU with the same weights."""
    return LatentKVCache(config, projection=_PROJECTIONS[0], ratio=0.5, bits=4, page_size=PAGE, tail_length=PAGE)


_PROJECTIONS: list[Any] = []


def calibrated() -> None:
    """Calibrate what :func:`low_rank` reads."""
    from hf_kvcache.lowrank import calibrate

    def tokens_of(text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % VOCABULARY for letter in text]]))

    text = "Some tokens, whatever they say. " * 12
    model = model_of("llama").float()
    _PROJECTIONS[:] = [calibrate(model, [text], tokens_of, "svd", tokens=300, progress=False)]


class Moments:
    """Counts of a model's forward passes with a cache, by moment.

    Attributes:
        most: what a moment asked for at most, by kind.
        seen: how often there was each moment.
        places: the lines of the package, by moment.
    """

    def __init__(self, device: PretendedDevice, cache: Any) -> None:
        self.device, self.cache = device, cache
        self.most: dict[str, Counter[str]] = {}
        self.seen: Counter[str] = Counter()
        self.places: dict[str, Counted] = {}
        self._stack = contextlib.ExitStack()
        self._last = ""

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Watch the forward passes of a model while the block runs."""
        before = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = model.register_forward_hook(self._end, with_kwargs=True)
        try:
            self._between()
            yield
        finally:
            self._close("between")
            before.remove()
            after.remove()

    def _open(self) -> None:
        self._counted = self._stack.enter_context(self.device.counting())

    def _between(self) -> None:
        self._open()

    def _close(self, moment: str) -> None:
        self._stack.close()
        self.seen[moment] += 1
        most = self.most.setdefault(moment, Counter(dict.fromkeys(KINDS, 0)))
        for kind, number in self._counted.own.items():
            most[kind] = max(most[kind], number)
        kept = self.places.setdefault(moment, Counted())
        if sum(self._counted.own.values()) >= sum(kept.own.values()):
            self.places[moment] = self._counted

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._close("between")
        self._state = self._pages(), self._evictions()
        self._open()

    def _end(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        self._last = self._moment(ids.shape[1])
        self._close(self._last)
        self._between()

    def _moment(self, length: int) -> str:
        if "prompt" not in self.seen:
            return "prompt"
        if self._evictions() != self._state[1]:
            return "eviction"
        if length > 1:
            return "chunk"
        if self._pages() != self._state[0]:
            return "page event"
        if "first step" not in self.seen:
            return "first step"
        return "step" if self._last in ("first step", "step", "step behind") else "step behind"

    def _pages(self) -> list[int]:
        storages = [getattr(layer, "storage", None) for layer in self.cache.layers]
        return [0 if storage is None else storage.table.version for storage in storages]

    def _evictions(self) -> list[int]:
        evictors = [getattr(layer, "evictor", None) for layer in self.cache.layers]
        return [0 if evictor is None else evictor.evictions for evictor in evictors]


def execute(run: Run, device: PretendedDevice) -> Moments:
    """One run; an exception is a path that a GPU would not get through either."""
    model: Any = moved(model_of(run.family))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (run.rows, PROMPT), generator=draw)
    if "prompt_lookup_num_tokens" in run.options:
        ids = ids[:, : PROMPT // 3].repeat(1, 3)
    mask = torch.ones_like(ids)
    for row in range(1, run.rows):
        mask[row, : 11 * row] = 0
    ids, mask = ids.to(DEVICE), mask.to(DEVICE)
    cache = run.make(model.config)
    moments = Moments(device, cache)
    with moments.watching(model):
        for _ in range(run.turns):
            inputs = {"input_ids": ids, "attention_mask": mask, CACHE_ARGUMENT: cache}
            ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **run.options)
            ids = torch.cat([ids, ids[:, :7]], 1)
            mask = torch.cat([mask, mask.new_ones(run.rows, ids.shape[1] - mask.shape[1])], 1)
    cache.memory()
    return moments


def forget() -> None:
    """Forget what earlier runs left in the package: small tables on the device, scratch buffers."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "hf_kvcache":
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    workspace._local.__dict__.clear()


def budget(path: Path) -> dict[tuple[str, str], dict[str, int]]:
    """What each moment of each run may ask for, by kind."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["run"], row["moment"]): {kind: int(row[kind]) for kind in KINDS} for row in rows}


def counts(found: dict[str, Moments]) -> dict[tuple[str, str], dict[str, int]]:
    """What each moment of each run asked for at most, by kind."""
    listed = {
        (name, moment): dict(moments.most[moment])
        for name, moments in found.items()
        for moment in MOMENTS
        if moment in moments.most
    }
    return {key: most for key, most in listed.items() if key[1] != "between" or any(most.values())}


def write(found: dict[str, Moments]) -> None:
    """Make today's counts the budget."""
    with BUDGET.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("run", "moment", *KINDS))
        rows.writerows((*key, *(most[kind] for kind in KINDS)) for key, most in counts(found).items())


def above(found: dict[str, Moments], allowed: dict[tuple[str, str], dict[str, int]]) -> list[str]:
    """Where a count is above the budget, in words."""
    wrong: list[str] = []
    for (name, moment), most in counts(found).items():
        if (name, moment) not in allowed:
            wrong.append(f"{name}, {moment}: no budget")
            continue
        for kind, number in most.items():
            if number > allowed[name, moment][kind]:
                wrong.append(f"{name}, {moment}: {number} {kind}, {allowed[name, moment][kind]} are allowed")
                wrong += [f"    {line}" for line in found[name].places[moment].lines([kind])]
    return wrong


def table(found: dict[str, Moments]) -> list[str]:
    """The counts as lines of a table."""
    lines = [f"{'':34}{'moment':12}{'times':>6}" + "".join(f"{kind:>11}" for kind in KINDS)]
    for (name, moment), most in counts(found).items():
        numbers = "".join(f"{most[kind]:11}" for kind in KINDS)
        lines.append(f"{name:34}{moment:12}{found[name].seen[moment]:6}{numbers}")
    return lines


def execute_all(chosen: list[Run]) -> tuple[dict[str, Moments], int]:
    """The counts of the runs that came to their end, and the number of those that did not."""
    if any(run.make is low_rank for run in chosen):
        calibrated()
    found: dict[str, Moments] = {}
    for run in chosen:
        forget()
        try:
            with PretendedDevice() as device:
                found[run.name] = execute(run, device)
        except Exception:
            print(f"FAILED {run.name}\n{traceback.format_exc()[-2500:]}", flush=True)
    return found, len(chosen) - len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="runs whose name is one of these")
    parser.add_argument("--uncompiled", action="store_true", help="bind the kernels' arguments without compiling")
    parser.add_argument("--places", nargs="*", metavar="KIND", help=f"print the lines that ask for these: {KINDS}")
    parser.add_argument("--check", nargs="?", type=Path, const=BUDGET, help="fail where a count is above this budget")
    parser.add_argument("--write", action="store_true", help="make the counts the budget; for all runs at once")
    args = parser.parse_args()
    unknown = set(args.only or ()) - {run.name for run in runs()}
    if unknown or (args.write and args.only):
        parser.error(f"--only {sorted(unknown)}: no such run" if unknown else "--write needs all runs")
    be_quiet()
    torch.set_num_threads(1)
    pretended.install(not args.uncompiled)
    found, failed = execute_all([run for run in runs() if args.only is None or run.name in args.only])
    if args.places is not None:
        for name, moments in found.items():
            for moment, counted in moments.places.items():
                print(f"{name}, {moment}:", *counted.lines(args.places or KINDS), sep="\n  ")
    wrong = above(found, budget(args.check)) if args.check else []
    print(*table(found), *wrong, f"{len(pretended.COMPILED)} kernels, {failed} failures", sep="\n")
    if args.write and not failed:
        write(found)
    return int(failed > 0 or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
