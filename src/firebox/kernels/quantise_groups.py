"""Rounds activations to what block-scaled tensor instructions multiply (kernels/_block_scaled.py):

    nvf4   s = E4M3(max |x| / 6 / r) for 16 columns;   q = E2M1(x / (s · r));   r = max |row| / (6 · 448)
    mxf4   s = 2^⌈log₂(max |x| / 6)⌉ for 32 columns;   q = E2M1(x / s)
    mxf8   s = 2^⌈log₂(max |x| / 448)⌉ for 32;         q = E4M3(x / s)

x [rows, columns] bf16 or float16; q [rows, columns / 2] uint8, two codes to a byte, or [rows, columns]
float8_e4m3fn, the columns of a group in the order of weights' words (formats/layouts.py: column i, i + group
/ 4, …); scales [rows, groups padded to 16] float8_e4m3fn or uint8 E8M0, those behind the last are not
written; row_scale [rows] float32 (nvf4 only). E2M1 is rounded to the nearest, ties to even, by comparisons:
the same on every GPU. In mxf4 and mxf8 nothing saturates. A number that is not finite makes its group NaN, in
nvf4 its row.

NVFP4 checkpoints may bring a static scale for activations (input_scale), one for each expert and calibrated
on other texts. The row's own maximum is taken instead: a token is rounded once for all its experts, nothing
saturates, and the row is in registers anyway.

Source: own; scales as OCP Microscaling Formats v1.0 has them, but rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._block_scaled import GROUPS, Rounded, padded_groups, scale_type
from firebox.kernels._experts import POINTER_NAMES, e2m1
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "quantise_groups"
LEAST = 1e-30  # a row of zeros has a scale, too


@dataclass(frozen=True)
class Problem:
    """`kind`: "nvf4", "mxf4" or "mxf8". `dtype`: of x, "bf16" or "f16"."""

    columns: int
    kind: str
    dtype: str = "bf16"

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return GROUPS[self.kind]


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs with the FP8 type."""
    if gpu.kind != "cuda" or "fp8" not in gpu.facts:
        return f"has no FP8 type on {gpu.name}"
    if problem.columns % problem.group:
        return f"needs columns a multiple of {problem.group}, not {problem.columns}"
    return None


# ---- 2. the device code


@triton.jit
def e2m1_code(x):
    """float32 → codes 0 … 15 in int32; beyond ±6 the last one."""
    size = tl.abs(x)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | (x < 0).to(tl.int32) << 3


@triton.jit
def e4m3_code(x):
    """float32 → the bits of E4M3 in int32."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def power_of_2(largest, KIND: tl.constexpr):
    """The E8M0 code of the least power of two by which `largest` is at most 6 (mxf4) or 448 (mxf8), and its
    inverse. Adding to the bits of a float carries into its exponent where the mantissa is above 1.5 or
    1.75."""
    bits = largest.to(tl.int32, bitcast=True)
    if KIND == "mxf4":
        exponent = ((bits + 0x3FFFFF) >> 23) - 2
    else:
        exponent = ((bits + 0x1FFFFF) >> 23) - 8
    exponent = tl.maximum(exponent, 1)
    return exponent, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantise_by_group(
    x, q, scales, row_scale, COLUMNS: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row. PADDED: its groups up to a power of two; STRIDE: groups of a row of `scales`."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    RUN: tl.constexpr = GROUP // 4
    group = tl.arange(0, PADDED)
    i = tl.arange(0, RUN)
    live = group < COLUMNS // GROUP
    at = x + row * COLUMNS + group[:, None] * GROUP + i[None, :]
    x0 = tl.load(at, mask=live[:, None], other=0.0).to(tl.float32)  # [PADDED, RUN]
    x1 = tl.load(at + RUN, mask=live[:, None], other=0.0).to(tl.float32)
    x2 = tl.load(at + 2 * RUN, mask=live[:, None], other=0.0).to(tl.float32)
    x3 = tl.load(at + 3 * RUN, mask=live[:, None], other=0.0).to(tl.float32)
    either = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))
    largest = tl.max(either, axis=1)
    nothing = tl.sum((x0 + x1 + x2 + x3) * 0.0, axis=1)  # NaN where a number is not finite
    if KIND == "nvf4":
        of_row = tl.maximum(tl.max(largest, axis=0) / (6.0 * 448.0), 1e-30)
        tl.store(row_scale + row, of_row + tl.sum(nothing, axis=0))
        stored = tl.minimum(largest / 6.0 / of_row, 448.0).to(tl.float8e4nv)
        scale = stored.to(tl.float32) * of_row
        inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    else:
        exponent, inverse = power_of_2(largest, KIND)
        stored = tl.where(nothing == 0, exponent, 255).to(tl.uint8)
    tl.store(scales + row * STRIDE + group, stored, mask=live)
    by = inverse[:, None]
    if KIND == "mxf8":
        word = e4m3_code(x0 * by) | e4m3_code(x1 * by) << 8
        word |= e4m3_code(x2 * by) << 16 | e4m3_code(x3 * by) << 24
    else:
        word = e2m1_code(x0 * by) | e2m1_code(x1 * by) << 4
        word |= e2m1_code(x2 * by) << 8 | e2m1_code(x3 * by) << 12
    to = q + row * (COLUMNS // 4) + group[:, None] * RUN + i[None, :]
    tl.store(to, word.to(q.dtype.element_ty), mask=live[:, None])


# ---- 3. the launch


def request(problem: Problem, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of rows."""
    p, pdl = problem, "pdl" in gpu.facts and not interpreted
    signature = {
        "x": f"*{POINTER_NAMES[p.dtype]}",
        "q": "*i32" if p.kind == "mxf8" else "*u16",
        "scales": f"*{scale_type(p.kind)}",
    }
    constants = {
        "COLUMNS": p.columns,
        "PADDED": triton.next_power_of_2(p.columns // p.group),
        "STRIDE": padded_groups(p.columns, p.group),
        "GROUP": p.group,
        "KIND": p.kind,
        "PDL": pdl,
    }
    if p.kind == "nvf4":
        signature["row_scale"] = "*fp32"
    else:
        constants["row_scale"] = None
    return CompileRequest(
        quantise_by_group,
        signature,
        constants,
        gpu,
        tuple(signature),
        num_warps=4 if p.columns <= 4096 else 8,
        options={"launch_pdl": True} if pdl else {},
    )


def empty(problem: Problem, rows: int, device: torch.device | str) -> Rounded:
    """Room for so many rows."""
    p, wide = problem, problem.kind == "mxf8"
    q_type = torch.float8_e4m3fn if wide else torch.uint8
    scale_type = torch.float8_e4m3fn if p.kind == "nvf4" else torch.uint8
    return Rounded(
        torch.empty(rows, p.columns if wide else p.columns // 2, dtype=q_type, device=device),
        torch.empty(rows, padded_groups(p.columns, p.group), dtype=scale_type, device=device),
        torch.empty(rows, device=device) if p.kind == "nvf4" else None,
    )


def run(launcher: Launcher, x: torch.Tensor, to: Rounded) -> None:
    """Writes all rows of `x` to `to`."""
    words = to.q.view(torch.int32) if to.q.dtype == torch.float8_e4m3fn else to.q.view(torch.uint16)
    further = {} if to.row_scale is None else {"row_scale": to.row_scale}
    launcher((x.shape[0], 1, 1), x=x, q=words, scales=to.scales, **further)


# ---- 4. the reference


def reference(problem: Problem, x: torch.Tensor) -> Rounded:
    """The same, but for groups' padding."""
    groups = x.float().unflatten(-1, (-1, problem.group))
    largest = groups.abs().amax(-1)
    if problem.kind == "nvf4":
        of_row = (largest.amax(-1) / (6 * 448)).clamp(min=LEAST)
        stored = (largest / 6 / of_row.unsqueeze(-1)).clamp(max=448).to(torch.float8_e4m3fn)
        return Rounded(quantised(problem, x, stored, of_row), stored, of_row)
    mantissa, exponent = torch.frexp(largest.double() / (6 if problem.kind == "mxf4" else 448))
    exponent = exponent - (mantissa == 0.5).int()  # ⌈log₂⌉: frexp's mantissa is in [0.5, 1)
    stored = (exponent.masked_fill(largest == 0, -126) + 127).clamp(min=1).to(torch.uint8)
    return Rounded(quantised(problem, x, stored, None), stored, None)


def quantised(
    problem: Problem, x: torch.Tensor, scales: torch.Tensor, row_scale: torch.Tensor | None
) -> torch.Tensor:
    """q of `x`, with scales that are given."""
    groups = x.float().unflatten(-1, (-1, problem.group))
    exact = groups * _inverse(problem, scales[:, : groups.shape[1]], row_scale).unsqueeze(-1)
    in_words = exact.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(1)  # a word's four next to each other
    if problem.kind == "mxf8":
        return in_words.to(torch.float8_e4m3fn)
    values = e2m1(torch.arange(8, device=x.device))
    distance = (in_words.double().abs().unsqueeze(-1) - values).abs()
    # Of two that are equally far the even code: odd ones stand back by less than float32 can differ.
    code = (distance + torch.arange(8, device=x.device) % 2 * 1e-10).argmin(-1) | (in_words < 0).int() << 3
    pairs = code.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def dequantised(problem: Problem, x: Rounded) -> torch.Tensor:
    """The numbers that were meant [rows, columns], in float32 and in order."""
    if problem.kind == "mxf8":
        values = x.q.float()
    else:
        values = e2m1(torch.stack((x.q & 15, x.q >> 4), dim=-1).flatten(-2))
    groups = values.unflatten(-1, (-1, problem.group // 4, 4)).transpose(-1, -2).flatten(-2)
    stored = x.scales[:, : groups.shape[1]].float()
    if x.row_scale is None:
        factor = torch.exp2(stored - 127).masked_fill(stored == 255, torch.nan)
    else:
        factor = stored * x.row_scale.unsqueeze(-1)
    return (groups * factor.unsqueeze(-1)).flatten(1)


def _inverse(problem: Problem, scales: torch.Tensor, row_scale: torch.Tensor | None) -> torch.Tensor:
    if row_scale is None:
        return torch.exp2(127 - scales.float())
    scale = scales.float() * row_scale.unsqueeze(-1)
    return torch.where(scale > 0, 1 / scale, 0.0)
