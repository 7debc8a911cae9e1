"""Machine code as a list of instructions: its loops, what they load, and how often a loop was unrolled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import reduce
from math import gcd


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        name: operation with its modifiers.
        loaded_bytes: bytes that a lane loads from global memory.
        steady: whether a loop that is unrolled ``n`` times has ``n`` times as many of it (loads, matrix products,
            barriers, exponentials: nothing that a compiler merges).
        issued: whether it takes an issue slot of the vector units.
        jump: label that it may jump to.
        passes: whether the next instruction may be executed after it.
    """

    name: str
    loaded_bytes: int = 0
    steady: bool = False
    issued: bool = True
    jump: str | None = None
    passes: bool = True


@dataclass
class Code:
    """A kernel's instructions, and where its labels stand among them."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def main_loop(self) -> list[Instruction]:
        """Of the innermost loops that load from global memory, the one that loads most; empty if there is none."""
        loops = [loop for loop in self._loops() if any(self.instructions[at].loaded_bytes for at in loop)]
        inner = [loop for loop in loops if not any(other < loop for other in loops)]
        return max(([self.instructions[at] for at in sorted(loop)] for loop in inner), key=loaded_bytes, default=[])

    def _loops(self) -> list[set[int]]:
        """The natural loops as places of instructions: compilers move parts of a loop behind the end of the kernel."""
        following = [self._following(at) for at in range(len(self.instructions))]
        before: list[list[int]] = [[] for _ in following]
        for at, places in enumerate(following):
            for place in places:
                before[place].append(at)
        loops: dict[int, set[int]] = {}
        for latch, header in _back_edges(following):
            body, waiting = loops.setdefault(header, {header}), [latch]
            while waiting:
                at = waiting.pop()
                if at not in body:
                    body.add(at)
                    waiting += before[at]
        return list(loops.values())

    def _following(self, at: int) -> list[int]:
        instruction = self.instructions[at]
        places = [at + 1] if instruction.passes else []
        if instruction.jump is not None and instruction.jump in self.labels:
            places.append(self.labels[instruction.jump])
        return [place for place in places if place < len(self.instructions)]


def _back_edges(following: list[list[int]]) -> list[tuple[int, int]]:
    """Edges to a place that is on the way to them, by depth-first search from the first place."""
    edges, on_the_way, seen = [], {0}, {0}
    stack = [(0, iter(following[0]))] if following else []
    while stack:
        at, rest = stack[-1]
        place = next(rest, None)
        if place is None:
            stack.pop()
            on_the_way.discard(at)
        elif place in on_the_way:
            edges.append((at, place))
        elif place not in seen:
            seen.add(place)
            on_the_way.add(place)
            stack.append((place, iter(following[place])))
    return edges


def loaded_bytes(instructions: list[Instruction], at_least: int = 1) -> int:
    """Bytes that a lane loads, by loads of ``at_least`` so many."""
    return sum(i.loaded_bytes for i in instructions if i.loaded_bytes >= at_least)


def turns(loop: list[Instruction], wide: int, loop_bytes: int) -> int:
    """How many turns of the source's loop one of the machine code's is, a power of two.

    It has as many times more of every steady instruction, and loads as many times more. Of the loads only those of 128
    bits are asked, since of narrow ones many threads often load the same.

    Args:
        loop: the machine code's loop.
        wide: bytes that the program loads in it by loads of 128 bits.
        loop_bytes: bytes that the program loads in one turn of the source's loop.
    """
    common = reduce(gcd, Counter(i.name for i in loop if i.steady).values(), 0)
    factor = 1
    while common and common % (2 * factor) == 0 and wide >= 0.75 * loop_bytes * 2 * factor:
        factor *= 2
    return factor
