"""What is slow on this machine, why, and what to do about it."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_kvcache.integration.versions import RELEASE
from hf_kvcache.kernels import dispatch
from hf_kvcache.kernels.cpu import library

#: Compute capability of the oldest GPUs that kernels are compiled for.
_OLDEST_GPU = (8, 0)
#: Where the tested versions are: in an installed package, and in a clone.
_PROJECTS = (Path(__file__).parent / "data" / "pyproject.toml", Path(__file__).parents[2] / "pyproject.toml")


@dataclass(frozen=True)
class Here:
    """What decides how fast the package is on a machine.

    Attributes:
        forced: the backend that the environment variable forces; empty for none.
        library: why there are no compiled kernels for the CPU; None if there are.
        compiler: whether a C++ compiler is found.
        isa: the instruction set that these kernels use; empty without them.
        machine: the architecture of the processor, such as ``"x86_64"``.
        gpu: the compute capability of the GPU; None without one.
        hip: whether torch was built for AMD's GPUs.
        triton: why the kernels for GPUs cannot run; None if they can.
        transformers: the installed release.
        tested: the releases that the package was tested with; empty if that is not known.
        forced_isa: the instruction set that the environment variable forces; empty for none.
    """

    forced: str
    library: str | None
    compiler: bool
    isa: str
    machine: str
    gpu: tuple[int, int] | None
    hip: bool
    triton: str | None
    transformers: str
    tested: tuple[str, ...]
    forced_isa: str = ""

    @classmethod
    def found(cls) -> Here:
        """This machine."""
        missing = dispatch.reason_missing("native", "cpu")
        return cls(
            forced=os.environ.get(dispatch.VARIABLE, ""),
            library=missing,
            compiler=any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name),
            isa="" if missing else library.isa(),
            machine=platform.machine(),
            gpu=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
            hip=torch.version.hip is not None,
            triton=dispatch.reason_missing("triton", "cuda"),
            transformers=RELEASE,
            tested=_tested(),
            forced_isa=os.environ.get(library.ISA_VARIABLE, ""),
        )

    def reasons(self) -> list[str]:
        """What is slow, why, and what to do: a line each."""
        return [*self._backend(), *self._cpu(), *self._gpu(), *self._transformers()]

    def _backend(self) -> Iterator[str]:
        if self.forced:
            yield f"{dispatch.VARIABLE}={self.forced} forces these kernels everywhere; unset it for the fastest ones"
        if self.forced_isa and self.library is None:
            name = library.ISA_VARIABLE
            yield f"{name}={self.forced_isa} forces this instruction set on the CPU; unset it for the best one"

    def _cpu(self) -> Iterator[str]:
        x86 = self.machine.lower() in ("x86_64", "amd64")
        if self.library is not None:
            first = "" if self.compiler else "install a C++ compiler (g++ or clang++), then "
            yield (
                f"on the CPU attention runs in torch ({self.library}); {first}reinstall: pip install --force-reinstall "
                "--no-deps hf-kvcache"
            )
        elif self.forced_isa:
            return
        elif self.isa == "portable" and x86:
            yield "the processor has no AVX2, so the kernels use no vector instructions; only another processor helps"
        elif self.isa == "portable" and self.machine.lower() in ("aarch64", "arm64"):
            yield (
                "the processor has no dot products of bytes (Armv8.2), or the compiler did not know them, so packed "
                "codes are multiplied as floats; only another processor, or a newer compiler and a new installation, "
                "helps"
            )
        elif self.isa == "portable":
            yield f"there are no kernels for the vector instructions of {self.machine}; only another processor helps"
        elif self.isa == "avx2":
            yield (
                "the processor has no AVX-512 VNNI, so packed codes are multiplied as 16-bit integers (avx2); only "
                "another processor helps"
            )

    def _gpu(self) -> Iterator[str]:
        if self.gpu is None:
            return
        if self.triton is not None:
            yield f"on the GPU attention runs in torch ({self.triton}); pip install 'triton>=3.6'"
        if not self.hip and self.gpu < _OLDEST_GPU:
            version = ".".join(map(str, self.gpu))
            yield (
                f"the GPU has compute capability {version}, and kernels are compiled and checked from 8.0 on; if they "
                f"fail, set {dispatch.VARIABLE}=reference"
            )

    def _transformers(self) -> Iterator[str]:
        newest = max(self.tested, key=_numbers, default=None)
        if newest is not None and _numbers(self.transformers) > _numbers(newest):
            yield (
                f"transformers {self.transformers} is newer than {newest}, the newest that was tested: what it does "
                f"differently may be slow or fail; if so, pip install transformers=={newest}"
            )


def _tested() -> tuple[str, ...]:
    """The releases of transformers in the table of tested versions."""
    path = next((path for path in _PROJECTS if path.is_file()), None)
    table = path and re.search(
        r"^tested = .*?transformers = \[([^]]*)\]", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    return tuple(re.findall(r'"([^"]+)"', table[1])) if table else ()


def _numbers(version: str) -> tuple[int, ...]:
    """``"5.24.0.dev0"`` as ``(5, 24, 0)``."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d", version)[0].split("."))  # type: ignore[index]
