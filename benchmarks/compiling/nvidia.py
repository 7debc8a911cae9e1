"""Reading a cubin with the tools that come with triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.compiling.code import Code, Instruction
from benchmarks.compiling.measured import Resources

TOOLS = ("ptxas", "cuobjdump", "nvdisasm")
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")
_JUMP = re.compile(r"`\((\.L_\w+)\)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
#: Bytes of a load by its modifier; 4 without one.
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_STEADY = ("LDG", "LDGSTS", "BAR", "MUFU", "SYNCS")


def read(cubin: bytes, shared_bytes: int) -> tuple[Code, Resources]:
    """Instructions and resources of a cubin with one kernel.

    Raises:
        RuntimeError: if a tool fails or says what is not understood.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _USAGE.search(_run("cuobjdump", "--dump-resource-usage", str(path)))
        assembly = _run("nvdisasm", "-c", "-ndf", str(path))
    if usage is None:
        raise RuntimeError("cuobjdump named no resources")
    code = parse(assembly)
    registers, stack, _, local = map(int, usage.groups())
    spills = sum(i.name.split(".")[0] in ("STL", "LDL") for i in code.instructions)
    return code, Resources(registers, spills, stack + local, shared_bytes)


def parse(assembly: str) -> Code:
    """The instructions in the output of ``nvdisasm``."""
    code = Code()
    for line in assembly.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            code.labels[label.group(1)] = len(code.instructions)
        elif instruction and instruction.group(2) != "NOP":
            code.instructions.append(_instruction(*instruction.groups()))
    if not code.instructions:
        raise RuntimeError("nvdisasm printed no instruction")
    return code


def _instruction(predicate: str | None, name: str, operands: str) -> Instruction:
    operation, *modifiers = name.split(".")
    loads = operation in ("LDG", "LDGSTS")
    jump = _JUMP.search(operands) if operation == "BRA" else None
    return Instruction(
        name,
        loaded_bytes=next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4) if loads else 0,
        steady=operation in _STEADY or operation.endswith("MMA"),
        jump=jump.group(1) if jump else None,
        # A jump may also be conditional by an operand: `BRA.U UP0, label`.
        passes=not (operation in ("BRA", "EXIT") and predicate is None and not re.match(r"\s*!?U?P\d", operands)),
    )


def missing_tools() -> list[str]:
    """The tools that triton should have brought and has not."""
    return [tool for tool in TOOLS if not _tool(tool).is_file()]


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()[:300]}")
    return done.stdout
