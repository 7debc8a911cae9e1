"""A pretended H100: what the package asks of a GPU, found out without one.

    python -m benchmarks.gpu.pretended                       counts of a plain step, a page event and a prompt, as JSON
    python -m benchmarks.gpu.pretended --cases attend        compile what these cases of ``cases.py`` launch
    python -m benchmarks.gpu.pretended --times               Python time of a plain step, see ``python_time.py``

Triton gets a driver that launches nothing, and torch a device whose tensors lie in the memory of the host
(``pretended_device.py``, which says what is not seen). Kernels are really compiled for sm_90, with registers and spills
read from their code; the numbers that they would write are 0. To be run in a process of its own: Triton is patched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.gpu.pretended_device import DEVICE, PROPERTIES, Counted, OnDevice, PretendedDevice, current

_RATES = {"sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}
#: The most programs of a launch along its first axis and along the others.
_MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
#: What Triton passes to a launcher before the kernel's own arguments.
_BEFORE_ARGUMENTS = 9
LAUNCHES: Counter[str] = Counter()
COMPILED: list[tuple[str, Any]] = []


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES | _RATES

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class _Launcher:
    """Counts a launch, and fails where a GPU would."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *args: Any) -> None:
        if any(programs > most for programs, most in zip(args, _MOST_PROGRAMS, strict=False)):
            raise RuntimeError(f"{self.name}: a grid of {args[:3]} programs; at most {_MOST_PROGRAMS}")
        for number, argument in enumerate(args[_BEFORE_ARGUMENTS:]):
            if isinstance(argument, torch.Tensor) and not isinstance(argument, OnDevice) and argument.numel():
                raise ValueError(f"{self.name}: argument {number} {tuple(argument.shape)} is a tensor of the CPU")
        LAUNCHES[self.name] += 1
        current().add("kernels", self.name)


class Driver:
    """What Triton asks of a driver."""

    def __init__(self, launcher: Any) -> None:
        self.utils = _Utils()
        self.launcher_cls = launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)


class _Uncompiled:
    """Stands for a compiled kernel where only launches are counted."""

    def __init__(self, name: str, options: Any, launcher: Any) -> None:
        self.name = name
        self.metadata = SimpleNamespace(name=name, shared=0, num_warps=options.num_warps, warp_size=32)
        self.packed_metadata, self.function, self.module = (), 1, 1
        self.n_regs = self.n_spills = 0
        self.asm: dict[str, Any] = {}
        self.run = launcher(None, self.metadata)

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, *args: Any) -> None:
        return None

    def __getitem__(self, grid: Any) -> Any:
        before = (1, 1, None, None, None, None)
        return lambda *args, **kwargs: self.run(*(*grid, 1, 1)[:3], *before, *args)


def install(compiled: bool = True, launcher: Any = _Launcher) -> None:
    """From here on Triton launches nothing.

    Args:
        compiled: whether kernels are compiled, which takes seconds each the first time. If not, their arguments are
            only bound.
        launcher: class of what is called for a launch.
    """
    triton.runtime.driver.set_active(Driver(launcher))
    original = JITFunction._do_compile

    def compile_and_keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        COMPILED.append((self.__name__, kernel))
        return kernel

    def bind(self: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, *more: Any) -> Any:
        kernel = self.device_caches[device][0][key] = _Uncompiled(self.__name__, options, launcher)
        COMPILED.append((self.__name__, kernel))
        return kernel

    JITFunction._do_compile = compile_and_keep if compiled else bind


def counts_of(codec: str, tokens: int) -> dict[str, Counted]:
    """What one layer (32/8/128, bfloat16) asks for: for a prompt of that many tokens, a plain step, a page event.

    What is made once for a device, as the signs of a rotation, is not counted. The table on the device learns of a page
    in the step after it.
    """
    from benchmarks.gpu.methods import Ours

    heads, dim, device = 8, 128, current()
    draw = torch.Generator().manual_seed(0)

    def random(heads: int, count: int) -> torch.Tensor:
        return torch.randn(1, heads, count, dim, generator=draw).bfloat16().to(DEVICE)

    keys, values, query, key, value = (random(*size) for size in ((8, tokens), (8, tokens), (32, 1), (8, 1), (8, 1)))
    first = Ours(codec, heads, dim)
    first.step(query, keys, values)
    first.cache.layers[0].flush()
    method = Ours(codec, heads, dim)
    layer, new = method.cache.layers[0], (query, key, value)
    found: dict[str, Counted] = {}
    with device.counting() as found["prompt"]:
        method.step(query, keys, values)
        layer.flush()
    for _ in range(2):
        method.step(*new)
    with device.counting() as found["step"]:
        method.step(*new)
        layer.flush()
    columns = layer.storage.table.columns
    while layer.storage.table.columns == columns:
        with device.counting() as found["page event"]:
            method.step(*new)
            layer.flush()
    with device.counting() as found["step after it"]:
        method.step(*new)
        layer.flush()
    return found


def compile_cases(parts: list[str]) -> list[str]:
    """Compile what the cases launch whose names match one of ``parts``; what is wrong with the kernels, in words."""
    from benchmarks.gpu import cases
    from benchmarks.gpu.settings import Settings
    from benchmarks.machine_code import read_nvidia

    wrong: list[str] = []
    seen = 0
    for case in cases.cases(Settings(DEVICE)):
        if not any(re.search(part, case.name) for part in parts):
            continue
        before = LAUNCHES.total()
        try:
            case.run()
        except Exception as error:
            wrong.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if LAUNCHES.total() == before:
            wrong.append(f"{case.name}: nothing was launched")
        for name, kernel in COMPILED[seen:]:
            made = read_nvidia(kernel.asm["cubin"], kernel.metadata.shared)
            print(case.name, name, made, flush=True)
            if made.spills or made.stack:
                wrong.append(f"{case.name}: {name} spills: {made}")
        seen = len(COMPILED)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="regular expressions: compile what these cases launch")
    parser.add_argument("--codecs", nargs="+", default=["none", "rotated8", "unbiased4"], help="of the counts")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt whose packing is counted")
    parser.add_argument("--uncompiled", action="store_true", help="count launches without compiling the kernels")
    parser.add_argument("--times", action="store_true", help="time the Python of a plain step in place of counting")
    parser.add_argument("--places", action="store_true", help="print the lines of the package that ask for them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.times:
        from benchmarks.gpu import python_time

        times = python_time.times(args.codecs)
        print(json.dumps({name: {"ours": each.us, "dynamic": each.dynamic_us} for name, each in times.items()}))
        return 0
    install(not args.uncompiled)
    with PretendedDevice():
        if args.cases is None:
            counted = {codec: counts_of(codec, args.tokens) for codec in args.codecs}
            if args.places:
                for codec, moments in counted.items():
                    for moment, found in moments.items():
                        print(f"{codec}, {moment}:", *found.lines(), sep="\n  ")
            print(
                json.dumps({codec: {m: dict(c.own) for m, c in moments.items()} for codec, moments in counted.items()})
            )
            return 0
        wrong = compile_cases(args.cases)
    print(f"{len(COMPILED)} kernels compiled, {LAUNCHES.total()} launches, {len(wrong)} failures", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
