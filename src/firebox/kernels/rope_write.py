"""Between the projections and attention, in one launch: norms of queries and keys, rotary position embedding,
and the write into the paged cache.

    q, k ← weight · (q, k) / rms        over each head, over all heads of a token, or not at all
    (a, b) ← (a · cos − b · sin, b · cos + a · sin)      a, b: the halves of the first rotary_dim dimensions

qkv [tokens, columns] bf16: queries (with `gated`, for each head its query, then its gate, which stays where
it is), keys, values, any bias already in them. q [tokens, heads, head_dim] bf16. k_cache and v_cache [pages,
page_tokens, kv_heads, head_dim] in the type of qkv, or in float8_e4m3fn after a division by scales [2]
float32 (of keys, of values). cos, sin [max_positions, rotary_dim / 2] float32, positions [tokens] int64;
token_slots [tokens] int64: page · page_tokens + row. q_weight, k_weight: [head_dim], or [heads · head_dim]
and [kv_heads · head_dim].

Rounding: the norm's as in layers/norm.py (the quotient, then its product with the weight, each to bf16); the
rotation with cos and sin in float32, rounded once. AttentionBlock rounds cos, sin and each product to bf16,
so it is off from this by up to four roundings, this from the formula by one. FP8 codes are made of the
rounded keys.

Each program takes some heads of one token, of its queries, its keys or its values. A head is [SLOTS, HALF],
HALF half of what is rotated, so the partner of slot 0 is slot 1 and the other way round; both are read from
memory, the second from the cache on chip. With a norm over all heads one program takes all of them.

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
from firebox.kernels import _kv_write
from firebox.kernels._experts import DTYPES, POINTER_NAMES
from firebox.kernels._kv_write import FP8, KV_POINTER_NAMES, encoded
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

# ---- 1. the problem

OP = "rope_write"
NORMS = ("", "head", "row")
MAX_ROW = 16_384  # columns of a norm over all heads: one program's


@dataclass(frozen=True)
class Problem:
    """One layer. `qk_norm`: "" for none, "head" or "row" (over all heads). `gated`: there is a gate behind
    each head's query. `dtype` of qkv and q: "bf16" or "f16"; `kv_dtype` of the cache: the same, or "fp8"."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm: str = ""
    eps: float = 1e-6
    gated: bool = False
    dtype: str = "bf16"
    kv_dtype: str = "bf16"

    @property
    def columns(self) -> int:
        """Of qkv."""
        return (self.heads * (2 if self.gated else 1) + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Config:
    """A program takes up to `heads` of one token; all of them with a norm over all."""

    heads: int
    warps: int


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; a rotary_dim that is a power of two and whose half divides head_dim."""
    p, half = problem, problem.rotary_dim // 2
    if p.qk_norm not in NORMS:
        return f"knows the norms {NORMS}, not {p.qk_norm!r}"
    reason = _kv_write.refuse(p.dtype, p.kv_dtype, half, gpu)
    if reason is None and (p.head_dim % half or p.head_dim < p.rotary_dim):
        reason = f"divides a head into pieces of {half}, which {p.head_dim} has not"
    if reason is None and p.qk_norm == "row" and p.heads * p.head_dim > MAX_ROW:
        reason = f"norms a row of up to {MAX_ROW} columns, not {p.heads * p.head_dim}"
    return reason


def search_space(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Tiles with 4 to 64 elements a thread."""
    every, width = triton.next_power_of_2(problem.heads), triton.next_power_of_2(problem.head_dim)
    for heads in (every,) if problem.qk_norm == "row" else (1, 2, 4, 8, 16, 32, 64):
        for warps in (1, 2, 4, 8, 16):
            if heads <= every and 4 <= heads * width // (32 * warps) <= 64:
                yield Config(heads, warps)


def default(problem: Problem, gpu: Gpu) -> Config:
    """1,024 elements, or a whole row; 8 to 32 a thread."""
    every, width = triton.next_power_of_2(problem.heads), triton.next_power_of_2(problem.head_dim)
    heads = every if problem.qk_norm == "row" else min(every, max(1, 1024 // width))
    return Config(heads, warps=max(1, min(16, heads * width // 256)))


# ---- 2. the device code


@triton.jit
def normed(
    values, gain, squares, NORM: tl.constexpr, NORM_WIDTH: tl.constexpr, EPS: tl.constexpr,
    DTYPE: tl.constexpr
):  # fmt: skip
    """`values` times `gain` over their root mean square, whose `squares` are summed already, rounded twice;
    without a NORM as they are."""
    if NORM != "":
        quotient = (values * tl.rsqrt(squares / NORM_WIDTH + EPS)).to(DTYPE).to(tl.float32)
        values = (quotient * gain).to(DTYPE).to(tl.float32)
    return values


@triton.jit
def _turned(
    base, weight, turn_cos, turn_sin, first_head, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of a token from `first_head` on, normed, rotated and rounded [BLOCK, SLOTS, HALF] float32.
    `base`: its first head, the next ones STRIDE behind each other. Waits for the launch before."""
    head = first_head + tl.arange(0, BLOCK)[:, None, None]
    slot = tl.arange(0, SLOTS)[None, :, None]
    lane = tl.arange(0, HALF)[None, None, :]
    place = slot * HALF + lane
    other = tl.where(slot < 2, 1 - slot, slot) * HALF + lane  # where the partner stands
    there = (head < HEADS) & (place < HEAD_DIM)
    rotated = there & (slot < 2)
    gain = 1.0
    other_gain = 1.0
    if NORM == "head":
        gain = tl.load(weight + place, mask=place < HEAD_DIM, other=0.0).to(tl.float32)
        other_gain = tl.load(weight + other, mask=slot + lane * 0 < 2, other=0.0).to(tl.float32)
    if NORM == "row":
        gain = tl.load(weight + head * HEAD_DIM + place, mask=there, other=0.0).to(tl.float32)
        other_gain = tl.load(weight + head * HEAD_DIM + other, mask=rotated, other=0.0).to(tl.float32)
    let_next_launch_begin(PDL)
    wait_for_launch_before(PDL)
    own = tl.load(base + head * STRIDE + place, mask=there, other=0.0).to(tl.float32)
    partner = tl.load(base + head * STRIDE + other, mask=rotated, other=0.0).to(tl.float32)
    squares = tl.sum(tl.sum(own * own, axis=2, keep_dims=True), axis=1, keep_dims=True)  # [BLOCK, 1, 1]
    if NORM == "row":
        squares = tl.sum(squares, axis=0, keep_dims=True)
    NORM_WIDTH: tl.constexpr = HEADS * HEAD_DIM if NORM == "row" else HEAD_DIM
    own = normed(own, gain, squares, NORM, NORM_WIDTH, EPS, DTYPE)
    partner = normed(partner, other_gain, squares, NORM, NORM_WIDTH, EPS, DTYPE)
    sign = tl.where(slot == 0, -1.0, 1.0)
    turned = own * turn_cos + sign * (partner * turn_sin)
    return tl.where(slot < 2, turned, own).to(DTYPE).to(tl.float32)


@triton.jit
def _store_queries(
    row, weight, turn_cos, turn_sin, q, token, first, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    turned = _turned(
        row, weight, turn_cos, turn_sin, first,
        HEADS, BLOCK, STRIDE, HEAD_DIM, SLOTS, HALF, NORM, EPS, DTYPE, PDL,
    )  # fmt: skip
    head = first + tl.arange(0, BLOCK)[:, None, None]
    place = _places(SLOTS, HALF)
    at = q + (token * HEADS + head) * HEAD_DIM + place
    tl.store(at, turned.to(DTYPE), mask=(head < HEADS) & (place < HEAD_DIM))


@triton.jit
def _store_keys(
    row, weight, turn_cos, turn_sin, cache, token_slot, scales, first, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, DTYPE: tl.constexpr, KV_TYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    scale = None if scales is None else tl.load(scales)
    turned = _turned(
        row, weight, turn_cos, turn_sin, first,
        HEADS, BLOCK, HEAD_DIM, HEAD_DIM, SLOTS, HALF, NORM, EPS, DTYPE, PDL,
    )  # fmt: skip
    head = first + tl.arange(0, BLOCK)[:, None, None]
    place = _places(SLOTS, HALF)
    at = cache + (token_slot * HEADS + head) * HEAD_DIM + place
    tl.store(at, encoded(turned, scale, KV_TYPE), mask=(head < HEADS) & (place < HEAD_DIM))


@triton.jit
def _store_values(
    row, cache, token_slot, scales, first, HEADS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    SLOTS: tl.constexpr, HALF: tl.constexpr, KV_TYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = first + tl.arange(0, BLOCK)[:, None, None]
    place = _places(SLOTS, HALF)
    there = (head < HEADS) & (place < HEAD_DIM)
    scale = None if scales is None else tl.load(scales + 1)
    let_next_launch_begin(PDL)
    wait_for_launch_before(PDL)
    values = tl.load(row + head * HEAD_DIM + place, mask=there, other=0.0).to(tl.float32)
    at = cache + (token_slot * HEADS + head) * HEAD_DIM + place
    tl.store(at, encoded(values, scale, KV_TYPE), mask=there)


@triton.jit
def _places(SLOTS: tl.constexpr, HALF: tl.constexpr):
    """The dimensions of a head, [1, SLOTS, HALF]."""
    return tl.arange(0, SLOTS)[None, :, None] * HALF + tl.arange(0, HALF)[None, None, :]


@triton.jit
def rotate_and_write(
    qkv, q_weight, k_weight, cos, sin, positions, token_slots, scales, q, k_cache, v_cache,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr,
    HALF: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr, DTYPE: tl.constexpr, KV_TYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs of a token: those of its queries, then of its keys, then of its values."""
    Q_STRIDE: tl.constexpr = 2 * HEAD_DIM if GATED else HEAD_DIM
    Q_PROGRAMS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    KV_PROGRAMS: tl.constexpr = (KV_HEADS + KV_BLOCK - 1) // KV_BLOCK
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    row = qkv + token * (HEADS * Q_STRIDE + 2 * KV_HEADS * HEAD_DIM)
    keys = row + HEADS * Q_STRIDE
    position = tl.load(positions + token)
    token_slot = tl.load(token_slots + token)
    lane = tl.arange(0, HALF)[None, None, :]
    turn_cos = tl.load(cos + position * HALF + lane)
    turn_sin = tl.load(sin + position * HALF + lane)
    if program < Q_PROGRAMS:
        _store_queries(
            row, q_weight, turn_cos, turn_sin, q, token, program * BLOCK,
            HEADS, BLOCK, Q_STRIDE, HEAD_DIM, SLOTS, HALF, NORM, EPS, DTYPE, PDL,
        )  # fmt: skip
    elif program < Q_PROGRAMS + KV_PROGRAMS:
        _store_keys(
            keys, k_weight, turn_cos, turn_sin, k_cache, token_slot, scales,
            (program - Q_PROGRAMS) * KV_BLOCK, KV_HEADS, KV_BLOCK, HEAD_DIM, SLOTS, HALF, NORM, EPS, DTYPE,
            KV_TYPE, PDL,
        )  # fmt: skip
    else:
        _store_values(
            keys + KV_HEADS * HEAD_DIM, v_cache, token_slot, scales,
            (program - Q_PROGRAMS - KV_PROGRAMS) * KV_BLOCK, KV_HEADS, KV_BLOCK, HEAD_DIM, SLOTS, HALF,
            KV_TYPE, PDL,
        )  # fmt: skip


# ---- 3. the launch


def request(
    problem: Problem, gpu: Gpu, config: Config | None = None, *, interpreted: bool = False
) -> CompileRequest:
    """One compile for any number of tokens. `config`: by default the default."""
    p, config = problem, config or default(problem, gpu)
    pdl = "pdl" in gpu.facts and not interpreted
    types, absent = _kv_write.types(p.kv_dtype)
    given = ("qkv", "q", "q_weight", "k_weight") if p.qk_norm else ("qkv", "q")
    types |= dict.fromkeys(given, f"*{POINTER_NAMES[p.dtype]}")
    types |= dict.fromkeys(("k_cache", "v_cache"), f"*{KV_POINTER_NAMES[p.kv_dtype]}")
    absent |= {} if p.qk_norm else dict.fromkeys(("q_weight", "k_weight"))
    every_kv = triton.next_power_of_2(p.kv_heads)
    constants = {
        "HEADS": p.heads,
        "KV_HEADS": p.kv_heads,
        "HEAD_DIM": p.head_dim,
        "SLOTS": triton.next_power_of_2(p.head_dim // (p.rotary_dim // 2)),
        "HALF": p.rotary_dim // 2,
        "GATED": p.gated,
        "NORM": p.qk_norm,
        "EPS": p.eps,
        "BLOCK": config.heads,
        "KV_BLOCK": every_kv if p.qk_norm == "row" else min(config.heads, every_kv),
        "DTYPE": DTYPES[p.dtype],
        "KV_TYPE": tl.float8e4nv if p.kv_dtype == FP8 else DTYPES[p.kv_dtype],
        "PDL": pdl,
    }
    return CompileRequest(
        rotate_and_write,
        types,
        absent | constants,
        gpu,
        _kv_write.pointers(types),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
    )


def run(launcher: Launcher, qkv: torch.Tensor, **others: torch.Tensor) -> None:
    """Writes `q`, and the tokens' rows of `k_cache` and `v_cache`. `others`: these, cos, sin, positions,
    token_slots, with a norm q_weight and k_weight, for an FP8 cache scales; by name, contiguous. positions
    and token_slots were written before the launch before this one began."""
    assert qkv.is_contiguous() and all(other.is_contiguous() for other in others.values())
    c = launcher.request.constexprs
    assert qkv.shape[1] == (c["HEADS"] * (1 + c["GATED"]) + 2 * c["KV_HEADS"]) * c["HEAD_DIM"], qkv.shape
    programs = -(-c["HEADS"] // c["BLOCK"]) + 2 * -(-c["KV_HEADS"] // c["KV_BLOCK"])
    launcher((qkv.shape[0], programs, 1), qkv=qkv, **others)


# ---- 4. the reference


def reference(
    problem: Problem,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [tokens, heads, head_dim], and keys and values [tokens, kv_heads, head_dim] before they are stored;
    in qkv's dtype, float32 inside."""
    p = problem
    q_columns = p.heads * p.head_dim * (2 if p.gated else 1)
    kv_columns = p.kv_heads * p.head_dim
    parts = qkv.split([q_columns, kv_columns, kv_columns], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, p.head_dim)) for part in parts)
    if p.gated:
        q = q[:, ::2]
    turns = tuple(table[positions].unsqueeze(1) for table in (cos, sin))
    q, k = (
        _rotated(_norm(p, rows, weight), *turns).to(qkv.dtype)
        for rows, weight in ((q, q_weight), (k, k_weight))
    )
    return q, k, v


def _norm(problem: Problem, rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """`rows` [tokens, heads, head_dim], normed, in their dtype's numbers."""
    if weight is None:
        return rows.float()
    over = (-2, -1) if problem.qk_norm == "row" else (-1,)
    wide, weight = rows.float(), weight.view(-1, problem.head_dim).float()
    root = torch.rsqrt(wide.pow(2).mean(over, keepdim=True) + problem.eps)
    return ((wide * root).to(rows.dtype).float() * weight).to(rows.dtype).float()


def _rotated(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    a, b, rest = rows[..., :half], rows[..., half : 2 * half], rows[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


# ---- 5. cases and inputs

CASES = (
    Problem(24, 2, 128, 64, "head"),
    Problem(12, 1, 128, 64),
    Problem(64, 8, 64, 64),
    Problem(48, 8, 128, 64, "row"),
    Problem(12, 3, 128, 64, "row", kv_dtype=FP8),
    Problem(32, 4, 128, 128, "head", kv_dtype=FP8),
    Problem(8, 2, 256, 64, "head", gated=True),
    Problem(5, 3, 192, 128, gated=True, kv_dtype=FP8),
)


def inputs(problem: Problem, rows: int, generator: torch.Generator, **kind: Any) -> dict[str, Any]:
    """What the reference takes: qkv, tables of 4,096 positions, positions and perhaps weights. `kind`: dtype
    and device."""
    p, device, half = problem, kind["device"], problem.rotary_dim // 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    angles = torch.arange(4096, device=device).unsqueeze(-1) * 1e4 ** (
        -torch.arange(half, device=device) / half
    )
    found: dict[str, Any] = {"qkv": (normal(rows, p.columns) * 3).to(kind["dtype"])}
    found |= {"cos": angles.cos() * 1.1, "sin": angles.sin() * 1.1}  # 1.1: YaRN's factor
    found["positions"] = torch.randint(0, 4096, (rows,), generator=generator, device=device)
    if p.qk_norm:
        widths = (p.heads, p.kv_heads) if p.qk_norm == "row" else (1, 1)
        for name, heads in zip(("q_weight", "k_weight"), widths, strict=True):
            found[name] = (normal(heads * p.head_dim) * 0.3 + 1).to(kind["dtype"])
    return found
