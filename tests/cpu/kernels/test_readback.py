"""_readback.py on texts as Triton and its assembler write them: names, what dominates, whom to believe."""

from __future__ import annotations

import pytest

from firebox.kernels._readback import Usage, features, has_tensor_instructions, instructions, usage

SYNC = "mma.sync.aligned"
# PTX, SASS, name: collected from compiled kernels
PAIRS = [
    (f"{SYNC}.m16n8k16.row.col.f32.bf16.bf16.f32", "HMMA.16816.F32.BF16", "mma.bf16"),
    (f"{SYNC}.m16n8k16.row.col.f32.f16.f16.f32", "HMMA.16816.F32", "mma.f16"),
    (f"{SYNC}.m16n8k8.row.col.f32.tf32.tf32.f32", "HMMA.1688.F32.TF32", "mma.tf32"),
    (f"{SYNC}.m16n8k32.row.col.satfinite.s32.s8.s8.s32", "IMMA.16832.S8.S8.SAT", "mma.int8"),
    (f"{SYNC}.m16n8k32.row.col.f32.e4m3.e4m3.f32", "QMMA.16832.F32.E4M3.E4M3", "mma.fp8"),
    (
        f"{SYNC}.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0",
        "QMMA.SF.16832.F32.E4M3.E4M3.E8",
        "mma.mxf8",
    ),
    (
        f"{SYNC}.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
        "OMMA.SF.16864.F32.E2M1.E2M1.E8",
        "mma.mxf4",
    ),
    (
        f"{SYNC}.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
        "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X",
        "mma.nvf4",
    ),
    ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "HGMMA.64x128x16.F32.BF16", "wgmma.bf16"),
    ("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", "QGMMA.64x128x32.F32.E4M3.E4M3", "wgmma.fp8"),
    ("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8", "IGMMA.64x128x32.S8.S8", "wgmma.int8"),
    ("tcgen05.mma.cta_group::1.kind::f16", "UTCHMMA", "tcgen05.f16"),
    ("tcgen05.mma.cta_group::1.kind::f8f6f4", "UTCQMMA", "tcgen05.fp8"),
    ("tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32", "UTCQMMA", "tcgen05.mxf8"),
    ("tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32", "UTCOMMA", "tcgen05.mxf4"),
    ("tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16", "UTCOMMA.4X", "tcgen05.nvf4"),
]


def ptx(*names: str) -> str:
    return "\n".join(f"\t@%p1 {name} {{%r1, %r2}}, %rd1;" for name in names) + "\n\tret;"


def sass(*names: str) -> str:
    return "\n".join(f"        /*0{at:03x}*/    {name} R4, R8, R12, R4 ;" for at, name in enumerate(names))


@pytest.mark.parametrize(("asked", "made", "name"), PAIRS, ids=[name for _, _, name in PAIRS])
def test_each_instruction_by_its_name_in_ptx_alone_and_with_machine_code(asked, made, name) -> None:
    confirmed = instructions(ptx(asked), sass("LDSM.16.M88.4", made, "EXIT"))
    assert (confirmed.dominant, confirmed.found, confirmed.machine_code) == (name, (name,), True)
    alone = instructions(ptx(asked), None)
    assert (alone.dominant, alone.found, alone.machine_code) == (name, (name,), False)


def test_what_the_assembler_emulates_is_called_what_it_became() -> None:
    """int4 becomes int8 and shifts on GPUs that have lost it."""
    asked = f"{SYNC}.m16n8k64.row.col.s32.s4.s4.s32"
    assert instructions(ptx(asked), sass("IMMA.16832.S8.S8", "LOP3.LUT")).found == ("mma.int8",)
    assert instructions(ptx(asked), None).found == (asked,)  # nothing known: the text itself, and not native


def test_what_the_machine_code_lacks_does_not_count() -> None:
    fp8, bf16 = PAIRS[4][0], PAIRS[0][0]
    assert instructions(ptx(fp8, bf16), sass("HMMA.16816.F32.BF16")).found == ("mma.bf16",)
    assert instructions(ptx(fp8), sass("FFMA")).dominant == "none"


def test_the_one_with_most_multiply_adds_dominates() -> None:
    """Two tf32 steps of 1,024 against one fp8 step of 4,096."""
    tf32, fp8 = PAIRS[2], PAIRS[4]
    found = instructions(ptx(tf32[0], tf32[0], fp8[0]), sass(tf32[1], tf32[1], fp8[1]))
    assert found.found == ("mma.fp8", "mma.tf32")
    assert instructions(ptx(*[tf32[0]] * 5, fp8[0]), None).found == ("mma.tf32", "mma.fp8")


def test_without_tensor_instructions() -> None:
    assert instructions(ptx(), "").dominant == "none" and instructions(ptx(), "").found == ()
    assert not has_tensor_instructions(ptx("// mma.sync.aligned")) and has_tensor_instructions(
        ptx(PAIRS[0][0])
    )


def test_features() -> None:
    assert features("cp.async.bulk.tensor.2d.shared::cta.global [%r1];") == ("tma",)
    assert features("cp.async.cg.shared.global [%r1], [%rd1], 16;\ngriddepcontrol.wait;") == (
        "cp.async",
        "pdl",
    )
    assert features("createpolicy.fractional.L2::evict_last.b64 %rd3, 1.0;") == ("evict_last",)
    assert features("bar.sync 0;") == ()


def test_usage_is_that_of_the_entry() -> None:
    log = """ptxas-blackwell info    : Compiling entry function 'gemm' for 'sm_121a'
ptxas-blackwell info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas-blackwell info    : Function properties for gemm
    72 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas-blackwell info    : Used 255 registers, used 1 barriers
"""
    assert usage(log, "gemm") == Usage(registers=255, spill_bytes=40, stack_bytes=72)
    with pytest.raises(AssertionError, match="nothing of gem"):
        usage(log, "gem")
