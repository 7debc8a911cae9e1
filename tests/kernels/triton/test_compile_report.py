"""The compile report: what it reads from machine code, what it asks for, and one kernel from source to verdict."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compile_record
from benchmarks.compile_record import is_older, read_record, write_record
from benchmarks.compile_report import Result, known, problems, stale, worse
from benchmarks.machine_code import TARGETS, Compiled, read_amd, read_sass
from hf_kvcache.kernels.triton.compile_case import ARCHITECTURES, CompileCase

ROOT = Path(__file__).parents[3]

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
USAGE = "Function _kernel:\n  REG:40 STACK:8 SHARED:0 LOCAL:16 TEXTURE:0"
CASE = CompileCase("made up", None, {}, {}, num_warps=4, num_stages=1, tensor_cores=True)
SOUND = Compiled(registers=64, spills=0, stack=0, shared=0, tensor=8, wide_loads=4, instructions=100)


def test_sass() -> None:
    """Resources, and instructions by what they are; HFMA2.MMA is no matrix instruction, and NOP none at all."""
    assert read_sass(SASS, USAGE, 512) == Compiled(40, 0, 24, 512, tensor=1, wide_loads=1, instructions=13, loop=5)
    spilling = SASS + "        /*00e0*/                   STL.64 [R1], R2 ;\n        /*00f0*/   @P0 LDL R2, [R1] ;\n"
    assert read_sass(spilling, USAGE, 512).spills == 2
    for assembly, usage in ((SASS, ""), ("", USAGE)):
        with pytest.raises(RuntimeError, match="no resources"):
            read_sass(assembly, usage, 0)


def test_amd_assembly() -> None:
    """The same of AMD's, up to the end of the function."""
    assert read_amd(ASSEMBLY, 512) == Compiled(40, 3, 16, 512, tensor=1, wide_loads=1, instructions=10)
    with pytest.raises(RuntimeError, match="does not name"):
        read_amd(ASSEMBLY.replace("vgpr_count", "other"), 0)


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


def test_share_of_bandwidth() -> None:
    """Bytes that a multiprocessor may load by the time that a loop has been issued, four instructions in a cycle."""
    target = replace(TARGETS["sm90"], cycle_bytes=10.0)
    assert target.bandwidth_share(loop=400, num_warps=4, loop_bytes=2000) == pytest.approx(2000 / 400 / 10)
    assert target.bandwidth_share(0, 4, 2000) is None and TARGETS["gfx942"].bandwidth_share(400, 4, 2000) is None


def test_every_failure_is_named() -> None:
    """Each of the checks fails for its own reason, and nothing else does."""
    assert set(TARGETS) == set(ARCHITECTURES)
    assert problems(SOUND, CASE, "sm80") == []
    for change, reason in [
        ({"spills": 2}, "spills"),
        ({"stack": 8}, "stack"),
        ({"shared": 164 * 1024}, "shared memory"),
        ({"tensor": 0}, "tensor-core"),
        ({"registers": 255, "shared": 81 * 1024}, "resident warps"),
    ]:
        case = CASE if "registers" not in change else replace(CASE, num_warps=2)
        found = problems(replace(SOUND, **change), case, "sm80")
        assert any(reason in text for text in found) and len(found) <= 2


def test_what_is_worse_than_recorded_fails() -> None:
    """Every figure in the direction that is bad, instructions with a margin; not what is better or not recorded."""
    record = {("sm80", "x"): vars(SOUND)}

    def found(**change: int) -> list[str]:
        return worse(Result("sm80", "x", replace(SOUND, **change), 4, ()), record)

    assert found() == [] and found(registers=60, tensor=9, instructions=105) == []
    changes = {"registers": 65, "spills": 1, "stack": 8, "shared": 16, "tensor": 7, "instructions": 106}
    for name, value in changes.items():
        assert len(found(**{name: value})) == 1 and found(**{name: value})[0].startswith(name)
    assert len(found(wide_loads=3)) == 1
    slow = Result("sm80", "x", SOUND, 4, (), share=0.7, least_share=0.75)
    assert "70% of the bandwidth" in worse(slow, record)[0] and worse(slow, {}) == []
    assert found(loop=300) == []
    longer = Result("sm80", "x", replace(SOUND, loop=106), 4, ())
    assert worse(longer, {("sm80", "x"): vars(replace(SOUND, loop=100))}) == ["loop: 106, recorded are 100"]
    assert worse(Result("sm90", "x", replace(SOUND, spills=1), 4, ()), record) == []


def test_spills_and_few_warps_of_an_older_triton_are_known_where_recorded() -> None:
    """With the newest Triton they are failures; other failures are failures with any, and so is what became worse."""
    bad = replace(SOUND, spills=2, registers=255, shared=164 * 1024, tensor=0)
    result = Result("sm90", "x", bad, 2, tuple(problems(bad, replace(CASE, num_warps=2), "sm80")), 0.7, 0.75)
    record = {result.key: vars(bad)}
    assert len(result.problems) == 4
    assert known(result, record, False) == [] and known(result, {}, True) == []
    assert [text.split()[1] for text in known(result, record, True)] == ["spills,", "resident"]
    assert worse(result, record, True) == [] and len(worse(result, record)) == 1
    assert len(worse(replace(result, compiled=replace(bad, spills=3)), record, True)) == 1
    waiving = replace(CASE, num_warps=2, waived={"warps": "why"})
    needless = replace(result, compiled=SOUND, problems=tuple(problems(SOUND, waiving, "sm80")))
    assert len(needless.problems) == 1 and known(needless, record, False) == []
    assert known(needless, record, True) == list(needless.problems)


def test_the_record_keeps_other_versions_and_other_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_record, "RECORD", tmp_path / "compiled.csv")
    monkeypatch.setattr(compile_record, "version", lambda: "3.9.0")
    first, second = {("sm80", "a"): vars(SOUND)}, {("sm80", "b"): vars(SOUND)}
    write_record(first, False)
    write_record(second, False)
    assert read_record() == {("sm80", "a"): vars(SOUND), ("sm80", "b"): vars(SOUND)}
    assert stale([Result("sm80", "b", SOUND, 4, ())], read_record()) == [("sm80", "a")]
    write_record(second, True)
    assert list(read_record()) == [("sm80", "b")]
    assert not is_older()
    monkeypatch.setattr(compile_record, "version", lambda: "3.10.0")
    assert read_record() == {} and not is_older()
    write_record(first, True)
    assert list(read_record()) == [("sm80", "a")]
    monkeypatch.setattr(compile_record, "version", lambda: "3.9.0")
    assert list(read_record()) == [("sm80", "b")] and is_older()


def test_waivers() -> None:
    """What a case waives is no failure, unless it is met, or is something that cannot be waived on its target."""
    spilling, few = replace(SOUND, spills=2), replace(SOUND, registers=255, shared=81 * 1024)
    waiving = {name: replace(CASE, num_warps=2, waived={name: "why"}) for name in ("warps", "spills", "shared memory")}
    assert problems(few, waiving["warps"], "sm80") == []
    assert "without need" in problems(SOUND, waiving["warps"], "sm80")[0]
    assert "spills" in problems(spilling, waiving["spills"], "sm80")[0]
    assert "shared memory" in problems(replace(SOUND, shared=164 * 1024), waiving["shared memory"], "sm80")[0]
    assert problems(spilling, waiving["spills"], "gfx942") == []
    assert problems(spilling, replace(waiving["spills"], name="encode a page"), "sm80") == []
    assert "without need" in problems(SOUND, waiving["spills"], "gfx942")[0]


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
