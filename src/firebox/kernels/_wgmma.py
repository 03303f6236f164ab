"""Hopper's asynchronous products (wgmma) of weights that were decoded into registers.

A loop leaves the last product of a step running, which reads its first operand from registers, and ptxas of
CUDA 12.8 and 12.9 (Triton 3.6 assembles with the former) forgets at the loop's end that they are being read:
the next step decodes into them. Whether the product was in time depends on what else the multiprocessor does:
gpt-oss's second half came out wrong at 2,048 tokens and right at 64 (H200, 2026-11-23,
docs/log/2026-11-23-running-products.md). So a step ends with a wait where this assembler is at work, and the
read-back refuses machine code of any kernel that needs one and has none (_running_products.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _triton

REMEMBERS_OPERANDS = (13, 4)  # the least version of ptxas that is known to


def waits(gpu: Gpu, *, decoded: bool, interpreted: bool) -> bool:
    """Must a step wait for its products? `decoded`: their first operand is in registers."""
    if interpreted or not decoded or "wgmma" not in gpu.facts or gpu.triton_target is None:
        return False
    version = _triton.assembler(gpu.triton_target).split(".")
    return tuple(int(part) for part in version[:2]) < REMEMBERS_OPERANDS


@triton.jit
def products_done(step, WAITS: tl.constexpr):
    """The end of a loop's `step`, a number that is 0 or more: its products have read their operands. In an
    `if` that is always true, because Triton puts that behind the loads of later steps, beside which products
    can run."""
    if WAITS:  # noqa: SIM102 — decided when it is compiled
        if step >= 0:
            tl.inline_asm_elementwise(
                "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;", "=r,r", [step], dtype=tl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip
