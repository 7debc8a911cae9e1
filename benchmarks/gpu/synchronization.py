"""Step c: a plain decoding step must not wait for the GPU, and what may be captured must not copy from the host.

    python -m benchmarks.gpu.synchronization        the same on the pretended H100, where no GPU is needed

A step of one layer: the cache's ``update`` and the attention function. On a GPU it runs under
``torch.cuda.set_sync_debug_mode("error")``. ``tests/gpu`` runs the same checks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.measuring import attempt
from benchmarks.gpu.methods import OfCache, OursStatic, attention_module, latent_module
from benchmarks.gpu.results import FAILED, LEFT_OUT, Figures, Results, reason
from benchmarks.gpu.settings import Settings
from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, SlidingWindowCache
from hf_kvcache.eviction import available, resolve

CODECS = ("none", "rotated8", "unbiased4", "unbiased3", "unbiased2", "fp8", "kvarn4")
RIGHT = "right"
# As the cases of step b have them, so that most kernels are compiled already.
HEADS, QUERY_HEADS, DIM, PROMPT = 8, 32, 128, 300
TINY_HEADS, TINY_QUERY_HEADS, TINY_DIM = 1, 2, 32
#: Steps before the plain ones that are looked at, and their number: the prompt's length leaves room for them.
_WARM_UP, _PLAIN = 2, 4
Step = Callable[[], Any]


class Check(NamedTuple):
    """A layer with its prompt, and one more token at each step.

    Attributes:
        make: the cache, which then holds the prompt, and the step.
    """

    name: str
    make: Callable[[], tuple[Any, Step]]


@contextlib.contextmanager
def no_waits(settings: Settings) -> Iterator[None]:
    """An operation that waits for the GPU is an error."""
    if not settings.cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def random(settings: Settings, *size: int) -> torch.Tensor:
    # Made on the CPU, where dry runs and the pretended GPU make them too.
    return torch.randn(size, device="cpu").to(settings.device, torch.bfloat16)


class _OneLayer(OfCache):
    def bytes_read(self) -> int:
        raise NotImplementedError("nothing is timed here")


def keys_and_values(settings: Settings, make: Callable[[Any], Any], prompt: int = PROMPT) -> tuple[Any, Step]:
    """A layer that caches keys and values."""
    tiny = settings.tiny
    query_heads, heads, dim = (TINY_QUERY_HEADS, TINY_HEADS, TINY_DIM) if tiny else (QUERY_HEADS, HEADS, DIM)
    method = _OneLayer(make(attention_module(query_heads, heads, dim)[1]), "hf_kvcache", heads)
    draw = partial(random, settings, 1)
    method.step(draw(query_heads, prompt, dim), draw(heads, prompt, dim), draw(heads, prompt, dim))
    new = draw(query_heads, 1, dim), draw(heads, 1, dim), draw(heads, 1, dim)
    return method.cache, lambda: method.step(*new)


def with_max_length(settings: Settings, codec: str) -> tuple[Any, Step]:
    """A layer with a maximum length, called as compiled code does. Its pages are not looked at, for that waits."""
    tiny = settings.tiny
    query_heads, heads, dim = (TINY_QUERY_HEADS, TINY_HEADS, TINY_DIM) if tiny else (QUERY_HEADS, HEADS, DIM)
    draw = partial(random, settings, 1)
    method = OursStatic(codec, draw(heads, PROMPT, dim), draw(heads, PROMPT, dim), _WARM_UP + _PLAIN)
    new = draw(query_heads, 1, dim), draw(heads, 1, dim), draw(heads, 1, dim)
    return SimpleNamespace(layers=[]), lambda: method.step(*new)


def latents(settings: Settings, bits: int | None) -> tuple[Any, Step]:
    """A layer that caches latents, as a model with multi-head latent attention calls it."""
    rank, rotary, width, count = (64, 16, 32, 2) if settings.tiny else (512, 64, 128, 16)
    module, config = latent_module(count, rank, rotary, width)
    module = on_device(settings, module.bfloat16())
    cache, draw = LatentKVCache(config, bits=bits), partial(random, settings, 1)
    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]

    def attend(query: torch.Tensor, latent: torch.Tensor, rotated: torch.Tensor) -> Any:
        states = module.expand_kv(*cache.update(latent, rotated, 0))
        return function(module, query, *states, None, dropout=0.0, scaling=module.scaling)

    attend(draw(count, PROMPT, width + rotary), draw(1, PROMPT, rank), draw(1, PROMPT, rotary))
    new = draw(count, 1, width + rotary), draw(1, 1, rank), draw(1, 1, rotary)
    return cache, lambda: attend(*new)


def on_device(settings: Settings, module: torch.nn.Module) -> Any:
    """The module on the device of the settings, which may be the pretended one."""
    if type(torch.empty(0, device=settings.device)) is not torch.Tensor:
        from benchmarks.gpu.pretended_device import moved

        return moved(module)
    return module.to(settings.device)


def _needs_no_model(policy: str) -> bool:
    """Whether one layer has all that a policy needs: no rotary embedding, hidden states or second reading."""
    needs = resolve(policy)
    return not (needs.needs_rope or needs.needs_hidden or needs.needs_replay)


def checks(settings: Settings) -> list[Check]:
    """All checks, the most important first."""
    of_layer = partial(partial, keys_and_values, settings)
    found = [Check(codec, of_layer(partial(KVCache, codec=codec))) for codec in CODECS]
    found += [Check("full-precision tokens alone", of_layer(partial(KVCache, codec="unbiased4"), 20))]
    found += [
        Check(f"{c}, max_length", partial(with_max_length, settings, c)) for c in ("none", "rotated8", "unbiased4")
    ]
    named = {None: "latents", 8: "latents, 8 bits", 4: "latents, 4 bits"}
    found += [Check(name, partial(latents, settings, bits)) for bits, name in named.items()]
    for policy in filter(_needs_no_model, available()):
        for bits in (None, 4) if policy in ("snapkv", "h2o") else (4,):
            make = partial(HeavyHitterCache, budget=128, policy=policy, bits=bits)
            found.append(Check(f"{policy}, {f'{bits} bits' if bits else 'none'}", of_layer(make)))
    found.append(Check("window", of_layer(partial(SlidingWindowCache, window=128, sinks=4))))
    return [check for check in found if settings.only in check.name]


@torch.no_grad()  # a pretended tensor cannot be made in inference mode
def plain_steps(settings: Settings, check: Check) -> Figures:
    """Run plain steps; RuntimeError with the operation that waits."""
    cache, step = check.make()
    for _ in range(_WARM_UP):  # they compile, and make small tables
        step()
    before = held(cache)
    with no_waits(settings):
        for _ in range(_PLAIN):
            step()
    if held(cache) != before:
        raise AssertionError("a page was packed or tokens were evicted: these steps are not plain")
    return {"plain steps": _PLAIN}


def held(cache: Any) -> list[Any]:
    """What changes in a layer where a step is not plain."""
    evictors = [getattr(layer, "evictor", None) for layer in cache.layers]
    evictions = [0 if evictor is None else evictor.evictions for evictor in evictors]
    return [*(layer.storage.table.lengths.tolist() for layer in cache.layers), *evictions]


def run(settings: Settings, results: Results) -> None:
    for check in checks(settings):
        if settings.left() < 2:
            results.leave_out(check.name)
            continue
        attempt(settings, results, check.name, lambda check=check: judge(settings, check, results))  # type: ignore[misc]


def judge(settings: Settings, check: Check, results: Results) -> None:
    """Run a check and take note of what it gave."""
    found = plain_steps(settings, check)
    results.add(check.name, f"{check.name}: does not wait", **found, **{RIGHT: True})


def lines(found: dict[str, Figures]) -> list[str]:
    """The results of this step in words."""
    right = sum(bool(figures.get(RIGHT)) for figures in found.values())
    text = [f"synchronization: {right} of {len(found)} plain steps do not wait"]
    for name, figures in found.items():
        if not figures.get(RIGHT):
            why = f"WAITS {name}: {figures[FAILED]}" if FAILED in figures else f"left out: {name}: {figures[LEFT_OUT]}"
            text.append(f"  {why}"[:240])
    return text


def main() -> int:
    """The checks on the pretended H100."""
    from benchmarks.gpu import pretended
    from benchmarks.gpu.pretended_device import DEVICE, PretendedDevice

    pretended.install(compiled=False)
    settings, failed = Settings(DEVICE), 0
    for check in checks(settings):
        try:
            with PretendedDevice():
                plain_steps(settings, check)
        except (RuntimeError, AssertionError) as error:
            failed += 1
            print(f"{check.name}: {reason(error)}")
    print(f"{len(checks(settings))} plain steps, {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
