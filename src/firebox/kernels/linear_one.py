"""A dense linear layer for one token, perhaps with the norm before it: every program some whole rows, summed
in place.

    y = W · x (+ bias) (+ residual)
    y = W · (gain · (x / √(mean(x²) + eps))) (+ bias) (+ residual)

x [1, columns] bf16; gain [columns] bf16; W in bf16 or in the FP8 formats of kernels/_linear.py; residual
[1, rows] bf16, which may be the same memory as y; y [1, rows] bf16 or float32. Weights, x and sums in
float32, one rounding at the end. A norm is rounded as kernels/rms_norm.py does it; each program makes all of
its row for itself.

A tile for tensor cores has 64 rows in linear_few.py, too few tiles for a GPU unless the columns are divided;
then programs write sums, and the last one adds them up. Here a program has a few rows, of which it loads all
columns into registers before it waits for the launch before (weights were written long ago); then x, one
product a weight, and a sum over its threads.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _linear, _whole_rows, rms_norm
from firebox.kernels._experts import BLOCK, DTYPES, FP8
from firebox.kernels._linear import Problem, Weights
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._whole_rows import normed_row, part_of_rows, part_product, row_of_x
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "linear"
FORMATS = ("bf16", *FP8)
LEAST, MOST = 16, 256  # weights a thread


@dataclass(frozen=True)
class Config:
    """A program takes `rows` rows."""

    rows: int
    warps: int


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """As linear_few, without the 4-bit formats."""
    if problem.format not in FORMATS:
        return f"multiplies {', '.join(FORMATS)}, not {problem.format}"
    return _linear.refuse(problem, gpu)


def search_space(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Tiles that are worth compiling."""
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            if LEAST <= rows * _whole_rows.padded(problem.columns) // (32 * warps) <= MOST:
                yield Config(rows, warps)


def default(problem: Problem, gpu: Gpu) -> Config:
    """Four warps and up to 64 weights a thread; of longer rows one."""
    padded = _whole_rows.padded(problem.columns)
    rows = next((rows for rows in (16, 8, 4, 2) if rows * padded <= 64 * 128), 1)
    return Config(rows, 4 if rows * padded <= MOST * 128 else 16)


# ---- 2. the device code


@triton.jit
def linear_whole_rows(
    x, gain, w, scale, row_scale, bias, residual, out, R: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of the result
    mine = tl.minimum(rows, R - 1).to(tl.int64)  # of W: those behind the last read the last one
    at = mine * COLUMNS
    w0 = part_of_rows(w, at, 0, C0, COLUMNS)
    if C1 > 0:
        w1 = part_of_rows(w, at, C0, C1, COLUMNS)
    if C2 > 0:
        w2 = part_of_rows(w, at, C0 + C1, C2, COLUMNS)
    factor = 1.0
    added = tl.zeros((ROWS,), tl.float32)
    scale_at = None
    if scale is not None:
        scale_at = scale + mine // 128 * (COLUMNS // 128)
    if row_scale is not None:
        factor = tl.load(row_scale + mine)
    if bias is not None:
        added = tl.load(bias + mine)
    if gain is not None:
        gains = row_of_x(gain, C0, C1, C2, COLUMNS)
    wait_for_launch_before(PDL)
    xs = row_of_x(x, C0, C1, C2, COLUMNS)
    if gain is not None:
        PARTS: tl.constexpr = 1 + (C1 > 0) + (C2 > 0)
        xs = normed_row(xs, gains, PARTS, COLUMNS, EPS, DTYPE)
    total = part_product(w0, xs[0], scale_at, 0, COLUMNS)
    if C1 > 0:
        total += part_product(w1, xs[1], scale_at, C0, COLUMNS)
    if C2 > 0:
        total += part_product(w2, xs[2], scale_at, C0 + C1, COLUMNS)
    let_next_launch_begin(PDL)
    total = total * factor + added
    live = rows < R
    if residual is not None:
        total += tl.load(residual + rows, mask=live, other=0.0).to(tl.float32)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=live)


# ---- 3. the launch


def request(
    problem: Problem, config: Config, gpu: Gpu, *, eps: float | None = None, interpreted: bool = False
) -> CompileRequest:
    """The compile of this problem. `eps`: of the norm before it, None without one."""
    assert BLOCK % config.rows == 0, config
    types, absent = _linear.arguments(problem, config.rows, 1, tma=False)
    types |= dict.fromkeys(("x",) if eps is None else ("x", "gain"), f"*{_linear.OUT_TYPES[problem.dtype]}")
    absent |= {"gain": None} if eps is None else {}
    pdl = "pdl" in gpu.facts and not interpreted
    constants: dict[str, Any] = {"R": problem.rows, "COLUMNS": problem.columns, "ROWS": config.rows}
    constants |= {"EPS": eps or 0.0, "DTYPE": DTYPES[problem.dtype], "PDL": pdl}
    return CompileRequest(
        kernel=linear_whole_rows,
        signature=types,
        constexprs={name: value for name, value in absent.items() if name != "tiles"}
        | constants
        | _whole_rows.parts(problem.columns),
        gpu=gpu,
        aligned=_linear.aligned(types),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
    )


def run(
    launcher: Launcher,
    problem: Problem,
    x: torch.Tensor,
    weights: Weights,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    gain: torch.Tensor | None = None,
) -> None:
    """Launches `request(...)` for `x` [1, columns]; writes `out` [1, rows]. `gain` [columns]: of the norm, if
    it was compiled for one. All contiguous."""
    assert x.shape[0] == 1, f"one token, not {x.shape[0]}"
    grid = (-(-problem.rows // launcher.request.constexprs["ROWS"]), 1, 1)
    assert (gain is not None) == ("gain" in launcher.request.signature), "a norm's gain, or none"
    norm = {} if gain is None else {"gain": gain}
    launcher(grid, **_linear.bound(launcher, weights, residual), **norm, x=x, out=out)


# ---- 4. the reference: _linear.reference
reference = _linear.reference


def normed_reference(
    problem: Problem,
    eps: float,
    x: torch.Tensor,
    gain: torch.Tensor,
    weights: Weights,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same for `x` [tokens, columns] before the norm with `gain` [columns]: y [tokens, rows] float32."""
    norm = rms_norm.Problem(problem.columns, eps, dtype=problem.dtype)
    return reference(problem, rms_norm.reference(norm, x, gain)["out"], weights, residual)
