"""What the targets offer: the limits of a multiprocessor, and the GPUs that have it. Vendors' public numbers."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        name: what the report calls it.
        multiprocessors: streaming multiprocessors, or compute units.
        ghz: boost clock.
        gigabytes_per_second: bandwidth of its memory.
    """

    name: str
    multiprocessors: int
    ghz: float
    gigabytes_per_second: float


@dataclass(frozen=True)
class Target:
    """What one multiprocessor of an architecture offers.

    Attributes:
        name: as in :data:`hf_kvcache.kernels.triton.compile_case.ARCHITECTURES`.
        lanes: threads of a warp (wavefront).
        warps: most resident warps.
        blocks: most resident programs.
        shared_bytes: shared memory for all resident programs.
        program_shared_bytes: most shared memory of one program.
        reserved_bytes: shared memory that each program costs besides what it asks for.
        issued: warp instructions that can start in a cycle.
        gpus: GPUs of this architecture.
    """

    name: str
    lanes: int
    warps: int
    blocks: int
    shared_bytes: int
    program_shared_bytes: int
    reserved_bytes: int
    issued: int
    gpus: tuple[Gpu, ...]

    @property
    def amd(self) -> bool:
        return self.name.startswith("gfx")

    def resident_warps(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Warps that fit on a multiprocessor at a time, of programs of ``num_warps`` warps.

        Args:
            registers: registers of a thread; on AMD, accumulation registers included.
            shared_bytes: shared memory of a program.
            num_warps: warps of a program.
        """
        programs = min(self.blocks, self.warps // num_warps, self._register_warps(registers) // num_warps)
        if shared_bytes:
            programs = min(programs, self.shared_bytes // (shared_bytes + self.reserved_bytes))
        return programs * num_warps

    def _register_warps(self, registers: int) -> int:
        if self.amd:  # 512 registers a lane in each of 4 SIMDs, given out by eights
            return 4 * (512 // _up(max(registers, 1), 8))
        # 65536 registers, given out by 256 a warp, in 4 partitions
        return 65536 // _up(max(registers, 1) * 32, 256) // 4 * 4

    def bandwidth_bound(self, gpu: Gpu, instructions_per_byte: float) -> float:
        """Share of the GPU's memory bandwidth at which its multiprocessors have no issue slot left."""
        issued = self.issued * gpu.multiprocessors * gpu.ghz
        return min(1.0, issued / (instructions_per_byte * gpu.gigabytes_per_second))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


TARGETS = {
    target.name: target
    for target in (
        Target("sm80", 32, 64, 32, 164 * KIB, 163 * KIB, KIB, 4, (Gpu("A100", 108, 1.41, 2039),)),
        Target(
            "sm86", 32, 48, 16, 100 * KIB, 99 * KIB, KIB, 4, (Gpu("A10", 72, 1.695, 600), Gpu("3090", 82, 1.695, 936))
        ),
        Target(
            "sm89", 32, 48, 24, 100 * KIB, 99 * KIB, KIB, 4, (Gpu("L4", 58, 2.04, 300), Gpu("4090", 128, 2.52, 1008))
        ),
        Target("sm90", 32, 64, 32, 228 * KIB, 227 * KIB, KIB, 4, (Gpu("H100", 132, 1.83, 3350),)),
        Target("sm100", 32, 64, 32, 228 * KIB, 227 * KIB, KIB, 4, (Gpu("B200", 148, 1.85, 8000),)),
        # A compute unit starts a vector instruction of 64 lanes in each cycle, in one of its 4 SIMDs after the other.
        Target("gfx942", 64, 32, 16, 64 * KIB, 64 * KIB, 0, 1, (Gpu("MI300X", 304, 2.1, 5300),)),
    )
}
