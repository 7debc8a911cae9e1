"""The compile report: what it reads from machine code, what it asks for, and one kernel from source to verdict."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compile_report
from benchmarks.compiling import amd, nvidia
from benchmarks.compiling.code import loaded_bytes, turns
from benchmarks.compiling.measured import Measured, Resources, failures, is_tensor, measure
from benchmarks.compiling.targets import TARGETS
from hf_kvcache.kernels.triton.compile_case import ARCHITECTURES, CompileCase

ROOT = Path(__file__).parents[3]

#: A wait without loads, an outer loop, and in it the main loop, a part of which stands behind the end.
SASS = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0040*/                   HFMA2.MMA R7, -RZ, RZ, 0, 0 ;
        /*0050*/               @P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0070*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0080*/              @!P2 BRA `(.L_x_2) ;
        /*0090*/                   BRA.U UP0, `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   LDG.E.U8.CONSTANT R9, desc[UR4][R2.64] ;
        /*00c0*/                   BRA `(.L_x_3) ;
        /*00d0*/                   NOP ;
"""
ASSEMBLY = """
_kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[2:5], v18, s[22:23]
\tbuffer_load_ubyte v1, v2, s[4:7], 0 offen
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
\ts_cbranch_scc1 .LBB0_3
.LBB0_2:
\tv_exp_f32_e32 v1, v1
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.LBB0_3:
\tglobal_load_dwordx2 v[2:3], v18, s[22:23]
\ts_branch .LBB0_2
.Lfunc_end0:
\t.amdhsa_next_free_vgpr 8
    .private_segment_fixed_size: 16
    .vgpr_count:     40
    .vgpr_spill_count: 3
"""
CASE = CompileCase("made up", None, {}, {}, num_warps=4, num_stages=1, loop_bytes=4 * 32 * 17, tensor_cores=True)
SOUND = Resources(registers=64, spills=0, stack_bytes=0, shared_bytes=0)


def test_sass() -> None:
    """The innermost loop that loads, parts of it behind the end included, and how much it loads."""
    code = nvidia.parse(SASS)
    loop = code.main_loop()
    assert [i.name for i in loop if i.loaded_bytes] == ["LDGSTS.E.BYPASS.LTC128B.128", "LDG.E.U8.CONSTANT"]
    assert len(loop) == 7 and loaded_bytes(loop) == 17 and loaded_bytes(loop, 16) == 16
    assert [i.name for i in code.instructions if is_tensor(i)] == ["HMMA.16816.F32.BF16"]
    measured = measure(CASE, TARGETS["sm80"], code, SOUND)
    assert measured.instructions_per_byte == pytest.approx(7 * 4 / (4 * 32 * 17)) and measured.turns == 1
    assert measured.wide == pytest.approx(16 / 17) and failures(measured, CASE, None, False) == []


def test_amd_assembly() -> None:
    """The same of AMD's, where a loop's cost is its vector instructions."""
    code, resources = amd.read(ASSEMBLY, 512)
    assert resources == Resources(40, 3, 16, 512)
    loop = code.main_loop()
    assert [i.loaded_bytes for i in loop if i.loaded_bytes] == [16, 1, 8]
    assert sum(i.issued for i in loop) == 2 and sum(map(is_tensor, loop)) == 1


def test_unrolled_loops() -> None:
    """A loop that does everything twice counts as two turns; one that loads twice as much does not."""
    loop = nvidia.parse(SASS).main_loop()
    assert turns(loop * 2, wide=2 * 1000, loop_bytes=1000) == 2
    assert turns(loop * 4, wide=4 * 900, loop_bytes=1000) == 4
    assert turns(loop, wide=2 * 1000, loop_bytes=1000) == 1
    assert turns(loop * 2, wide=1000, loop_bytes=1000) == 1


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "expected"),
    [
        ("sm80", 32, 0, 4, 64),
        ("sm80", 255, 0, 4, 8),
        ("sm80", 168, 0, 4, 12),
        ("sm80", 32, 81 * 1024, 4, 8),
        ("sm86", 32, 0, 1, 16),
        ("sm86", 64, 60 * 1024, 4, 4),
        ("gfx942", 128, 0, 4, 16),
        ("gfx942", 264, 0, 4, 4),
        ("gfx942", 64, 32 * 1024, 4, 8),
    ],
)
def test_resident_warps(target: str, registers: int, shared: int, num_warps: int, expected: int) -> None:
    """What NVIDIA's occupancy calculator and AMD's tables say."""
    assert TARGETS[target].resident_warps(registers, shared, num_warps) == expected


def test_every_failure_is_named() -> None:
    """Each of the checks fails for its own reason, and nothing else does."""
    assert set(TARGETS) == set(ARCHITECTURES)
    good = Measured("sm80", "x", None, SOUND, 8, 16, 100, 1, 0.9, 0.1)
    assert failures(good, CASE, 0.104, True) == []
    for change, reason in [
        ({"resources": replace(SOUND, spills=2)}, "spills"),
        ({"resources": replace(SOUND, stack_bytes=8)}, "stack"),
        ({"resources": replace(SOUND, shared_bytes=164 * 1024)}, "shared memory"),
        ({"tensor_instructions": 0}, "tensor-core"),
        ({"warps": 4}, "resident warps"),
        ({"wide": 0.4}, "128-bit"),
        ({"instructions_per_byte": 0.12}, "recorded are"),
        ({"instructions_per_byte": None}, "no loop"),
        ({"error": "CompilationError: why"}, "why"),
    ]:
        found = failures(replace(good, **change), CASE, 0.104, True)
        assert len(found) == 1 and reason in found[0]
    assert "--record" in failures(good, CASE, None, True)[0]
    assert failures(good, CASE, None, False) == []
    assert failures(replace(good, instructions_per_byte=None), replace(CASE, loop_bytes=None), None, True) == []


def test_waivers() -> None:
    """What a case waives is no failure, unless it is met, or is something that cannot be waived on its target."""
    narrow, spilling = Measured("sm80", "x", None, SOUND, 8, 16, 100, 1, 0.4, 0.1), replace(SOUND, spills=2)
    waiving = {name: replace(CASE, waived={name: "why"}) for name in ("wide loads", "spills", "shared memory")}
    assert failures(narrow, waiving["wide loads"], 0.1, True) == []
    assert "without need" in failures(replace(narrow, wide=0.9), waiving["wide loads"], 0.1, True)[0]
    for name in ("spills", "shared memory"):
        assert "cannot be waived" in failures(replace(narrow, wide=0.9), waiving[name], 0.1, True)[0]
    on_amd = replace(narrow, target="gfx942", resources=spilling, wide=0.9)
    assert failures(on_amd, waiving["spills"], 0.1, True) == []


def test_waivers_are_told() -> None:
    """The report names what is waived, of which case and why, and marks it in the table."""
    case = replace(CASE, waived={"wide loads": "rows are short"})
    measured = Measured("sm80", CASE.name, None, SOUND, 8, 16, 100, 1, 0.4, 0.1)
    work = [("pack", "sm80", 0, case)]
    lines = compile_report.waivers(work, [measured])
    assert lines[0] == "* wide loads waived: rows are short"
    assert lines[1].strip().startswith("sm80 made up: 40%")
    columns = compile_report.table(work, [measured], set()).columns
    assert "40%*" in [cell for column in columns for cell in column.cells]


def test_one_kernel() -> None:
    """The command compiles a kernel without a GPU, also where kernels are interpreted, and finds it sound."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", "--target=sm90", "--case=hadamard fp32 d128", "--jobs=1"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kernels, 0 failures" in done.stdout and "sm90" in done.stdout
