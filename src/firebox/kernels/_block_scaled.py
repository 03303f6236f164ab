"""What the kernels of block-scaled tensor instructions share: which instruction a format takes, and the
device code of one step.

    acc [TOKENS, ROWS] += (x · x_scale) [TOKENS, DEPTH] · (w · w_scale) [ROWS, DEPTH]ᵀ

    kind   x                      w      a scale for      instruction, OPs a clock
    nvf4   E2M1, E4M3 scales      E2M1   16 columns       mma kind::mxf4nvf4 scale_vec::4X, 4 × bf16's
    mxf4   E2M1, E8M0 scales      E2M1   32 columns       mma kind::mxf4 scale_vec::2X, 4 × bf16's
    mxf8   E4M3, E8M0 scales      E2M1   32 columns       mma kind::mxf8f6f4, 2 × bf16's

In mxf8 the weights are turned into E4M3, which holds E2M1 · 2⁻⁶ exactly; the accumulator is owed 2⁶. The
instruction could take E2M1 beside E4M3 as it stands, but no Triton up to 3.9 has a way to say so.

Weights lie as formats/layouts.py says of nibbles. A product does not depend on the order of its columns
as long as both operands have the same one, so activations are written in the order of the words
(kernels/quantise_groups.py), and weights are read as they lie.

NVFP4 on a GPU without the instruction, and under the interpreter: Triton 3.6 has no other code for E4M3
scales, and 3.9's interpreter reads them as E8M0. EMULATED multiplies decoded numbers instead, exact in tf32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._experts import GROUP_SCALE_TYPES, POINTER_NAMES, Problem, Weights, refuse
from firebox.kernels._sorted import biased, scaled
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_gate_up import Config


@dataclass(frozen=True)
class Rounded:
    """Activations as kernels/quantise_groups.py leaves them: `q` [rows, columns / 2] uint8 or [rows, columns]
    float8_e4m3fn; `scales` [rows, groups padded] float8_e4m3fn or uint8 E8M0; `row_scale` [rows] float32, in
    nvf4 only."""

    q: torch.Tensor
    scales: torch.Tensor
    row_scale: torch.Tensor | None


KINDS = {"nvfp4_nibbles": ("nvf4",), "mxfp4_nibbles": ("mxf8", "mxf4")}
GROUPS = {"nvf4": 16, "mxf4": 32, "mxf8": 32}
NEVER = 1 << 30  # tokens
BF16_SHARE = 0.5  # of its rate that a weight-only product is taken to reach


def kind_of(problem: Problem) -> str:
    """The block-scaled kind in which a format's experts are computed. NVFP4 with 4-bit activations, which is
    what its checkpoints are calibrated for; MXFP4 with 8-bit ones: its models were trained with such weights,
    not activations, and E2M1 under a power of two for 32 columns is 12 % off, E4M3 2.7 %."""
    return KINDS[problem.format][0]


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """GPUs whose tensor cores have the instruction, weights in nibbles."""
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if problem.format not in KINDS:
        return f"knows no {problem.format} weights"
    if f"mma.{kind_of(problem)}" not in gpu.facts:
        return f"{gpu.name} has no mma.{kind_of(problem)}"
    return refuse(problem)


def scale_type(kind: str) -> str:
    """Triton's type of group scales, weights' and activations'."""
    return GROUP_SCALE_TYPES["nvfp4_nibbles" if kind == "nvf4" else "mxfp4_nibbles"]


def search_space(rows_there: int, tokens: int) -> Iterator[Config]:
    """Tiles of `tokens` choices that are worth compiling, for a matrix of `rows_there` rows."""
    for rows, depth, warps, stages in itertools.product((64, 128, 256), (128, 256), (4, 8), (2, 3, 4)):
        if rows <= rows_there and 16 <= rows * tokens / (32 * warps) <= 128:
            yield Config(rows, tokens, depth, warps, stages, flip=True)


def default(rows_there: int, tokens: int) -> Config:
    """A tile that fits in 99 KiB whatever the kind."""
    rows = next(rows for rows in (128, 64, 32, 16) if rows <= rows_there)
    return Config(rows, tokens, 128, 4 if tokens < 128 else 8, 3, flip=True)


def request(
    kernel: Any, problem: Problem, kind: str, config: Config, constants: dict[str, Any], gpu: Gpu,
    further: dict[str, str] | None = None,
) -> CompileRequest:  # fmt: skip
    """The compile of either kernel; `further` arguments with their Triton types."""
    nvf4 = kind == "nvf4"
    present = {
        "x": "*fp8e4nv" if kind == "mxf8" else "*u8",
        "x_scale": f"*{scale_type(kind)}",
        "x_row_scale": "*fp32" if nvf4 else "",
        "w": "*u8",
        "scale": f"*{scale_type(kind)}",
        "row_scale": "*fp32" if nvf4 else "",
        "bias": "*fp32" if problem.biases else "",
        "out": f"*{POINTER_NAMES[problem.dtype]}",
        "order": "*i32",
        "blocks": "*i32",
    }
    types = {name: type for name, type in (present | (further or {})).items() if type}
    absent = dict.fromkeys(name for name, type in present.items() if not type)
    return CompileRequest(
        kernel,
        types,
        absent | constants,
        gpu,
        tuple(types),
        num_warps=config.warps,
        num_stages=config.stages,
        options=({"launch_pdl": True} if constants["PDL"] else {}) | _family(kind, gpu),
        declares=(kind,),
    )


def _family(kind: str, gpu: Gpu) -> dict[str, str]:
    """Triton 3.6 and 3.7 know these instructions for 12.0 only: they emulate them on 12.1, or do not compile.
    This says for which GPU Triton lowers; the binary is for the one that is there (read back on 12.1: the
    instruction, and the target sm_121a)."""
    return {"arch": "sm120"} if f"mma.{kind}" in gpu.facts else {}


def constants(
    problem: Problem, kind: str, columns: int, config: Config, block: int, gpu: Gpu, *, interpreted: bool
) -> dict[str, Any]:
    """The constants that both kernels have. `columns`: of the matrix; `block`: choices of a block, 0 for as
    many as the tile's."""
    return {
        "HIDDEN": problem.hidden,
        "INTER": problem.inter,
        "GROUPS": padded_groups(columns, GROUPS[kind]),
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "PARTS": (block or config.tokens) // config.tokens,
        "DEPTH": config.depth,
        "STAGES": config.stages,
        "KIND": kind,
        "GROUP": GROUPS[kind],
        "EMULATED": kind == "nvf4" and (interpreted or f"mma.{kind}" not in gpu.facts),
        "PDL": "pdl" in gpu.facts and not interpreted,
    }


def bound(launcher: Launcher, weights: Weights, x: Rounded) -> dict[str, Any]:
    """The weights and activations as the launch's arguments."""
    found = {"w": weights.w.view(torch.uint8), "scale": weights.scale, "x": x.q, "x_scale": x.scales}
    further = {"row_scale": weights.row_scale, "bias": weights.bias, "x_row_scale": x.row_scale}
    signature = launcher.request.signature
    return found | {name: tensor for name, tensor in further.items() if name in signature}


def padded_groups(columns: int, group: int) -> int:
    """Groups of a row as they lie in memory."""
    return -(-columns // group // 16) * 16


def native_from(problem: Problem, gpu: Gpu) -> int:
    """The number of tokens from which the native product is taken to be faster: a guess from the data sheet,
    since no such GPU was there to measure.

    Few choices an expert: both paths wait for the same weights, and weight-only needs no rounding of
    activations, which costs a launch and accuracy. Its bf16 products take longer than the reading once an
    expert has more than bytes · rate / (2 · bandwidth) choices, with `BF16_SHARE` of the rate."""
    group = problem.group
    rate, bandwidth = gpu.bf16_tflop_s, gpu.bandwidth_gb_s
    if accepts(problem, gpu) is not None or not rate or not bandwidth:
        return NEVER
    bytes_per_weight = 0.5 + 1 / group
    choices = bytes_per_weight * BF16_SHARE * rate * 1e3 / (2 * bandwidth)
    return max(65, round(choices * problem.experts / problem.top_k))


# ---- device code


@triton.jit
def e2m1_as_e4m3(packed, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Two codes to a byte [ROWS, DEPTH / 2] → E4M3 [ROWS, DEPTH], times 2⁻⁶: sign to bit 7, magnitude to bits
    4 … 2, subnormal or not."""
    low = ((packed & 8) << 4) | ((packed & 7) << 2)
    high = (packed & 128) | (packed >> 2 & 28)
    return tl.reshape(tl.join(low, high), (ROWS, DEPTH)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _e2m1_value(code):
    """Codes of 0 … 15 in float32."""
    magnitude = (code & 7).to(tl.int32)
    exponent = magnitude >> 1
    steps = tl.where(exponent == 0, magnitude, 2 + (magnitude & 1)).to(tl.float32) * 0.5
    value = steps * tl.where(exponent == 3, 4.0, tl.where(exponent == 2, 2.0, 1.0))
    return tl.where(code >= 8, -value, value)


@triton.jit
def _decoded(packed, scale, ROWS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """Two codes to a byte and E4M3 scales → float32 [ROWS, DEPTH]."""
    both = tl.join(_e2m1_value(packed & 15), _e2m1_value(packed >> 4))
    groups = tl.reshape(both, (ROWS, DEPTH // GROUP, GROUP))
    return tl.reshape(groups * scale.to(tl.float32)[:, :, None], (ROWS, DEPTH))


@triton.jit
def _loaded(rows, columns, THERE: tl.constexpr, MASKED: tl.constexpr):
    """`columns` of `rows` [n, 1]; nothing from THERE on."""
    if MASKED:
        nothing = 0 if rows.dtype.element_ty == tl.uint8 else 0.0
        return tl.load(rows + columns[None, :], mask=(columns < THERE)[None, :], other=nothing)
    else:
        return tl.load(rows + columns[None, :])


@triton.jit
def add_step(
    acc, x, x_scale, w, scale, first, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """acc + the columns `first` … first + DEPTH; those from COLUMNS on are not there. `x`, `x_scale`, `w` and
    `scale` point at rows [n, 1], all of which are there."""
    MASKED: tl.constexpr = COLUMNS % DEPTH != 0
    pair = first // 2 + tl.arange(0, DEPTH // 2)
    group = first // GROUP + tl.arange(0, DEPTH // GROUP)
    wt = _loaded(w, pair, COLUMNS // 2, MASKED)
    ws = _loaded(scale, group, COLUMNS // GROUP, MASKED)
    xs = _loaded(x_scale, group, COLUMNS // GROUP, MASKED)
    if KIND == "mxf8":
        xt = _loaded(x, first + tl.arange(0, DEPTH), COLUMNS, MASKED)
        of_w = e2m1_as_e4m3(wt, ROWS, DEPTH)
        return tl.dot_scaled(xt, xs, "e4m3", tl.trans(of_w), ws, "e4m3", acc)
    else:
        xt = _loaded(x, pair, COLUMNS // 2, MASKED)
        if EMULATED:
            of_x = _decoded(xt, xs, TOKENS, DEPTH, GROUP)
            of_w = _decoded(wt, ws, ROWS, DEPTH, GROUP)
            return tl.dot(of_x, tl.trans(of_w), acc)
        else:
            return tl.dot_scaled(xt, xs, "e2m1", tl.trans(wt), ws, "e2m1", acc)


@triton.jit
def finished(acc, x_row_scale, at, live, row_scale, bias, rows, KIND: tl.constexpr):
    """`acc` [TOKENS, ROWS] with the scales of activations' rows `at` and of the weights' `rows`, and with
    biases, as far as there are any."""
    if KIND == "mxf8":
        acc *= 64.0  # what e2m1_as_e4m3 left
    if x_row_scale is not None:
        of_token = tl.load(x_row_scale + at, mask=live, other=0.0)
        acc = scaled(acc, tl.load(row_scale + rows), of_token, True)
    if bias is not None:
        acc = biased(acc, tl.load(bias + rows), True)
    return acc
