"""What the kernels of a dense linear layer share: its sizes, its weights as they lie in memory, the oracle,
and the device code of one step.

    acc [ROWS, TOKENS] += w [ROWS, DEPTH] · x [TOKENS, DEPTH]ᵀ

Weights are those of the expert kernels (kernels/_experts.py), but for 4-bit floats in nibbles: those are for
the block-scaled products of experts.

Columns and rows behind the last whole step are masked within the pipelined loop, not handled behind it:
there Triton 3.6 reads past its shared memory on sm_90 (see _experts.pipeline_depths).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from firebox.formats.layouts import unpack_words
from firebox.hardware.base import Gpu
from firebox.kernels import _experts
from firebox.kernels._experts import BLOCK, FP8, NIBBLES
from firebox.kernels._words import decode, scales_of
from firebox.kernels.launch import Launcher

FORMATS = tuple(format for format in _experts.FORMATS if format not in NIBBLES)
ROW_SCALED = _experts.ROW_SCALED
GROUPS = {**dict.fromkeys(_experts.INTEGERS, _experts.INT4_GROUPS), "mxfp4": (32,), "nvfp4": (16,)}
WEIGHT_TYPES = _experts.WEIGHT_TYPES
SCALE_TYPES = _experts.GROUP_SCALE_TYPES
OUT_TYPES = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}


@dataclass(frozen=True)
class Problem:
    """One linear layer on one GPU: y [tokens, rows] = x [tokens, columns] · Wᵀ (+ bias) (+ residual).
    `format`: of W, one of FORMATS. `group`: columns that share a scale in the 4-bit formats, 0 in the others.
    `dtype`: of x and of the residual, "bf16" or "f16"; `out_dtype`: of y, `dtype` or "f32". `normed`: x is
    what a norm wrote, which writes FP8 codes where these are multiplied (layers/norm_gpu.py)."""

    rows: int
    columns: int
    format: str
    group: int = 0
    bias: bool = False
    residual: bool = False
    dtype: str = "bf16"
    out_dtype: str = "bf16"
    normed: bool = False


@dataclass(frozen=True)
class Weights:
    """`w` [rows, columns] bf16 or float8_e4m3fn, or words [rows, columns / 4] uint16 (formats/layouts.py).
    `scale`: of blocks [⌈rows / 128⌉, columns / 128] float32, or of groups [rows, groups padded to 16]: bf16
    (int4_group), uint8 E8M0 (mxfp4), float8_e4m3fn (nvfp4), int32 (int4_zero: the scale as bf16 in the low
    half, −(128 + zero) as bf16 in the high half). `row_scale` [rows] float32 in fp8_tensor, fp8_channel and
    nvfp4, so that stacked parts keep theirs. `bias` [rows] float32."""

    w: torch.Tensor
    scale: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def refuse(problem: Problem, gpu: Gpu) -> str | None:
    """Why no kernel of this family can run the problem on `gpu`, or None."""
    p = problem
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if p.format not in FORMATS:
        return f"knows no {p.format} weights"
    if p.format in FP8 and "fp8" not in gpu.facts:
        return f"has no FP8 type on {gpu.name}"
    if p.group not in GROUPS.get(p.format, (0,)):
        return f"knows no groups of {p.group} columns in {p.format}"
    if p.out_dtype not in (p.dtype, "f32"):
        return f"writes {p.dtype} or f32, not {p.out_dtype}"
    unit = BLOCK if p.format == "fp8_block" else max(p.group, 16)
    if p.columns % unit:
        return f"needs columns a multiple of {unit} in {p.format}, not {p.columns}"
    return None


def operand(problem: Problem) -> str:
    """What weights are multiplied as where they are not multiplied as they are stored."""
    return "f16" if problem.format in FP8 else problem.dtype


def weight_bytes(problem: Problem) -> float:
    """Bytes of one weight, its scales not counted."""
    return 0.5 if problem.group else 1.0 if problem.format in FP8 else 2.0


def total_bytes(problem: Problem) -> float:
    """Bytes of the matrix with its scales: what a product of few tokens must read."""
    per_group = {"i32": 4, "bf16": 2}.get(SCALE_TYPES.get(problem.format, ""), 1)
    scales = per_group / problem.group if problem.group else 0.0
    return problem.rows * problem.columns * (weight_bytes(problem) + scales)


def per_word(problem: Problem) -> int:
    """Weights of one stored item."""
    return 4 if problem.group else 1


def arguments(problem: Problem, rows: int, depth: int, *, tma: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """The arguments w, tiles, scale, row_scale, bias, residual and out: those that are there with their
    Triton types, and the others as constants None."""
    pointers = _experts.POINTER_NAMES
    kind = pointers[problem.dtype] if problem.format == "bf16" else WEIGHT_TYPES[problem.format]
    present = {
        "w": f"*{kind}",
        "tiles": f"tensordesc<{kind}[{rows}, {depth // per_word(problem)}]>" if tma else "",
        "scale": f"*{SCALE_TYPES[problem.format]}" if problem.format in SCALE_TYPES else "",
        "row_scale": "*fp32" if problem.format in ROW_SCALED else "",
        "bias": "*fp32" if problem.bias else "",
        "residual": f"*{pointers[problem.dtype]}" if problem.residual else "",
        "out": f"*{OUT_TYPES[problem.out_dtype]}",
    }
    types = {name: type for name, type in present.items() if type}
    return types, dict.fromkeys(name for name, type in present.items() if not type)


def constants(problem: Problem, gpu: Gpu, *, interpreted: bool) -> dict[str, Any]:
    """The constants that both kernels have."""
    multiply, group = operand(problem), problem.group
    return {
        "R": problem.rows,
        "COLUMNS": problem.columns,
        "GROUPS": -(-problem.columns // group // 16) * 16 if group else 0,
        "FORMAT": problem.format,
        "DTYPE": _experts.DTYPES[multiply],
        "GROUP": group,
        "ASM": group > 0 and multiply == "bf16" and not interpreted,
        "PDL": "pdl" in gpu.facts and not interpreted,
    }


def aligned(types: dict[str, str]) -> tuple[str, ...]:
    """Arguments that are divisible by 16: all pointers."""
    return tuple(name for name, type in types.items() if type.startswith("*"))


def bound(launcher: Launcher, weights: Weights, residual: torch.Tensor | None) -> dict[str, Any]:
    """The weights and the residual as the launch's arguments."""
    signature = launcher.request.signature
    found = {
        name: getattr(weights, name) for name in ("w", "scale", "row_scale", "bias") if name in signature
    }
    assert (residual is not None) == ("residual" in signature), "compiled for another kind of residual"
    if residual is not None:
        found["residual"] = residual
    if "tiles" in signature:
        found["tiles"] = descriptor(weights.w, signature["tiles"])
    return found


def descriptor(matrix: torch.Tensor, type: str) -> TensorDescriptor:
    """A tensor descriptor of `matrix` for an argument of Triton type "tensordesc<kind[rows, columns]>"."""
    box = [int(size) for size in type.partition("[")[2].rstrip("]>").split(",")]
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box)


def dequantised(problem: Problem, weights: Weights) -> torch.Tensor:
    """W [rows, columns] in float32, as the stored numbers mean it. The kernels' oracle."""
    w, scale, group = weights.w, weights.scale, problem.group
    if group:
        assert scale is not None
        factors, zeros = _experts.factors_and_zeros(problem.format, scale[:, : problem.columns // group])
        codes = unpack_words(w, group, _experts.word_bits(problem.format))
        values = codes.float() if problem.format in _experts.INTEGERS else _experts.e2m1(codes)
        matrix = ((values.unflatten(1, (-1, group)) - zeros) * factors).flatten(1)
    elif problem.format == "fp8_block":
        assert scale is not None
        wide = scale.repeat_interleave(BLOCK, 0)[: problem.rows].repeat_interleave(BLOCK, 1)
        matrix = w.float() * wide
    else:
        matrix = w.float()
    return matrix if weights.row_scale is None else matrix * weights.row_scale.unsqueeze(-1)


def reference(
    problem: Problem, x: torch.Tensor, weights: Weights, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """y [tokens, rows] in float32."""
    y = x.float() @ dequantised(problem, weights).T
    if weights.bias is not None:
        y = y + weights.bias
    return y if residual is None else y + residual.float()


# ---- device code


@triton.jit
def groups_of(
    scale, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The scales of DEPTH columns for each word, and −(128 + zero) (the same again where there are none)."""
    live = None
    if MASKED:
        live = first // GROUP + tl.arange(0, DEPTH // GROUP) < COLUMNS // GROUP
    return scales_of(scale, first, live, ROWS, DEPTH, GROUP, FORMAT, DTYPE, ASM)


@triton.jit
def stored(
    w, tiles, first_row, rows, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[ROWS, DEPTH / PER] as they lie in memory. `w` points at the matrix, `rows` [ROWS] are in it."""
    if tiles is None:
        i = first // PER + tl.arange(0, DEPTH // PER)
        at = w + rows[:, None].to(tl.int64) * (COLUMNS // PER) + i[None, :]
        if MASKED:
            nothing = 0.0 if PER == 1 else 0
            there = (i < COLUMNS // PER)[None, :]
            return tl.load(at, mask=there, other=nothing, eviction_policy="evict_first")
        else:
            return tl.load(at, eviction_policy="evict_first")
    else:
        return tiles.load([first_row, first // PER])


@triton.jit
def bf16_to_f16(x):
    """Saturates at ±65,504; three instructions for two numbers. NaN stays NaN."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 low, high;
        shl.b32 low, $1, 16; and.b32 high, $1, 0xFFFF0000;
        cvt.rn.satfinite.f16x2.f32 $0, high, low; }""",
        "=r,r",
        [x],
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def as_operand(x, DTYPE: tl.constexpr):
    """`x` as what weights are turned into; as it is if they are not."""
    if DTYPE is None:
        return x
    elif tl.float16 == DTYPE and x.dtype == tl.bfloat16:
        return bf16_to_f16(x)
    else:
        return x.to(DTYPE)


@triton.jit
def columns_of_x(
    x,
    token_live,
    first,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The columns of `x` that DEPTH columns of weights meet: for words one matrix for each of their four
    codes, otherwise one (four times). `x` points at rows [TOKENS, 1]."""
    if GROUP > 0:
        RUN: tl.constexpr = GROUP // 4
        i = tl.arange(0, DEPTH // 4)
        column = first + (i // RUN) * GROUP + i % RUN
        live = token_live[:, None]
        if MASKED:
            live = live & (column < COLUMNS)[None, :]
        x0 = tl.load(x + column[None, :], mask=live, other=0.0)
        x1 = tl.load(x + (column + RUN)[None, :], mask=live, other=0.0)
        x2 = tl.load(x + (column + 2 * RUN)[None, :], mask=live, other=0.0)
        x3 = tl.load(x + (column + 3 * RUN)[None, :], mask=live, other=0.0)
        return x0, x1, x2, x3
    else:
        i = first + tl.arange(0, DEPTH)
        live = token_live[:, None]
        if MASKED:
            live = live & (i < COLUMNS)[None, :]
        xt = tl.load(x + i[None, :], mask=live, other=0.0)
        return xt, xt, xt, xt


@triton.jit
def words_product(
    acc, words, wide, minus, x0, x1, x2, x3, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):
    """acc + Σ over the four codes of a word, as _expert_tiles.four_products."""
    w0, w1, w2, w3 = decode(words, minus, FORMAT, DTYPE, ASM)
    acc = tl.dot(w0 * wide, tl.trans(x0), acc)
    acc = tl.dot(w1 * wide, tl.trans(x1), acc)
    acc = tl.dot(w2 * wide, tl.trans(x2), acc)
    return tl.dot(w3 * wide, tl.trans(x3), acc)


@triton.jit
def step(
    acc, w, tiles, first_row, rows, scale, x, x_tiles, first_token, x_scale, token_live, first,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, X_GROUP: tl.constexpr, ASM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """acc + the columns `first` … first + DEPTH. `scale` points at rows [ROWS, 1] of groups or blocks, `x` at
    rows [TOKENS, 1]. DTYPE: what both are turned into, None for a product of their own type. X_GROUP: columns
    of x that share an `x_scale` (0: nothing to apply here)."""
    PER: tl.constexpr = 4 if GROUP > 0 else 1
    wt = stored(w, tiles, first_row, rows, first, ROWS, COLUMNS, DEPTH, PER, MASKED)
    if GROUP > 0:
        wide, minus = groups_of(scale, first, ROWS, COLUMNS, DEPTH, GROUP, FORMAT, DTYPE, ASM, MASKED)
        x0, x1, x2, x3 = columns_of_x(x, token_live, first, COLUMNS, DEPTH, GROUP, MASKED)
        acc = words_product(acc, wt, wide, minus, x0, x1, x2, x3, FORMAT, DTYPE, ASM)
    else:
        if x_tiles is None:
            xt, _, _, _ = columns_of_x(x, token_live, first, COLUMNS, DEPTH, GROUP, MASKED)
        else:
            xt = x_tiles.load([first_token, first])
        if DTYPE is not None:
            wt = wt.to(DTYPE)
        xt = as_operand(xt, DTYPE)
        if X_GROUP > 0 or scale is not None:
            part = tl.dot(wt, tl.trans(xt))
            if X_GROUP > 0:
                part *= tl.load(x_scale + first // X_GROUP, mask=token_live, other=0.0)[None, :]
            if scale is not None:
                part *= tl.load(scale + first // 128)
            acc += part
        else:
            acc = tl.dot(wt, tl.trans(xt), acc)
    return acc


@triton.jit
def finish(y, bias, residual, out, at, live):
    """Bias (as wide as y) and residual are added in float32; one rounding; the store, at the places `at`."""
    if bias is not None:
        y += bias
    if residual is not None:
        y += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live)


@triton.jit
def add_up(
    partial, bias, residual, out, tokens, first, stop, rows, live_rows, R: tl.constexpr, ROWS: tl.constexpr,
    SLICES: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """The sums of all slices, `partial` [SLICES, tokens, R], of the tokens `first` … `stop` and these rows:
    slice by slice, SUMMED tokens at a time, and then `finish`. Around the L1 cache (.cg), which may hold what
    stood there before."""
    for before in range(first, stop, SUMMED):
        t = before + tl.arange(0, SUMMED)
        live = (t < stop)[:, None] & live_rows[None, :]
        at = t[:, None].to(tl.int64) * R + rows[None, :]
        total = tl.zeros((SUMMED, ROWS), tl.float32)
        for s in tl.static_range(SLICES):
            of_slice = partial + tokens.to(tl.int64) * s * R
            total += tl.load(of_slice + at, mask=live, other=0.0, cache_modifier=".cg")
        finish(total, None if bias is None else tl.trans(bias), residual, out, at, live)
