"""A gated delta net layer (Yang et al., 2024, arXiv:2412.06464) with its norm and residual: linear attention
over a recurrent state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from firebox.attention.base import RecurrentSpec
from firebox.formats.base import Cut, PlainSlot, Slots
from firebox.kernels.select import select
from firebox.layers.base import Build
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm
from firebox.step import Step

if TYPE_CHECKING:
    from firebox.kernels.plan import Operation, Setting

OP = "gated_delta_block"


class GatedDeltaBlock:
    """x + out(norm(o) · silu(z)), token by token and head by head, with h = norm(x) and the state S [key_dim,
    value_dim]:

        q, k, v = silu(causal convolution of in_qkv(h));  q = q / |q| / √key_dim;  k = k / |k|
        S ← S · exp(−exp(A_log) · softplus(in_a(h) + dt_bias))
        S ← S + k ⊗ (v − k·S) · sigmoid(in_b(h));  o = q·S

    Each of `key_heads` serves value_heads / key_heads successive value heads. The layer composed of torch
    operators walks a request's tokens one by one, so its states are the same to the bit however a prompt is
    cut into chunks. `name`: the module's path; `layer`: the index of its state in `step.caches`.
    """

    backend = None  # no attention backend plans for it
    capturable = False  # it walks requests on the host
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

        def into(part: str, rows: int, cut: Cut, gates: bool = False) -> Linear:
            parts = {f"{name}.{part}": rows}
            return Linear(build, hidden, parts, cuts=(cut,), requantisable=not gates, dense=gates)

        self.in_qkv = into("in_proj_qkv", spec.conv_channels, self._channels_cut)
        self.in_z = into("in_proj_z", value_rows, by_head)
        self.in_b = into("in_proj_b", spec.heads, by_head, gates=True)
        self.in_a = into("in_proj_a", spec.heads, by_head, gates=True)
        self.conv = build.empty(spec.conv_channels, spec.conv_taps + 1, dtype=torch.float32)
        self.dt_bias = build.empty(spec.heads, dtype=torch.float32)
        self.a_log = build.empty(spec.heads, dtype=torch.float32)
        self.out_norm = RMSNorm(build, f"{name}.norm", spec.value_dim, norm.eps)
        self.out = Linear(build, value_rows, {f"{name}.out_proj": hidden}, cuts=(inwards,), residual=True)
        build.choices.append(select(OP, None, build.gpu))

    def operations(self, setting: Setting) -> tuple[Operation, ...]:
        """What its projections launch on one of `setting.tp` NVIDIA GPUs, for the plan; the rest is
        torch's."""
        linears = {"qkv": self.in_qkv, "z": self.in_z, "b": self.in_b, "a": self.in_a, "out": self.out}
        return tuple(linear.operation(name, setting) for name, linear in linears.items())

    @property
    def format(self) -> str:
        """Of the projections' weights; of several, all."""
        return " and ".join(sorted({self.in_qkv.format, self.in_z.format, self.out.format}))

    def slots(self) -> Slots:
        """The norm's tensor and those of the module."""
        yield from self.norm.slots()
        for linear in (self.in_qkv, self.in_z, self.in_b, self.in_a, self.out):
            yield from linear.slots()
        stored = (self.conv.shape[0], 1, self.conv.shape[1])
        yield PlainSlot(
            f"{self.name}.conv1d.weight", self.conv, stored, lambda w: w.squeeze(1), cut=self._channels_cut
        )
        yield PlainSlot(f"{self.name}.dt_bias", self.dt_bias, cut=self._heads_cut)
        yield PlainSlot(f"{self.name}.A_log", self.a_log, cut=self._heads_cut)
        yield from self.out_norm.slots()

    def finish(self) -> None:
        """Binds the projections' kernels."""
        for linear in (self.in_qkv, self.in_z, self.in_b, self.in_a, self.out):
            linear.finish()

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape; advances the states of the step's requests."""
        assert step.state_slots is not None
        states, spec = step.caches[self.layer], self.spec
        h = self.norm(x)
        mixed, beta = self.in_qkv(h).float(), self.in_b(h).float().sigmoid()
        decay = torch.exp(
            -self.a_log.exp() * F.softplus(self.in_a(h).float() + self.dt_bias)
        )  # [tokens, heads]
        o = torch.empty(x.shape[0], spec.heads, spec.value_dim, device=x.device)
        starts = step.query_start.tolist()
        for first, last, slot in zip(starts[:-1], starts[1:], step.state_slots.tolist(), strict=True):
            q, k, v = self._convolve(mixed[first:last], states.conv[slot])
            delta_rule(q, k, v, decay[first:last], beta[first:last], states.matrix[slot], o[first:last])
        gate = F.silu(self.in_z(h).float()).unflatten(-1, (spec.heads, -1))
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
