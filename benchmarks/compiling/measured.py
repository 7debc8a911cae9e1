"""What is measured of a compiled kernel, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.compiling.code import Code, Instruction, loaded_bytes, turns
from benchmarks.compiling.targets import TARGETS, Target
from hf_kvcache.kernels.triton.compile_case import CompileCase

#: Resident warps of a multiprocessor that hide the latency of memory.
LEAST_WARPS = 8
#: Share of the loaded bytes that comes by loads of 128 bits.
LEAST_WIDE = 0.5
#: How far instructions per byte may be from the recorded value.
MOST_DRIFT = 0.05
SPILLS, SHARED, TENSOR_CORES, WARPS, WIDE_LOADS = "spills", "shared memory", "tensor cores", "warps", "wide loads"
#: What a case may name in ``waived``; registers must suffice at least on NVIDIA's GPUs.
WAIVABLE = (SPILLS, WARPS, WIDE_LOADS)


@dataclass
class Resources:
    """What a kernel takes, as its compiler says.

    Attributes:
        registers: of a thread.
        spills: instructions that spill registers or fetch them back, or on AMD registers spilled.
        stack_bytes: memory of a thread that is not in registers.
        shared_bytes: of a program.
    """

    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int


@dataclass
class Measured:
    """One case compiled for one target.

    Attributes:
        target: name of the target.
        case: name of the case.
        error: why it could not be compiled or read; the rest is then meaningless.
        resources: what it takes.
        tensor_instructions: matrix instructions.
        warps: that a multiprocessor holds at a time.
        loop_instructions: instructions in the main loop that take an issue slot; 0 without one.
        turns: turns of the source's loop in one of the machine code's.
        wide: share of the loaded bytes that comes by loads of 128 bits.
        instructions_per_byte: warp instructions of the main loop per byte that the program loads in it.
        seconds: time it took.
    """

    target: str
    case: str
    error: str | None = None
    resources: Resources | None = None
    tensor_instructions: int = 0
    warps: int = 0
    loop_instructions: int = 0
    turns: int = 1
    wide: float = 0.0
    instructions_per_byte: float | None = None
    seconds: float = 0.0


def measure(case: CompileCase, target: Target, code: Code, resources: Resources) -> Measured:
    """Everything that instructions and resources say about a case."""
    loop = code.main_loop() if case.loop_bytes else []
    part = loop or code.instructions
    threads = case.num_warps * target.lanes
    loaded, wide = loaded_bytes(part) * threads, loaded_bytes(part, 16) * threads
    measured = Measured(target.name, case.name, resources=resources)
    measured.tensor_instructions = sum(is_tensor(i) for i in code.instructions)
    measured.warps = target.resident_warps(resources.registers, resources.shared_bytes, case.num_warps)
    if case.loop_bytes and loop:
        measured.turns = turns(loop, wide, case.loop_bytes)
        # Threads that load the same bytes count once: the case says how many there are.
        loaded = case.loop_bytes * measured.turns
        measured.loop_instructions = sum(i.issued for i in loop)
        measured.instructions_per_byte = measured.loop_instructions * case.num_warps / loaded
    measured.wide = min(1.0, wide / loaded) if loaded else 0.0
    return measured


def is_tensor(instruction: Instruction) -> bool:
    """Whether this is a matrix instruction (HMMA, IMMA, QGMMA, UTCHMMA, v_mfma, v_smfmac)."""
    name = instruction.name.split(".")[0]
    return name.endswith("MMA") or name.startswith(("v_mfma", "v_smfmac"))


def failures(measured: Measured, case: CompileCase, recorded: float | None, compare: bool) -> list[str]:
    """What is wrong with a compiled case, in words, but for what is waived.

    Args:
        measured: the case.
        case: what it should be.
        recorded: instructions per byte as recorded; None if they are not.
        compare: whether recorded values are of the same compiler.
    """
    if measured.error is not None:
        return [measured.error]
    unmet = unmet_criteria(measured, case)
    allowed = {criterion for criterion in case.waived if may_waive(criterion, measured.target)}
    wrong = [text for criterion, text in unmet.items() if criterion not in allowed]
    wrong += [f"{criterion} cannot be waived" for criterion in case.waived if criterion not in allowed]
    wrong += [f"{criterion} are waived without need" for criterion in allowed if criterion not in unmet]
    return wrong + _drift(measured, case, recorded, compare)


def may_waive(criterion: str, target: str) -> bool:
    """Whether a case may leave a criterion unmet if it says why."""
    return criterion in WAIVABLE and (criterion != SPILLS or TARGETS[target].amd)


def unmet_criteria(measured: Measured, case: CompileCase) -> dict[str, str]:
    """The criteria that a compiled case does not meet, waived or not, with what it does instead."""
    resources, target = measured.resources, TARGETS[measured.target]
    if resources is None:
        return {}
    unmet = {}
    if resources.spills or resources.stack_bytes:
        unmet[SPILLS] = f"{resources.spills} spills, {resources.stack_bytes} bytes of stack"
    if resources.shared_bytes > target.program_shared_bytes:
        most = target.program_shared_bytes
        unmet[SHARED] = f"{resources.shared_bytes} bytes of shared memory, {most} are to be had"
    if case.tensor_cores and not measured.tensor_instructions:
        unmet[TENSOR_CORES] = "no tensor-core instructions"
    if measured.warps < LEAST_WARPS:
        unmet[WARPS] = f"{measured.warps} resident warps, {LEAST_WARPS} are wanted"
    if measured.wide < LEAST_WIDE:
        unmet[WIDE_LOADS] = f"{measured.wide:.0%} of the bytes by 128-bit loads, {LEAST_WIDE:.0%} are wanted"
    return unmet


def _drift(measured: Measured, case: CompileCase, recorded: float | None, compare: bool) -> list[str]:
    actual = measured.instructions_per_byte
    if case.loop_bytes is None:
        return []
    if actual is None:
        return ["no loop that loads from global memory was found"]
    if not compare:
        return []
    if recorded is None:
        return ["instructions per byte are not recorded; run with --record"]
    if abs(actual - recorded) > MOST_DRIFT * recorded:
        return [f"{actual:.4f} instructions per byte, recorded are {recorded:.4f}"]
    return []
