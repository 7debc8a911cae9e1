"""Unpacking four bytes of codes at a time on NVIDIA's GPUs: assembly text for ``tl.inline_asm_elementwise``.

A 32-bit register holds the codes of four neighboring bytes. They become half precision two at a time:

- A byte ``b`` in the mantissa of the half-precision number 1024 is the number ``1024 + b``, exactly. Subtracting 1024
  leaves ``b``. So integers take a byte permutation or a bit operation, and one fused multiply-add for two of them.
- Levels that are multiples of one number, the *unit*, are signed bytes, and exact in half precision too. ``prmt`` picks
  four bytes out of eight by four indices of three bits, which stand in the low bits of four half bytes. So it looks up
  the lower bytes, or the upper ones, of the levels of four codes of 2 or 3 bits at once. Codes of 4 bits have sixteen
  levels: two lookups give signed bytes, between which the fourth bit of each code chooses, and those are widened.

What comes out is divided by a power of two, so that levels lie between -2 and 2; the unit is multiplied by it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

#: Levels are signed bytes in units of 1/127 of the largest.
_LARGEST_BYTE = 127
_BYTES_TO_LEVELS = 1 / 64
#: How far a level may be from a multiple of the unit, relative to the largest: the rounding of fp32.
_MOST_OFF = 1e-6
#: Selectors of ``prmt``: of the bytes of a register with a constant behind, the even ones or the odd ones widened; of
#: lower bytes with upper ones behind, the even pairs or the odd ones.
_EVEN, _ODD, _FIRST, _SECOND = 0x4240, 0x4341, 0x4140, 0x4342
_EVEN_PAIRS, _ODD_PAIRS = 0x6240, 0x7351
#: ``lop3`` by the truth table of what it does with its operands a, b and c.
_AND_OR, _CHOOSE, _OR_AND = 0xEA, 0xCA, 0xEC
_MAGIC = 0x64646464


@dataclass(frozen=True)
class Unpacking:
    """How four bytes of codes become numbers in half precision.

    Attributes:
        text: the assembly. Its operands are an output of four elements for each segment, the four bytes, and for 3 bits
            those with the high bits and a mask of the bytes whose odd bits count; else two that it does not read.
        constraints: those of the assembly.
        unit: what the numbers are to be multiplied by.
    """

    text: str
    constraints: str
    unit: float


def unpacking(level: str, bits: int, table: tuple[float, ...], middle: int) -> Unpacking | None:
    """How codes are unpacked; None where there is no assembly for it.

    Args:
        level: as in :class:`~hf_kvcache.kernels.page.SideFormat`.
        bits: bits of a code.
        table: the levels of ``level="table"``.
        middle: what is subtracted from integers.
    """
    if level == "table":
        known = signed_bytes(table)
        if bits not in (2, 3, 4) or known is None:
            return None
        levels, unit = known
        return _made(bits, _looked_up(bits, levels), unit / _BYTES_TO_LEVELS)
    if level == "integer" and bits in (2, 4, 8):
        return _made(bits, _integers(bits, middle), 1.0)
    if level == "float8":
        return _made(8, _floats(), 1.0)
    return None


def with_scales(how: Unpacking, segments: int, zero: bool, other: bool) -> Unpacking:
    """The assembly that makes decoded elements of the same codes: ``(number * scale + zero) * other``.

    Behind the operands of ``how`` it has the scales of each segment, then the zero points, then the second scales, four
    numbers in half precision each. It does not read those that there are not. Scales are multiplied by the unit here.
    Products and sums are rounded to half precision; a product and the sum with it once.

    Args:
        how: the unpacking.
        segments: numbers that it makes of each byte.
        zero: whether there are zero points.
        other: whether there are second scales.
    """
    outputs, lines = 2 * segments, []
    operands = [outputs + 3 + part * outputs for part in range(3)]
    for i in range(outputs):
        scale, addend, second = (f"${first + i}" for first in operands)
        if how.unit != 1.0:
            lines += [f"mov.b32 r10, {_half(how.unit):#010x};", f"mul.rn.f16x2 r11, {scale}, r10;"]
            scale = "r11"
        lines.append(f"fma.rn.f16x2 ${i}, ${i}, {scale}, {addend};" if zero else f"mul.rn.f16x2 ${i}, ${i}, {scale};")
        if other:
            lines.append(f"mul.rn.f16x2 ${i}, ${i}, {second};")
    text = how.text.removesuffix("\n}") + "\n" + "\n".join(lines) + "\n}"
    return Unpacking(text, ",".join([how.constraints, *["r"] * (3 * outputs)]), 1.0)


def signed_bytes(table: tuple[float, ...]) -> tuple[list[int], float] | None:
    """Levels as multiples of a unit, from -127 to 127, and that unit; None if they are no such multiples."""
    largest = max(map(abs, table), default=0.0)
    if not largest:
        return None
    unit = largest / _LARGEST_BYTE
    levels = [round(level / unit) for level in table]
    off = max(abs(level - whole * unit) for level, whole in zip(table, levels, strict=True))
    return (levels, unit) if off <= _MOST_OFF * largest else None


def _made(bits: int, lines: list[str], unit: float) -> Unpacking:
    outputs = 2 * {8: 1, 4: 2, 3: 4, 2: 4}[bits]
    text = "{\n.reg .b32 r<12>;\n" + "\n".join(lines) + "\n}"
    # Outputs are written before the last read of an input: they need registers of their own.
    return Unpacking(text, ",".join(["=&r"] * outputs + ["r"] * 3), unit)


def _half(number: float) -> int:
    """The bits of a number in half precision, twice."""
    (bits,) = struct.unpack("<H", struct.pack("<e", number))
    return int(bits) * 0x10001


def _register(levels: list[int]) -> str:
    """Four levels as bytes, 128 added."""
    return hex(sum((level + 128) << (8 * i) for i, level in enumerate(levels)))


def _scaled(output: int, factor: float, addend: float) -> list[str]:
    """An output times a factor, and a number added, rounded once; the compiler keeps both numbers in registers."""
    return [
        f"mov.b32 r10, {_half(factor):#010x};",
        f"mov.b32 r11, {_half(addend):#010x};",
        f"fma.rn.f16x2 ${output}, ${output}, r10, r11;",
    ]


def _widened(output: int, source: str, selector: int) -> list[str]:
    """Two of the bytes of a register as levels."""
    return [
        f"prmt.b32 ${output}, {source}, {_MAGIC:#x}, {selector:#06x};",
        *_scaled(output, _BYTES_TO_LEVELS, -(1024 + 128) * _BYTES_TO_LEVELS),
    ]


def _looked_up(bits: int, levels: list[int]) -> list[str]:
    if bits == 4:
        return _looked_up_in_sixteen(levels)
    lines = _indices_of_three_bits() if bits == 3 else _indices_of_two_bits()
    tables = [_table_of(levels, upper) for upper in (False, True)]
    # r0 holds the indices of segments 0 and 2 in turn, r1 those of segments 1 and 3.
    for odd in range(2):
        for half in range(2):
            index = f"r{odd}"
            if half:
                lines.append(f"shr.b32 r2, {index}, 16;")
                index = "r2"
            lines += [f"prmt.b32 r{3 + i}, {first}, {second}, {index};" for i, (first, second) in enumerate(tables)]
            for segment, selector in ((odd, _EVEN_PAIRS), (odd + 2, _ODD_PAIRS)):
                lines.append(f"prmt.b32 ${2 * segment + half}, r3, r4, {selector:#06x};")
    return lines


def _table_of(levels: list[int], upper: bool) -> tuple[str, str]:
    """The lower or the upper bytes of levels in half precision, as the operands of ``prmt``; four levels come last."""
    halves = [_half(level * _BYTES_TO_LEVELS) >> (8 if upper else 0) & 0xFF for level in levels]
    first, second = (sum(byte << (8 * i) for i, byte in enumerate(part)) for part in (halves[:-4], halves[-4:]))
    return hex(first), hex(second)


def _indices_of_two_bits() -> list[str]:
    """The bit above a code says that its level is in the second operand of ``prmt``, which may be a constant."""
    pick = f"0x33333333, 0x44444444, {_AND_OR:#x};"
    return [f"lop3.b32 r0, $8, {pick}", "shr.b32 r1, $8, 2;", f"lop3.b32 r1, r1, {pick}"]


def _indices_of_three_bits() -> list[str]:
    """The bits of the lower plane, and above them the even bits of the higher one, or its odd bits where masked."""
    return [
        "shr.b32 r2, $9, 1;",
        f"lop3.b32 r2, $10, r2, $9, {_CHOOSE:#x};",
        "shl.b32 r3, r2, 2;",
        "and.b32 r3, r3, 0x44444444;",
        f"lop3.b32 r0, $8, 0x33333333, r3, {_AND_OR:#x};",
        "and.b32 r3, r2, 0x44444444;",
        "shr.b32 r1, $8, 2;",
        f"lop3.b32 r1, r1, 0x33333333, r3, {_AND_OR:#x};",
    ]


def _looked_up_in_sixteen(levels: list[int]) -> list[str]:
    lines = [f"mov.b32 r{i}, {_register(levels[4 * i : 4 * i + 4])};" for i in range(4)]
    lines += ["and.b32 r4, $4, 0x77777777;", "shl.b32 r5, $4, 4;"]
    # The highest bit of a half byte, spread over a byte: of the lower ones in r5, of the higher ones in the input.
    for half, spread in enumerate((0xD9C8, 0xFBEA)):
        if half:
            lines.append("shr.b32 r4, r4, 16;")
        lines += [
            "prmt.b32 r6, r0, r1, r4;",
            "prmt.b32 r7, r2, r3, r4;",
            f"prmt.b32 r8, r5, $4, {spread:#x};",
            f"lop3.b32 r6, r8, r7, r6, {_CHOOSE:#x};",
        ]
        lines += _widened(half, "r6", _EVEN) + _widened(2 + half, "r6", _ODD)
    return lines


def _integers(bits: int, middle: int) -> list[str]:
    segments = 8 // bits
    source = f"${2 * segments}"
    lines = []
    for half, selector in enumerate((_FIRST, _SECOND)):
        if bits == 8:
            lines += [f"prmt.b32 ${half}, {source}, {_MAGIC:#x}, {selector:#x};"]
            lines += _scaled(half, 1.0, -(1024.0 + middle))
            continue
        lines += [f"prmt.b32 r0, {source}, 0, {selector:#x};"]
        for segment in range(segments):
            output, shift = 2 * segment + half, segment * bits
            mask = ((1 << bits) - 1) << shift
            lines += [f"mov.b32 r1, {_half(1024.0):#x};"]
            lines += [f"lop3.b32 ${output}, r0, {mask * 0x10001:#x}, r1, {_AND_OR:#x};"]
            lines += _scaled(output, 2.0**-shift, -(1024.0 * 2.0**-shift + middle))
    return lines


def _floats() -> list[str]:
    """The numbers of e4m3: half precision with 3 bits less of exponent. The same bits are 2**8 times too small."""
    lines = []
    for half, selector in enumerate((0x1404, 0x3424)):
        lines += [
            f"prmt.b32 r0, $2, 0, {selector:#06x};",
            "shr.b32 r1, r0, 1;",
            "and.b32 r1, r1, 0x3f803f80;",
            f"lop3.b32 r1, r0, 0x80008000, r1, {_AND_OR:#x};",
            f"mov.b32 r10, {_half(256.0):#010x};",
            f"mul.rn.f16x2 ${half}, r1, r10;",
        ]
    return lines
