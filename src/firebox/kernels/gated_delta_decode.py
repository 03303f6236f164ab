"""A gated delta net for few tokens a request, in one launch: causal convolution, silu, norms of q and k,
decay, delta rule, gated norm of the output; both states are advanced in place.

    q, k, v = silu(convolution of mixed);  q = q / |q| / √key_dim;  k = k / |k|
    S ← S · exp(−exp(A_log) · softplus(a + dt_bias))
    S ← S + k ⊗ (v − k·S) · sigmoid(b);  o = q·S;  y = rms_norm(o) · weight · silu(z)

Inputs and weights as in kernels/_gated_delta.py; conv_state [slots, channels, taps] and state [slots, heads,
key_dim, value_dim] float32; y [tokens, heads · value_dim]. All in float32; o, its norm and y are rounded to
the activations' type, as layers/gated_delta.py does. q·S is taken as q·S' + (q·k)(v − k·S') · sigmoid(b), S'
the decayed state before the update, so that S is summed over once a token.

A program takes one value head of one request, keeps its state in registers and reads and writes it once. The
kept inputs of q and k are read by all value heads of a key head; the last of these to end (a counter says so;
it is zero before and after) replaces them. A request without tokens does nothing, whatever its slot.

Source: arXiv:2412.06464 for the rule; the kernel is own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels import _gated_delta
from firebox.kernels._experts import POINTER_NAMES
from firebox.kernels._gated_delta import (
    UNALIGNED,
    UNIT_EPS,
    Inputs,
    Problem,
    Weights,
    check_strides,
    convolved,
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

OP = "gated_delta_decode"


@dataclass(frozen=True)
class Config:
    """How many warps keep a head's state. No more threads than key_dim: Triton repeats the loads of shorter
    vectors in every layout that wants them (8 warps for 128 × 128 spilled 700 bytes a thread, 4 none)."""

    warps: int = 4


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs; dimensions that are powers of two, a state that fits in registers."""
    refused = _gated_delta.refuse(problem, gpu)
    if refused is None and problem.key_dim * problem.value_dim > 2**14:
        return f"keeps up to 16,384 numbers of a head, not {problem.key_dim} × {problem.value_dim}"
    return refused


def search_space(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Numbers of warps that are worth compiling."""
    yield from (Config(warps) for warps in (2, 4, 8))


def default(problem: Problem, gpu: Gpu) -> Config:
    """A thread for each of a key's numbers."""
    return Config(max(1, min(problem.key_dim, problem.value_dim, 128) // 32))


def counters(problem: Problem, requests: int, device: torch.device | str) -> torch.Tensor:
    """[requests · key_heads] int32, zero between calls."""
    return torch.zeros(requests * problem.key_heads, dtype=torch.int32, device=device)


# ---- 2. the device code


@triton.jit
def _last_inputs(
    mixed, taps, channel, first, last, WIDTH: tl.constexpr, MIXED_STRIDE: tl.constexpr, TAPS: tl.constexpr
):
    """What is to be kept of `channel` [n], as [n, WIDTH]."""
    j = tl.arange(0, WIDTH)[None, :]
    there = (channel >= 0)[:, None] & (j < TAPS)
    return input_of(mixed, taps, channel[:, None], last - TAPS + j, first, there, MIXED_STRIDE, TAPS)


@triton.jit
def _keep(taps, channel, kept, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """Replaces the inputs of `channel` [n] by `kept` [n, WIDTH]."""
    j = tl.arange(0, WIDTH)[None, :]
    tl.store(taps + channel[:, None] * TAPS + j, kept, mask=(channel >= 0)[:, None] & (j < TAPS))


@triton.jit
def decode_heads(
    mixed, z, a, b, query_start, state_slots, conv, dt_bias, a_log, norm, conv_state, state, counters, y,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, MIXED_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr, A_STRIDE: tl.constexpr, EPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    SCALE: tl.constexpr = KEY_DIM**-0.5
    head = tl.program_id(0)
    request = tl.program_id(1)
    key_head = head // GROUP
    key = tl.arange(0, KEY_DIM)
    value = tl.arange(0, VALUE_DIM)
    of_q = key_head * KEY_DIM + key
    of_k = KEY_HEADS * KEY_DIM + of_q
    of_v = 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + value
    rate = tl.load(a_log + head)
    bias = tl.load(dt_bias + head)
    gain = tl.load(norm + value)
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    first = tl.load(query_start + request)
    last = tl.load(query_start + request + 1)
    if last > first:
        slot = tl.load(state_slots + request).to(tl.int64)
        taps = conv_state + slot * (CHANNELS * TAPS)
        matrix = state + (slot * HEADS + head) * (KEY_DIM * VALUE_DIM)
        matrix += key[:, None] * VALUE_DIM + value[None, :]
        s = tl.load(matrix)  # [KEY_DIM, VALUE_DIM]
        for i in range(last - first):
            t = first + i
            q = convolved(mixed, taps, conv, of_q, t, first, MIXED_STRIDE, TAPS)
            k = convolved(mixed, taps, conv, of_k, t, first, MIXED_STRIDE, TAPS)
            v = convolved(mixed, taps, conv, of_v, t, first, MIXED_STRIDE, TAPS)
            q *= tl.rsqrt(tl.sum(q * q, 0) + UNIT_EPS) * SCALE
            k *= tl.rsqrt(tl.sum(k * k, 0) + UNIT_EPS)
            token = t.to(tl.int64)
            s *= tl.exp(log_decay(tl.load(a + token * A_STRIDE + head).to(tl.float32), rate, bias))
            known = tl.sum(s * k[:, None], 0)
            seen = tl.sum(s * q[:, None], 0)
            change = (v - known) * tl.sigmoid(tl.load(b + token * B_STRIDE + head).to(tl.float32))
            s += k[:, None] * change[None, :]
            o = seen + tl.sum(q * k, 0) * change
            gate = tl.load(z + token * Z_STRIDE + head * VALUE_DIM + value)
            tl.store(
                y + (token * HEADS + head) * VALUE_DIM + value, gated_norm(o, gate, gain, EPS, VALUE_DIM)
            )
        tl.store(matrix, s)
        kept = _last_inputs(mixed, taps, of_v, first, last, WIDTH, MIXED_STRIDE, TAPS)
        tl.debug_barrier()  # all inputs that were kept are read before one is replaced
        _keep(taps, of_v, kept, WIDTH, TAPS)
        counter = counters + request * KEY_HEADS + key_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == GROUP - 1:
            kept_q = _last_inputs(mixed, taps, of_q, first, last, WIDTH, MIXED_STRIDE, TAPS)
            kept_k = _last_inputs(mixed, taps, of_k, first, last, WIDTH, MIXED_STRIDE, TAPS)
            tl.debug_barrier()
            _keep(taps, of_q, kept_q, WIDTH, TAPS)
            _keep(taps, of_k, kept_k, WIDTH, TAPS)
            tl.store(counter, 0)


# ---- 3. the launch


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of requests and of tokens."""
    p, pdl = problem, "pdl" in gpu.facts and not interpreted
    types = dict.fromkeys(("mixed", "z", "a", "b", "norm", "y"), f"*{POINTER_NAMES[p.dtype]}")
    types |= {"query_start": "*i32", "state_slots": "*i64", "counters": "*i32"}
    types |= dict.fromkeys(("conv", "dt_bias", "a_log", "conv_state", "state"), "*fp32")
    constants = {
        "HEADS": p.heads,
        "KEY_HEADS": p.key_heads,
        "KEY_DIM": p.key_dim,
        "VALUE_DIM": p.value_dim,
        "CHANNELS": p.channels,
        "TAPS": p.taps,
        "WIDTH": triton.next_power_of_2(p.taps),
        "EPS": p.eps,
        "PDL": pdl,
        **p.constants,
    }
    aligned = tuple(name for name in types if name not in UNALIGNED)
    options = {"launch_pdl": True} if pdl else {}
    return CompileRequest(
        decode_heads, types, constants, gpu, aligned, num_warps=config.warps, options=options
    )


def run(
    launcher: Launcher,
    inputs: Inputs,
    weights: Weights,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    counters: torch.Tensor,
    y: torch.Tensor,
) -> None:
    """Writes `y` for the requests' tokens; advances both states of their slots, which must differ. `counters`
    (of at least as many requests) are zero and come back zero."""
    requests = inputs.state_slots.shape[0]
    check_strides(launcher.request.constexprs, inputs)
    if requests:
        launcher(
            (launcher.request.constexprs["HEADS"], requests, 1),
            **vars(inputs),
            **vars(weights),
            conv_state=conv_state,
            state=state,
            counters=counters,
            y=y,
        )
