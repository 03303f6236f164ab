"""Root-mean-square norm, with a residual branch added first if there is one:

    x ← x + delta;  out = weight · (x / √(mean(x²) + eps))

x [rows, width] bf16, rows perhaps columns of a wider matrix (`x.stride(0)`); delta [rows, width] bf16; weight
[width] bf16; out [rows, width] bf16, and/or q float8_e4m3fn with scales as kernels/quantise_fp8.py writes
them.

Rounding is that of layers/norm.py: the sum with delta is rounded to bf16 and written back to x; mean, root
and quotient are float32; the quotient is rounded to bf16, then its product with weight. q is made of the
rounded product: the same codes as two launches give.

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
from firebox.kernels import _rows
from firebox.kernels._experts import POINTER_NAMES
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels._rows import PLAIN, Outputs, tile_columns, write_rows
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "rms_norm"
MAX_WIDTH = 16_384  # a row is one program's


@dataclass(frozen=True)
class Problem:
    """`width` of a row: hidden, a latent's or a head's. `delta`: there is a residual branch. `dtype`: of x,
    "bf16" or "f16"."""

    width: int
    eps: float
    delta: bool = False
    outputs: Outputs = PLAIN
    dtype: str = "bf16"


@dataclass(frozen=True)
class Config:
    """A program takes `rows` rows."""

    rows: int
    warps: int


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; rows of up to 16,384."""
    if problem.width > MAX_WIDTH:
        return f"holds a row of up to {MAX_WIDTH} in registers, not {problem.width}"
    return _rows.refuse(problem.width, problem.outputs, gpu)


def search_space(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Tiles with 4 to 64 elements a thread."""
    padded = triton.next_power_of_2(problem.width)
    for rows in (1, 2, 4, 8):
        for warps in (1, 2, 4, 8, 16):
            if rows * padded <= 16_384 and 4 <= rows * padded // (32 * warps) <= 64:
                yield Config(rows, warps)


def default(problem: Problem, gpu: Gpu) -> Config:
    """Tiles of 1,024 elements where rows are narrower than that; 16 elements a thread."""
    padded = triton.next_power_of_2(problem.width)
    rows = max(1, 1024 // padded)
    return Config(rows, warps=max(1, min(16, rows * padded // 512)))


# ---- 2. the device code


@triton.jit
def normalise_rows(
    x, delta, weight, out, q, scales, rows, x_stride, EPS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, LEAST: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program ROWS rows; a tile is [ROWS, GROUPS, GROUP]."""
    column = tile_columns(0, GROUPS, GROUP)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    there = (column < WIDTH) & (row < rows)
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)  # no launch wrote it
    let_next_launch_begin(PDL)
    wait_for_launch_before(PDL)
    at = x + row * x_stride + column
    values = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if delta is not None:
        branch = tl.load(delta + row * WIDTH + column, mask=there, other=0.0)
        summed = (values + branch.to(tl.float32)).to(DTYPE)
        tl.store(at, summed, mask=there)
        values = summed.to(tl.float32)
    squares = tl.sum(tl.sum(values * values, axis=2, keep_dims=True), axis=1, keep_dims=True)
    normed = (values * tl.rsqrt(squares / WIDTH + EPS)).to(DTYPE).to(tl.float32)
    write_rows(normed * gain, out, q, scales, row, 0, there, WIDTH, GROUPS, GROUP, LEAST, DTYPE)


# ---- 3. the launch


def request(
    problem: Problem, gpu: Gpu, config: Config | None = None, *, interpreted: bool = False
) -> CompileRequest:
    """One compile for any number of rows at any stride. `config`: by default the default."""
    config = config or default(problem, gpu)
    pdl = "pdl" in gpu.facts and not interpreted
    types, absent = _rows.arguments(problem.outputs, problem.dtype)
    given = ("x", "weight", "delta") if problem.delta else ("x", "weight")
    types |= dict.fromkeys(given, f"*{POINTER_NAMES[problem.dtype]}")
    absent |= {} if problem.delta else {"delta": None}
    padded = triton.next_power_of_2(problem.width)
    constants = _rows.constants(problem.width, padded, problem.outputs, problem.dtype, pdl=pdl)
    return CompileRequest(
        normalise_rows,
        types | {"rows": "i32", "x_stride": "i32"},
        absent | constants | {"EPS": problem.eps, "ROWS": config.rows},
        gpu,
        (*_rows.pointers(types), "x_stride"),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
    )


def run(launcher: Launcher, x: torch.Tensor, weight: torch.Tensor, **others: torch.Tensor) -> None:
    """Writes those of `out`, `q` and `scales` that the launch was compiled for, given by name in `others`, as
    is `delta`; then it changes `x` too."""
    rows = x.shape[0]
    programs = -(-rows // launcher.request.constexprs["ROWS"])
    launcher((programs, 1, 1), x=x, weight=weight, rows=rows, x_stride=_rows.aligned(x), **others)


# ---- 4. the reference


def reference(
    problem: Problem, x: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What the launch writes, by its name: out, q, scales, and x with delta. In x's dtype, float32 inside."""
    x = x if delta is None else (x.float() + delta.float()).to(x.dtype)
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + problem.eps)).to(x.dtype)
    rows = (normed.float() * weight.float()).to(x.dtype)
    return _rows.written(problem.outputs, rows) | ({} if delta is None else {"x": x})


# ---- 5. cases and inputs

EPS = 1e-5
CASES = (
    *(Problem(width, EPS) for width in (128, 512, 1536, 2880, 5120)),
    Problem(8192, EPS, delta=True),
    Problem(2880, EPS, delta=True),
    Problem(5120, EPS, delta=True, outputs=Outputs(plain=False, fp8=True)),
    Problem(7168, EPS, delta=True, outputs=Outputs(plain=True, fp8=True, group=128)),
    Problem(256, EPS, outputs=Outputs(plain=True, fp8=True, group=128)),
)


def inputs(
    problem: Problem, rows: int, generator: torch.Generator, *, beside: int = 0, **kind: Any
) -> dict[str, Any]:
    """x, weight and perhaps delta; x is the last columns of a matrix that is `beside` wider. `kind`: dtype
    and device."""
    device, dtype = kind["device"], kind["dtype"]
    sizes = torch.logspace(-2, 2, max(rows, 1), device=device)[:rows].unsqueeze(-1)  # rows differ in size
    wide = torch.randn(rows, beside + problem.width, generator=generator, device=device) * sizes
    found: dict[str, Any] = {"x": wide.to(dtype)[:, beside:]}
    found["weight"] = (torch.randn(problem.width, generator=generator, device=device) * 0.2 + 1).to(dtype)
    if problem.delta:
        delta = torch.randn(rows, problem.width, generator=generator, device=device) * sizes
        found["delta"] = delta.to(dtype)
    return found
