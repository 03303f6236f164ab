"""Between the projections and attention of a latent layer (MLA), in one launch: the norm of the compressed
keys and values, rotary position embedding of their last part and of the queries' last part, and the write
into the paged cache.

    cache row ← (weight · c / rms, turn(r))        q's last rope_dim columns ← turn(q_b's last rope_dim
    columns)

kv_a [tokens, latent_dim + rope_dim] bf16 (c, then r), rows perhaps columns of a wider matrix; q_b [tokens,
heads · (nope_dim + rope_dim)] bf16, likewise; q [tokens, heads, latent_dim + rope_dim] bf16, whose first
latent_dim columns this kernel leaves alone; cache [pages, page_tokens, 1, latent_dim + rope_dim] in the type
of kv_a, or in float8_e4m3fn after a division by scales[0], float32. cos, sin [max_positions, rope_dim / 2]
float32, positions and token_slots [tokens] int64. `interleaved`: the dimensions that turn together stand in
pairs; the even ones come out first, then the odd ones (layers/rope.py, rotate_pairs).

Rounding as in rope_write.py: the norm's twice, the rotation's once, codes are made of rounded numbers.

Source: own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _kv_write, _rows
from firebox.kernels._experts import DTYPES, POINTER_NAMES
from firebox.kernels._kv_write import FP8, KV_POINTER_NAMES, encoded
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "latent_write"
ELEMENTS = 1024  # that a program turns
WARPS = 4


@dataclass(frozen=True)
class Problem:
    """One layer. `dtype` of kv_a and q: "bf16" or "f16"; `kv_dtype` of the cache: the same, or "fp8"."""

    heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    interleaved: bool
    eps: float = 1e-6
    dtype: str = "bf16"
    kv_dtype: str = "bf16"


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; a rope_dim that is a power of two."""
    p = problem
    for width in (p.latent_dim, p.nope_dim):
        if width % _rows.ALIGNED:
            return f"needs widths that are multiples of {_rows.ALIGNED}, not {width}"
    return _kv_write.refuse(p.dtype, p.kv_dtype, p.rope_dim // 2, gpu)


# ---- 2. the device code


@triton.jit
def _turned(
    base, turn_cos, turn_sin, mask, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, DTYPE: tl.constexpr
):
    """`base` [ROWS, 1] points at 2 · HALF numbers each → both halves of what comes out, [ROWS, HALF]
    float32."""
    if INTERLEAVED:
        wide = tl.load(base + tl.arange(0, 2 * HALF)[None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(wide, (wide.shape[0], HALF, 2)))
    else:
        a = tl.load(base + tl.arange(0, HALF)[None, :], mask=mask, other=0.0)
        b = tl.load(base + HALF + tl.arange(0, HALF)[None, :], mask=mask, other=0.0)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    first = (a * turn_cos - b * turn_sin).to(DTYPE).to(tl.float32)
    second = (b * turn_cos + a * turn_sin).to(DTYPE).to(tl.float32)
    return first, second


@triton.jit
def _store_row(
    row, weight, turn_cos, turn_sin, scales, at, LATENT: tl.constexpr, PADDED: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
    KV_TYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, PADDED)
    lane = tl.arange(0, HALF)[None, :]
    inside = column < LATENT
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scale = None if scales is None else tl.load(scales)
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    values = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    turning = row + LATENT + tl.zeros((1, 1), tl.int32)
    always = tl.full((1, 1), 1, tl.int1)
    first, second = _turned(turning, turn_cos, turn_sin, always, HALF, INTERLEAVED, DTYPE)
    root = tl.rsqrt(tl.sum(values * values, 0) / LATENT + EPS)
    normed = ((values * root).to(DTYPE).to(tl.float32) * gain).to(DTYPE).to(tl.float32)
    tl.store(at + column, encoded(normed, scale, KV_TYPE), mask=inside)
    tl.store(at + LATENT + lane, encoded(first, scale, KV_TYPE))
    tl.store(at + LATENT + HALF + lane, encoded(second, scale, KV_TYPE))


@triton.jit
def _store_queries(
    row, turn_cos, turn_sin, at, first_head, HEADS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`row` and `at` point at what turns of the token's first head."""
    head = first_head + tl.arange(0, BLOCK)[:, None]
    there = head < HEADS
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    first, second = _turned(row + head * STRIDE, turn_cos, turn_sin, there, HALF, INTERLEAVED, DTYPE)
    into = at + head * OUT_STRIDE + tl.arange(0, HALF)[None, :]
    tl.store(into, first.to(DTYPE), mask=there)
    tl.store(into + HALF, second.to(DTYPE), mask=there)


@triton.jit
def write_latent(
    kv_a, weight, q_b, cos, sin, positions, token_slots, scales, q, cache, kv_a_stride, q_b_stride,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, LATENT: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr,
    NOPE: tl.constexpr, INTERLEAVED: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
    KV_TYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs of a token: that of its cache row, then those of its queries, BLOCK heads each."""
    ROW: tl.constexpr = LATENT + 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    lane = tl.arange(0, HALF)[None, :]
    position = tl.load(positions + token)
    turn_cos = tl.load(cos + position * HALF + lane)
    turn_sin = tl.load(sin + position * HALF + lane)
    if program == 0:
        _store_row(
            kv_a + token * kv_a_stride, weight, turn_cos, turn_sin, scales,
            cache + tl.load(token_slots + token) * ROW, LATENT, PADDED, HALF, INTERLEAVED, EPS, DTYPE,
            KV_TYPE, PDL,
        )  # fmt: skip
    else:
        _store_queries(
            q_b + token * q_b_stride + NOPE, turn_cos, turn_sin, q + token * (HEADS * ROW) + LATENT,
            (program - 1) * BLOCK, HEADS, BLOCK, NOPE + 2 * HALF, ROW, HALF, INTERLEAVED, DTYPE, PDL,
        )  # fmt: skip


# ---- 3. the launch


def request(problem: Problem, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of tokens and any strides."""
    p, pdl = problem, "pdl" in gpu.facts and not interpreted
    types, absent = _kv_write.types(p.kv_dtype)
    types |= dict.fromkeys(("kv_a", "weight", "q_b", "q"), f"*{POINTER_NAMES[p.dtype]}")
    types |= {"cache": f"*{KV_POINTER_NAMES[p.kv_dtype]}"}
    constants = {
        "HEADS": p.heads,
        "BLOCK": min(triton.next_power_of_2(p.heads), max(1, ELEMENTS // p.rope_dim)),
        "LATENT": p.latent_dim,
        "PADDED": triton.next_power_of_2(p.latent_dim),
        "HALF": p.rope_dim // 2,
        "NOPE": p.nope_dim,
        "INTERLEAVED": p.interleaved,
        "EPS": p.eps,
        "DTYPE": DTYPES[p.dtype],
        "KV_TYPE": tl.float8e4nv if p.kv_dtype == FP8 else DTYPES[p.kv_dtype],
        "PDL": pdl,
    }
    return CompileRequest(
        write_latent,
        types | {"kv_a_stride": "i32", "q_b_stride": "i32"},
        absent | constants,
        gpu,
        (*_kv_write.pointers(types), "kv_a_stride", "q_b_stride"),
        num_warps=WARPS,
        options={"launch_pdl": True} if pdl else {},
    )


def run(
    launcher: Launcher,
    kv_a: torch.Tensor,
    q_b: torch.Tensor,
    **others: torch.Tensor,
) -> None:
    """Writes the last columns of `q` and the tokens' rows of `cache`. `others`: these, weight, cos, sin,
    positions, token_slots, for an FP8 cache scales; by name, contiguous. positions and token_slots were
    written before the launch before this one began."""
    assert all(other.is_contiguous() for other in others.values())
    c = launcher.request.constexprs
    assert kv_a.shape[1] == c["LATENT"] + 2 * c["HALF"], kv_a.shape
    assert q_b.shape[1] == c["HEADS"] * (c["NOPE"] + 2 * c["HALF"]), q_b.shape
    strides = {"kv_a_stride": _rows.aligned(kv_a), "q_b_stride": _rows.aligned(q_b)}
    grid = (kv_a.shape[0], 1 + -(-c["HEADS"] // c["BLOCK"]), 1)
    launcher(grid, kv_a=kv_a, q_b=q_b, **strides, **others)


# ---- 4. the reference


def reference(
    problem: Problem,
    kv_a: torch.Tensor,
    q_b: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last columns of q [tokens, heads, rope_dim], and the cache's rows [tokens, 1, latent_dim +
    rope_dim] before they are stored; in kv_a's dtype, float32 inside."""
    p, dtype = problem, kv_a.dtype
    latent, k_rope = kv_a.float().split([p.latent_dim, p.rope_dim], dim=-1)
    q_rope = q_b.float().unflatten(-1, (p.heads, -1))[..., p.nope_dim :]
    root = torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + p.eps)
    normed = ((latent * root).to(dtype).float() * weight.float()).to(dtype)
    turns = tuple(table[positions].unsqueeze(1) for table in (cos, sin))
    q_turned, k_turned = (_rotated(p, rows, *turns).to(dtype) for rows in (q_rope, k_rope.unsqueeze(1)))
    return q_turned, torch.cat((normed.unsqueeze(1), k_turned), dim=-1)


def _rotated(problem: Problem, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = (rows[..., 0::2], rows[..., 1::2]) if problem.interleaved else rows.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---- 5. cases and inputs

CASES = (
    Problem(16, 512, 64, 128, interleaved=True),
    Problem(128, 512, 64, 128, interleaved=True, kv_dtype=FP8),
    Problem(5, 512, 64, 128, interleaved=False),
    Problem(3, 320, 32, 64, interleaved=False, kv_dtype=FP8),
)


def inputs(problem: Problem, rows: int, generator: torch.Generator, **kind: Any) -> dict[str, Any]:
    """What the reference takes: kv_a and q_b as columns of wider matrices, the norm's weight, tables of 4,096
    positions, positions. `kind`: dtype and device."""
    p, device, half = problem, kind["device"], problem.rope_dim // 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    angles = torch.arange(4096, device=device).unsqueeze(-1) * 1e4 ** (
        -torch.arange(half, device=device) / half
    )
    kv_a = normal(rows, 48 + p.latent_dim + p.rope_dim) * 3
    q_b = normal(rows, p.heads * (p.nope_dim + p.rope_dim) + 32) * 3
    return {
        "kv_a": kv_a.to(kind["dtype"])[:, 48:],
        "q_b": q_b.to(kind["dtype"])[:, :-32],
        "weight": (normal(p.latent_dim) * 0.3 + 1).to(kind["dtype"]),
        "cos": angles.cos() * 1.1,  # YaRN's factor
        "sin": angles.sin() * 1.1,
        "positions": torch.randint(0, 4096, (rows,), generator=generator, device=device),
    }
