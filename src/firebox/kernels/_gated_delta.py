"""What the kernels of a gated delta net share: its sizes, its weights, and the device code around the
recurrence; layers/gated_delta.py has the formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from firebox.hardware.base import Gpu

UNIT_EPS = tl.constexpr(1e-6)  # of the norms of q and k
STRIDES = ("MIXED_STRIDE", "Z_STRIDE", "B_STRIDE", "A_STRIDE")
UNALIGNED = ("a", "b", "query_start", "state_slots")  # read number by number, perhaps from the middle on


@dataclass(frozen=True)
class Problem:
    """One layer on one GPU. `key_heads` and `heads` (of values): this GPU's share; each key head serves
    heads / key_heads successive value heads. `taps`: inputs the convolution keeps. `eps`: of the norm of the
    output. `dtype`: of activations, "bf16" or "f16". `strides`: numbers from a token's row of mixed, z, b and
    a to the next one's, where they are columns of wider matrices; None: they are as wide as what they hold.
    """

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int
    eps: float
    dtype: str = "bf16"
    strides: tuple[int, int, int, int] | None = None

    @property
    def channels(self) -> int:
        """Of the convolution: q, then k, then v."""
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    @property
    def constants(self) -> dict[str, int]:
        """The strides as the device code names them."""
        widths = (self.channels, self.heads * self.value_dim, self.heads, self.heads)
        return dict(zip(STRIDES, self.strides or widths, strict=True))


@dataclass(frozen=True)
class Weights:
    """`conv` [channels, taps + 1], `dt_bias` and `a_log` [heads] float32; `norm` [value_dim] in the
    activations' type."""

    conv: torch.Tensor
    dt_bias: torch.Tensor
    a_log: torch.Tensor
    norm: torch.Tensor


@dataclass(frozen=True)
class Inputs:
    """What a step brings. `mixed` [tokens, channels], `z` [tokens, heads · value_dim], `a` and `b` [tokens,
    heads]: the four projections, in the activations' type, at the problem's strides. Request r has the tokens
    `query_start`[r] to [r + 1] (int32 [requests + 1]) and the states of slot `state_slots`[r] (int64
    [requests])."""

    mixed: torch.Tensor
    z: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    query_start: torch.Tensor
    state_slots: torch.Tensor


def check_strides(constants: Mapping[str, Any], inputs: Inputs) -> None:
    """The projections lie as the launches were compiled for; `constants` as in Problem."""
    for name, rows in zip(STRIDES, (inputs.mixed, inputs.z, inputs.b, inputs.a), strict=True):
        assert rows.stride() == (constants[name], 1), (name, constants[name], rows.stride())


def refuse(problem: Problem, gpu: Gpu) -> str | None:
    """Why no kernel of this family can run the problem, or None."""
    p = problem
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    if p.heads % p.key_heads:
        return f"needs value heads a multiple of key heads, not {p.heads} and {p.key_heads}"
    for width in (p.key_dim, p.value_dim):
        if width & (width - 1) or not 16 <= width <= 256:
            return f"needs dimensions that are powers of two from 16 to 256, not {width}"
    return None


# ---- device code


@triton.jit
def input_of(mixed, taps, channel, at, first, mask, MIXED_STRIDE: tl.constexpr, TAPS: tl.constexpr):
    """The convolution's input of token `at`: one of the step's, or before `first` one of the kept. `taps`
    points at the slot."""
    now = mask & (at >= first)
    new = tl.load(mixed + at.to(tl.int64) * MIXED_STRIDE + channel, mask=now, other=0.0).to(tl.float32)
    kept = mask & (at < first)
    return new + tl.load(taps + channel * TAPS + (TAPS + at - first), mask=kept, other=0.0)


@triton.jit
def convolved(mixed, taps, conv, channel, at, first, MIXED_STRIDE: tl.constexpr, TAPS: tl.constexpr):
    """silu(convolution) of `channel` [n] at token `at`."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(TAPS + 1):
        token = at + (tap - TAPS) + channel * 0  # the interpreter's masks must be vectors throughout
        x = input_of(mixed, taps, channel, token, first, channel >= 0, MIXED_STRIDE, TAPS)
        total += x * tl.load(conv + channel * (TAPS + 1) + tap)
    return total * tl.sigmoid(total)


@triton.jit
def log_decay(a, a_log, dt_bias):
    """−exp(A_log) · softplus(a + dt_bias), all float32."""
    x = a + dt_bias
    return -tl.exp(a_log) * tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def gated_norm(o, z, weight, EPS: tl.constexpr, VALUE_DIM: tl.constexpr):
    """rms_norm(o) · weight · silu(z) over the last axis, rounded as the layer does, to z's type. `weight` and
    `z` broadcast with `o` float32."""
    o = o.to(z.dtype).to(tl.float32)
    normed = o * tl.rsqrt(tl.sum(o * o, len(o.shape) - 1, keep_dims=True) / VALUE_DIM + EPS)
    scaled = (weight.to(tl.float32) * normed.to(z.dtype).to(tl.float32)).to(z.dtype)
    gate = z.to(tl.float32)
    return (scaled.to(tl.float32) * (gate * tl.sigmoid(gate))).to(z.dtype)


# ---- the oracle


def reference(
    problem: Problem, weights: Weights, inputs: Inputs, conv_state: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [tokens, heads · value_dim] in the activations' type and the two states afterwards; token by token in
    float64."""
    p, dtype = problem, inputs.mixed.dtype
    conv_state, state = conv_state.double(), state.double()
    o = torch.zeros(inputs.mixed.shape[0], p.heads, p.value_dim, dtype=torch.float64, device=state.device)
    starts = inputs.query_start.tolist()
    for first, last, slot in zip(starts[:-1], starts[1:], inputs.state_slots.tolist(), strict=True):
        if last > first:
            _one_request(p, weights, inputs, slice(first, last), conv_state[slot], state[slot], o[first:last])
    wide = o.to(dtype).double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + p.eps)
    normed = weights.norm * normed.to(dtype)
    gate = F.silu(inputs.z.double()).unflatten(-1, (p.heads, -1))
    return (normed.double() * gate).to(dtype).flatten(1), conv_state, state


def _one_request(
    p: Problem,
    weights: Weights,
    inputs: Inputs,
    tokens: slice,
    taps: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Advances `taps` [channels, taps] and `state` [heads, key_dim, value_dim], fills `out`."""
    x = torch.cat((taps.T, inputs.mixed[tokens].double()))
    n = x.shape[0] - p.taps
    summed = sum(x[tap : tap + n] * weights.conv[:, tap].double() for tap in range(p.taps + 1))
    assert isinstance(summed, torch.Tensor)
    taps.copy_(x[n:].T)
    key_rows = p.key_heads * p.key_dim
    q, k, v = F.silu(summed).split([key_rows, key_rows, p.heads * p.value_dim], dim=-1)
    q, k = (
        _unit(part.unflatten(-1, (p.key_heads, -1))).repeat_interleave(p.heads // p.key_heads, 1)
        for part in (q, k)
    )
    v = v.unflatten(-1, (p.heads, -1))
    rate = weights.a_log.double().exp() * F.softplus(inputs.a[tokens].double() + weights.dt_bias.double())
    decay, beta = (-rate).exp(), inputs.b[tokens].double().sigmoid()
    for t in range(n):
        state *= decay[t, :, None, None]
        known = torch.einsum("hk,hkv->hv", k[t], state)
        state += torch.einsum("hk,hv->hkv", k[t], (v[t] - known) * beta[t].unsqueeze(-1))
        out[t] = torch.einsum("hk,hkv->hv", q[t], state) * p.key_dim**-0.5


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + UNIT_EPS.value)
