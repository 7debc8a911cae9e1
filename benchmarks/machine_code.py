"""Compiling a Triton kernel without a GPU, and counting in its machine code: what the compile report is made of."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from hf_kvcache.kernels.dispatch import OPERATIONS, module_of
from hf_kvcache.kernels.triton.compile_case import CompileCase

_KIB = 1024
_TOOLS = ("ptxas", "cuobjdump", "nvdisasm")


@dataclass(frozen=True)
class Target:
    """What one multiprocessor of an architecture offers, by the vendor's public numbers.

    Attributes:
        warps: most resident warps (on AMD wavefronts).
        blocks: most resident programs.
        shared: bytes of shared memory for all resident programs.
        program_shared: most shared memory of one program.
        reserved: shared memory that each program costs besides what it asks for.
        amd: whether it is one of AMD's.
        cycle_bytes: bytes of memory for each cycle of a multiprocessor, at boost clock, if all of a GPU's read; 0 where
            no static bound is computed. The GPUs are A100, RTX 3090, RTX 4090, H100 and B200.
    """

    warps: int
    blocks: int
    shared: int
    program_shared: int
    reserved: int = _KIB
    amd: bool = False
    cycle_bytes: float = 0.0

    def bandwidth_share(self, loop: int, num_warps: int, loop_bytes: int) -> float | None:
        """The share of a GPU's memory bandwidth at which a loop takes every issue slot: at most that much is reached.

        Args:
            loop: instructions of the loop, of which a multiprocessor starts four in a cycle.
            num_warps: warps of a program.
            loop_bytes: bytes that a program loads in one turn.
        """
        if not (loop and loop_bytes and self.cycle_bytes):
            return None
        return 4 * loop_bytes / (loop * num_warps * self.cycle_bytes)

    def resident_warps(self, registers: int, shared: int, num_warps: int) -> int:
        """Warps that fit on a multiprocessor at a time, of programs of ``num_warps`` warps.

        Args:
            registers: registers of a thread; on AMD, accumulation registers included.
            shared: bytes of shared memory of a program.
            num_warps: warps of a program.
        """
        if self.amd:  # 512 registers a lane in each of 4 SIMDs, given out by eights
            by_registers = 4 * (512 // _up(max(registers, 1), 8))
        else:  # 65536 registers, given out by 256 a warp, in 4 partitions
            by_registers = 65536 // _up(max(registers, 1) * 32, 256) // 4 * 4
        programs = min(self.blocks, self.warps // num_warps, by_registers // num_warps)
        if shared:
            programs = min(programs, self.shared // (shared + self.reserved))
        return programs * num_warps


TARGETS = {
    "sm80": Target(64, 32, 164 * _KIB, 163 * _KIB, cycle_bytes=2039 / (108 * 1.41)),
    "sm86": Target(48, 16, 100 * _KIB, 99 * _KIB, cycle_bytes=936 / (82 * 1.695)),
    "sm89": Target(48, 24, 100 * _KIB, 99 * _KIB, cycle_bytes=1008 / (128 * 2.52)),
    "sm90": Target(64, 32, 228 * _KIB, 227 * _KIB, cycle_bytes=3350 / (132 * 1.83)),
    "sm100": Target(64, 32, 228 * _KIB, 227 * _KIB, cycle_bytes=8000 / (148 * 1.85)),
    "gfx942": Target(32, 16, 64 * _KIB, 64 * _KIB, 0, True),
}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes, and what its machine code is made of.

    Attributes:
        registers: of a thread.
        spills: instructions that spill registers or fetch them back, or on AMD registers spilled.
        stack: bytes of a thread that are not in registers.
        shared: bytes of shared memory of a program.
        tensor: matrix instructions (HMMA, IMMA, QGMMA, UTCHMMA, v_mfma, v_smfmac).
        wide_loads: loads of 128 bits a lane, or more, from global memory.
        instructions: all of them.
        loop: those of the loop with most matrix instructions; 0 without one, and on AMD.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    tensor: int
    wide_loads: int
    instructions: int
    loop: int = 0


FIELDS = tuple(field.name for field in fields(Compiled))


def missing() -> str | None:
    """What is missing on this machine, in words."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install -e .[dev]` brings it"
    if absent := [tool for tool in _TOOLS if not _tool(tool).is_file()]:
        return f"this build of triton came without {', '.join(absent)}"
    return None


def operations() -> list[str]:
    """The operations that have a Triton implementation."""
    return sorted(OPERATIONS["triton"])


def cases(operation: str, target: str) -> list[CompileCase]:
    """The cases of an operation for a target."""
    return list(module_of(operation, "triton").compile_cases(target))


def compile_case(case: CompileCase, target: str) -> Compiled:
    """Compile a case and read what came out.

    Raises:
        ValueError: if the arguments of the case are not those of its kernel.
        RuntimeError: if the machine code cannot be read; and whatever triton raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    names = case.kernel.arg_names
    if unknown := (set(case.signature) | set(case.constants)) ^ set(names):
        raise ValueError(f"arguments of the case and of the kernel differ: {', '.join(sorted(unknown))}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = triton.compiler.ASTSource(case.kernel, signature, case.constants, aligned)
    amd = TARGETS[target].amd
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm")), 32)
    with warnings.catch_warnings():
        # Triton announces a future default; what users get is today's.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
        made = triton.compile(source, target=gpu, options=options)
    return (read_amd if amd else read_nvidia)(made.asm["amdgcn" if amd else "cubin"], made.metadata.shared)


def read_amd(assembly: str, shared: int) -> Compiled:
    """What assembly text of one kernel says, as the compiler writes it."""
    body, end, _ = assembly.partition(".Lfunc_end")
    names = re.findall(r"^\t([a-z]\w+)", body, re.MULTILINE)
    if not end or not names:
        raise RuntimeError("the assembly has no function")
    found = [re.search(rf"\.{name}:\s+(\d+)", assembly) for name in _AMD_RESOURCES]
    if not all(found):
        raise RuntimeError(f"the assembly does not name all of {', '.join(_AMD_RESOURCES)}")
    registers, spills, stack = (int(match.group(1)) for match in found if match)
    wide = sum(re.match(r"(global|buffer|flat)_load_(lds_)?dwordx4", name) is not None for name in names)
    tensor = _count(names, ("v_mfma", "v_smfmac"))
    return Compiled(registers, spills, stack, shared, tensor, wide, len(names))


_AMD_RESOURCES = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")


def read_nvidia(cubin: bytes, shared: int) -> Compiled:
    """What a cubin with one kernel says, by the tools that come with triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        return read_sass(_run("nvdisasm", "-c", "-ndf", str(path)), usage, shared)


def read_sass(assembly: str, usage: str, shared: int) -> Compiled:
    """The same from the output of ``nvdisasm`` and of ``cuobjdump --dump-resource-usage``."""
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", assembly, re.MULTILINE)
    names = [name for name in names if name != "NOP"]
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None or not names:
        raise RuntimeError("the tools named no resources or no instructions")
    registers, stack, local = map(int, found.groups())
    operations = [name.split(".")[0] for name in names]
    wide = sum(re.match(r"LDG(STS)?\..*\b(128|256)\b", name) is not None for name in names)
    tensor = sum(name.endswith("MMA") for name in operations)
    spills = sum(name in ("STL", "LDL") for name in operations)
    return Compiled(registers, spills, stack + local, shared, tensor, wide, len(names), _loop(assembly))


_LABEL_OR_INSTRUCTION = re.compile(
    r"^(?P<label>\.L_\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)(?P<rest>[^;]*)",
    re.MULTILINE,
)


def _loop(assembly: str) -> int:
    """Instructions between a label and a jump back to it, of the loop that has most matrix instructions."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for found in _LABEL_OR_INSTRUCTION.finditer(assembly):
        if found["label"]:
            labels[found["label"]] = len(names)
        elif found["name"] != "NOP":
            names.append(found["name"].split(".")[0])
            target = re.search(r"`\((\.L_\w+)\)", found["rest"])
            if names[-1] == "BRA" and target and target[1] in labels:
                body = names[labels[target[1]] :]
                loops.append((sum(name.endswith("MMA") for name in body), -len(body)))
    tensor, length = max(loops, default=(0, 0))
    return -length if tensor else 0


def _count(names: Iterable[str], starts: tuple[str, ...]) -> int:
    return sum(name.startswith(starts) for name in names)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()[:300]}")
    return done.stdout
