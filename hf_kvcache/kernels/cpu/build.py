"""Compiles the CPU kernels: once when the package is installed (hatch_build.py), or by hand with this file.

Nothing but the standard library is imported, so that the file runs before the package's own dependencies are there. The
library links to no OpenMP of its own: at load time it finds the one that torch has loaded, and so shares its threads.

The sources are compiled once for each instruction set of the processor that the compiler compiles for, as far as the
compiler knows it; the library chooses between them when it is loaded (``src/dispatch.cpp``).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
LIBRARY = HERE / f"libhf_kvcache{SUFFIX}"

_COMMON = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
# Vectors wider than the baseline cross no function that is not inlined, so their calling convention does not matter;
# GCC 12 takes the undefined operands in its own AVX-512 headers for uninitialised variables.
_WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
_VNNI = [*_AVX512, "-mavx512vnni"]
_AMX = [*_VNNI, "-mavx512vbmi", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
# Those that take the compiler longest come first, so that the last one is short.
_X86 = {"amx": _AMX, "vnni": _VNNI, "avx2": _AVX2}
_ARM = {"i8mm": ["-march=armv8.2-a+dotprod+i8mm"], "dotprod": ["-march=armv8.2-a+dotprod"]}
_INSTRUCTION_SETS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
SANITIZER = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]


class CompilerError(RuntimeError):
    """There is no compiler, or it failed."""


def find_compiler() -> str:
    """The C++ compiler: ``$CXX``, else the first of c++, g++, clang++.

    Raises:
        CompilerError: if there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise CompilerError("no C++ compiler found; accepted: $CXX, c++, g++ or clang++ on the PATH")


def build(output: Path = LIBRARY, sanitize: bool = False) -> Path:
    """Compile and link the library.

    Args:
        output: file to write; it appears only when it is complete.
        sanitize: with the address and undefined-behavior sanitizers.

    Raises:
        CompilerError: if there is no compiler or it fails.
    """
    compiler = find_compiler()
    # Sanitized and fully optimized, the vector kernels take a compiler many minutes.
    flags = _COMMON + _WARNINGS + ([*SANITIZER, "-O1"] if sanitize else [])
    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
    sets = {name: options for name, options in instruction_sets(compiler).items() if _knows(compiler, options)}
    units = {f"kernels_{name}": options for name, options in sets.items()}
    units |= {"kernels_portable": [], "dispatch": [f"-DHFKV_WITH_{name.upper()}" for name in sets]}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:

        def compile_unit(unit: str) -> str:
            target = str(Path(folder) / f"{unit}.o")
            _run([compiler, *flags, *openmp, *units[unit], "-c", str(SOURCES / f"{unit}.cpp"), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        linked = Path(folder) / output.name
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([compiler, "-shared", *undefined, *(SANITIZER if sanitize else []), *objects, "-o", str(linked)])
        # Copied beside its place and renamed: a library that is loaded is never written into.
        staged = output.with_name(output.name + ".new")
        shutil.copy(linked, staged)
        staged.replace(output)
    return output


def instruction_sets(compiler: str) -> dict[str, list[str]]:
    """The instruction sets that there are kernels for, on the processor that ``compiler`` compiles for, and its
    options for each. Another processor than this one is named by a compiler for it: ``CXX=aarch64-linux-gnu-g++``.
    """
    named = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True)
    target = named.stdout.split("-")[0] if named.returncode == 0 else platform.machine()
    return _INSTRUCTION_SETS.get(target.strip().lower(), {})


def _knows(compiler: str, options: list[str]) -> bool:
    """Whether the compiler accepts the options; old ones do not know every instruction set."""
    command = [compiler, *options, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompilerError(f"{' '.join(command)}\n{result.stderr.strip()}")
    if result.stderr.strip():
        print(result.stderr.strip(), file=sys.stderr)


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--sanitize"]
    print(build(Path(arguments[0]) if arguments else LIBRARY, sanitize="--sanitize" in sys.argv))
