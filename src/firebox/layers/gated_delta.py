"""A gated delta net layer (Yang et al., 2024, arXiv:2412.06464) with its norm and residual: linear attention
over a recurrent state."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from firebox.attention.base import RecurrentSpec
from firebox.formats import fp8_block
from firebox.formats.base import Cut, PlainSlot, Slots
from firebox.kernels.select import TORCH, Choice, select
from firebox.layers import gated_delta_gpu
from firebox.layers.base import Build
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm
from firebox.step import Step

if TYPE_CHECKING:
    from firebox.kernels.plan import Operation, Setting

OP = "gated_delta_block"
GATES = ("in_proj_b", "in_proj_a")  # few numbers that scale others: never requantised


class GatedDeltaBlock:
    """x + out(norm(o) · silu(z)), token by token and head by head, with h = norm(x) and the state S [key_dim,
    value_dim]:

        q, k, v = silu(causal convolution of in_qkv(h));  q = q / |q| / √key_dim;  k = k / |k|
        S ← S · exp(−exp(A_log) · softplus(in_a(h) + dt_bias))
        S ← S + k ⊗ (v − k·S) · sigmoid(in_b(h));  o = q·S

    Each of `key_heads` serves value_heads / key_heads successive value heads. The layer composed of torch
    operators walks a request's tokens one by one, so its states are the same to the bit however a prompt is
    cut into chunks. `name`: the module's path; `layer`: the index of its state in `step.caches`.

    `ins` are the four projections qkv, z, b and a, in this order: on a GPU one product for those that stand
    together and share a format, behind --requantize too (and are whole blocks, if it has any), elsewhere one
    for each.
    """

    backend = None  # no attention backend plans for it
    kv_scales = None  # it keeps no keys and values

    def __init__(
        self, build: Build, norm: RMSNorm, name: str, layer: int, spec: RecurrentSpec, *, key_heads: int
    ) -> None:
        hidden, value_rows = norm.weight.shape[0], spec.heads * spec.value_dim
        self.layer, self.name, self.spec, self.norm = layer, name, spec, norm
        self.key_heads = key_heads
        # value heads go where their key head goes
        key_rows, label = key_heads * spec.key_dim, "linear_num_key_heads"
        by_head, inwards = (Cut(axis, key_heads, label) for axis in (0, 1))
        self._heads_cut = by_head
        self._channels_cut = Cut(0, key_heads, label, runs=(key_rows, key_rows, value_rows))

        parts = {"in_proj_qkv": spec.conv_channels, "in_proj_z": value_rows}
        parts |= dict.fromkeys(GATES, spec.heads)
        self.ins = tuple(self._merged(build, hidden, parts))
        self.conv = build.empty(spec.conv_channels, spec.conv_taps + 1, dtype=torch.float32)
        self.dt_bias = build.empty(spec.heads, dtype=torch.float32)
        self.a_log = build.empty(spec.heads, dtype=torch.float32)
        self.out_norm = RMSNorm(build, f"{name}.norm", spec.value_dim, norm.eps)
        self.out = Linear(build, value_rows, {f"{name}.out_proj": hidden}, cuts=(inwards,), residual=True)
        self._build = build
        self._run: Callable[[torch.Tensor, Step], torch.Tensor] = self._compose
        self._choice = self._chosen(build)
        build.choices.append(self._choice)

    def _merged(self, build: Build, hidden: int, parts: dict[str, int]) -> Iterator[Linear]:
        """`parts`: rows of each projection."""

        def alike(part: str) -> object:
            path = f"{self.name}.{part}"
            format = build.format_of(path)
            broken = isinstance(format, fp8_block.Format) and parts[part] % format.block[0] > 0
            changes = part not in GATES and build.requantises(path)
            return part if broken or build.gpu.kind != "cuda" else (format, changes)

        for _, found in itertools.groupby(parts, alike):
            together = list(found)
            cuts = [self._channels_cut if part == "in_proj_qkv" else self._heads_cut for part in together]
            rows = {f"{self.name}.{part}": parts[part] for part in together}
            yield Linear(build, hidden, rows, cuts=cuts, requantisable=not set(together) & set(GATES))

    def _chosen(self, build: Build) -> Choice:
        choice = select(OP, None, build.gpu)
        if build.shared is None:
            return choice
        why_not = gated_delta_gpu.refusal(self, build.gpu, build.dtype)
        if why_not is not None:
            return dataclasses.replace(choice, losers={"gated_delta_gpu": why_not})
        why = "kernels of kernels/gated_delta_*.py"
        return dataclasses.replace(choice, why=why, losers={TORCH: "slower"}, composed="gated_delta_gpu")

    def operations(self, setting: Setting) -> tuple[Operation, ...] | str:
        """What it launches on one of `setting.tp` NVIDIA GPUs, for the plan; or why it is composed of torch
        operators there."""
        return gated_delta_gpu.operations(self, self._build.dtype, setting)

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold it? The layer composed of torch operators walks requests on the host."""
        return bool(self._choice.composed)

    @property
    def format(self) -> str:
        """Of the projections' weights, the gates' left out; of several, all."""
        paths = (f"{self.name}.{part}" for part in ("in_proj_qkv", "in_proj_z", "out_proj"))
        return " and ".join(sorted({self._build.format_of(path).name for path in paths}))

    def slots(self) -> Slots:
        """The norm's tensor and those of the module."""
        yield from self.norm.slots()
        for linear in (*self.ins, self.out):
            yield from linear.slots()
        stored = (self.conv.shape[0], 1, self.conv.shape[1])
        yield PlainSlot(
            f"{self.name}.conv1d.weight", self.conv, stored, lambda w: w.squeeze(1), cut=self._channels_cut
        )
        yield PlainSlot(f"{self.name}.dt_bias", self.dt_bias, cut=self._heads_cut)
        yield PlainSlot(f"{self.name}.A_log", self.a_log, cut=self._heads_cut)
        yield from self.out_norm.slots()

    def finish(self) -> None:
        """Binds the kernels."""
        for linear in (*self.ins, self.out):
            linear.finish()
        if self._choice.composed:
            self._run = gated_delta_gpu.GatedDeltaKernels(self, self._build)

    def project(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`h` [tokens, hidden] → [tokens, rows] of each projection, columns of wider matrices."""
        return tuple(part for linear in self.ins for part in linear(h).split(list(linear.parts.values()), -1))

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape; advances the states of the step's requests."""
        return self._run(x, step)

    def _compose(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        assert step.state_slots is not None
        states, spec = step.caches[self.layer], self.spec
        mixed, z, b, a = (part.float() for part in self.project(self.norm(x)))
        beta = b.sigmoid()
        decay = torch.exp(-self.a_log.exp() * F.softplus(a + self.dt_bias))  # [tokens, heads]
        o = torch.empty(x.shape[0], spec.heads, spec.value_dim, device=x.device)
        starts = step.query_start.tolist()
        for first, last, slot in zip(starts[:-1], starts[1:], step.state_slots.tolist(), strict=True):
            q, k, v = self._convolve(mixed[first:last], states.conv[slot])
            delta_rule(q, k, v, decay[first:last], beta[first:last], states.matrix[slot], o[first:last])
        gate = F.silu(z).unflatten(-1, (spec.heads, -1))
        y = (self.out_norm(o.to(x.dtype)) * gate).to(x.dtype)
        return self.out(y.flatten(1), x)

    def _convolve(
        self, mixed: torch.Tensor, taps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Causal depthwise convolution of one request's `mixed` [n, channels] after the inputs kept in `taps`
        [channels, conv_taps], which it replaces. q, k [n, heads, key_dim], normed, and v [n, heads,
        value_dim]."""
        spec = self.spec
        inputs = torch.cat((taps.T, mixed))  # [conv_taps + n, channels]
        n = mixed.shape[0]
        summed = sum(inputs[tap : tap + n] * self.conv[:, tap] for tap in range(spec.conv_taps + 1))
        assert isinstance(summed, torch.Tensor)
        taps.copy_(inputs[n:].T)
        key_rows = self.key_heads * spec.key_dim
        q, k, v = F.silu(summed).split([key_rows, key_rows, spec.heads * spec.value_dim], dim=-1)
        group = spec.heads // self.key_heads
        q, k = (
            _unit(part.unflatten(-1, (self.key_heads, -1))).repeat_interleave(group, 1) for part in (q, k)
        )
        return q * spec.key_dim**-0.5, k, v.unflatten(-1, (spec.heads, -1))


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The recurrence over one request's tokens: `q`, `k` [n, heads, key_dim], `v`, `out` [n, heads,
    value_dim], `decay`, `beta` [n, heads], float32. Advances `state` [heads, key_dim, value_dim] in place."""
    for t in range(q.shape[0]):
        state *= decay[t, :, None, None]
        known = (k[t].unsqueeze(-1) * state).sum(1)  # [heads, value_dim]
        state += k[t].unsqueeze(-1) * ((v[t] - known) * beta[t].unsqueeze(-1)).unsqueeze(1)
        out[t] = (q[t].unsqueeze(-1) * state).sum(1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
