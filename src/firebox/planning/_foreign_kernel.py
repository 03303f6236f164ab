"""The grouped expert product that SGLang and vLLM tune, in our words, to be compiled and never run:

    out[r, :] = route[r] · x[r // rows_per_token, :] @ w[expert(r), :, :]ᵀ

    x        [tokens, k]                bf16, fp32, fp8e4nv or int8
    w        [experts, n, k]            bf16, fp32, fp8e4nv, int8, or int4 as [experts, n, k / 2] uint8
    out      [tokens · top_k, n]        bf16; fp32 accumulation (int32 where both operands are int8)
    sorted   [padded rows] int32        rows r in the order of their experts, each expert's padded to BLOCK_M
                                        with a number past the last row
    experts  [padded rows / BLOCK_M] int32
    padded   [1] int32                  how many of the sorted rows count

Scales of w are bf16 for int4 groups, fp32 otherwise. The inner loop loads what theirs loads: gathered rows of
x, one expert's rows of w, with `block` a vector of scales of each, with `group` a scale for every weight; an
int4 weight takes a byte of the tile, since both halves of a byte are loaded on their own. With TMA (SGLang's
second product, whose rows are sorted already) both tiles come through tensor descriptors. Order of programs
is a run-time argument, so that equal tiles are one compile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels.compile import CompileRequest

INT4_ZERO = tl.constexpr(8)


@triton.jit  # type: ignore[untyped-decorator]
def expert_product(
    x: tl.tensor, w: tl.tensor, out: tl.tensor, x_scale: tl.tensor, w_scale: tl.tensor, route: tl.tensor,
    sorted_rows: tl.tensor, experts: tl.tensor, padded: tl.tensor, rows: tl.tensor, n: tl.tensor,
    k: tl.tensor, rows_per_token: tl.tensor, group_m: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALES: tl.constexpr,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, INT4: tl.constexpr, ROUTED: tl.constexpr,
    TMA: tl.constexpr, ACC: tl.constexpr, COMPUTE: tl.constexpr,
) -> None:  # fmt: skip
    """See the formula above. One program: BLOCK_M sorted rows × BLOCK_N columns."""
    # programs run down a column of group_m row blocks before they move on
    columns = tl.cdiv(n, BLOCK_N)
    blocks = tl.cdiv(tl.load(padded), BLOCK_M)
    band = tl.program_id(0) // (group_m * columns)
    if band * group_m >= blocks:
        return
    height = tl.minimum(blocks - band * group_m, group_m)
    within = tl.program_id(0) % (group_m * columns)
    block_m = band * group_m + within % height
    block_n = within // height

    at = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(sorted_rows + at).to(tl.int64)  # [BLOCK_M]
    real = row < rows
    token = row // rows_per_token
    expert = tl.load(experts + block_m).to(tl.int64)
    col = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64) % n  # [BLOCK_N]
    inner = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, k, BLOCK_K):
        within_k = inner < k - start
        if TMA:
            a = x.load([block_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K]
            b = w.load([expert.to(tl.int32), block_n * BLOCK_N, start]).reshape(BLOCK_N, BLOCK_K).T
        else:
            a = tl.load(
                x + token[:, None] * k + (start + inner)[None, :],
                mask=real[:, None] & within_k[None, :],
                other=0.0,
            )
            first = expert * n * k
            if INT4:
                place = (first + col[None, :] * k + (start + inner)[:, None]) // 2
            else:
                place = first + col[None, :] * k + (start + inner)[:, None]
            b = tl.load(w + place, mask=within_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        if SCALES == "group":
            if INT4:
                b = ((b >> ((inner % 2) * 4)[:, None]) & 15).to(tl.float32) - INT4_ZERO
            groups = tl.cdiv(k, SCALE_K)
            scale = tl.load(
                w_scale + (expert * n + col[None, :]) * groups + ((start + inner) // SCALE_K)[:, None],
                mask=within_k[:, None],
                other=0.0,
            )
            acc = tl.dot(a, (b * scale.to(tl.float32)).to(COMPUTE), acc)
        elif SCALES == "block":
            groups = tl.cdiv(k, SCALE_K)
            xs = tl.load(x_scale + token * groups + start // SCALE_K, mask=real, other=0.0)
            bands = tl.cdiv(n, SCALE_N)
            ws = tl.load(w_scale + (expert * bands + col // SCALE_N) * groups + start // SCALE_K)
            acc += tl.dot(a, b).to(tl.float32) * xs[:, None] * ws[None, :]
        else:
            acc = tl.dot(a, b.to(COMPUTE), acc, out_dtype=ACC)

    total = acc.to(tl.float32)
    if SCALES == "weight" or SCALES == "channel":
        total *= tl.load(w_scale + expert * n + col)[None, :]
    if SCALES == "channel":
        total *= tl.load(x_scale + token, mask=real, other=0.0)[:, None]
    if SCALES == "tensor":
        total *= tl.load(x_scale) * tl.load(w_scale + expert)
    if ROUTED:
        total *= tl.load(route + row, mask=real, other=0.0)[:, None]
    out_col = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(
        out + row[:, None] * n + out_col[None, :],
        total.to(tl.bfloat16),
        mask=real[:, None] & (out_col < n)[None, :],
    )


@dataclass(frozen=True)
class Operands:
    """What the product's operands are. `x`, `w`: Triton types; `instruction`: the kind of tensor instruction
    that computes it without conversion; `scales`: "" (none), "tensor", "weight" (one a channel of `w`),
    "channel" (and one a token), "block" or "group"; `block`: (n, k) elements that share a scale of `w`."""

    x: str
    w: str
    instruction: str
    scales: str = ""
    block: tuple[int, int] = (1, 1)
    int4: bool = False


@dataclass(frozen=True)
class Tile:
    """What decides the compile of one entry of a tuning file."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False


_COMPUTE = {"bf16": tl.bfloat16, "fp32": tl.float32, "fp8e4nv": tl.float8e4nv, "i8": tl.int8}


def request(operands: Operands, tile: Tile, routed: bool, gpu: Gpu) -> CompileRequest:
    """The compile of one tile. `routed`: routing weights are multiplied in, as in the second product."""
    x, w = f"*{operands.x}", f"*{operands.w}"
    if tile.tma:
        x = f"tensordesc<{operands.x}[{tile.block_m}, {tile.block_k}]>"
        w = f"tensordesc<{operands.w}[1, {tile.block_n}, {tile.block_k}]>"
    signature = {
        "x": x,
        "w": w,
        "out": "*bf16",
        "x_scale": "*fp32",
        "w_scale": "*bf16" if operands.scales == "group" else "*fp32",
        "route": "*fp32",
        **dict.fromkeys(("sorted_rows", "experts", "padded"), "*i32"),
        **dict.fromkeys(("rows", "n", "k", "rows_per_token", "group_m"), "i32"),
    }
    return CompileRequest(
        expert_product,
        signature,
        _constants(operands, tile, routed),
        gpu,
        aligned=tuple(name for name, kind in signature.items() if kind[0] == "*" or name in ("n", "k")),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        declares=(operands.instruction,),
    )


def _constants(operands: Operands, tile: Tile, routed: bool) -> Mapping[str, Any]:
    exact = operands.x == "i8" and operands.scales != "block"
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SCALES": operands.scales,
        "SCALE_N": operands.block[0],
        "SCALE_K": operands.block[1],
        "INT4": operands.int4,
        "ROUTED": routed,
        "TMA": tile.tma,
        "ACC": tl.int32 if exact else tl.float32,
        "COMPUTE": _COMPUTE[operands.x],
    }
