"""_running_products.py on machine code as nvdisasm prints it: loops of wgmma that reads registers."""

from __future__ import annotations

import pytest

from firebox.kernels._running_products import overwritten

PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R100, gdesc[UR20], R24, gsb0"
OTHER = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR20], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_FOR_ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
DECODING = "LOP3.LUT R101, R5, 0x81c081c0, RZ, 0xc0, !PT"


def loop(*instructions: str, labels: bool = True) -> str:
    """A loop, its branch back by label or by address, as without nvdisasm's data flow analysis."""
    back = "`(.L_x_1)" if labels else "0xc10"
    lines = [".L_x_1:"] if labels else []
    for place, text in enumerate((*instructions, f"@P2 BRA {back}")):
        lines.append(f"        /*{0xC10 + 16 * place:04x}*/                   {text} ;")
    return "\n".join(lines)


@pytest.mark.parametrize("labels", [True, False])
def test_a_product_left_running_at_the_end_of_a_loop_meets_its_beginning(labels: bool) -> None:
    assert overwritten(loop(DECODING, PRODUCT, labels=labels)) == [f"{PRODUCT}; then {DECODING}"]


def test_a_wait_lets_its_operands_be_written() -> None:
    assert overwritten(loop(DECODING, PRODUCT, WAIT)) == []
    assert overwritten(loop(WAIT, DECODING, PRODUCT)) == []


def test_a_product_is_over_when_later_ones_may_run() -> None:
    """The wait for all but the last group is not one for the last."""
    first = "HGMMA.64x64x16.F32.BF16 R24, R96, gdesc[UR20], R24"
    of_first = "IMAD.SHL.U32 R96, R6, 0x40, RZ"
    assert overwritten(loop(of_first, DECODING, first, OTHER, PRODUCT, WAIT_FOR_ALL_BUT_ONE)) == [
        f"{PRODUCT}; then {DECODING}"
    ]


@pytest.mark.parametrize(
    ("text", "writes"),
    [
        ("LDSM.16.M88.4 R98, [R107+UR8]", True),  # R98 to R101
        ("LDSM.16.M88.2 R98, [R107+UR8]", False),
        ("LDS.128 R100, [R0]", True),
        ("LDS R103, [R56+0xa020]", True),
        ("IMAD.WIDE.U32 R99, R6, R7, R8", True),
        ("@!P3 LDG.E.64 R102, desc[UR18][R4.64]", True),
        ("SHFL.IDX PT, R100, R5, RZ, 0x1f", True),
        ("HMUL2.BF16_V2 R104, R100, R56.H0_H0", False),  # reads
        ("LDGSTS.E.BYPASS.128 [R100+0x800], desc[UR18][R6.64]", False),
        ("STS [R100], R62", False),
        ("ISETP.NE.U32.AND P0, PT, R100, RZ, PT", False),
        ("R2UR UR4, R100", False),
    ],
)
def test_what_writes_a_register(text: str, writes: bool) -> None:
    assert bool(overwritten(loop(text, PRODUCT))) is writes


def test_operands_in_shared_memory_and_straight_code_are_no_concern() -> None:
    of_shared = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], R24, gsb0"
    assert overwritten(loop(DECODING, of_shared)) == []
    assert overwritten(loop(DECODING, PRODUCT).replace("@P2 BRA `(.L_x_1)", "EXIT")) == []
