"""Reading AMD assembly as the compiler writes it."""

from __future__ import annotations

import re

from benchmarks.compiling.code import Code, Instruction
from benchmarks.compiling.measured import Resources

_LABEL = re.compile(r"^(\.LBB\w+):")
_INSTRUCTION = re.compile(r"^\t([a-z]\w+)\s*([^;]*)")
_LOAD = re.compile(r"^(?:global|buffer|flat)_load_(?:lds_)?(dwordx[234]|dword|ubyte|sbyte|ushort|sshort|short)")
_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}
_STEADY = ("global_load", "buffer_load", "flat_load", "v_mfma", "v_smfmac", "v_exp", "s_barrier", "ds_read")


def read(assembly: str, shared_bytes: int) -> tuple[Code, Resources]:
    """Instructions and resources of assembly text with one kernel.

    Raises:
        RuntimeError: if it says what is not understood.
    """
    registers, spilled, scratch = (
        _number(assembly, name) for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return parse(assembly), Resources(registers, spilled, scratch, shared_bytes)


def parse(assembly: str) -> Code:
    """The instructions of assembly text."""
    code = Code()
    for line in assembly.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            code.labels[label.group(1)] = len(code.instructions)
        elif instruction:
            code.instructions.append(_instruction(*instruction.groups()))
        if line.startswith(".Lfunc_end"):
            return code
    raise RuntimeError("the assembly has no end of a function")


def _instruction(name: str, operands: str) -> Instruction:
    load = _LOAD.match(name)
    return Instruction(
        name,
        loaded_bytes=_WIDTHS.get(load.group(1), 1) if load else 0,
        steady=name.startswith(_STEADY),
        # Scalar, memory and branch instructions start beside those of the vector unit.
        issued=name.startswith("v_"),
        jump=operands.strip() if name.startswith(("s_cbranch", "s_branch")) else None,
        passes=name not in ("s_branch", "s_endpgm"),
    )


def _number(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    if found is None:
        raise RuntimeError(f"the assembly does not name its {name}")
    return int(found.group(1))
