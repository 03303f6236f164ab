"""Small Triton kernels for tests that compile: dots of every kind, tensor descriptors, dependent launches.
They never run."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels.compile import CompileRequest


@triton.jit
def gemm(a, b, c, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """c [m, n] = a [m, k] @ b [n, k]ᵀ, pipelined over k."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    for start in range(0, k, BK):
        x = tl.load(a + rows[:, None] * k + (start + inner)[None, :])
        w = tl.load(b + cols[None, :] * k + (start + inner)[:, None])
        acc = tl.dot(x, w, acc, out_dtype=ACC)
    tl.store(c + rows[:, None] * n + cols[None, :], acc.to(tl.float32))


@triton.jit
def one_dot(a, b, c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    """c [BM, BN] = a [BM, BK] @ b [BN, BK]ᵀ."""
    rows, cols, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    x = tl.load(a + rows[:, None] * BK + inner[None, :])
    w = tl.load(b + cols[None, :] * BK + inner[:, None])
    tl.store(c + rows[:, None] * BN + cols[None, :], tl.dot(x, w, out_dtype=ACC))


@triton.jit
def one_scaled_dot(
    a, a_scale, b, b_scale, c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FORMAT: tl.constexpr,
    PACK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As one_dot, with PACK elements an item and one scale for GROUP elements along k."""
    rows, cols = tl.arange(0, BM), tl.arange(0, BN)
    items, groups = tl.arange(0, BK // PACK), tl.arange(0, BK // GROUP)
    x = tl.load(a + rows[:, None] * (BK // PACK) + items[None, :])
    w = tl.load(b + cols[None, :] * (BK // PACK) + items[:, None])
    xs = tl.load(a_scale + rows[:, None] * (BK // GROUP) + groups[None, :])
    ws = tl.load(b_scale + cols[:, None] * (BK // GROUP) + groups[None, :])
    tl.store(c + rows[:, None] * BN + cols[None, :], tl.dot_scaled(x, xs, FORMAT, w, ws, FORMAT))


@triton.jit
def narrow(source, target, N: tl.constexpr):
    """target [N] fp8 = source [N] float32."""
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(tl.float8e4nv))


@triton.jit
def copy_tile(source, target, BM: tl.constexpr, BN: tl.constexpr):
    """target = source [BM, BN], a tensor descriptor."""
    tile = source.load([0, 0])
    tl.store(target + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], tile)


@triton.jit
def total(source, target, N: tl.constexpr):
    """target [1] = the sum of source [N]."""
    tl.store(target, tl.sum(tl.load(source + tl.arange(0, N)), 0))


@triton.jit
def dependent(target, N: tl.constexpr):
    """Waits for the launch before it, and lets the next one begin."""
    tl.extra.cuda.gdc_wait()
    tl.store(target + tl.arange(0, N), 1.0)
    tl.extra.cuda.gdc_launch_dependents()


# kind → argument type, accumulator
PLAIN = {
    "bf16": ("bf16", tl.float32),
    "f16": ("fp16", tl.float32),
    "tf32": ("fp32", tl.float32),
    "int8": ("i8", tl.int32),
    "fp8": ("fp8e4nv", tl.float32),
}
# kind → argument type, scale type, format of dot_scaled, elements an item, elements a scale
SCALED = {
    "mxf8": ("fp8e4nv", "u8", "e4m3", 1, 32),
    "mxf4": ("u8", "u8", "e2m1", 2, 32),
    "nvf4": ("u8", "fp8e4nv", "e2m1", 2, 16),
}


def dot_request(kind: str, gpu: Gpu, tile: tuple[int, int, int], **further: Any) -> CompileRequest:
    """One dot of `kind` at tile (BM, BN, BK)."""
    shape = dict(zip(("BM", "BN", "BK"), tile, strict=True))
    if kind in PLAIN:
        dtype, acc = PLAIN[kind]
        signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*i32" if kind == "int8" else "*fp32"}
        kernel, constants = one_dot, {**shape, "ACC": acc}
    else:
        dtype, scale, text, pack, group = SCALED[kind]
        signature = dict(a=f"*{dtype}", a_scale=f"*{scale}", b=f"*{dtype}", b_scale=f"*{scale}", c="*fp32")
        kernel, constants = one_scaled_dot, {**shape, "FORMAT": text, "PACK": pack, "GROUP": group}
    return CompileRequest(
        kernel, signature, constants, gpu, aligned=tuple(signature), declares=(kind,), **further
    )


def gemm_request(
    kind: str, gpu: Gpu, tile: tuple[int, int, int], num_stages: int, **further: Any
) -> CompileRequest:
    """The pipelined product of `kind` at tile (BM, BN, BK)."""
    dtype, acc = PLAIN[kind]
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "c": "*fp32", "n": "i32", "k": "i32"}
    constants = {**dict(zip(("BM", "BN", "BK"), tile, strict=True)), "ACC": acc}
    return CompileRequest(
        gemm, signature, constants, gpu, aligned=tuple(signature), num_stages=num_stages, declares=(kind,),
        **further,
    )  # fmt: skip
