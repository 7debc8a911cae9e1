"""Finding the cases of all kernels, and compiling them without a GPU."""

from __future__ import annotations

import time
import warnings
from typing import Any

from benchmarks.compiling import amd, nvidia
from benchmarks.compiling.measured import Measured, measure
from benchmarks.compiling.targets import TARGETS
from hf_kvcache.kernels.dispatch import OPERATIONS, module_of
from hf_kvcache.kernels.triton.compile_case import CompileCase


def operations() -> list[str]:
    """The operations that have a Triton kernel."""
    return sorted(OPERATIONS["triton"])


def cases(operation: str, architecture: str) -> list[CompileCase]:
    """The cases of an operation for a target."""
    module = module_of(operation, "triton")
    return list(module.compile_cases(architecture))


def build(operation: str, architecture: str, index: int) -> Measured:
    """Compile one case and measure it; what goes wrong is in the result."""
    start = time.perf_counter()
    case, target = cases(operation, architecture)[index], TARGETS[architecture]
    try:
        with warnings.catch_warnings():
            # Triton announces a future default; what users get is today's.
            warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
            compiled = compile_case(case, architecture)
        read = amd.read if target.amd else nvidia.read
        measured = measure(
            case, target, *read(compiled.asm["amdgcn" if target.amd else "cubin"], compiled.metadata.shared)
        )
    except Exception as error:  # a compiler may fail in any way, and the other cases are still of interest
        measured = Measured(architecture, case.name, error=_reason(error))
    measured.seconds = time.perf_counter() - start
    return measured


def _reason(error: BaseException) -> str:
    """The first of the errors that led to this one, in a line: what triton wraps around it only says where."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    # Triton's own errors begin with a place and end with the reason; between them stands the source.
    return f"{type(error).__name__}: " + (text if len(text) < 400 else f"{text[:80]} … {text[-300:]}")


def compile_case(case: CompileCase, architecture: str) -> Any:
    """The compiled kernel of a case: ``asm`` and ``metadata``."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constants)) ^ set(names)
    if unknown:
        raise ValueError(f"arguments of the case and of the kernel differ: {', '.join(sorted(unknown))}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = triton.compiler.ASTSource(case.kernel, signature, case.constants, aligned)
    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm")), 32)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=target, options=options)
