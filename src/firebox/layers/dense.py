"""A dense gated MLP with its norm and residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from firebox.formats.base import Cut, Slots
from firebox.kernels import cpu_dense_block
from firebox.kernels.select import TORCH, Choice, select
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES
from firebox.layers.linear import Linear
from firebox.layers.norm import RMSNorm


class DenseBlock:
    """x + down(silu(gate(h)) · up(h)), h = norm(x). `name`: the path of the MLP, whose parts are gate_proj,
    up_proj and down_proj."""

    def __init__(self, build: Build, norm: RMSNorm, name: str, inter: int) -> None:
        hidden = norm.weight.shape[0]
        self.norm, self._inter = norm, inter
        rows, columns = (Cut(axis, inter, "intermediate_size") for axis in (0, 1))
        gate_up = {f"{name}.gate_proj": inter, f"{name}.up_proj": inter}
        self.gate_up = Linear(build, hidden, gate_up, cuts=(rows, rows))
        self.down = Linear(build, inter, {f"{name}.down_proj": hidden}, cuts=(columns,), residual=True)
        self._problem = cpu_dense_block.Problem(hidden, inter, norm.eps, build.dtype)
        self._choice = select(cpu_dense_block.OP, self._problem, build.gpu)
        self._threads = build.threads
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._compose
        self._build = build
        if build.shared is not None and not (self.gate_up.refusal or self.down.refusal):
            losers = {TORCH: "slower"}
            self._choice = Choice(cpu_dense_block.OP, None, "kernels of kernels/", losers, "dense_gpu")
        build.choices.append(self._choice)

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold it?"""
        return bool(self._choice.composed)

    def slots(self) -> Slots:
        """The norm's and the three projections' tensors."""
        yield from self.norm.slots()
        yield from self.gate_up.slots()
        yield from self.down.slots()

    def finish(self) -> None:
        """Binds the chosen kernel; its packed copy replaces the weights."""
        self.gate_up.finish()
        self.down.finish()
        if self._choice.composed:
            self._run = self._with_kernels()
        if self._choice.kernel is not None:
            weights = {"norm": self.norm.weight, "gate_up": self.gate_up.weight, "down": self.down.weight}
            self._run = self._choice.kernel.bind(self._problem, weights, self._threads)
            del self.norm, self.gate_up, self.down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, hidden] → the same shape."""
        return self._run(x)

    def _with_kernels(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """rms_norm → linear → silu_mul → linear, which adds x; x becomes the result."""
        from firebox.kernels import rms_norm, silu_mul

        p, device, inter = self._problem, self._build.shared, self._inter
        assert device is not None
        dtype = KERNEL_DTYPES[p.dtype]
        norm = device.launcher(rms_norm, rms_norm.Problem(p.hidden, p.eps, dtype=dtype))
        activate = device.launcher(silu_mul, silu_mul.Problem(inter, dtype=dtype))

        def run(x: torch.Tensor) -> torch.Tensor:
            h, inner = torch.empty_like(x), x.new_empty(x.shape[0], inter)
            rms_norm.run(norm, x, self.norm.weight, out=h)
            silu_mul.run(activate, self.gate_up(h), out=inner)
            return self.down(inner, x)

        return run

    def _compose(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, x)
