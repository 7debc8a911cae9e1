"""The byte layout of packed codes, one code at a time in python integers."""

from __future__ import annotations

#: Planes of a width as (bits of the plane, position of its lowest bit in the code).
PLANES = {1: [(1, 0)], 2: [(2, 0)], 3: [(2, 0), (1, 2)], 4: [(4, 0)], 8: [(8, 0)]}


def bytes_by_hand(row: list[int], bits: int) -> bytes:
    """Puts one code after the other where the layout says, with python integers."""
    packed = bytearray()
    for width, lowest in PLANES[bits]:
        length = len(row) * width // 8
        plane = [0] * length
        for element, code in enumerate(row):
            segment, byte = divmod(element, length)
            plane[byte] += ((code // 2**lowest) % 2**width) * 2 ** (segment * width)
        packed += bytes(plane)
    return bytes(packed)
