"""A gated delta net for many tokens a request: the formula of kernels/gated_delta_decode.py, 64 tokens at a
time, for all requests of a step in four launches.

Within a chunk let c_i be the sum of the logarithms of the decays up to token i, and S₀ the state before it.
With u_i = β_i (v_i − exp(g_i) S_{i−1}ᵀ k_i) the recurrence S_i = exp(g_i) S_{i−1} + k_i u_iᵀ unrolls to

    (I + A) U = diag(β) V − diag(β e^c) K S₀,   A_ij = β_i e^(c_i − c_j) k_i·k_j below the diagonal, else 0
    U = U₀ − W S₀,   U₀ = T diag(β) V,   W = T diag(β e^c) K,   T = (I + A)⁻¹
    O = diag(e^c) Q S₀ + (Q Kᵀ ∘ e^(c_i − c_j), on and below the diagonal) U
    S ← e^(c_last) S₀ + (diag(e^(c_last − c)) K)ᵀ U

so that only U₀ − W S₀ and the update walk from chunk to chunk. T: blocks of 16 on the diagonal by
substitution, D⁻¹; with N = D⁻¹ (A's blocks below), whose fourth power is 0, T = (I − N)(I + N²) D⁻¹.
(Squaring A itself would lose all digits where keys are alike.)

Launches: 1 convolution, silu, norms of q and k; 2 T, U₀, W, c of every chunk and head; 3 the walk, for a part
of the value columns, which also replaces the convolution's kept inputs; 4 the gated norm, in place. Inputs,
weights and states as in kernels/_gated_delta.py; the state is float32, products are of the activations' type
with float32 sums, those that make T tf32. A program finds its chunk from query_start, so nothing is known on
the host but upper bounds.

Source: arXiv:2412.06464 and arXiv:2406.06484 for the idea; derivation and kernels are own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _gated_delta
from firebox.kernels._experts import DTYPES, POINTER_NAMES
from firebox.kernels._gated_delta import (
    UNALIGNED,
    UNIT_EPS,
    Inputs,
    Problem,
    Weights,
    check_strides,
    gated_norm,
    input_of,
    log_decay,
    reference,
)
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher

__all__ = ["reference"]

# ---- 1. the problem

OP = "gated_delta_chunk"
CHUNK = 64
BLOCK = tl.constexpr(16)  # of the diagonal of T
TILE = 16  # tokens that a program convolves
NORM_ROWS = 8
MOST_REQUESTS = 1024


@dataclass(frozen=True)
class Config:
    """`columns` of values that a program of the walk takes; warps of the launches that multiply."""

    columns: int = 32
    warps: int = 8
    walk_warps: int = 8


@dataclass(frozen=True)
class Scratch:
    """`q`, `k` [tokens, key_heads, key_dim], `v`, `u` [tokens, heads, value_dim], `w` [tokens, heads,
    key_dim] in the activations' type, `c` [tokens, heads] float32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    u: torch.Tensor
    w: torch.Tensor
    c: torch.Tensor


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; dimensions that are powers of two."""
    return _gated_delta.refuse(problem, gpu)


def default(problem: Problem, gpu: Gpu) -> Config:
    """For want of a tuned one."""
    return Config(columns=min(32, problem.value_dim))


def scratch(problem: Problem, tokens: int, dtype: torch.dtype, device: torch.device | str) -> Scratch:
    """For up to so many tokens a step."""
    p = problem

    def empty(heads: int, width: int) -> torch.Tensor:
        return torch.empty(tokens, heads, width, dtype=dtype, device=device)

    return Scratch(
        q=empty(p.key_heads, p.key_dim),
        k=empty(p.key_heads, p.key_dim),
        v=empty(p.heads, p.value_dim),
        u=empty(p.heads, p.value_dim),
        w=empty(p.heads, p.key_dim),
        c=torch.empty(tokens, p.heads, device=device),
    )


# ---- 2. the device code


@triton.jit
def _find_chunk(query_start, requests, n, CHUNK: tl.constexpr, REQUESTS: tl.constexpr):
    """The n-th chunk of the step: its request (`requests`: there is no such chunk), the request's first
    token, the chunk's, and the request's end."""
    r = tl.arange(0, REQUESTS)
    start = tl.load(query_start + r, mask=r < requests, other=0)
    end = tl.load(query_start + r + 1, mask=r < requests, other=0)
    count = (end - start + CHUNK - 1) // CHUNK
    request = tl.sum((tl.cumsum(count, 0) <= n).to(tl.int32) * (r < requests).to(tl.int32), 0)
    mine = r == request
    first = tl.sum(tl.where(mine, start, 0), 0)
    before = tl.sum(tl.where(r < request, count, 0), 0)
    return request, first, first + (n - before) * CHUNK, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _convolved_tile(
    mixed, taps, conv, channel, token, first, there, MIXED_STRIDE: tl.constexpr, TAPS: tl.constexpr
):
    """silu(convolution) [TILE, n] of `channel` [1, n] at `token` [TILE, 1]."""
    total = tl.zeros((token.shape[0], channel.shape[1]), tl.float32)
    for tap in tl.static_range(TAPS + 1):
        x = input_of(mixed, taps, channel, token + (tap - TAPS), first, there, MIXED_STRIDE, TAPS)
        total += x * tl.load(conv + channel * (TAPS + 1) + tap)
    return total * tl.sigmoid(total)


@triton.jit
def convolve_chunks(
    mixed, query_start, state_slots, conv, conv_state, q, k, v, requests,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, MIXED_STRIDE: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, REQUESTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TILE tokens of a chunk and one head of q, k or v."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    head = tl.program_id(1)
    request, first, start, last = _find_chunk(query_start, requests, tl.program_id(0), CHUNK, REQUESTS)
    if request < requests:
        slot = tl.load(state_slots + request).to(tl.int64)
        taps = conv_state + slot * (CHANNELS * TAPS)
        token = start + tl.program_id(2) * TILE + tl.arange(0, TILE)[:, None]
        there = token < last
        if head < 2 * KEY_HEADS:
            key = tl.arange(0, KEY_DIM)[None, :]
            mask = there & (key >= 0)
            of_q = head * KEY_DIM + key
            x = _convolved_tile(mixed, taps, conv, of_q, token, first, mask, MIXED_STRIDE, TAPS)
            x *= tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) + UNIT_EPS)
            at = (token.to(tl.int64) * KEY_HEADS + head % KEY_HEADS) * KEY_DIM + key
            if head < KEY_HEADS:
                tl.store(q + at, (x * KEY_DIM**-0.5).to(q.dtype.element_ty), mask=mask)
            else:
                tl.store(k + at, x.to(k.dtype.element_ty), mask=mask)
        else:
            value = tl.arange(0, VALUE_DIM)[None, :]
            mask_v = there & (value >= 0)
            of_head = head - 2 * KEY_HEADS
            channel = 2 * KEY_HEADS * KEY_DIM + of_head * VALUE_DIM + value
            y = _convolved_tile(mixed, taps, conv, channel, token, first, mask_v, MIXED_STRIDE, TAPS)
            at_v = (token.to(tl.int64) * HEADS + of_head) * VALUE_DIM + value
            tl.store(v + at_v, y.to(v.dtype.element_ty), mask=mask_v)


@triton.jit
def _diagonal_inverse(a, CHUNK: tl.constexpr):
    """(I + a)⁻¹ of `a` [blocks, BLOCK, BLOCK], strictly lower, as a block-diagonal [CHUNK, CHUNK]: column by
    column, what row s has found is taken from all rows below."""
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    row = tl.arange(0, BLOCK)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    x = tl.where((row == column) & (a == a), 1.0, 0.0)
    for s in tl.static_range(BLOCK - 1):
        of_row = tl.sum(tl.where(row == s, x, 0.0), 1)[:, None, :]
        x -= tl.sum(tl.where(column == s, a, 0.0), 2)[:, :, None] * of_row
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    wide = tl.where(same, x[:, :, None, :], 0.0)  # [BLOCKS, BLOCK, BLOCKS, BLOCK]
    return tl.reshape(wide, (CHUNK, CHUNK))


@triton.jit
def solve_chunks(
    a, b, query_start, dt_bias, a_log, k, v, u, w, c, requests,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    B_STRIDE: tl.constexpr, A_STRIDE: tl.constexpr, CHUNK: tl.constexpr, REQUESTS: tl.constexpr,
    DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """U₀, W and c of one chunk and value head."""
    head = tl.program_id(1)
    rate = tl.load(a_log + head)
    bias = tl.load(dt_bias + head)
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    request, _, start, last = _find_chunk(query_start, requests, tl.program_id(0), CHUNK, REQUESTS)
    if request < requests:
        i = tl.arange(0, CHUNK)
        there = start + i < last
        token = (start + i).to(tl.int64)
        at = token * HEADS + head
        change = tl.load(a + token * A_STRIDE + head, mask=there, other=0.0).to(tl.float32)
        total = tl.cumsum(tl.where(there, log_decay(change, rate, bias), 0.0), 0)
        strength = tl.load(b + token * B_STRIDE + head, mask=there, other=0.0).to(tl.float32)
        beta = tl.where(there, tl.sigmoid(strength), 0.0)
        tl.store(c + at, total, mask=there)
        key = tl.arange(0, KEY_DIM)
        value = tl.arange(0, VALUE_DIM)
        at_k = (token * KEY_HEADS + head // (HEADS // KEY_HEADS)) * KEY_DIM
        keys = tl.load(k + at_k[:, None] + key[None, :], mask=there[:, None], other=0.0)  # [CHUNK, KEY_DIM]
        fall = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))
        products = tl.dot(keys, tl.trans(keys)) * beta[:, None] * fall
        lower = tl.where(i[:, None] > i[None, :], products, 0.0)
        inside = i[:, None] // BLOCK == i[None, :] // BLOCK
        diagonal = tl.where(inside, lower, 0.0)
        BLOCKS: tl.constexpr = CHUNK // BLOCK
        blocks = tl.sum(tl.reshape(diagonal, (BLOCKS, BLOCK, BLOCKS, BLOCK)), 2)  # one of the four is not 0
        inverse = _diagonal_inverse(blocks, CHUNK)
        n = tl.dot(inverse, tl.where(inside, 0.0, lower), input_precision="tf32")
        n2 = tl.dot(n, n, input_precision="tf32")
        one = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
        t = tl.dot(one - n + n2 - tl.dot(n, n2, input_precision="tf32"), inverse, input_precision="tf32")
        t = t.to(DTYPE)
        weighted = (keys.to(tl.float32) * (beta * tl.exp(total))[:, None]).to(DTYPE)
        at_w = w + at[:, None] * KEY_DIM + key[None, :]
        tl.store(at_w, tl.dot(t, weighted).to(DTYPE), mask=there[:, None])
        at_v = at[:, None] * VALUE_DIM + value[None, :]
        values = tl.load(v + at_v, mask=there[:, None], other=0.0)
        values = (values.to(tl.float32) * beta[:, None]).to(DTYPE)
        tl.store(u + at_v, tl.dot(t, values).to(DTYPE), mask=there[:, None])


@triton.jit
def _move_taps(
    mixed, conv_state, slot, channel, first, last, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    WIDTH: tl.constexpr, MIXED_STRIDE: tl.constexpr,
):  # fmt: skip
    """Replaces the kept inputs of `channel` [n, 1], which nobody else reads any more."""
    taps = conv_state + slot * (CHANNELS * TAPS)
    j = tl.arange(0, WIDTH)[None, :]
    mask = (channel >= 0) & (j < TAPS)
    kept = input_of(mixed, taps, channel, last - TAPS + j, first, mask, MIXED_STRIDE, TAPS)
    tl.debug_barrier()  # all are read before one is replaced
    tl.store(taps + channel * TAPS + j, kept, mask=mask)


@triton.jit
def walk_chunks(
    mixed, query_start, state_slots, conv_state, state, q, k, u, w, c, y,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, MIXED_STRIDE: tl.constexpr,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One request, value head and COLUMNS of its values, from chunk to chunk."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    part = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    first = tl.load(query_start + request)
    last = tl.load(query_start + request + 1)
    if last > first:
        slot = tl.load(state_slots + request).to(tl.int64)
        key = tl.arange(0, KEY_DIM)
        value = part * COLUMNS + tl.arange(0, COLUMNS)
        matrix = state + (slot * HEADS + head) * (KEY_DIM * VALUE_DIM)
        matrix += key[:, None] * VALUE_DIM + value[None, :]
        s = tl.load(matrix)  # [KEY_DIM, COLUMNS]
        i = tl.arange(0, CHUNK)
        for start in range(first, last, CHUNK):
            there = (start + i < last)[:, None]
            at = (start + i).to(tl.int64) * HEADS + head
            at_k = (((start + i).to(tl.int64) * KEY_HEADS + head // GROUP) * KEY_DIM)[:, None] + key[None, :]
            total = tl.load(c + at, mask=start + i < last, other=0.0)
            end = tl.load(c + (tl.minimum(start + CHUNK, last) - 1).to(tl.int64) * HEADS + head)
            old = s.to(DTYPE)
            ws = tl.load(w + at[:, None] * KEY_DIM + key[None, :], mask=there, other=0.0)
            at_v = at[:, None] * VALUE_DIM + value[None, :]
            change = tl.load(u + at_v, mask=there, other=0.0).to(tl.float32) - tl.dot(ws, old)
            change = change.to(DTYPE)  # [CHUNK, COLUMNS]
            keys = tl.load(k + at_k, mask=there, other=0.0)
            queries = tl.load(q + at_k, mask=there, other=0.0)
            fall = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))
            scores = tl.where(i[:, None] >= i[None, :], tl.dot(queries, tl.trans(keys)) * fall, 0.0)
            o = tl.dot(queries, old) * tl.exp(total)[:, None]
            o = tl.dot(scores.to(DTYPE), change, o)
            tl.store(y + at_v, o.to(DTYPE), mask=there)
            left = tl.where(start + i < last, tl.exp(tl.minimum(end - total, 0.0)), 0.0)
            keys = (keys.to(tl.float32) * left[:, None]).to(DTYPE)
            s = tl.dot(tl.trans(keys), change, s * tl.exp(end))
        tl.store(matrix, s)
        if part == 0:
            of_v = 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + tl.arange(0, VALUE_DIM)[:, None]
            _move_taps(mixed, conv_state, slot, of_v, first, last, CHANNELS, TAPS, WIDTH, MIXED_STRIDE)
            if head % GROUP == 0:
                of_q = head // GROUP * KEY_DIM + key[:, None]
                of_k = KEY_HEADS * KEY_DIM + of_q
                _move_taps(mixed, conv_state, slot, of_q, first, last, CHANNELS, TAPS, WIDTH, MIXED_STRIDE)
                _move_taps(mixed, conv_state, slot, of_k, first, last, CHANNELS, TAPS, WIDTH, MIXED_STRIDE)


@triton.jit
def norm_rows(
    z, norm, y, first_row, end_row, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, Z_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = rms_norm(y) · weight · silu(z), for ROWS heads of tokens; row t · HEADS + h: head h of token t."""
    value = tl.arange(0, VALUE_DIM)[None, :]
    gain = tl.load(norm + value)
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    there = (row < end_row) & (value >= 0)
    at = y + row.to(tl.int64) * VALUE_DIM + value
    at_z = (row // HEADS).to(tl.int64) * Z_STRIDE + row % HEADS * VALUE_DIM
    o = tl.load(at, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(z + at_z + value, mask=there, other=0.0)
    tl.store(at, gated_norm(o, gate, gain, EPS, VALUE_DIM), mask=there)


# ---- 3. the launch


def requests(
    problem: Problem, config: Config, gpu: Gpu, *, most_requests: int = 256, interpreted: bool = False
) -> tuple[CompileRequest, ...]:
    """The four launches, for any number of tokens and up to `most_requests` requests."""
    p, pdl = problem, "pdl" in gpu.facts and not interpreted
    assert most_requests <= MOST_REQUESTS, most_requests
    types = dict.fromkeys(
        ("mixed", "z", "a", "b", "norm", "q", "k", "v", "u", "w", "y"), f"*{POINTER_NAMES[p.dtype]}"
    )
    types |= dict.fromkeys(("conv", "dt_bias", "a_log", "conv_state", "state", "c"), "*fp32")
    types |= {"query_start": "*i32", "state_slots": "*i64"}
    types |= dict.fromkeys(("requests", "first_row", "end_row"), "i32")
    constants = {
        "HEADS": p.heads,
        "KEY_HEADS": p.key_heads,
        "KEY_DIM": p.key_dim,
        "VALUE_DIM": p.value_dim,
        "CHANNELS": p.channels,
        "TAPS": p.taps,
        "WIDTH": triton.next_power_of_2(p.taps),
        "CHUNK": CHUNK,
        "TILE": TILE,
        "REQUESTS": triton.next_power_of_2(most_requests),
        "COLUMNS": config.columns,
        "ROWS": NORM_ROWS,
        "EPS": p.eps,
        "DTYPE": DTYPES[p.dtype],
        "PDL": pdl,
        **p.constants,
    }
    made = []
    for kernel, warps, declares in (
        (convolve_chunks, 4, ()),
        (solve_chunks, config.warps, (p.dtype, "tf32")),
        (walk_chunks, config.walk_warps, (p.dtype,)),
        (norm_rows, 4, ()),
    ):
        signature = {name: types[name] for name in kernel.arg_names if name in types}
        made.append(
            CompileRequest(
                kernel,
                signature,
                {name: value for name, value in constants.items() if name in kernel.arg_names},
                gpu,
                tuple(n for n, type in signature.items() if type.startswith("*") and n not in UNALIGNED),
                num_warps=warps,
                num_stages=2,
                options={"launch_pdl": True} if pdl else {},
                declares=declares,
            )
        )
    return tuple(made)


def run(
    launchers: tuple[Launcher, ...],
    problem: Problem,
    inputs: Inputs,
    weights: Weights,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    scratch: Scratch,
    y: torch.Tensor,
    tokens: range | None = None,
) -> None:
    """Writes `y` [tokens, heads · value_dim] for the requests' tokens; advances both states of their slots,
    which must differ; changes `scratch`. `tokens`: those that the requests have, if not all that the inputs
    are of; `query_start` counts from the first of all."""
    p, count = problem, inputs.state_slots.shape[0]
    tokens = range(inputs.mixed.shape[0]) if tokens is None else tokens
    check_strides(p.constants, inputs)
    if not tokens:
        return
    most_chunks = len(tokens) // CHUNK + count
    parts = p.value_dim // launchers[2].request.constexprs["COLUMNS"]
    grids = (
        (most_chunks, 2 * p.key_heads + p.heads, CHUNK // TILE),
        (most_chunks, p.heads, 1),
        (parts, p.heads, count),
        (-(-len(tokens) * p.heads // NORM_ROWS), 1, 1),
    )
    given = {**vars(inputs), **vars(weights), **vars(scratch), "conv_state": conv_state, "state": state}
    given |= {"y": y, "requests": count}
    given |= {"first_row": tokens.start * p.heads, "end_row": tokens.stop * p.heads}
    for launcher, grid in zip(launchers, grids, strict=True):
        launcher(grid, **{name: given[name] for name in launcher.request.signature})
