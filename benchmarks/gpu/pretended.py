"""A Triton driver that looks like an H100 and launches nothing: what the package asks of a GPU, found out without one.

    python -m benchmarks.gpu.pretended                       counts of a plain step, a page event and a prompt, as JSON
    python -m benchmarks.gpu.pretended --cases attend        compile what these cases of ``cases.py`` launch

The package's own launch code runs on tensors of the CPU, and kernels are really compiled for sm_90, with registers and
spills read from their code. Outputs are garbage. What is not seen: what depends on ``is_cuda``, but for the packing of
bits, and time. To be run in a process of its own, since the package is patched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

os.environ.pop("TRITON_INTERPRET", None)
os.environ["HF_KVCACHE_BACKEND"] = "triton"

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

#: The limits of an H100.
_PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
_RATES = {"sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}
#: Operators that launch nothing on a GPU though their result is no view.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "set_")
LAUNCHES: Counter[str] = Counter()
COMPILED: list[tuple[str, Any]] = []


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return _PROPERTIES | _RATES

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *args: Any) -> None:
        LAUNCHES[self.name] += 1


class Driver:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launcher_cls = _Launcher

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
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)


def install() -> None:
    """From here on the package takes tensors of the CPU for those of an H100."""
    triton.runtime.driver.set_active(Driver())
    from hf_kvcache.codecs import pages as encoding
    from hf_kvcache.kernels import dispatch
    from hf_kvcache.kernels.triton import configs, encode, latent_decode, launch, pack

    replaced: dict[str, Any] = {
        "architecture": lambda device: "sm90",
        "architecture_of": lambda device: "sm90",
        "programs_wanted": lambda device: 2 * _PROPERTIES["multiprocessor_count"],
    }
    for module in (configs, encode, latent_decode, launch, pack):
        for name, value in replaced.items():
            if hasattr(module, name):
                setattr(module, name, value)
    dispatch.reason_missing = lambda backend, device_type: None
    encoding.pack_bits = lambda codes, bits: pack.pack_bits(codes, bits)
    original = JITFunction._do_compile

    def compile_and_keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        COMPILED.append((self.__name__, kernel))
        return kernel

    JITFunction._do_compile = compile_and_keep


class Counts(TorchDispatchMode):
    """Counts, while it is active, launches of Triton kernels, torch operators that would launch, and uploads.

    Attributes:
        found: the counts. An operator counts as one; an upload is an array of the host that becomes a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter(kernels=0, operators=0, uploads=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name.split("::")[1] not in _FREE:
            self.found["operators"] += 1
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Count while the block runs."""
        before, module = LAUNCHES.total(), cast(Any, torch)
        from_numpy = module.from_numpy

        def counted(array: Any) -> torch.Tensor:
            self.found["uploads"] += 1
            return from_numpy(array)

        module.from_numpy = counted
        try:
            with self:
                yield self.found
        finally:
            module.from_numpy = from_numpy
            self.found["kernels"] = LAUNCHES.total() - before


def counts_of(codec: str, tokens: int) -> dict[str, dict[str, int]]:
    """What one layer (32/8/128, bfloat16) asks for: for a prompt of that many tokens, a plain step, a page event."""
    from benchmarks.gpu.methods import Ours

    heads, dim = 8, 128
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, heads, tokens, dim, generator=draw).bfloat16() for _ in range(2))
    query, key, value = (torch.randn(1, h, 1, dim, generator=draw).bfloat16() for h in (32, heads, heads))
    first = Ours(codec, heads, dim)  # makes what is made once for a device: the signs of the rotation
    first.step(query, keys, values)
    first.cache.layers[0].flush()
    method = Ours(codec, heads, dim)
    method.module(32, dim)  # whose weights are not the cache's
    layer, new = method.cache.layers[0], (query, key, value)
    found: dict[str, dict[str, int]] = {}
    with Counts().counting() as found["prompt"]:
        method.step(query, keys, values)
        layer.flush()
    for _ in range(2):
        method.step(*new)
    with Counts().counting() as found["step"]:
        method.step(*new)
        layer.flush()
    columns = layer.storage.table.columns
    while layer.storage.table.columns == columns:
        with Counts().counting() as found["page event"]:
            method.step(*new)
            layer.flush()
    return {name: dict(counted) for name, counted in found.items()}


def compile_cases(parts: list[str]) -> list[str]:
    """Compile what the cases launch whose names match one of ``parts``; what is wrong with the kernels, in words."""
    from benchmarks.gpu import cases
    from benchmarks.gpu.settings import Settings
    from benchmarks.machine_code import read_nvidia

    wrong: list[str] = []
    seen = 0
    for case in cases.cases(Settings(torch.device("cpu"))):
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    install()
    if args.cases is None:
        print(json.dumps({codec: counts_of(codec, args.tokens) for codec in args.codecs}))
        return 0
    wrong = compile_cases(args.cases)
    print(f"{len(COMPILED)} kernels compiled, {LAUNCHES.total()} launches, {len(wrong)} failures", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
