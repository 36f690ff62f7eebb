"""Loads are told apart by width and by whether they are in a loop, in both dialects."""

from dataclasses import replace

import pytest

from kernels.aot.ahead import Report, Variant
from kernels.aot.machine_code import read_amdgcn, read_sass

SASS = """
        /*0000*/                   LDG.E.LTC128B R2, desc[UR4][R2.64] ;
        /*0010*/               @P0 EXIT ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R4.64], !P1 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/              @!P2 BRA `(.L_x_2) ;
.L_x_0:
        /*0050*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R4.64], !P1 ;
        /*0060*/              @!P3 LDG.E.64.STRONG.GPU R6, desc[UR4][R6.64] ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0080*/               @P4 BRA `(.L_x_3) ;
.L_x_1:
        /*0090*/                   LDG.E.U16 R7, desc[UR4][R6.64] ;
        /*00a0*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*00b0*/                   LDG.E.S8.CONSTANT R5, desc[UR4][R6.64] ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00e0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4);
"""
AMD = """
kernel:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	global_load_dword v1, v2, s[0:1]
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[2:5], v1, s[0:3], 0 offen
	global_load_dwordx2 v[6:7], v1, s[0:1]
	v_mfma_f32_16x16x16_bf16 a[0:3], v[2:3], v[4:5], a[0:3]
	s_cbranch_scc0 .LBB0_1
	s_branch .LBB0_3
.LBB0_2:
	global_load_ushort v1, v2, s[0:1]
	global_load_short_d16 v1, v2, s[0:1]
.LBB0_3:
	global_load_sbyte_d16 v1, v2, s[0:1]
	s_endpgm
"""


def test_sass() -> None:
    code = read_sass(SASS)
    assert code.load_bytes == {16: 3, 8: 1, 4: 1, 2: 1, 1: 1}
    # A block that was moved behind the loop and jumps back into it is a part of it.
    assert code.loop_load_bytes == {16: 2, 8: 1, 2: 1}
    assert code.matrix_instructions == 1


def test_amd() -> None:
    code = read_amdgcn(AMD)
    assert code.load_bytes == {16: 1, 8: 1, 4: 1, 2: 2, 1: 1}
    assert code.loop_load_bytes == {16: 1, 8: 1}
    assert code.matrix_instructions == 1


@pytest.mark.parametrize("always", ["BRA `(.L_x_1)", "EXIT"])
def test_a_predicate_decides_whether_control_falls_through(always: str) -> None:
    text = ".L_x_0:\n/*00*/ LDG.E R1 ;\n/*10*/ {}{} ;\n/*20*/ @P1 BRA `(.L_x_0) ;\n.L_x_1:\n"
    assert read_sass(text.format("", always)).loop_load_bytes == {}
    assert read_sass(text.format("@P0 ", always)).loop_load_bytes == {4: 1}


def test_a_narrow_load_in_a_loop_is_a_fault_unless_the_op_says_what_for() -> None:
    report = Report(
        target="sm_90", registers=32, spill_bytes=0, shared_bytes=0,
        load_bytes={16: 3, 8: 2, 4: 1, 2: 7}, loop_load_bytes={16: 2, 8: 2, 4: 1},
    )  # fmt: skip
    variant = Variant(name="x", kernel=None, signature={}, constexprs={})
    assert report.faults(replace(variant, narrow_in_loops=frozenset({4, 8}))) == []
    assert report.faults(replace(variant, narrow_in_loops=frozenset({4}))) == [
        "2 loads of 8 bytes in loops"
    ]
    assert len(report.faults(variant)) == 2
