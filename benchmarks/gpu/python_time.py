"""Python time of a decoding step's launch code, relative to DynamicCache with sdpa in the same process.

    python -m benchmarks.gpu.python_time                    microseconds of a layer and step, ratio, Python calls
    python -m benchmarks.gpu.python_time --only unbiased4

Kernels are launched on nothing, and tensors are tiny and on the CPU, so that nearly all is what Python, torch and
Triton do for a launch. Steps of both sides alternate; a figure is the median. What a GPU's own launch takes in the
driver (some microseconds for a kernel) is not in it, and neither is what depends on ``is_cuda``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.gpu import pretended  # first: it takes Triton out of the interpreter

# isort: split
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.gpu.methods import Dynamic, OfCache, attention_module, latent_module
from benchmarks.gpu.pretended_device import PROPERTIES
from benchmarks.gpu.settings import be_quiet
from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache
from hf_kvcache.kernels import dispatch

HEADS, QUERY_HEADS, DIM, TOKENS = 2, 4, 64, 150
_WARM_UP = 5
Step = Callable[[], Any]


class Time(NamedTuple):
    """A step of one layer.

    Attributes:
        us: microseconds of the CPU, the median. What other processes take does not count.
        dynamic_us: those of DynamicCache's step, taken in between.
        calls: Python functions that are called.
    """

    us: float
    dynamic_us: float
    calls: int

    @property
    def ratio(self) -> float:
        return self.us / self.dynamic_us


class _Ours(OfCache):
    def bytes_read(self) -> int:
        raise NotImplementedError("only time is of interest here")


class _Nothing:
    """A launcher without a GPU behind it."""

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


def install() -> None:
    """From here on tensors of the CPU are launched on as those of an H100, and nothing is launched."""
    os.environ["HF_KVCACHE_BACKEND"] = "triton"
    pretended.install(compiled=False, launcher=_Nothing)
    from hf_kvcache.kernels.triton import configs

    for operation in dispatch.OPERATIONS["triton"]:
        dispatch.module_of(operation, "triton")  # imported before it is patched

    properties = SimpleNamespace(multi_processor_count=PROPERTIES["multiprocessor_count"])
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore
    replaced: dict[str, Any] = {
        "architecture": lambda device: "sm90",
        "architecture_of": lambda device: "sm90",
        "programs_wanted": lambda device: 2 * PROPERTIES["multiprocessor_count"],
    }
    before = {name: getattr(configs, name) for name in replaced if hasattr(configs, name)}
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_kvcache.kernels.triton"):
            for function, original in before.items():
                if getattr(module, function, None) is original:
                    setattr(module, function, replaced[function])
    dispatch.reason_missing = lambda backend, device_type: None


def random(*size: int) -> torch.Tensor:
    return torch.randn(size).bfloat16()


def of_keys_and_values(make: Callable[[Any], Any]) -> tuple[Step, Step]:
    """A step of ours, and of DynamicCache."""
    held = random(1, HEADS, TOKENS, DIM), random(1, HEADS, TOKENS, DIM)
    new = random(1, QUERY_HEADS, 1, DIM), random(1, HEADS, 1, DIM), random(1, HEADS, 1, DIM)
    ours = _Ours(make(attention_module(QUERY_HEADS, HEADS, DIM)[1]), "hf_kvcache", HEADS)
    ours.step(random(1, QUERY_HEADS, TOKENS, DIM), *held)
    # In float32: how long a CPU takes for bfloat16 depends on its instructions more than on its speed.
    dynamic, single = Dynamic(*(x.float() for x in held)), [x.float() for x in new]
    return lambda: ours.step(*new), lambda: dynamic.step(*single)


def of_latents(make: Callable[[Any], Any], steps: int) -> tuple[Step, Step]:
    """The same with multi-head latent attention, which DynamicCache expands at every step."""
    rank, rotary, width = 64, 16, 32
    query = random(1, QUERY_HEADS, 1, width + rotary)
    new = random(1, 1, 1, rank), random(1, 1, 1, rotary)

    def step_of(make: Callable[[Any], Any]) -> Step:
        module, config = latent_module(QUERY_HEADS, rank, rotary, width)
        module, cache = module.bfloat16(), make(config)
        function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]

        def step() -> Any:
            states = module.expand_kv(*cache.update(*new, 0))
            return function(module, query, *states, None, dropout=0.0, scaling=module.scaling)

        states = module.expand_kv(*cache.update(random(1, 1, TOKENS, rank), random(1, 1, TOKENS, rotary), 0))
        many = random(1, QUERY_HEADS, TOKENS, width + rotary)
        function(module, many, *states, None, dropout=0.0, scaling=module.scaling, is_causal=True)
        return step

    first, dynamic = (step_of(lambda config: DynamicCache()) for _ in range(2))
    for _ in range(_WARM_UP + steps):  # oneDNN prepares a product for every number of tokens that it meets
        first()
    return step_of(make), dynamic


def sides(steps: int) -> dict[str, Callable[[], tuple[Step, Step]]]:
    """What is measured: how its step and DynamicCache's are made, for that many steps."""

    def codec(name: str) -> Callable[[], tuple[Step, Step]]:
        return lambda: of_keys_and_values(lambda config: KVCache(config, name))

    def policy(name: str) -> Callable[[], tuple[Step, Step]]:
        return lambda: of_keys_and_values(lambda config: HeavyHitterCache(config, budget=120, policy=name, bits=4))

    found = {name: codec(name) for name in ("unbiased4", "rotated8", "none")}
    found |= {name: policy(name) for name in ("snapkv", "h2o")}
    found["latents"] = lambda: of_latents(LatentKVCache, steps)
    found["latents, 4 bits"] = lambda: of_latents(partial(LatentKVCache, bits=4), steps)
    return found


def python_calls(step: Step) -> int:
    """The Python functions that a step calls."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls - 1  # the step itself


def measure(make: Callable[[], tuple[Step, Step]], steps: int) -> Time:
    """Steps of both sides in turns. Where a page fills, a step is longer; the median does not see it."""
    ours, dynamic = make()
    for _ in range(_WARM_UP):
        ours()
        dynamic()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        for step, taken in zip((ours, dynamic), times, strict=True):
            begin = time.thread_time()
            step()
            taken.append(time.thread_time() - begin)
    calls = sorted(python_calls(ours) for _ in range(3))[1]
    return Time(median(times[0]) * 1e6, median(times[1]) * 1e6, calls)


def times(names: Sequence[str], steps: int = 200) -> dict[str, Time]:
    """Measure what is named, in a process in which nothing else was done with Triton."""
    be_quiet()
    torch.set_num_threads(1)
    install()
    made = sides(steps)
    with torch.inference_mode():
        return {name: measure(made[name], steps) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(sides(0)), help="default: all")
    parser.add_argument("--steps", type=int, default=200, help="of each side")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON in the last line")
    args = parser.parse_args()
    found = times(args.only or list(sides(0)), args.steps)
    for name, each in found.items():
        text = f"{name:16} {each.us:7.0f} us, DynamicCache {each.dynamic_us:6.0f} us"
        print(f"{text}, ratio {each.ratio:5.2f}, {each.calls} Python calls", flush=True)
    if args.json:
        print(json.dumps({name: {"ratio": each.ratio, "calls": each.calls} for name, each in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
