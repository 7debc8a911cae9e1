"""The instructions of ``kernels/triton/unpack`` carried out in numpy, also in place of Triton's inline assembly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def execute(text: str, operands: dict[str, Words], outputs: int) -> list[Words]:
    """The outputs ``$0``, ``$1``, ... of assembly, one number of each array being a register of a thread.

    Args:
        text: the assembly.
        operands: the inputs by name, all of the same shape; registers not written yet are read as garbage.
        outputs: number of outputs.
    """
    shape = next(iter(operands.values())).shape
    registers = dict(operands)

    def read(name: str) -> Words:
        if re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            return np.full(shape, int(name, 0), np.uint32)
        return registers[name]

    for line in re.findall(r"[^;{}]+;", text):
        operation, _, rest = line.strip(" \n;").partition(" ")
        if operation == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        assert target not in operands, "an input is written"
        registers[target] = _compute(operation, [read(name) for name in sources])
    return [registers[f"${i}"] for i in range(outputs)]


def _compute(operation: str, values: list[Words]) -> Words:
    if operation == "mov.b32":
        return values[0]
    if operation == "and.b32":
        return values[0] & values[1]
    if operation == "shl.b32":
        return values[0] << values[1]
    if operation == "shr.b32":
        return values[0] >> values[1]
    if operation == "lop3.b32":
        return _lop3(*values)
    if operation == "prmt.b32":
        return _prmt(*values)
    halves = [np.ascontiguousarray(value).view(np.float16).astype(np.float64) for value in values]
    if operation == "fma.rn.f16x2":
        return (halves[0] * halves[1] + halves[2]).astype(np.float16).view(np.uint32)
    assert operation == "mul.rn.f16x2", operation
    return (halves[0] * halves[1]).astype(np.float16).view(np.uint32)


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit by bit: the bit of the truth table whose number is made of a bit of each."""
    result = np.zeros_like(a)
    for bit in range(32):
        one = np.uint32(bit)
        index = ((a >> one & 1) << 2) | ((b >> one & 1) << 1) | (c >> one & 1)
        result |= (table >> index & 1) << one
    return result.astype(np.uint32)


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    """Four of eight bytes by three bits each; the fourth bit asks for the sign of the byte in all of its bits."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for place in range(4):
        chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (both >> (8 * (chosen & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte >> 7 != 0, np.uint32(255), np.uint32(0))
        result |= np.where(chosen & 8 != 0, sign, byte) << np.uint32(8 * place)
    return result.astype(np.uint32)


def of_bytes(text: str, constraints: str, inputs: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[np.float16]]:
    """The half-precision arrays that assembly makes of uint8 and float16 arrays of one shape, four numbers at a time.

    Four bytes are an operand, four numbers in half precision are two.
    """
    registers = constraints.count("=")
    words = [np.ascontiguousarray(x).reshape(-1, 4).view(np.uint32) for x in inputs]
    columns = [np.ascontiguousarray(word[:, i]) for word in words for i in range(word.shape[1])]
    operands = {f"${registers + i}": column for i, column in enumerate(columns)}
    assert constraints.split(",") == ["=&r"] * registers + ["r"] * len(columns)
    outputs = execute(text, operands, registers)
    pairs = [np.stack(outputs[i : i + 2], -1).view(np.float16) for i in range(0, registers, 2)]
    return [pair.reshape(inputs[0].shape) for pair in pairs]


def create_inline_asm(self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
    """In place of what Triton's interpreter refuses."""
    from triton.language import float16
    from triton.runtime.interpreter import TensorHandle

    assert pack == 4
    found = of_bytes(text, constraints, [value.data for value in values])
    handles = [TensorHandle(x, float16) for x in found]

    class Result:
        def get_result(self, i: int) -> Any:
            return handles[i]

    return Result()
