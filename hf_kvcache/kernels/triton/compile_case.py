"""A Triton kernel with the types and constants under which it is compiled ahead of time, for the compile report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Targets for which every Triton kernel is compiled without a GPU.
ARCHITECTURES = ("sm80", "sm86", "sm89", "sm90", "sm100", "gfx942")


@dataclass(frozen=True)
class CompileCase:
    """One specialization of a kernel.

    Attributes:
        name: what the report calls it: operation, codec, head dimension.
        kernel: the ``@triton.jit`` function.
        signature: Triton type of every argument that is no constant: ``"*fp32"``, ``"i64"``, ``"fp32"``.
        constants: values of the ``tl.constexpr`` arguments.
        num_warps: warps of a program.
        num_stages: software pipeline stages.
        aligned: arguments that are multiples of 16 (pointers, strides), as the launcher would find them.
        loop_bytes: bytes that a program loads from global memory in one iteration of its main loop; None without one.
        tensor_cores: whether matrix instructions must appear in the code.
        options: further options of the compiler.
        least_share: the share of memory bandwidth that the instructions of its main loop must leave room for, on sm90.
        waived: criteria of the report that this case cannot meet on its target, and why.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    loop_bytes: int | None = None
    tensor_cores: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    least_share: float = 0.0
    waived: dict[str, str] = field(default_factory=dict)
